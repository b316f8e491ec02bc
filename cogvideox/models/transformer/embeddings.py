"""Latents as patches, and the embeddings of place (rotary) and time."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from cogvideox.models.transformer import taps
from cogvideox.models.transformer.layers import linear


def rotary_embedding(config: Mapping, latent_shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return cosines and sines of the 3D rotary embedding, float32 [video tokens, attention_head_dim / 2] each.

    Positions are whole numbers from 0 on, also where they exceed the sizes of the config, for which the pipeline stops.

    Args:
        config: `transformer/config.json`.
        latent_shape: [batch, frames, channels, height, width], frames a multiple of patch_size_t.

    Source: `CogVideoXPipeline._prepare_rotary_positional_embeddings`, the branch of CogVideoX 1.5.
    """
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    _, frames, _, height, width = latent_shape
    size = height // config["patch_size"], width // config["patch_size"]
    cos, sin = get_3d_rotary_pos_embed(
        embed_dim=config["attention_head_dim"],
        crops_coords=None,
        grid_size=size,
        temporal_size=frames // config["patch_size_t"],
        grid_type="slice",
        max_size=size,
    )
    return cos[:, ::2].numpy(), sin[:, ::2].numpy()  # diffusers writes each value twice, once for each of a pair


def time_embedding(timestep: jax.Array, parameters: Mapping, config: Mapping, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Compute the time embedding, [time_embed_dim].

    Source: `Timesteps` and `TimestepEmbedding`.
    """
    width = config["num_attention_heads"] * config["attention_head_dim"]
    half = width // 2
    frequencies = np.exp(-math.log(10000) * np.arange(half) / (half - config["freq_shift"])).astype(np.float32)
    angles = timestep.astype(jnp.float32) * frequencies
    order = (jnp.cos, jnp.sin) if config["flip_sin_to_cos"] else (jnp.sin, jnp.cos)
    x = jnp.concatenate([function(angles) for function in order]).astype(dtype)
    x = jax.nn.silu(linear(x, parameters, "time_embedding.linear_1")).astype(dtype)
    x = linear(x, parameters, "time_embedding.linear_2").astype(dtype)
    taps.tap_vector("linear_2", x)
    return x


def patchify(latents: jax.Array, config: Mapping) -> jax.Array:
    """Cut [batch, frames, channels, height, width] into [batch, video tokens, patch]; source: `CogVideoXPatchEmbed`."""
    batch, frames, channels, height, width = latents.shape
    p, pt = config["patch_size"], config["patch_size_t"]
    x = latents.reshape(batch, frames // pt, pt, channels, height // p, p, width // p, p)
    x = x.transpose(0, 1, 4, 6, 3, 2, 5, 7)
    return x.reshape(batch, -1, channels * pt * p * p)


def unpatchify(x: jax.Array, latent_shape: tuple[int, ...], config: Mapping) -> jax.Array:
    """Join patches [batch, video tokens, patch] to [batch, frames, channels, height, width]."""
    batch, frames, channels, height, width = latent_shape
    p, pt = config["patch_size"], config["patch_size_t"]
    x = x.reshape(batch, frames // pt, height // p, width // p, channels, pt, p, p)
    return x.transpose(0, 1, 5, 4, 2, 6, 3, 7).reshape(batch, frames, channels, height, width)
