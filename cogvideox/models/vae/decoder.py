"""What the TorchAx and the Flax decoder share: chunks in time, the split in space, conversion to pixels, the loop."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cogvideox.models.shared import tap
from cogvideox.models.shared.sharding import to_devices
from cogvideox.models.vae import chunks
from cogvideox.models.vae.spatial_split import Split

# AutoencoderKLCogVideoX.num_latent_frames_batch_size. The group norms see one chunk at a time, so the chunks are part
# of the result, and the VAE was trained with this number: it is no option.
LATENT_FRAMES_PER_CHUNK = 2


class Decoder(NamedTuple):
    """A VAE decoder as functions of arrays.

    Attributes:
        decode_chunk: `decode_chunk(weights, latents, cache, split)`, to be run on each chip of the split. latents: its
            part of one chunk, [frames, height, width, strips, channels], scaling factor removed; cache: what the
            causal convolutions keep of the chunk before, None for the first chunk. Returns pixels around [-1, 1],
            [frames, height, width, strips, 3], and the cache for the next chunk.
        weight_shapes: shape of each weight by its name in the checkpoint, as in `CogVideoXDecoder3D.state_dict()`.
        convert_weights: turns a dict of those weights into the tree that `decode_chunk` takes. Of NumPy arrays it makes
            views of them, and copies nothing.
    """

    decode_chunk: Callable
    weight_shapes: dict[str, tuple[int, ...]]
    convert_weights: Callable[[dict[str, Any]], Any]


def chunk_sizes(latent_frames: int) -> list[int]:
    """Return the latent frames of each chunk, as `AutoencoderKLCogVideoX._decode`: an odd one joins the first chunk."""
    return chunks.sizes(latent_frames, LATENT_FRAMES_PER_CHUNK)


def channels_last(weight: jax.Array) -> jax.Array:
    """Transpose a convolution's weight from torch's [out, in, ...] to [..., in, out], with which a TPU is faster."""
    return weight.transpose(*range(2, weight.ndim), 1, 0)


def to_pixels(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Turn decoder output around [-1, 1] into pixels in [0, 1], or from 0 to 255 for an integer dtype.

    Source: `VaeImageProcessor.denormalize` and `numpy_to_pil`, which rounds.
    """
    x = jnp.clip(x.astype(jnp.float32) * 0.5 + 0.5, 0.0, 1.0)
    return jnp.round(x * 255.0).astype(dtype) if jnp.issubdtype(dtype, jnp.integer) else x.astype(dtype)


def chunk_programs(
    decoder: Decoder,
    weights: Any,
    latent_shape: tuple[int, ...],
    split: Split,
    pixel_dtype: jax.typing.DTypeLike = jnp.uint8,
    wanted: tap.Wanted | None = None,
) -> list[jax.stages.Traced]:
    """Trace the programs that decode latents [1, channels, frames, height, width]: the first chunk, and any later one.

    Args:
        decoder: see `Decoder`.
        weights: the tree that the decoder takes; shapes are enough to compile without data.
        latent_shape: of the latents, all chunks together.
        split: of a frame over chips and strips.
        pixel_dtype: of the pixels, see `to_pixels`.
        wanted: if anything, a program returns its result and what is `tap.Collected`: the outputs of modules as
            [frames, channels, height, width].

    Returns:
        One or two programs that map weights, latents and cache to pixels and the next cache. The first program takes no
        cache; the second one donates its cache.
    """

    def decode_chunk(weights, latents, cache=None):
        x, cache = decoder.decode_chunk(weights, latents, cache, split)
        return split.image(to_pixels(x, pixel_dtype)), cache

    shapes = [split.tiles_shape(size, latent_shape[1]) for size in chunk_sizes(latent_shape[2])[:2]]
    return chunks.trace(decode_chunk, weights, shapes, split, wanted)


def decode(programs: Sequence[Callable], weights: Any, latents: np.ndarray, split: Split) -> Iterator[np.ndarray]:
    """Run the compiled `chunk_programs` on latents [1, channels, frames, height, width].

    Yields the pixels of each chunk, [frames, height, width, 3], while the next chunk is decoded. If the first chunk has
    an even number of latent frames, the programs make several frames of its first one too, though that stands for a
    single frame of the video; the surplus frames in front are dropped.
    """
    sizes = chunk_sizes(latents.shape[2])
    starts = np.cumsum([0, *sizes])
    cache: list[Any] = []  # the first program takes none
    waiting: jax.Array | None = None
    for i, size in enumerate(sizes):
        tiles = to_devices(split.tiles(latents[:, :, starts[i] : starts[i] + size]), split.latents)
        pixels, *cache = programs[min(i, 1)](weights, tiles, *cache)
        if i == 0 and size % 2 == 0:
            pixels = pixels[len(pixels) // size - 1 :]
        pixels = chunks.to_host(pixels, split)
        if waiting is not None:
            yield _frames(waiting, latents, split)
        waiting = pixels
    assert waiting is not None  # there is at least one chunk
    yield _frames(waiting, latents, split)


def warm_up(programs: Sequence[Callable], weights: Any, latents: np.ndarray, split: Split) -> None:
    """Run each of the compiled `chunk_programs` once, as `decode` would, for what only the first run of one costs."""
    used = sum(chunk_sizes(latents.shape[2])[:2])
    for _ in decode(programs, weights, latents[:, :, :used], split):
        pass


def _frames(pixels: jax.Array, latents: np.ndarray, split: Split) -> np.ndarray:
    """Turn a program's pixels into [frames, height, width, 3], without those beyond the frame's edge."""
    scale = pixels.shape[2] // split.covered[0]
    height, width = (scale * size for size in latents.shape[3:])
    return np.ascontiguousarray(np.moveaxis(np.asarray(pixels)[:, :, :height, :width], 1, -1))
