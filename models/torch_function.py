"""A torch module as a pure JAX function of its weights."""

import functools
from collections.abc import Callable, Mapping

import jax
import torch

from models.torchax_compat import torchax


def jax_function(
    module: torch.nn.Module,
    overrides: Mapping[Callable, Callable] | None = None,
    layers: Mapping[type[torch.nn.Module], Callable] | None = None,
) -> Callable:
    """Turn `module.forward` into `function(weights, *args, **kwargs)` over JAX arrays, ready for `jax.jit`.

    Args:
        module: may live on the "meta" device; only its structure is used. Where `layers` names its layers, they keep
            the `forward` that they are given.
        overrides: torch function -> JAX function that takes its place inside the module, same arguments.
        layers: class of a layer -> `function(layer, weights, *args, **kwargs)` over JAX arrays that takes the place of
            its `forward`; `weights` are the layer's own, by name.

    Returns:
        A function whose first argument maps the names of `module.state_dict()` to JAX arrays, and whose other
        arguments and results are trees of JAX arrays.
    """
    with jax.ensure_compile_time_eval():  # it draws a random key, which would be in the program and never be used
        environment = torchax.tensor.Environment()

    def on_torch(function: Callable) -> Callable:
        def call(*args, **kwargs):
            return environment.j2t_iso(function(*environment.t2j_iso(args), **environment.t2j_iso(kwargs)))

        return call

    def forward(layer: torch.nn.Module, *args, **kwargs):
        function = functools.partial(layers[type(layer)], layer)
        return on_torch(function)(dict(layer.named_parameters()), *args, **kwargs)

    for torch_function, function in (overrides or {}).items():
        environment.override_op_definition(torch_function, on_torch(function))
    for layer in module.modules():
        if type(layer) in (layers or {}):
            layer.forward = functools.partial(forward, layer)

    def function(weights: Mapping[str, jax.Array], *args, **kwargs):
        weights, args, kwargs = environment.j2t_iso((dict(weights), args, kwargs))
        with environment:
            output = torch.func.functional_call(module, weights, args, kwargs)
        return environment.t2j_iso(output)

    return function
