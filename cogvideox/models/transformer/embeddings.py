"""Latents as patches, and the embeddings of place and time."""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cogvideox.features import features_of
from cogvideox.models.shared import tap
from cogvideox.models.transformer import taps
from cogvideox.models.transformer.layers import linear

OFS = 2.0  # the constant that models with its embedding are given; source: `CogVideoXImageToVideoPipeline.__call__`


def token_grid(config: Mapping, latent_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the patches of latents [batch, frames, channels, height, width] along frames, height and width."""
    _, frames, _, height, width = latent_shape
    patch = config["patch_size"]
    return frames // features_of(config).frames_per_patch, height // patch, width // patch


def rotary_embedding(config: Mapping, latent_shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return cosines and sines of the 3D rotary embedding, float32 [video tokens, attention_head_dim / 2] each.

    Of a model without one the angles are 0. Of temporal patches the positions are whole numbers from 0 on, also where
    they exceed the sizes of the config, for which the pipeline stops; of flat ones the positions of the size in the
    config are stretched over the video.

    Args:
        config: `transformer/config.json`.
        latent_shape: [batch, frames, channels, height, width], frames a multiple of patch_size_t.

    Source: `CogVideoXPipeline._prepare_rotary_positional_embeddings`.
    """
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    features = features_of(config)
    frames, *size = token_grid(config, latent_shape)
    if not features.rotary:
        shape = frames * math.prod(size), config["attention_head_dim"] // 2
        return np.ones(shape, np.float32), np.zeros(shape, np.float32)
    is_flat = features.patch_frames is None
    cos, sin = get_3d_rotary_pos_embed(
        embed_dim=config["attention_head_dim"],
        crops_coords=sample_region(config, size) if is_flat else None,
        grid_size=size,
        temporal_size=frames,
        grid_type="linspace" if is_flat else "slice",
        max_size=size,
    )
    return cos[:, ::2].numpy(), sin[:, ::2].numpy()  # diffusers writes each value twice, once for each of a pair


def sample_region(config: Mapping, size: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return where a grid of `size` lies in that of the config's sample, which it fills in one direction.

    Args:
        config: `transformer/config.json`.
        size: height and width, in patches.

    Returns:
        The first and the last row and column, (top, left) and (bottom, right); negative where the grid is longer.

    Source: `get_resize_crop_region_for_grid` of diffusers' pipelines, which would take seconds to import.
    """
    sample = [config[f"sample_{name}"] // config["patch_size"] for name in ("height", "width")]
    axis = 0 if size[0] / size[1] > sample[0] / sample[1] else 1  # the one that is filled
    resized = [round(sample[axis] / size[axis] * length) for length in size]
    resized[axis] = sample[axis]
    first = [round((whole - part) / 2) for whole, part in zip(sample, resized, strict=True)]
    return (first[0], first[1]), (first[0] + resized[0], first[1] + resized[1])


def sine_cosine_positions(config: Mapping, latent_shape: tuple[int, ...]) -> np.ndarray:
    """Return what is added to the embedded tokens of text and video, float32 [tokens, embed]; to text it is 0.

    Source: `CogVideoXPatchEmbed._get_positional_embeddings`.
    """
    from diffusers.models.embeddings import get_3d_sincos_pos_embed

    frames, height, width = token_grid(config, latent_shape)
    positions = get_3d_sincos_pos_embed(
        config["num_attention_heads"] * config["attention_head_dim"],
        (width, height),
        frames,
        config["spatial_interpolation_scale"],
        config["temporal_interpolation_scale"],
        output_type="pt",
    )
    of_video = positions.flatten(0, 1).float().numpy()
    return np.pad(of_video, ((config["max_text_seq_length"], 0), (0, 0)))


def time_embedding(timestep: jax.Array, parameters: Mapping, config: Mapping, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Compute the time embedding, with that of the constant OFS added for a model that has one, [time_embed_dim].

    Source: `CogVideoXTransformer3DModel.forward`, `Timesteps` and `TimestepEmbedding`.
    """
    width = config["num_attention_heads"] * config["attention_head_dim"]
    x = embedded_number(timestep, width, parameters, "time_embedding", config, dtype)
    if features_of(config).ofs:
        x = x + embedded_number(jnp.float32(OFS), config["ofs_embed_dim"], parameters, "ofs_embedding", config, dtype)
    return x


def embedded_number(
    number: jax.Array, width: int, parameters: Mapping, name: str, config: Mapping, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Compute the embedding of a scalar by module `name`, from `width` sines and cosines of it, [time_embed_dim]."""
    half = width // 2
    frequencies = np.exp(-math.log(10000) * np.arange(half) / (half - config["freq_shift"])).astype(np.float32)
    angles = number.astype(jnp.float32) * frequencies
    order = (jnp.cos, jnp.sin) if config["flip_sin_to_cos"] else (jnp.sin, jnp.cos)
    with tap.scope(name):
        x = jnp.concatenate([function(angles) for function in order]).astype(dtype)
        x = jax.nn.silu(linear(x, parameters, f"{name}.linear_1")).astype(dtype)
        x = linear(x, parameters, f"{name}.linear_2").astype(dtype)
        taps.tap_vector("linear_2", x)
    return x


def patchify(latents: jax.Array, config: Mapping) -> jax.Array:
    """Cut [batch, frames, channels, height, width] into [batch, video tokens, patch]; source: `CogVideoXPatchEmbed`."""
    batch, frames, channels, height, width = latents.shape
    p, pt = config["patch_size"], features_of(config).frames_per_patch
    x = latents.reshape(batch, frames // pt, pt, channels, height // p, p, width // p, p)
    x = x.transpose(0, 1, 4, 6, 3, 2, 5, 7)
    return x.reshape(batch, -1, channels * pt * p * p)


def unpatchify(x: jax.Array, latent_shape: tuple[int, ...], config: Mapping) -> jax.Array:
    """Join patches [batch, video tokens, patch] to [batch, frames, channels, height, width]."""
    batch, frames, channels, height, width = latent_shape
    p, pt = config["patch_size"], features_of(config).frames_per_patch
    x = x.reshape(batch, frames // pt, height // p, width // p, channels, pt, p, p)
    return x.transpose(0, 1, 5, 4, 2, 6, 3, 7).reshape(batch, frames, channels, height, width)
