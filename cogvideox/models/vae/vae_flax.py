"""The Flax decoder: CogVideoX's VAE decoder in Flax NNX.

The module tree and the attribute names are those of diffusers' `CogVideoXDecoder3D`
(diffusers/models/autoencoders/autoencoder_kl_cogvideox.py), so that its weights load by name.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from cogvideox.models.vae.decoder import Decoder, channels_last
from cogvideox.models.vae.spatial_split import Split
from cogvideox.models.vae.vae_layers import (
    ACTIVATIONS,
    Convolved,
    Deferred,
    causal_conv,
    computed,
    shortcut,
    spatial_norm,
    tap_output,
    upsample,
)

# Flax asks for random keys, though the weights come from a checkpoint: under `nnx.eval_shape` none are drawn.
RNGS = functools.partial(nnx.Rngs, 0)


class NamedModule(nnx.Module):
    """A module that knows its name in the decoder, which `Decoder3D` sets: "up_blocks.0.resnets.1" and the like."""

    name: str


def named(call: Callable) -> Callable:
    """Name a module's operations after it in profiles, and tap its output; the last argument of `call` is the split."""

    @functools.wraps(call)
    def wrapped(self: NamedModule, *args: Any) -> Any:
        with jax.named_scope(self.name):
            output = call(self, *args)
        tap_output(self.name, output, args[-1])
        return output

    return wrapped


def value(parameter: nnx.Param | None) -> jax.Array:
    """Return the array of a layer's parameter, which all layers of this decoder have."""
    assert parameter is not None
    return parameter[...]


class CausalConv3d(NamedModule):
    """Convolution that sees this frame and the frames before it; `cache` holds the last ones of the chunk before."""

    def __init__(self, in_features: int, out_features: int, kernel_size: int = 3):
        self.conv = nnx.Conv(in_features, out_features, (kernel_size,) * 3, rngs=RNGS())

    @named
    def __call__(
        self, x: jax.Array | Deferred | Convolved, cache: Any, split: Split
    ) -> tuple[jax.Array | Convolved, Any]:
        """Return the convolution and the next cache; see `causal_conv`."""
        return causal_conv(x, value(self.conv.kernel), value(self.conv.bias), cache, split)


class SpatialNorm3D(NamedModule):
    """Group norm whose scale and shift are 1 x 1 x 1 convolutions of the latents (https://arxiv.org/abs/2209.09002)."""

    def __init__(self, features: int, latent_features: int, groups: int):
        self.norm_layer = nnx.GroupNorm(features, groups, rngs=RNGS())
        self.conv_y = CausalConv3d(latent_features, features, kernel_size=1)
        self.conv_b = CausalConv3d(latent_features, features, kernel_size=1)

    @named
    def __call__(self, x: jax.Array | Convolved, latents: jax.Array, split: Split) -> Deferred:
        """Return the norm of x, deferred; see `spatial_norm`."""
        norm = value(self.norm_layer.scale), value(self.norm_layer.bias)
        conv_y, conv_b = ((c.conv.kernel[0, 0, 0], value(c.conv.bias)) for c in (self.conv_y, self.conv_b))
        return spatial_norm(x, latents, norm, conv_y, conv_b, self.norm_layer.num_groups, split)


class ResnetBlock3D(NamedModule):
    """Norm, activation and convolution, twice, added to the input; a pointwise convolution adapts its channels."""

    def __init__(self, in_features: int, out_features: int, latent_features: int, groups: int, activation: Callable):
        self.activation = activation
        self.norm1 = SpatialNorm3D(in_features, latent_features, groups)
        self.conv1 = CausalConv3d(in_features, out_features)
        self.norm2 = SpatialNorm3D(out_features, latent_features, groups)
        self.conv2 = CausalConv3d(out_features, out_features)
        if in_features != out_features:
            self.conv_shortcut = nnx.Conv(in_features, out_features, (1, 1, 1), rngs=RNGS())

    @named
    def __call__(self, x: Any, latents: jax.Array, cache: dict, split: Split) -> tuple[Any, dict]:
        """Return the block's output and the next cache, by layer."""
        new_cache = {}
        hidden = self.norm1(x, latents, split).with_activation(self.activation)
        hidden, new_cache["conv1"] = self.conv1(hidden, cache.get("conv1"), split)
        hidden = self.norm2(hidden, latents, split).with_activation(self.activation)
        hidden, new_cache["conv2"] = self.conv2(hidden, cache.get("conv2"), split)
        if hasattr(self, "conv_shortcut"):
            x = shortcut(x, self.conv_shortcut.kernel[0, 0, 0], value(self.conv_shortcut.bias), split)
            tap_output(f"{self.name}.conv_shortcut", x, split)
        return hidden + x, new_cache  # in this order, so that a kernel can add x


class Upsample3D(NamedModule):
    """Upsampling to twice the height and width and, with `compress_time`, twice the frames, and a convolution."""

    def __init__(self, features: int, compress_time: bool):
        self.compress_time = compress_time
        self.conv = nnx.Conv(features, features, (3, 3), rngs=RNGS())

    @named
    def __call__(self, x: jax.Array | Convolved, split: Split) -> jax.Array | Convolved:
        """Return the larger frames; see `upsample`."""
        return upsample(x, value(self.conv.kernel), value(self.conv.bias), self.compress_time, split)


class Block3D(NamedModule):
    """Resnet blocks, then upsampling: the middle block and the up blocks."""

    def __init__(
        self, in_features: int, out_features: int, layers: int, upsample: bool, compress_time: bool, **resnet: Any
    ):
        self.resnets = nnx.List(
            [ResnetBlock3D(in_features if i == 0 else out_features, out_features, **resnet) for i in range(layers)]
        )
        self.upsamplers = nnx.List([Upsample3D(out_features, compress_time)] if upsample else [])

    @named
    def __call__(self, x: Any, latents: jax.Array, cache: dict, split: Split) -> tuple[Any, dict]:
        """Return the block's output and the next cache, by resnet."""
        new_cache = {}
        for i, resnet in enumerate(self.resnets):
            x, new_cache[f"resnet_{i}"] = resnet(x, latents, cache.get(f"resnet_{i}", {}), split)
        for upsampler in self.upsamplers:
            x = upsampler(x, split)
        return x, new_cache


class Decoder3D(nnx.Module):
    """`CogVideoXDecoder3D`: latents to pixels around [-1, 1], laid out as in models/spatial_split.py."""

    def __init__(self, config: Mapping):
        channels = list(reversed(config["block_out_channels"]))
        resnet = dict(
            latent_features=config["latent_channels"],
            groups=config["norm_num_groups"],
            activation=ACTIVATIONS[config["act_fn"]],
        )
        temporal_doublings = int(config["temporal_compression_ratio"]).bit_length() - 1

        self.conv_in = CausalConv3d(config["latent_channels"], channels[0])
        self.mid_block = Block3D(channels[0], channels[0], layers=2, upsample=False, compress_time=False, **resnet)
        self.up_blocks = nnx.List(
            [
                Block3D(
                    channels[max(i - 1, 0)],
                    channels[i],
                    layers=config["layers_per_block"] + 1,
                    upsample=i < len(channels) - 1,
                    compress_time=i < temporal_doublings,
                    **resnet,
                )
                for i in range(len(channels))
            ]
        )
        self.norm_out = SpatialNorm3D(channels[-1], config["latent_channels"], config["norm_num_groups"])
        self.conv_out = CausalConv3d(channels[-1], config["out_channels"])
        for path, module in nnx.iter_modules(self):
            if isinstance(module, NamedModule):
                module.name = ".".join(map(str, path))

    def __call__(self, latents: jax.Array, cache: dict, split: Split) -> tuple[jax.Array, dict]:
        """Return the pixels of a chunk and the next cache; see `Decoder.decode_chunk`."""
        new_cache = {}
        x, new_cache["conv_in"] = self.conv_in(latents, cache.get("conv_in"), split)
        x, new_cache["mid_block"] = self.mid_block(x, latents, cache.get("mid_block", {}), split)
        for i, up_block in enumerate(self.up_blocks):
            x, new_cache[f"up_block_{i}"] = up_block(x, latents, cache.get(f"up_block_{i}", {}), split)
        x = self.norm_out(x, latents, split).with_activation(jax.nn.silu)
        x, new_cache["conv_out"] = self.conv_out(x, cache.get("conv_out"), split)
        return x, new_cache


def make_decoder(config: Mapping) -> Decoder:
    """Build the decoder of a `vae/config.json`."""
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Decoder3D(config)))
    parameters = {_diffusers_name(path): (path, parameter) for path, parameter in nnx.to_flat_state(abstract)}

    def convert_weights(weights: dict[str, jax.Array]) -> nnx.State:
        return nnx.from_flat_state(
            (path, parameter.replace(_flax_layout(path, weights[name])))
            for name, (path, parameter) in parameters.items()
        )

    def decode_chunk(weights, latents, cache, split):
        return computed(*nnx.merge(graph, weights)(latents, cache or {}, split))

    shapes = {name: _diffusers_shape(path, parameter.shape) for name, (path, parameter) in parameters.items()}
    return Decoder(decode_chunk, shapes, convert_weights)


def _diffusers_name(path: tuple) -> str:
    *module, leaf = path
    return ".".join(map(str, [*module, {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)]))


def _flax_layout(path: tuple, weight: jax.Array) -> jax.Array:
    return channels_last(weight) if path[-1] == "kernel" else weight


def _diffusers_shape(path: tuple, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[-1], shape[-2], *shape[:-2]) if path[-1] == "kernel" else shape
