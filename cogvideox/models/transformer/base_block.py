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

SEQUENCE_TILE = 16  # rows of a bfloat16 tile in a TPU's memory; each chip's share of the sequence is whole tiles


@dataclasses.dataclass(frozen=True)
class BaseBlock(abc.ABC):
    """One transformer block on one chip; call it on hidden states [batch / dp, sequence / (sp * tp), embed].

    Attributes:
        parameters: of this block, by names without "blocks.", split over tp. With `reads_stacks`, those that are
            declared `read_in_stack` may be a `kernels.Weight`.
        time: silu of the time embedding, [time_embed_dim].
        rotary: cosines and sines of the chip's gathered tokens, [sequence / sp, head_dim / 2] each.
        is_text: which of the chip's own tokens are text, bool [sequence / (sp * tp), 1].
        length: tokens of the whole sequence that are not padding.
        config: `transformer/config.json`.
        parallelism: see `Parallelism`.
        attention: `attention(query, key, value, kv_length)`; see models/transformer/attention.py.
    """

    gathered_multiple: ClassVar[int] = 1  # of which each chip's tokens, gathered over tp, are a multiple
    reads_stacks: ClassVar[bool] = False  # whether it reads weights in the stack of all blocks

    parameters: Mapping[str, Any]
    time: jax.Array
    rotary: tuple[jax.Array, jax.Array]
    is_text: jax.Array
    length: int
    config: Mapping
    parallelism: Parallelism
    attention: Callable

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
        return {-2: (0, self.length)}

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

        Of each the first row is for text, the second for video, and for the padding, whose values nothing reads.
        """
        modulation = linear(self.time, self.parameters, f"{name}.linear")
        taps.tap_vector("linear", modulation)
        # diffusers has shift, scale and gate of the video first, and then those of the text.
        return jnp.flip(modulation.reshape(2, 3, -1), 0).swapaxes(0, 1)

    def gated_residual(
        self, hidden: jax.Array, partial_sum: jax.Array, name: str, gates: jax.Array, is_text: jax.Array
    ) -> jax.Array:
        """Compute hidden + gate * (sum of `partial_sum` over tp + bias of module `name`).

        Args:
            hidden: [batch, tokens, embed]: the chip's own tokens, or a piece of them.
            partial_sum: of a product whose inputs tp splits, [batch, tokens gathered over tp, embed].
            name: of the module that ends with the product.
            gates: of text and of video, [2, embed].
            is_text: which of the tokens are text.
        """
        x = jax.lax.psum_scatter(partial_sum.astype(hidden.dtype), "tp", scatter_dimension=1, tiled=True)
        x = self.with_bias(x, name)
        tap.tap(name.partition(".")[2], x, HIDDEN_STATES, self.bounds)
        return (hidden.astype(jnp.float32) + jnp.where(is_text, gates[0], gates[1]) * x).astype(hidden.dtype)

    def with_bias(self, x: jax.Array, name: str) -> jax.Array:
        """Add the bias of module `name`, if it has one, in float32."""
        x = x.astype(jnp.float32)
        return x + self.parameters[f"{name}.bias"].astype(jnp.float32) if f"{name}.bias" in self.parameters else x
