"""A torch module as a pure JAX function of its weights."""

from collections.abc import Callable, Mapping

import jax
import torch

from models.torchax_compat import torchax


def jax_function(module: torch.nn.Module, overrides: Mapping[Callable, Callable] | None = None) -> Callable:
    """Turn `module.forward` into `function(weights, *args, **kwargs)` over JAX arrays, ready for `jax.jit`.

    Args:
        module: may live on the "meta" device; only its structure is used.
        overrides: torch function -> JAX function that takes its place inside the module, same arguments.

    Returns:
        A function whose first argument maps the names of `module.state_dict()` to JAX arrays, and whose other
        arguments and results are trees of JAX arrays.
    """
    environment = torchax.tensor.Environment()
    for torch_operator, implementation in (overrides or {}).items():
        environment.override_op_definition(torch_operator, _on_torch(implementation, environment))

    def function(weights: Mapping[str, jax.Array], *args, **kwargs):
        weights, args, kwargs = environment.j2t_iso((dict(weights), args, kwargs))
        with environment:
            output = torch.func.functional_call(module, weights, args, kwargs)
        return environment.t2j_iso(output)

    return function


def _on_torch(function: Callable, environment) -> Callable:
    def call(*args, **kwargs):
        return environment.j2t_iso(function(*environment.t2j_iso(args), **environment.t2j_iso(kwargs)))

    return call
