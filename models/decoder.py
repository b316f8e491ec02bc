"""What the TorchAx and the Flax decoder share: the chunks in time, the pixel range, the loop over chunks."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# AutoencoderKLCogVideoX.num_latent_frames_batch_size. The group norms see one chunk at a time, so the chunks are part
# of the result, and the VAE was trained with this number: it is no option.
LATENT_FRAMES_PER_CHUNK = 2


class Decoder(NamedTuple):
    """A VAE decoder as functions of arrays.

    Attributes:
        decode_chunk: jitted `decode_chunk(weights, latents, cache)`. latents: one chunk, [batch, channels, frames,
            height, width], scaling factor removed; cache: what the causal convolutions remember of the chunk before,
            None for the first. Returns pixels, float32 [batch, frames, height, width, 3] in [0, 1], and the cache
            for the next chunk.
        weight_shapes: shape of each weight by its name in the checkpoint, as in `CogVideoXDecoder3D.state_dict()`.
        convert_weights: takes a dict of those weights to the tree that `decode_chunk` takes.
    """

    decode_chunk: Callable
    weight_shapes: dict[str, tuple[int, ...]]
    convert_weights: Callable[[dict[str, jax.Array]], Any]


def chunk_sizes(latent_frames: int) -> list[int]:
    """Latent frames of each chunk, as in `AutoencoderKLCogVideoX._decode`: an odd frame joins the first chunk."""
    chunks, odd = divmod(latent_frames, LATENT_FRAMES_PER_CHUNK)
    if chunks == 0:
        return [odd]
    return [LATENT_FRAMES_PER_CHUNK + odd] + [LATENT_FRAMES_PER_CHUNK] * (chunks - 1)


def to_unit_range(pixels: jax.Array) -> jax.Array:
    """Decoder output around [-1, 1] to float32 in [0, 1]; source: `VaeImageProcessor.denormalize`."""
    return jnp.clip(pixels.astype(jnp.float32) * 0.5 + 0.5, 0.0, 1.0)


def chunk_programs(decoder: Decoder, weights: Any, latents: jax.Array) -> list[jax.stages.Traced]:
    """The programs that decode `latents` [batch, channels, frames, height, width]: first chunk, any later chunk.

    Both arguments may be shapes, for compiling without data.
    """
    sizes = chunk_sizes(latents.shape[2])
    batch, channels, _, height, width = latents.shape

    def chunk(frames):
        return jax.ShapeDtypeStruct((batch, channels, frames, height, width), latents.dtype, sharding=latents.sharding)

    first = decoder.decode_chunk.trace(weights, chunk(sizes[0]), None)
    if len(sizes) == 1:
        return [first]
    _, cache = jax.eval_shape(decoder.decode_chunk, weights, chunk(sizes[0]), None)
    cache = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=latents.sharding), cache)
    return [first, decoder.decode_chunk.trace(weights, chunk(sizes[1]), cache)]


def decode(programs: list[jax.stages.Compiled], weights: Any, latents: jax.Array) -> Iterator[np.ndarray]:
    """Run the compiled `chunk_programs`; yields the pixels of each chunk, float32 [batch, frames, height, width, 3]."""
    cache, start = None, 0
    for i, size in enumerate(chunk_sizes(latents.shape[2])):
        pixels, cache = programs[min(i, 1)](weights, latents[:, :, start : start + size], cache)
        start += size
        yield np.asarray(pixels)
