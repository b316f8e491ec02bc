"""A torch module as a pure JAX function of its weights."""

from collections.abc import Callable, Mapping

import jax
import torch

from models.torchax_compat import torchax


def jax_function(module: torch.nn.Module, layers: Mapping[type[torch.nn.Module], Callable] | None = None) -> Callable:
    """Turn `module.forward` into `function(weights, *args, **kwargs)` over JAX arrays, ready for `jax.jit`.

    Args:
        module: may live on the "meta" device; only its structure is used.
        layers: class of a layer -> `function(layer, weights, *args, **kwargs)` over JAX arrays that takes the place of
            its `forward`; `weights` are the layer's own, by name.

    Returns:
        A function whose first argument maps the names of `module.state_dict()` to JAX arrays, and whose other
        arguments and results are trees of JAX arrays.
    """
    environment = torchax.tensor.Environment()

    def on_torch(layer: torch.nn.Module, function: Callable) -> Callable:
        def forward(*args, **kwargs):
            weights = environment.t2j_iso(dict(layer.named_parameters()))
            args, kwargs = environment.t2j_iso((args, kwargs))
            return environment.j2t_iso(function(layer, weights, *args, **kwargs))

        return forward

    for layer in module.modules():
        if type(layer) in (layers or {}):
            layer.forward = on_torch(layer, layers[type(layer)])

    def function(weights: Mapping[str, jax.Array], *args, **kwargs):
        weights, args, kwargs = environment.j2t_iso((dict(weights), args, kwargs))
        with environment:
            output = torch.func.functional_call(module, weights, args, kwargs)
        return environment.t2j_iso(output)

    return function
