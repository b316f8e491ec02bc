"""The transformer block of Pallas kernels, for an attention that takes tiles; source: `CogVideoXBlock`.

It computes the same as models/transformer/block.py, with the kernels of models/transformer/kernels/: each does in VMEM
what XLA would do beside a matrix product in passes of its own over the whole array. Between the projections to and from
the heads, arrays are tiles [tiles, batch, heads, head_dim, 128], which the attention kernel takes as they are.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from cogvideox.models.shared import tap
from cogvideox.models.shared.sharding import HIDDEN_STATES
from cogvideox.models.transformer import kernels, taps
from cogvideox.models.transformer.attention import Attention
from cogvideox.models.transformer.base_block import BaseBlock
from cogvideox.models.transformer.layers import QK_NORM_EPS

CHIPS = 0  # the axis that counts to which, or from which, chip of its group along sp a chip exchanges what
TILES = 0  # the axis of tiles


@dataclasses.dataclass(frozen=True)
class TiledBlock(BaseBlock):
    """See the top of this file."""

    gathered_multiple: ClassVar[int] = kernels.LANES
    reads_stacks: ClassVar[bool] = True

    attention: Attention

    def __call__(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Apply the block to hidden states [batch / dp, sequence / (sp * tp), embed]."""
        hidden, online = self.self_attention(hidden)
        hidden = self.feed_forward(hidden)
        tap.tap("", hidden, HIDDEN_STATES, self.bounds)
        return hidden, jnp.stack([(online > 0).sum(dtype=jnp.float32), online.sum()])

    def self_attention(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Apply the first half of the block: norm, attention, gated residual; and what `Attention.tiled` tells."""
        parts, interpret = self.parallelism.head_parts, self.attention.interpret
        x, gates = self.modulated_norm(hidden, "norm1")
        with tap.scope("attn1"):
            taps.tap_heads(x, self.parameters, self.heads, self.bounds)

            def project(letter: str, norm: kernels.QKNorm | None) -> jax.Array:
                weight, bias = self.weight(f"attn1.to_{letter}.weight"), self.parameters.get(f"attn1.to_{letter}.bias")
                y = kernels.to_heads(x, weight, bias, self.heads, parts, norm, interpret)
                return self.exchanged(y, CHIPS, CHIPS).reshape(-1, *y.shape[2:])

            query, key = project("q", self.norm("q")), self.gathered(project("k", self.norm("k")), TILES)
            value = self.gathered(project("v", None), TILES)
            all_heads, query_parts = self.config["num_attention_heads"], self.parallelism.query_parts
            taps.tap_weights(lambda: (rows(query), rows(key)), self.length, all_heads, query_parts)
            y, online = self.attention.tiled(query, key, value, self.length)
            taps.tap_online_heads(lambda: online > 0, query_parts)
            y = self.exchanged(y.reshape(parts, -1, *y.shape[1:]), CHIPS, CHIPS)
            weight = self.weight("attn1.to_out.0.weight")
            product = functools.partial(kernels.from_heads, y, weight, interpret=interpret)
            return self.added(product, hidden, "attn1.to_out.0", gates), online

    def feed_forward(self, hidden: jax.Array) -> jax.Array:
        """Apply the second half of the block: norm, MLP, gated residual."""
        dense = functools.partial(kernels.dense, interpret=self.attention.interpret)
        x, gates = self.modulated_norm(hidden, "norm2")
        with tap.scope("ff"):
            activation = kernels.Gelu(self.parameters["ff.net.0.proj.bias"])
            x = dense(x, self.weight("ff.net.0.proj.weight"), activation)
            taps.tap_mlp(x, self.bounds)
            product = functools.partial(dense, x, self.weight("ff.net.2.weight"))
            return self.added(product, hidden, "ff.net.2", gates)

    def modulated_norm(self, hidden: jax.Array, name: str) -> tuple[jax.Array, jax.Array]:
        """Normalise and modulate hidden states; returns them gathered over tp, and the gates; see `modulation`."""
        with tap.scope(name):
            shifts, scales, gates = self.modulation(name)
            scales = 1 + scales
            if f"{name}.norm.weight" in self.parameters:
                weight, bias = (self.parameters[f"{name}.norm.{k}"].astype(jnp.float32) for k in ("weight", "bias"))
                scales, shifts = weight * scales, bias * scales + shifts
            changes = kernels.Modulation(scales, shifts, self.text_tokens)
            x = kernels.modulated_norm(hidden, changes, self.config["norm_eps"], self.attention.interpret)
            tap.tap("", x, HIDDEN_STATES, self.bounds)
            return jax.lax.all_gather(x, "tp", axis=1, tiled=True), gates

    def added(
        self, product: Callable[[kernels.Residual | None], jax.Array], hidden: jax.Array, name: str, gates: jax.Array
    ) -> jax.Array:
        """Compute hidden + gate * (product + bias of module `name`); without tp the kernel `product` does all of it."""
        if self.parallelism.tp > 1:
            return self.gated_residual(hidden, product(None), name, gates, self.is_text)
        tap.tap(name.partition(".")[2], lambda: self.with_bias(product(None), name), HIDDEN_STATES, self.bounds)
        bias = self.parameters.get(f"{name}.bias")
        return product(kernels.Residual(hidden, bias, gates, self.text_tokens))

    def norm(self, letter: str) -> kernels.QKNorm:
        """Return the norm and the rotary embedding of queries or keys."""
        weight, bias = (self.parameters[f"attn1.norm_{letter}.{kind}"] for kind in ("weight", "bias"))
        return kernels.QKNorm(weight, bias, QK_NORM_EPS, *self.rotary)

    def weight(self, name: str) -> kernels.Weight:
        """Return a weight as kernels take it."""
        weight = self.parameters[name]
        return weight if isinstance(weight, kernels.Weight) else kernels.Weight(weight[None], jnp.int32(0))

    @property
    def text_tokens(self) -> jax.Array:
        """How many of the chip's own tokens are text: they are the first."""
        return self.is_text.sum(dtype=jnp.int32)


def rows(tiles: jax.Array) -> jax.Array:
    """Turn tiles [tiles, batch, heads, head_dim, 128] into rows [batch, heads, tokens, head_dim]."""
    _, batch, heads, head_dim, _ = tiles.shape
    return tiles.transpose(1, 2, 0, 4, 3).reshape(batch, heads, -1, head_dim)
