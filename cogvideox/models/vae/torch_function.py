"""A torch module as a pure JAX function of its weights."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import torch

from cogvideox.models.vae.torchax_compat import torchax


def jax_function(
    module: torch.nn.Module,
    overrides: Mapping[Callable, Callable] | None = None,
    layers: Mapping[type[torch.nn.Module], Callable] | None = None,
    record: Callable[[str, Any], None] | None = None,
) -> Callable:
    """Turn `module.forward` into `function(weights, *args, **kwargs)` over JAX arrays, ready for `jax.jit`.

    Args:
        module: may be on the "meta" device, because only its structure is used. The `forward` of its layers is
            replaced, and stays so.
        overrides: torch function -> JAX function with the same arguments that replaces it inside the module.
        layers: class of a layer -> `function(layer, weights, *args, **kwargs)` over JAX arrays that replaces its
            `forward`; `weights` are the layer's own, by name.
        record: called as `record(name, output)` with the output of each layer, a tree of JAX arrays.

    Returns:
        A function whose first argument maps the names of `module.state_dict()` to JAX arrays, and whose other
        arguments and results are trees of JAX arrays.
    """
    with jax.ensure_compile_time_eval():  # it draws a random key, which would stay in the program without use
        environment = torchax.tensor.Environment()

    def on_torch(function: Callable) -> Callable:
        def call(*args, **kwargs):
            return environment.j2t_iso(function(*environment.t2j_iso(args), **environment.t2j_iso(kwargs)))

        return call

    replaced = layers or {}

    def forward(name: str, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if type(layer) in replaced:
            replacement = functools.partial(replaced[type(layer)], layer)
            with jax.named_scope(name):
                output = on_torch(replacement)(dict(layer.named_parameters()), *args, **kwargs)
        else:
            output = type(layer).forward(layer, *args, **kwargs)
        if record:
            record(name, environment.t2j_iso(output))
        return output

    for torch_function, override in (overrides or {}).items():
        environment.override_op_definition(torch_function, on_torch(override))
    for name, layer in module.named_modules():
        if name:
            layer.forward = functools.partial(forward, name, layer)

    def function(weights: Mapping[str, jax.Array], *args: Any, **kwargs: Any) -> Any:
        tensors, args, kwargs = environment.j2t_iso((dict(weights), args, kwargs))
        with environment:
            output = torch.func.functional_call(module, tensors, args, kwargs)
        return environment.t2j_iso(output)

    return function
