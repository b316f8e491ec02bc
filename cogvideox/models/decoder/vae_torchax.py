"""The TorchAx decoder: diffusers' own CogVideoX decoder, run by JAX.

The weights and the order of the layers are those of diffusers' code. The layers themselves are replaced by those of
models/vae_layers.py, which handle the split in space; tensors are laid out as there.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import torch
from diffusers import AutoencoderKLCogVideoX
from diffusers.models.activations import get_activation
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import (
    CogVideoXCausalConv3d,
    CogVideoXSafeConv3d,
    CogVideoXSpatialNorm3D,
)
from diffusers.models.upsampling import CogVideoXUpsample3D

from cogvideox.models.decoder.decoder import Decoder, channels_last
from cogvideox.models.decoder.spatial_split import Split
from cogvideox.models.decoder.torch_function import jax_function
from cogvideox.models.decoder.vae_layers import (
    ACTIVATIONS,
    Deferred,
    causal_conv,
    shortcut,
    spatial_norm,
    tap_output,
    upsample,
)


def make_decoder(config: Mapping) -> Decoder:
    """Build the decoder of a `vae/config.json`."""
    with torch.device("meta"):
        module = AutoencoderKLCogVideoX.from_config(config).decoder.eval()

    def decode_chunk(weights, latents, cache, split):
        layers = {
            CogVideoXSpatialNorm3D: functools.partial(_spatial_norm, split=split),
            CogVideoXCausalConv3d: functools.partial(_causal_conv, split=split),
            CogVideoXUpsample3D: functools.partial(_upsample, split=split),
            CogVideoXSafeConv3d: functools.partial(_shortcut, split=split),
            torch.nn.Dropout: lambda layer, weights, x: x,
        }
        for name, activation in ACTIVATIONS.items():
            layers[type(get_activation(name))] = functools.partial(_activation, activation=activation)
        record = functools.partial(tap_output, split=split)
        return jax_function(module, layers=layers, record=record)(weights, latents, conv_cache=cache)

    def convert_weights(weights: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return {name: channels_last(weight) if weight.ndim > 1 else weight for name, weight in weights.items()}

    shapes = {name: tuple(weight.shape) for name, weight in module.state_dict().items()}
    return Decoder(decode_chunk, shapes, convert_weights)


# Each function below takes a layer of diffusers, its weights by name, and the arguments of its `forward`.
Weights = Mapping[str, jax.Array]


def _spatial_norm(
    layer: CogVideoXSpatialNorm3D,
    weights: Weights,
    x: jax.Array,
    latents: jax.Array,
    conv_cache: Any = None,
    *,
    split: Split,
) -> tuple[Deferred, dict]:
    conv_y, conv_b = ((weights[f"{c}.conv.weight"][0, 0, 0], weights[f"{c}.conv.bias"]) for c in ("conv_y", "conv_b"))
    norm = weights["norm_layer.weight"], weights["norm_layer.bias"]
    return spatial_norm(x, latents, norm, conv_y, conv_b, layer.norm_layer.num_groups, split), {}


def _causal_conv(
    layer: CogVideoXCausalConv3d,
    weights: Weights,
    x: jax.Array | Deferred,
    conv_cache: jax.Array | None = None,
    *,
    split: Split,
) -> tuple[jax.Array, jax.Array | None]:
    return causal_conv(x, weights["conv.weight"], weights["conv.bias"], conv_cache, split)


def _upsample(layer: CogVideoXUpsample3D, weights: Weights, x: jax.Array, *, split: Split) -> jax.Array:
    return upsample(x, weights["conv.weight"], weights["conv.bias"], layer.compress_time, split)


def _shortcut(layer: CogVideoXSafeConv3d, weights: Weights, x: jax.Array, *, split: Split) -> jax.Array:
    return shortcut(x, weights["weight"][0, 0, 0], weights["bias"], split)


def _activation(layer: torch.nn.Module, weights: Weights, x: Deferred, *, activation: Callable) -> Deferred:
    return x.with_activation(activation)
