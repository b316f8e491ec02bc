"""The TorchAx decoder: diffusers' own CogVideoX decoder, run by JAX."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import torch
from diffusers import AutoencoderKLCogVideoX

from models.decoder import Decoder, to_unit_range
from models.torch_function import jax_function


def make_decoder(config: Mapping) -> Decoder:
    """Build the decoder of a `vae/config.json`."""
    with torch.device("meta"):
        module = AutoencoderKLCogVideoX.from_config(config).decoder.eval()
    decoder = jax_function(module)

    @jax.jit
    def decode_chunk(weights, latents, cache):
        pixels, cache = decoder(weights, latents, conv_cache=cache)
        return to_unit_range(jnp.moveaxis(pixels, 1, -1)), _without_pointwise(cache)

    shapes = {name: tuple(weight.shape) for name, weight in module.state_dict().items()}
    return Decoder(decode_chunk, shapes, dict)


def _without_pointwise(cache: dict) -> dict:
    """Drop what diffusers caches for the 1 x 1 x 1 convolutions: whole activations that are never read."""
    return {
        name: _without_pointwise(value) if isinstance(value, dict) else value
        for name, value in cache.items()
        if name not in ("conv_y", "conv_b")
    }
