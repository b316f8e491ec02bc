"""What both blocks of the transformer have: their arguments, the modulation, and the gated residual."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from cogvideox.models.shared import tap
from cogvideox.models.shared.sharding import HIDDEN_STATES, Parallelism
from cogvideox.models.transformer import taps
from cogvideox.models.transformer.layers import linear
from cogvideox.models.transformer.sparse.heads import HeadPatterns
from cogvideox.models.transformer.sparse.layout import AlignedLayout
from cogvideox.models.transformer.sparse.table import HeadTable
from cogvideox.models.transformer.token_order import TokenOrder

SEQUENCE_TILE = 16  # rows of a bfloat16 tile in a TPU's memory; each chip's share of the sequence is whole tiles


@dataclasses.dataclass(frozen=True)
class BaseBlock(abc.ABC):
    """One transformer block on one chip; call it on hidden states [batch / dp, sequence / (sp * tp), embed].

    Attributes:
        parameters: of this block, by names without "blocks.", split over tp. With `reads_stacks`, those that are
            declared `read_in_stack` may be a `kernels.Weight`.
        time: silu of the time embedding, [time_embed_dim].
        rotary: cosines and sines of the chip's gathered tokens, [sequence / sp, head_dim / 2] each.
        is_first: which of the chip's own tokens lie before the boundary of text and video, bool
            [sequence / (sp * tp), 1].
        order: of the tokens.
        config: `transformer/config.json`.
        parallelism: see `Parallelism`.
        attention: `attention(query, key, value, kv_length)`; see models/transformer/attention.py.
        patterns: of this layer's heads, for block-sparse attention; None for dense attention.
    """

    gathered_multiple: ClassVar[int] = 1  # of which each chip's tokens, gathered over tp, are a multiple
    reads_stacks: ClassVar[bool] = False  # whether it reads weights in the stack of all blocks

    parameters: Mapping[str, Any]
    time: jax.Array
    rotary: tuple[jax.Array, jax.Array]
    is_first: jax.Array
    order: TokenOrder
    config: Mapping
    parallelism: Parallelism
    attention: Callable
    patterns: HeadPatterns | None

    @abc.abstractmethod
    def __call__(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Apply the block; returns the hidden states, and `Prediction.online_heads` of this block and chip."""

    @property
    def heads(self) -> int:
        """Attention heads that this chip projects to."""
        return self.config["num_attention_heads"] // self.parallelism.tp

    @property
    def bounds(self) -> tap.Bounds:
        """Bounds of the tokens that are not padding, for taps."""
        return {-2: self.order.runs}

    def table(self, group: int, groups: int, samples: int) -> HeadTable:
        """Return the patterns of one of the groups of the heads that this chip attends."""
        assert self.patterns is not None
        parts = self.parallelism.head_parts
        chip = jax.lax.axis_index("tp") * parts + jax.lax.axis_index("sp") % parts
        count = self.heads // parts // groups
        return self.patterns.part((chip * groups + group) * count, count).table(samples)

    def first_tile(self, tiles: int) -> jax.Array | None:
        """Return with which tile of the sequence this chip's queries begin, of which it has so many tiles."""
        if self.parallelism.query_parts == 1:
            return None
        return jax.lax.axis_index("sp") // self.parallelism.head_parts * tiles

    def tap_attention(self, arrays: Callable[[], tuple[jax.Array, jax.Array, jax.Array]]) -> None:
        """Tap what attention does with what `arrays` computes: its arguments, [batch, heads, tokens, head_dim] each."""
        heads, query_parts = self.config["num_attention_heads"], self.parallelism.query_parts
        taps.tap_weights(arrays, self.order, heads, query_parts, self.patterns)
        if self.patterns is not None:
            assert isinstance(self.order, AlignedLayout)
            taps.tap_patterns(self.patterns)
            taps.tap_pattern_errors(arrays, self.order, self.first_tile, query_parts, self.patterns)

    def exchanged(self, y: jax.Array, split_axis: int, concat_axis: int) -> jax.Array:
        """Exchange tokens for heads, or heads for tokens, in groups of chips; see `Parallelism.query_parts`."""
        groups = self.parallelism.exchanging
        return jax.lax.all_to_all(y, "sp", split_axis, concat_axis, axis_index_groups=groups, tiled=True)

    def gathered(self, y: jax.Array, axis: int) -> jax.Array:
        """Gather the tokens of all groups, along an axis of keys or values."""
        if self.parallelism.query_parts == 1:
            return y
        return jax.lax.all_gather(y, "sp", axis_index_groups=self.parallelism.gathering, axis=axis, tiled=True)

    def modulation(self, name: str) -> jax.Array:
        """Compute what the time embedding makes of the norm `name`: shifts, scales and gates, float32 [3, 2, embed].

        Of each the first row is for the tokens before the boundary of text and video, the second for those after it; in
        padding are values that nothing reads.
        """
        modulation = linear(self.time, self.parameters, f"{name}.linear")
        taps.tap_vector("linear", modulation)
        # diffusers has shift, scale and gate of the video first, and then those of the text.
        modulation = modulation.reshape(2, 3, -1)
        return (jnp.flip(modulation, 0) if self.order.text_first else modulation).swapaxes(0, 1)

    def gated_residual(
        self, hidden: jax.Array, partial_sum: jax.Array, name: str, gates: jax.Array, is_first: jax.Array
    ) -> jax.Array:
        """Compute hidden + gate * (sum of `partial_sum` over tp + bias of module `name`).

        Args:
            hidden: [batch, tokens, embed]: the chip's own tokens, or a piece of them.
            partial_sum: of a product whose inputs tp splits, [batch, tokens gathered over tp, embed].
            name: of the module that ends with the product.
            gates: see `modulation`, [2, embed].
            is_first: which of the tokens lie before the boundary of text and video.
        """
        x = jax.lax.psum_scatter(partial_sum.astype(hidden.dtype), "tp", scatter_dimension=1, tiled=True)
        x = self.with_bias(x, name)
        tap.tap(name.partition(".")[2], x, HIDDEN_STATES, self.bounds)
        return (hidden.astype(jnp.float32) + jnp.where(is_first, gates[0], gates[1]) * x).astype(hidden.dtype)

    def with_bias(self, x: jax.Array, name: str) -> jax.Array:
        """Add the bias of module `name`, if it has one, in float32."""
        x = x.astype(jnp.float32)
        return x + self.parameters[f"{name}.bias"].astype(jnp.float32) if f"{name}.bias" in self.parameters else x
