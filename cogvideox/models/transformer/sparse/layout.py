"""The aligned order of tokens: frame after frame, each padded to whole tiles, and then the text.

So a tile of 128 tokens, of which the attention kernels read and write whole ones, lies in one frame, and a pattern of
tiles can say which frames, or which places of all frames, a head attends.
"""

import dataclasses
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

LANES = 128  # tokens in a tile
GROUP_TILES = 28  # most tiles of all frames in a group of places: 3,584 queries or keys


@dataclasses.dataclass(frozen=True)
class AlignedLayout:
    """Where the tokens of a sequence lie in the aligned order. The packed order is the text and then all frames.

    Attributes:
        frames: frames of patches; where a patch has two latent frames, pairs of them.
        frame_tokens: patches of a frame.
        text_tokens: tokens of the text.
        text_first: whether the text lies before the video.
        multiple: of which each chip's share of the tokens is a multiple.
    """

    text_first: ClassVar[bool] = False
    multiple: ClassVar[int] = LANES

    frames: int
    frame_tokens: int
    text_tokens: int

    @classmethod
    def of(cls, token_grid: tuple[int, int, int], text_tokens: int) -> Self:
        """Return the layout of a video of [frames, height, width] patches; see `embeddings.token_grid`."""
        frames, height, width = token_grid
        return cls(frames, height * width, text_tokens)

    @property
    def frame_tiles(self) -> int:
        """Tiles of a frame, of which the last may be padded."""
        return -(-self.frame_tokens // LANES)

    @property
    def text_tiles(self) -> int:
        """Tiles of the text."""
        return -(-self.text_tokens // LANES)

    @property
    def video_tiles(self) -> int:
        """Tiles of all frames; the text's follow."""
        return self.frames * self.frame_tiles

    @property
    def tiles(self) -> int:
        """Tiles of the sequence."""
        return self.video_tiles + self.text_tiles

    @property
    def tokens(self) -> int:
        """Tokens of the sequence, padding included."""
        return self.tiles * LANES

    @property
    def real_tokens(self) -> int:
        """Tokens of the sequence that are not padding."""
        return self.text_tokens + self.frames * self.frame_tokens

    @property
    def boundary(self) -> int:
        """Where the text begins, in tokens."""
        return self.video_tiles * LANES

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """First and last place of the text and of each frame, in tokens."""
        return ((self.boundary, self.boundary + self.text_tokens), *self.video_runs)

    @property
    def video_runs(self) -> tuple[tuple[int, int], ...]:
        """First and last place of each frame, in tokens."""
        frames = range(0, self.boundary, self.frame_tiles * LANES)
        return tuple((first, first + self.frame_tokens) for first in frames)

    @property
    def padding(self) -> float:
        """The share by which the aligned sequence is longer than the packed one."""
        return self.tokens / self.real_tokens - 1

    @property
    def group_tiles(self) -> int:
        """Tiles of each frame in a group of places: of all frames together at most GROUP_TILES, or one."""
        most = min(max(GROUP_TILES // self.frames, 1), self.frame_tiles)
        return -(-self.frame_tiles // -(-self.frame_tiles // most))

    @property
    def place_groups(self) -> int:
        """Groups of places; the last may have fewer tiles."""
        return -(-self.frame_tiles // self.group_tiles)

    def positions(self) -> np.ndarray:
        """Return where in the aligned order each token of the packed order lies, int32 [real tokens]."""
        text = self.boundary + np.arange(self.text_tokens)
        video = np.arange(self.frames)[:, None] * self.frame_tiles * LANES + np.arange(self.frame_tokens)
        return np.concatenate([text, video.reshape(-1)]).astype(np.int32)

    def is_real(self, tokens: int | None = None) -> np.ndarray:
        """Tell which of the aligned sequence's tokens, which a mesh may have padded to `tokens`, are not padding."""
        real = np.zeros(self.tokens if tokens is None else tokens, bool)
        real[self.positions()] = True
        return real

    def tile_tokens(self, tiles: int | None = None) -> np.ndarray:
        """Return how many tokens of each tile are not padding, they are its first ones, int32 [tiles]."""
        tiles = self.tiles if tiles is None else tiles
        return self.is_real(tiles * LANES).reshape(tiles, LANES).sum(1, dtype=np.int32)

    def place_video(self, x: jax.Array, axis: int, tokens: int | None = None) -> jax.Array:
        """Put tokens of the video, [..., frames * frame_tokens, ...], where they lie; all others are 0.

        It takes a padding of each frame and one of the end, which XLA joins with what made `x`.

        Args:
            x: any array.
            axis: of the tokens.
            tokens: of the result, at least those of the layout.
        """
        shape, axis = x.shape, axis % x.ndim
        x = x.reshape(*shape[:axis], self.frames, self.frame_tokens, *shape[axis + 1 :])
        x = padded_to(x, axis + 1, 0, self.frame_tiles * LANES)
        x = x.reshape(*shape[:axis], -1, *shape[axis + 1 :])
        return padded_to(x, axis, 0, self.tokens if tokens is None else tokens)

    def place_text(self, x: jax.Array, axis: int, tokens: int | None = None) -> jax.Array:
        """Put tokens of the text where they lie; all others are 0. Arguments as for `place_video`."""
        return padded_to(x, axis % x.ndim, self.boundary, self.tokens if tokens is None else tokens)

    def video(self, x: jax.Array, axis: int) -> jax.Array:
        """Take the video's tokens, in the packed order, out of an aligned array, of which a mesh may have padded."""
        axis = axis % x.ndim
        x = jax.lax.slice_in_dim(x, 0, self.boundary, axis=axis)
        shape = x.shape
        x = x.reshape(*shape[:axis], self.frames, -1, *shape[axis + 1 :])
        x = jax.lax.slice_in_dim(x, 0, self.frame_tokens, axis=axis + 1)
        return x.reshape(*shape[:axis], -1, *shape[axis + 1 :])

    def text(self, x: jax.Array, axis: int) -> jax.Array:
        """Take the text's tokens out of an aligned array."""
        first = self.boundary
        return jax.lax.slice_in_dim(x, first, first + self.text_tokens, axis=axis % x.ndim)

    def from_packed(self, x: jax.Array, axis: int, tokens: int | None = None) -> jax.Array:
        """Turn an array of the packed order, perhaps padded at the end, into the aligned order; padding is 0."""
        axis = axis % x.ndim
        text = jax.lax.slice_in_dim(x, 0, self.text_tokens, axis=axis)
        video = jax.lax.slice_in_dim(x, self.text_tokens, self.real_tokens, axis=axis)
        video = self.place_video(video, axis, self.boundary)
        tokens = self.tokens if tokens is None else tokens
        text = padded_to(text, axis, 0, tokens - self.boundary)
        return jnp.concatenate([video, text], axis)

    def to_packed(self, x: jax.Array, axis: int) -> jax.Array:
        """Turn an aligned array into the packed order, without padding."""
        return jnp.concatenate([self.text(x, axis), self.video(x, axis)], axis % x.ndim)


def padded_to(x: jax.Array, axis: int, first: int, length: int) -> jax.Array:
    """Pad an axis with zeros so that `x` begins at `first` of `length`."""
    edges = [(0, 0)] * x.ndim
    edges[axis % x.ndim] = first, length - first - x.shape[axis]
    return jnp.pad(x, edges)
