"""The order of a sample's tokens in the hidden states: packed, or aligned to tiles for block-sparse attention."""

import dataclasses
import math
from typing import ClassVar

import jax
import numpy as np

from cogvideox.models.transformer.sparse.layout import AlignedLayout, padded_to


@dataclasses.dataclass(frozen=True)
class PackedOrder:
    """First the text, and then all of the video; a mesh may pad the end. Methods and attributes as of `AlignedLayout`.

    Attributes:
        video_tokens: tokens of the video.
        text_tokens: tokens of the text.
    """

    text_first: ClassVar[bool] = True
    multiple: ClassVar[int] = 1

    video_tokens: int
    text_tokens: int

    @property
    def real_tokens(self) -> int:
        """Tokens of the sequence, of which none is padding."""
        return self.text_tokens + self.video_tokens

    @property
    def tokens(self) -> int:
        """Tokens of the sequence."""
        return self.real_tokens

    @property
    def boundary(self) -> int:
        """Where the video begins."""
        return self.text_tokens

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """First and last place of the text and of the video, which are one run."""
        return ((0, self.real_tokens),)

    @property
    def video_runs(self) -> tuple[tuple[int, int], ...]:
        """First and last place of the video."""
        return ((self.text_tokens, self.real_tokens),)

    def positions(self) -> np.ndarray:
        """Return where each token of the packed order lies, int32 [real tokens]."""
        return np.arange(self.real_tokens, dtype=np.int32)

    def is_real(self, tokens: int) -> np.ndarray:
        """Tell which of so many tokens are not padding."""
        return np.arange(tokens) < self.real_tokens

    def place_text(self, x: jax.Array, axis: int, tokens: int) -> jax.Array:
        """Put tokens of the text where they lie in so many tokens; all others are 0."""
        return padded_to(x, axis, 0, tokens)

    def place_video(self, x: jax.Array, axis: int, tokens: int) -> jax.Array:
        """Put tokens of the video where they lie in so many tokens; all others are 0."""
        return padded_to(x, axis, self.text_tokens, tokens)

    def video(self, x: jax.Array, axis: int) -> jax.Array:
        """Take the video's tokens out of an array, which a mesh may have padded."""
        return jax.lax.slice_in_dim(x, self.text_tokens, self.real_tokens, axis=axis % x.ndim)

    def from_packed(self, x: jax.Array, axis: int, tokens: int) -> jax.Array:
        """Pad an array to so many tokens."""
        return padded_to(x, axis, 0, tokens)

    def to_packed(self, x: jax.Array, axis: int) -> jax.Array:
        """Take what is not padding out of an array."""
        return jax.lax.slice_in_dim(x, 0, self.real_tokens, axis=axis % x.ndim)


TokenOrder = PackedOrder | AlignedLayout


def token_order(token_grid: tuple[int, int, int], text_tokens: int, is_aligned: bool) -> TokenOrder:
    """Return the order of the tokens of text and of a video of [frames, height, width] patches."""
    if is_aligned:
        return AlignedLayout.of(token_grid, text_tokens)
    return PackedOrder(math.prod(token_grid), text_tokens)
