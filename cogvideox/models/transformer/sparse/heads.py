"""The patterns of a model's heads, in which steps they are used, and which chip attends which head."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cogvideox.defaults import DENSE_STEPS
from cogvideox.models.transformer.sparse.geometry import predicted_cycles
from cogvideox.models.transformer.sparse.layout import LANES, AlignedLayout
from cogvideox.models.transformer.sparse.patterns import KINDS, Kind, Pattern, head_order, tile_groups
from cogvideox.models.transformer.sparse.table import HeadTable


class HeadPatterns(NamedTuple):
    """The heads of a model, in the order in which chips have them, as arrays [layers, heads] or of one layer, [heads].

    Programs take them as data: one program runs every map, and a step in which all heads are dense.

    Attributes:
        order: which head of the model is at each place; the places of a chip, and of a group of its heads, are
            neighbours. int32.
        kinds: the pattern's place in KINDS, int32.
        windows: `Pattern.window`, int32.
    """

    order: Any
    kinds: Any
    windows: Any

    def dense(self) -> "HeadPatterns":
        """Return the same heads, all dense."""
        return HeadPatterns(self.order, np.zeros_like(self.kinds), np.zeros_like(self.windows))

    def part(self, first: jax.Array, count: int) -> "HeadPatterns":
        """Return `count` heads of a layer, from a place on."""
        return HeadPatterns(*(jax.lax.dynamic_slice_in_dim(array, first, count) for array in self))

    def table(self, samples: int) -> HeadTable:
        """Return the table of a layer's heads, or of a part of them, which several samples have."""
        kinds, windows = (jnp.tile(array, samples) for array in (self.kinds, self.windows))
        heads = jnp.arange(len(kinds), dtype=jnp.int32)
        # A stable sort of a few numbers: on a TPU this is one operation, and a sort and a gather are longer ones.
        before = (kinds < kinds[:, None]) | ((kinds == kinds[:, None]) & (heads < heads[:, None]))
        is_at = before.sum(1, dtype=jnp.int32) == heads[:, None]  # [place, head]
        order, windows = (jnp.where(is_at, array, 0).sum(1, dtype=jnp.int32) for array in (heads, windows))
        counts = (kinds == jnp.arange(len(KINDS))[:, None]).sum(1, dtype=jnp.int32)
        return HeadTable(order, windows, counts)

    def mask(self, layout: AlignedLayout, queries: np.ndarray) -> jax.Array:
        """Tell which keys some queries of a layer's heads attend, bool [heads, queries, keys]; tokens are packed."""
        tile = layout.positions() // LANES
        groups = tile_groups([Pattern(kind) for kind in KINDS], layout)[:, tile]
        is_text = np.arange(len(tile)) < layout.text_tokens
        distance = jnp.abs(jnp.asarray(groups[:, queries, None] - groups[:, None]))[self.kinds]
        always = is_text[queries, None] | is_text
        return (distance <= self.windows[:, None, None]) | always

    def in_model_order(self, x: jax.Array, axis: int) -> jax.Array:
        """Put what all heads of a layer have, at their places along an axis, into the model's order."""
        return jnp.take(x, jnp.argsort(self.order), axis=axis)


@dataclasses.dataclass(frozen=True)
class SparseAttention:
    """Which keys each head of a model attends in the later steps of a run.

    Attributes:
        patterns: of each layer and head, in the model's order.
        dense_steps: share of the scheduler's steps, from the first one on, in which every head attends everything.
    """

    patterns: tuple[tuple[Pattern, ...], ...]
    dense_steps: float = DENSE_STEPS

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of patterns that heads have in some step, in the order of KINDS."""
        found = {pattern.kind for of_layer in self.patterns for pattern in of_layer}
        return tuple(kind for kind in KINDS if kind in found or (kind == "dense" and self.dense_steps > 0))

    def placed(self, layout: AlignedLayout, chips: int, groups: int) -> HeadPatterns:
        """Share the heads of each layer among chips, and those of a chip among groups, so that all have equal work.

        Returns numpy arrays [layers, heads].
        """
        return _placed(self.patterns, layout, chips, groups)


@functools.lru_cache(maxsize=8)
def _placed(patterns: tuple[tuple[Pattern, ...], ...], layout: AlignedLayout, chips: int, groups: int) -> HeadPatterns:
    cycles = {pattern: predicted_cycles(pattern, layout) for of_layer in patterns for pattern in of_layer}
    orders = []
    for of_layer in patterns:
        costs = np.asarray([cycles[pattern] for pattern in of_layer])
        shares = head_order(costs.tolist(), chips).reshape(chips, -1)
        orders.append(np.concatenate([share[head_order(costs[share].tolist(), groups)] for share in shares]))
    order = np.stack(orders)
    kinds = np.asarray([[KINDS.index(pattern.kind) for pattern in of_layer] for of_layer in patterns], np.int32)
    windows = np.asarray([[pattern.window for pattern in of_layer] for of_layer in patterns], np.int32)
    return HeadPatterns(order, *(np.take_along_axis(array, order, axis=1) for array in (kinds, windows)))
