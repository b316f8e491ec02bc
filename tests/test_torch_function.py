"""Torch modules as JAX functions, with functions and layers in the place of torch's."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F

from cogvideox.models.vae.torch_function import jax_function


class Mixer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(8, 24)
        self.norm = torch.nn.LayerNorm(8)

    def forward(self, x):
        query, key, value = self.project(self.norm(x)).chunk(3, dim=-1)
        return x + F.scaled_dot_product_attention(query, key, value)


def run(**replacements) -> tuple[np.ndarray, np.ndarray]:
    """Return what JAX and what torch make of the same input."""
    torch.manual_seed(0)
    module, x = Mixer(), torch.randn(2, 5, 8)
    with torch.no_grad():
        expected = module(x).numpy()
    weights = {name: jnp.asarray(weight.numpy()) for name, weight in module.state_dict().items()}
    return np.asarray(jax.jit(jax_function(module, **replacements))(weights, jnp.asarray(x.numpy()))), expected


def test_as_torch():
    np.testing.assert_allclose(*run(), atol=1e-5)


def test_a_torch_function_is_overridden():
    seen = []

    def attention(query, key, value):
        seen.append(query.shape)
        scores = jax.nn.softmax(query @ jnp.swapaxes(key, -1, -2) * query.shape[-1] ** -0.5)
        return scores @ value

    np.testing.assert_allclose(*run(overrides={F.scaled_dot_product_attention: attention}), atol=1e-5)
    assert seen == [(2, 5, 8)]


def test_a_layer_is_replaced():
    seen = []

    def linear(layer, weights, x):
        seen.append(layer.out_features)
        return x @ weights["weight"].T + weights["bias"]

    np.testing.assert_allclose(*run(layers={torch.nn.Linear: linear}), atol=1e-5)
    assert seen == [24]
