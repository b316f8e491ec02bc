"""The VAE's encoder on frames split in space: chunks in time, the loop over them, the posterior of the latents."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cogvideox.models.shared.sharding import to_devices
from cogvideox.models.vae import chunks
from cogvideox.models.vae.spatial_split import Split

# AutoencoderKLCogVideoX.num_sample_frames_batch_size: a part of the result, as is the number of the decoder.
FRAMES_PER_CHUNK = 8
LOGVAR_LIMITS = -30.0, 20.0  # DiagonalGaussianDistribution


class Encoder(NamedTuple):
    """A VAE encoder as functions of arrays.

    Attributes:
        encode_chunk: `encode_chunk(weights, pixels, cache, split)`, to be run on each chip of the split. pixels: its
            part of one chunk, around [-1, 1], [frames, height, width, strips, 3]; cache: as for `Decoder`. Returns
            means and log-variances of the latents, [latent frames, strip height, strip width, strips, 2 * channels],
            and the cache for the next chunk.
        weight_shapes: shape of each weight by its name in the checkpoint, as in `CogVideoXEncoder3D.state_dict()`.
        convert_weights: as that of `Decoder`.
    """

    encode_chunk: Callable
    weight_shapes: dict[str, tuple[int, ...]]
    convert_weights: Callable[[dict[str, Any]], Any]


def chunk_programs(encoder: Encoder, weights: Any, shape: tuple[int, ...], split: Split) -> list[jax.stages.Traced]:
    """Trace the programs that encode frames [frames, height, width, 3]: the first chunk, and any later one.

    Args:
        encoder: see `Encoder`.
        weights: the tree that the encoder takes; shapes are enough to compile without data.
        shape: of the frames, all chunks together.
        split: of a frame over chips and strips.

    Returns:
        The programs; see `chunks.trace`.
    """

    def encode_chunk(weights, pixels, cache=None):
        x, cache = encoder.encode_chunk(weights, pixels, cache, split)
        return split.image(x), cache

    frames, height, _, channels = shape
    sizes = chunks.sizes(frames, FRAMES_PER_CHUNK)[:2]
    shapes = [split.tiles_shape(size, channels, height // split.height) for size in sizes]
    return chunks.trace(encode_chunk, weights, shapes, split)


def to_pixels(frames: np.ndarray) -> np.ndarray:
    """Turn frames, uint8 [frames, height, width, 3], into pixels around [-1, 1], float32 [1, 3, frames, height, width].

    Source: `VideoProcessor.preprocess_video`.
    """
    return np.moveaxis(2.0 * (frames.astype(np.float32) / 255.0) - 1.0, -1, 0)[None]


def encode(
    programs: Sequence[Callable],
    weights: Any,
    frames: np.ndarray,
    split: Split,
    told: Callable[[int], None] = lambda frames: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Run the compiled `chunk_programs` on frames, uint8 [frames, height, width, 3].

    `told` is called with the number of frames after each chunk.

    Returns:
        Mean and log-variance of the latents, each [1, channels, latent frames, height, width], in the weights' dtype.

    Source: `AutoencoderKLCogVideoX._encode`.
    """
    dtype = jax.tree.leaves(weights)[0].dtype
    sizes = chunks.sizes(len(frames), FRAMES_PER_CHUNK)
    starts = np.cumsum([0, *sizes])
    cache: list[Any] = []  # the first program takes none
    results: list[jax.Array] = []
    for i, size in enumerate(sizes):
        pixels = to_pixels(frames[starts[i] : starts[i] + size]).astype(dtype)
        tiles = to_devices(split.tiles(pixels, frames.shape[1] // split.height), split.latents)
        result, *cache = programs[min(i, 1)](weights, tiles, *cache)
        results.append(chunks.to_host(result, split))
        if i > 0:  # one chunk is computed while the next one is prepared
            jax.block_until_ready(results[-2])
        told(size)
    encoded = np.concatenate([np.asarray(result) for result in results])[:, :, : split.height, : split.width]
    mean, logvar = np.split(np.moveaxis(encoded, 1, 0)[None], 2, axis=1)
    return np.ascontiguousarray(mean), np.asarray(jnp.clip(logvar, *LOGVAR_LIMITS))
