"""The TorchAx decoder, and the encoder: diffusers' own CogVideoX decoder and encoder, run by JAX.

The weights and the order of the layers are those of diffusers' code. The layers themselves are replaced by those of
vae_layers.py, which handle the split in space; tensors are laid out as there.
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
from diffusers.models.downsampling import CogVideoXDownsample3D
from diffusers.models.upsampling import CogVideoXUpsample3D

from cogvideox.models.vae.decoder import Decoder, channels_last
from cogvideox.models.vae.encoder import Encoder
from cogvideox.models.vae.spatial_split import Split
from cogvideox.models.vae.torch_function import jax_function
from cogvideox.models.vae.vae_layers import (
    ACTIVATIONS,
    Convolved,
    Deferred,
    Shortcut,
    causal_conv,
    computed,
    downsample,
    group_norm,
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
        record = functools.partial(tap_output, split=split)
        decode = jax_function(module, layers=_layers(split), record=record)
        return computed(*decode(weights, latents, conv_cache=cache))

    return Decoder(decode_chunk, _weight_shapes(module), _convert_weights)


def make_encoder(config: Mapping) -> Encoder:
    """Build the encoder of a `vae/config.json`."""
    with torch.device("meta"):
        module = AutoencoderKLCogVideoX.from_config(config).encoder.eval()

    def encode_chunk(weights, pixels, cache, split):
        return computed(*jax_function(module, layers=_layers(split))(weights, pixels, conv_cache=cache))

    return Encoder(encode_chunk, _weight_shapes(module), _convert_weights)


def _layers(split: Split) -> dict[type[torch.nn.Module], Callable]:
    """Return what replaces the layers of diffusers, by their class."""
    functions: dict[type[torch.nn.Module], Callable] = {
        CogVideoXSpatialNorm3D: _spatial_norm,
        CogVideoXCausalConv3d: _causal_conv,
        CogVideoXUpsample3D: _upsample,
        CogVideoXSafeConv3d: _shortcut,
        torch.nn.GroupNorm: _group_norm,
        CogVideoXDownsample3D: _downsample,
    }
    layers: dict[type[torch.nn.Module], Callable] = {
        kind: functools.partial(function, split=split) for kind, function in functions.items()
    }
    layers[torch.nn.Dropout] = lambda layer, weights, x: x
    activations = {
        type(get_activation(name)): functools.partial(_activation, activation=activation)
        for name, activation in ACTIVATIONS.items()
    }
    return layers | activations


def _weight_shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in module.state_dict().items()}


def _convert_weights(weights: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: channels_last(weight) if weight.ndim > 1 else weight for name, weight in weights.items()}


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
    conv_cache: Any = None,
    *,
    split: Split,
) -> tuple[jax.Array | Convolved, Any]:
    return causal_conv(x, weights["conv.weight"], weights["conv.bias"], conv_cache, split)


def _group_norm(layer: torch.nn.GroupNorm, weights: Weights, x: jax.Array, *, split: Split) -> Deferred:
    return group_norm(x, (weights["weight"], weights["bias"]), layer.num_groups, layer.eps, split)


def _upsample(layer: CogVideoXUpsample3D, weights: Weights, x: jax.Array, *, split: Split) -> jax.Array | Convolved:
    return upsample(x, weights["conv.weight"], weights["conv.bias"], layer.compress_time, split)


def _downsample(layer: CogVideoXDownsample3D, weights: Weights, x: jax.Array, *, split: Split) -> jax.Array | Convolved:
    return downsample(x, weights["conv.weight"], weights["conv.bias"], layer.compress_time, split)


def _shortcut(layer: CogVideoXSafeConv3d, weights: Weights, x: jax.Array, *, split: Split) -> jax.Array | Shortcut:
    return shortcut(x, weights["weight"][0, 0, 0], weights["bias"], split)


def _activation(layer: torch.nn.Module, weights: Weights, x: Deferred, *, activation: Callable) -> Deferred:
    return x.with_activation(activation)
