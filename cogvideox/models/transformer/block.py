"""The transformer block that XLA compiles; source: `CogVideoXBlock`.

Each chip holds whole rows of the sequence between the matrix products. For the products the chips along tp gather the
rows, and split the heads and the MLP instead; for attention the chips along sp exchange rows for heads, all of them or
in groups (`Parallelism.query_parts`).
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from cogvideox.models.shared import tap
from cogvideox.models.shared.sharding import HIDDEN_STATES
from cogvideox.models.transformer import taps
from cogvideox.models.transformer.attention import Attention
from cogvideox.models.transformer.base_block import SEQUENCE_TILE, BaseBlock
from cogvideox.models.transformer.layers import QK_NORM_EPS, affine, layer_norm, linear, moments, project_heads
from cogvideox.models.transformer.sparse.layout import LANES, AlignedLayout

# Tokens of a chip that go through the MLP at a time: what lies between its two products stays in a TPU's VMEM. Another
# device is to be filled by them, with less memory than attention takes.
FEED_FORWARD_TOKENS = {"tpu": 2048}
ELSEWHERE = 16384
TOKENS = 1  # the axis of the hidden states
HEADS, ROWS = 1, 2  # axes of queries, keys and values


@dataclasses.dataclass(frozen=True)
class Block(BaseBlock):
    """See the top of this file."""

    def __call__(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Apply the block to hidden states [batch / dp, sequence / (sp * tp), embed]."""
        hidden = self.self_attention(hidden)
        pieces = zip(jnp.split(hidden, self.cuts, TOKENS), jnp.split(self.is_first, self.cuts), strict=True)
        hidden = jnp.concatenate(tap.pieces(self.feed_forward, list(pieces), TOKENS), axis=TOKENS)
        tap.tap("", hidden, HIDDEN_STATES, self.bounds)
        return hidden, jnp.zeros(2)

    def self_attention(self, hidden: jax.Array) -> jax.Array:
        """Apply the first half of the block: norm, attention, gated residual."""
        x, gates = self.modulated_norm(hidden, self.is_first, "norm1")
        with tap.scope("attn1"):
            # Only where something is tapped: it computes what is named in diffusers and is not kept here.
            taps.tap_heads(x, self.parameters, self.heads, self.bounds, self.patterns)
            query, key, value = (project_heads(x, self.parameters, f"attn1.to_{name}", self.heads) for name in "qkv")
            # Text is rotated too, by the angle 0; diffusers leaves it out.
            query = normalized_and_rotated(query, self.parameters, "attn1.norm_q", self.rotary)
            key = normalized_and_rotated(key, self.parameters, "attn1.norm_k", self.rotary)

            # From a share of the tokens with all heads of this chip to all tokens with a share of the heads, and back.
            query, key, value = (self.exchanged(y.astype(x.dtype), HEADS, ROWS) for y in (query, key, value))
            key, value = self.gathered(key, ROWS), self.gathered(value, ROWS)
            self.tap_attention(lambda: (query, key, value))
            y = self.exchanged(self.attended(query, key, value), ROWS, HEADS)

            weight = self.parameters["attn1.to_out.0.weight"].reshape(x.shape[-1], self.heads, -1)
            y = jnp.einsum("bnsh,onh->bso", y, weight, preferred_element_type=jnp.float32)
            return self.gated_residual(hidden, y, "attn1.to_out.0", gates, self.is_first)

    def attended(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        """Compute the attention of this chip's heads and queries, [batch, heads, tokens, head_dim]."""
        if self.patterns is None:
            return self.attention(query, key, value, kv_length=self.order.real_tokens)
        assert isinstance(self.attention, Attention) and isinstance(self.order, AlignedLayout)
        table, first_tile = self.table(0, 1, len(query)), self.first_tile(query.shape[ROWS] // LANES)
        return self.attention.sparse(query, key, value, table, self.order, first_tile)

    def feed_forward(self, hidden: jax.Array, is_first: jax.Array) -> jax.Array:
        """Apply the second half of the block to some of the tokens: norm, MLP, gated residual."""
        x, gates = self.modulated_norm(hidden, is_first, "norm2")
        with tap.scope("ff"):
            x = jax.nn.gelu(linear(x, self.parameters, "ff.net.0.proj"), approximate=True).astype(hidden.dtype)
            taps.tap_mlp(x, self.bounds)
            weight = self.parameters["ff.net.2.weight"]
            x = jnp.einsum("bsi,oi->bso", self.materialized(x), weight, preferred_element_type=jnp.float32)
            return self.gated_residual(hidden, x, "ff.net.2", gates, is_first)

    def modulated_norm(self, hidden: jax.Array, is_first: jax.Array, name: str) -> tuple[jax.Array, jax.Array]:
        """Normalise and modulate hidden states; returns them gathered over tp, and the gates; see `modulation`."""
        with tap.scope(name):
            shifts, scales, gates = self.modulation(name)
            x = layer_norm(hidden, self.parameters, f"{name}.norm", self.config["norm_eps"])
            x = x * (1 + jnp.where(is_first, scales[0], scales[1])) + jnp.where(is_first, shifts[0], shifts[1])
            x = x.astype(hidden.dtype)
            tap.tap("", x, HIDDEN_STATES, self.bounds)
            return self.materialized(jax.lax.all_gather(x, "tp", axis=1, tiled=True)), gates

    @property
    def cuts(self) -> list[int]:
        """Where to cut the chip's own tokens for the MLP."""
        share = len(self.is_first)
        pieces = round(share * self.parallelism.tp / FEED_FORWARD_TOKENS.get(self.parallelism.platform, ELSEWHERE))
        pieces = min(max(pieces, 1), share // SEQUENCE_TILE)
        return [share * i // pieces // SEQUENCE_TILE * SEQUENCE_TILE for i in range(1, pieces)]

    def materialized(self, x: jax.Array) -> jax.Array:
        """Prevent XLA, for a TPU, from computing `x` again for every tile of a matrix product that reads it."""
        return jax.lax.optimization_barrier(x) if self.parallelism.platform == "tpu" else x


def normalized_and_rotated(x: jax.Array, parameters: Mapping, name: str, rotary: tuple) -> jax.Array:
    """Apply layer norm and rotary embedding to float32 [batch, heads, sequence, head_dim], pairs in two halves.

    Both work on the halves, so that XLA does them in one pass over the array.
    """
    cos, sin = rotary
    half = x.shape[-1] // 2
    mean, scale = moments(x, QK_NORM_EPS)
    first, second = (
        affine((x[..., part] - mean) * scale, parameters, name, part) for part in (slice(half), slice(half, None))
    )
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
