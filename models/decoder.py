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
        weight_names: the checkpoint's names of the weights, as in `CogVideoXDecoder3D.state_dict()`.
        convert_weights: takes a dict of those weights to the tree that `decode_chunk` takes.
    """

    decode_chunk: Callable
    weight_names: list[str]
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


class CompiledDecoder:
    """A decoder compiled for one latent shape: one program for the first chunk and one for all others."""

    def __init__(self, decode_chunk: Callable, weights: Any, latents: jax.Array):
        """Compile; `latents` [batch, channels, frames, height, width] gives shape and dtype."""
        self._weights = weights
        sizes = chunk_sizes(latents.shape[2])
        self._chunks = np.split(np.arange(latents.shape[2]), np.cumsum(sizes)[:-1])
        chunks = [self._chunk(latents, i) for i in range(min(2, len(sizes)))]
        self._first = decode_chunk.lower(weights, chunks[0], None).compile()
        if len(sizes) > 1:
            _, cache = jax.eval_shape(decode_chunk, weights, chunks[0], None)
            self._next = decode_chunk.lower(weights, chunks[1], cache).compile()

    def __call__(self, latents: jax.Array) -> Iterator[np.ndarray]:
        """Yield the pixels of each chunk, float32 [batch, frames, height, width, 3] in [0, 1]."""
        cache = None
        for i in range(len(self._chunks)):
            decode = self._first if i == 0 else self._next
            pixels, cache = decode(self._weights, self._chunk(latents, i), cache)
            yield np.asarray(pixels)

    def _chunk(self, latents, i):
        frames = self._chunks[i]
        return latents[:, :, frames[0] : frames[-1] + 1]
