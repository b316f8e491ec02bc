"""The transformer block of Pallas kernels, for an attention that takes tiles; source: `CogVideoXBlock`.

It computes the same as models/transformer/block.py, with the kernels of models/transformer/kernels/: each does in VMEM
what XLA would do beside a matrix product in passes of its own over the whole array. Between the projections to and from
the heads, arrays are tiles [tiles, batch, heads, head_dim, 128], which the attention kernel takes as they are.
"""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from cogvideox.models.shared import tap
from cogvideox.models.shared.sharding import HIDDEN_STATES
from cogvideox.models.transformer import kernels, taps
from cogvideox.models.transformer.attention import Attention, Tiles
from cogvideox.models.transformer.base_block import BaseBlock
from cogvideox.models.transformer.layers import QK_NORM_EPS
from cogvideox.models.transformer.sparse.layout import AlignedLayout

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
        hidden, summed = self.feed_forward(hidden)
        tap.tap("", hidden, HIDDEN_STATES, self.bounds, summed=summed)
        return hidden, jnp.stack([(online > 0).sum(dtype=jnp.float32), online.sum()])

    def self_attention(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Apply the first half of the block: norm, attention, gated residual; and what `Attention.tiled` tells."""
        parts = self.parallelism.head_parts
        x, gates = self.modulated_norm(hidden, "norm1")
        with tap.scope("attn1"):
            groups = self.projected(x)
            queries, keys, values = zip(*groups, strict=True)
            self.tap_attention(lambda: (rows(queries), rows(keys), rows(values)))
            attended, shares = zip(*self.attended(groups), strict=True)
            online = jnp.concatenate(shares, axis=1)
            taps.tap_online_heads(lambda: online > 0, self.parallelism.query_parts, self.patterns)
            y = [self.exchanged(y.reshape(parts, -1, *y.shape[1:]), CHIPS, CHIPS) for y in attended]
            weight = self.weight("attn1.to_out.0.weight")
            product = functools.partial(kernels.from_heads, y, weight, interpret=self.attention.interpret)
            return self.added(product, hidden, "attn1.to_out.0", gates)[0], online

    def attended(self, groups: Sequence[Sequence[Tiles]]) -> Iterator[tuple[jax.Array, jax.Array]]:
        """Attend the groups of heads one after the other; yields what `Attention.tiled` returns."""
        output = None
        for number, (queries, keys, values) in enumerate(groups):
            if self.patterns is None:
                yield self.attention.tiled(queries, keys, values, self.order.real_tokens)
            else:
                assert isinstance(self.order, AlignedLayout)
                tiles, samples, *_ = queries.shape
                table = self.table(number, len(groups), samples)
                first_tile = self.first_tile(tiles)
                # XLA would attend the second group first, and its exchange is the longer one.
                attended = self.attention.sparse_tiled(
                    *(queries, keys, values, table, self.order, first_tile), after=output
                )
                output, _ = attended
                yield attended

    def projected(self, x: jax.Array) -> list[list[Tiles]]:
        """Project tokens to queries, keys and values, and exchange tokens for heads, a group of heads after the other.

        A TPU has one exchange on its way at a time. The first group's queries travel as soon as they are there, keys
        and values while the next group is projected, and all three of a later group while the one before is attended.

        Returns the three of each of `Parallelism.head_groups`.
        """
        groups = self.parallelism.head_groups(self.config["num_attention_heads"])
        apart = ["q", "kv"]  # of the queries nothing is gathered
        together = apart if self.parallelism.query_parts > 1 else ["qkv"]
        summed: dict[str, list[jax.Array]] = defaultdict(list)

        def exchanged(letters: str, group: int) -> list[Tiles]:
            y: Any = None
            for place, letter in enumerate(letters):
                split = kernels.Split(self.parallelism.head_parts, group, groups, place, len(letters))
                y = self.project(x, letter, split, y, summed)
            y = self.exchanged(y, CHIPS, CHIPS).reshape(-1, *y.shape[2:])
            y = y if letters == "q" else self.gathered(y, TILES)
            return [Tiles(y, place, len(letters)) for place in range(len(letters))]

        projected = [
            [tiles for letters in (together if group else apart) for tiles in exchanged(letters, group)]
            for group in range(groups)
        ]
        of_all_groups = {name: tap.added(sums) for name, sums in summed.items()}
        taps.tap_heads(x, self.parameters, self.heads, self.bounds, self.patterns, of_all_groups)
        return projected

    def project(
        self,
        x: jax.Array,
        letter: str,
        split: kernels.Split,
        into: jax.Array | None,
        summed: dict[str, list[jax.Array]],
    ) -> jax.Array:
        """Project to queries, keys or values, as `kernels.to_heads` does, and add what that sums to `summed`."""
        weight, bias = self.weight(f"attn1.to_{letter}.weight"), self.parameters.get(f"attn1.to_{letter}.bias")
        norm, names = None if letter == "v" else self.norm(letter), (f"to_{letter}", f"norm_{letter}")
        interpret, real_tokens = self.attention.interpret, self.real_tokens(x, "sp", *names)
        y, found = kernels.to_heads(x, weight, bias, self.heads, split, norm, interpret, real_tokens, into)
        for name, sums in zip(names, found, strict=False):  # values have no norm
            summed[name].append(sums)
        return y

    def feed_forward(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Apply the second half of the block: norm, MLP, gated residual; returns what `added` does."""
        dense = functools.partial(kernels.dense, interpret=self.attention.interpret)
        x, gates = self.modulated_norm(hidden, "norm2")
        with tap.scope("ff"):
            activation = kernels.Gelu(self.parameters["ff.net.0.proj.bias"])
            real_tokens = self.real_tokens(x, "sp", "net.0")
            x, summed = dense(x, self.weight("ff.net.0.proj.weight"), activation, real_tokens=real_tokens)
            taps.tap_mlp(x, self.bounds, *summed)
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
            changes = kernels.Modulation(scales, shifts, self.first_tokens)
            eps, real_tokens = self.config["norm_eps"], self.real_tokens(hidden, ("sp", "tp"), "")
            x, summed = kernels.modulated_norm(hidden, changes, eps, self.attention.interpret, real_tokens)
            tap.tap("", x, HIDDEN_STATES, self.bounds, None, *summed)
            return jax.lax.all_gather(x, "tp", axis=1, tiled=True), gates

    def added(
        self, product: Callable[..., kernels.Summed], hidden: jax.Array, name: str, gates: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        """Compute hidden + gate * (product + bias of module `name`); without tp the kernel `product` does all of it.

        Then it also returns the result's `tap.sums`, if statistics are wanted.
        """
        if self.parallelism.tp > 1:
            return self.gated_residual(hidden, product(None)[0], name, gates, self.is_first), None
        name_in_scope, bias = name.partition(".")[2], self.parameters.get(f"{name}.bias")
        residual = kernels.Residual(hidden, bias, gates, self.first_tokens)
        y, summed = product(residual, real_tokens=self.real_tokens(hidden, ("sp", "tp"), name_in_scope))
        with_bias = functools.partial(self.with_bias, name=name)
        tap.tap(name_in_scope, lambda: with_bias(product(None)[0]), HIDDEN_STATES, self.bounds, None, *summed[:1])
        return y, summed[1] if summed else None

    def real_tokens(self, x: jax.Array, axes: str | tuple[str, ...], *names: str) -> jax.Array | None:
        """Return how many tokens of each of this chip's tiles are real, if statistics of one of `names` are wanted.

        Args:
            x: [batch, tokens of this chip, anything].
            axes: of the mesh over which the tokens are split.
            names: as `tap.tap` takes them.

        Returns:
            int32 [tiles]; in a tile the first tokens are those that are not padding.
        """
        if not any([tap.wants_statistics(name) for name in names]):
            return None
        tokens, chips = x.shape[1], jax.lax.axis_size(axes)
        is_real = self.order.is_real(chips * tokens).reshape(chips, tokens)
        is_real = np.pad(is_real, ((0, 0), (0, -tokens % kernels.LANES)))
        of_chips = is_real.reshape(chips, -1, kernels.LANES).sum(2, dtype=np.int32)
        return jax.lax.dynamic_index_in_dim(jnp.asarray(of_chips), jax.lax.axis_index(axes), keepdims=False)

    def norm(self, letter: str) -> kernels.QKNorm:
        """Return the norm and the rotary embedding of queries or keys."""
        weight, bias = (self.parameters[f"attn1.norm_{letter}.{kind}"] for kind in ("weight", "bias"))
        return kernels.QKNorm(weight, bias, QK_NORM_EPS, *self.rotary)

    def weight(self, name: str) -> kernels.Weight:
        """Return a weight as kernels take it."""
        weight = self.parameters[name]
        return weight if isinstance(weight, kernels.Weight) else kernels.Weight(weight[None], jnp.int32(0))

    @property
    def first_tokens(self) -> jax.Array:
        """How many of the chip's own tokens lie before the boundary of text and video."""
        return self.is_first.sum(dtype=jnp.int32)


def rows(groups: Sequence[Tiles]) -> jax.Array:
    """Turn groups of heads, in tiles, into rows [batch, heads, tokens, head_dim]."""
    tiles = jnp.concatenate([group.alone() for group in groups], axis=2)
    _, batch, heads, head_dim, _ = tiles.shape
    return tiles.transpose(1, 2, 0, 4, 3).reshape(batch, heads, -1, head_dim)
