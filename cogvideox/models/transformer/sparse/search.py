"""Which pattern a head can have: the error of its attention under each, and the cheapest within a budget of error."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cogvideox.models.transformer.sparse.geometry import predicted_cycles
from cogvideox.models.transformer.sparse.layout import LANES, AlignedLayout
from cogvideox.models.transformer.sparse.patterns import Kind, Pattern, head_order, tile_groups

SAMPLED_TILES = 16  # of queries, by which a head is judged: 2,048 tokens
GOLDEN = (math.sqrt(5) - 1) / 2  # of whose multiples the fractional parts are evenly spread, however many there are


def candidates(layout: AlignedLayout) -> list[Pattern]:
    """Return the patterns with a window that are predicted to take less time than dense attention, cheapest first."""
    groups: dict[Kind, int] = {"frames": layout.frames, "positions": layout.place_groups}
    found = [Pattern(kind, window) for kind, count in groups.items() for window in range(count - 1)]
    cycles = {pattern: predicted_cycles(pattern, layout) for pattern in found}
    dense = predicted_cycles(Pattern(), layout)
    return sorted((pattern for pattern in found if cycles[pattern] < dense), key=lambda pattern: cycles[pattern])


def sampled_tiles(layout: AlignedLayout, count: int = SAMPLED_TILES) -> np.ndarray:
    """Return about `count` of the video's tiles, evenly spread over its frames and the places of a frame.

    Returns:
        int32, in ascending order; all tiles of the video if there are not more.
    """
    if layout.video_tiles <= count:
        return np.arange(layout.video_tiles, dtype=np.int32)
    number = np.arange(count)
    frame = (number + 0.5) * layout.frames // count
    place = (number * GOLDEN % 1 * layout.frame_tiles).astype(int)
    return np.unique(frame * layout.frame_tiles + place).astype(np.int32)


def pattern_errors(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    layout: AlignedLayout,
    tiles: np.ndarray,
    patterns: Sequence[Pattern],
    *,
    scale: float | None = None,
    first_tile: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Compute what attention under each pattern differs from dense attention, for some tiles of queries.

    The scores of a query with all keys are computed once. Each tile of keys has its own sums of weights and of weighted
    values, and the softmax under a pattern follows from those of the tiles that it names. A tile of queries is computed
    at a time: heads x 128 x tokens numbers in float32, a few times.

    Args:
        queries: [tiles, heads, head_dim, 128], of the aligned order, bfloat16 or float32.
        keys, values: like `queries`, of the whole sequence; there may be more tiles than the layout's.
        layout: of the sequence.
        tiles: the tiles of queries by their numbers in the sequence, ascending, int32; those of them that `queries`
            lacks are left out.
        patterns: any.
        scale: positive factor of the scores; by default head_dim ** -0.5.
        first_tile: as `sparse_attention` takes it: the tile of the sequence with which the queries begin.

    Returns:
        The sums of squares of the output under a pattern minus the dense output, float32 [heads, patterns], and of the
        dense output, float32 [heads].
    """
    scale = queries.shape[2] ** -0.5 if scale is None else scale
    first = jnp.int32(0) if first_tile is None else jnp.reshape(first_tile, ()).astype(jnp.int32)
    # However the queries begin, they have at most so many of the tiles, which are neighbours in the list.
    most = max(np.searchsorted(tiles, tile + len(queries)) - number for number, tile in enumerate(tiles))
    none = np.full(most, np.iinfo(np.int32).max, np.int32)
    start = jnp.searchsorted(tiles, first)
    chosen = lax.dynamic_slice_in_dim(jnp.asarray(np.concatenate([tiles, none])), start, most)
    is_here = chosen < first + len(queries)
    place = jnp.where(is_here, chosen - first, 0)

    real = jnp.asarray(layout.is_real().reshape(-1, 1, 1, LANES))
    keys, values = (jnp.where(real, x[: layout.tiles], 0).astype(jnp.float32) for x in (keys, values))
    # The sums of weights are those of weighted ones.
    values = jnp.concatenate([values, jnp.ones_like(values[:, :, :1])], axis=2)
    seen = [*patterns, Pattern()]
    groups, windows = jnp.asarray(tile_groups(seen, layout)), jnp.asarray([pattern.window for pattern in seen])
    is_text = jnp.arange(layout.tiles) >= layout.video_tiles

    def of_tile(chosen: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        tile, place, is_here = chosen
        near = is_text | (jnp.abs(groups[:, tile][:, None] - groups) <= windows[:, None])  # [patterns, tiles]
        outputs = outputs_under(queries[place], keys, values, near, real, scale)
        outputs = jnp.where(real[tile, 0, 0] & is_here, outputs, 0)  # [patterns, heads, head_dim, 128]
        squares = jnp.square(outputs[:-1] - outputs[-1]).sum((2, 3))
        return squares.T, jnp.square(outputs[-1]).sum((1, 2))

    differences, dense = lax.map(of_tile, (chosen, place, is_here))
    return differences.sum(0), dense.sum(0)


def outputs_under(
    query: jax.Array, keys: jax.Array, values: jax.Array, near: jax.Array, real: jax.Array, scale: float
) -> jax.Array:
    """Compute attention of a tile of queries under each of some patterns, float32.

    Args:
        query: [heads, head_dim, 128]; where it is bfloat16, so are the values of keys and values.
        keys: [tiles, heads, head_dim, 128], float32.
        values: like `keys`, with a row of ones at the end.
        near: which tiles of keys each pattern names, bool [patterns, tiles].
        real: which keys are not padding, bool [tiles, 1, 1, 128].
        scale: of the scores.

    Returns:
        [patterns, heads, head_dim, 128]; 0 where a pattern names no key that has a weight in float32, e ** -87 of the
        greatest.
    """
    # The default precision holds all digits of bfloat16. It rounds weights, but for all patterns alike.
    exact = lax.Precision.HIGHEST
    precision = exact if query.dtype == jnp.float32 else lax.Precision.DEFAULT
    scores = jnp.einsum("khdl,hdq->khlq", keys, query.astype(jnp.float32), precision=precision) * scale
    scores = jnp.where(real.swapaxes(2, 3), scores, -jnp.inf)
    weights = jnp.exp(scores - scores.max((0, 2), keepdims=True))
    sums = jnp.einsum("khdl,khlq->khdq", values, weights, precision=precision)
    sums = jnp.einsum("pk,khdq->phdq", near.astype(jnp.float32), sums, precision=exact)
    total = sums[:, :, -1:]
    return jnp.where(total > 0, sums[:, :, :-1] / total, 0)


class Choice(NamedTuple):
    """Patterns of a model's heads, and what they cost.

    Attributes:
        patterns: of each layer and head.
        errors: of each head under its pattern, float64 [layers, heads]; 0 where it is dense.
        density: the share of all scores that each layer computes, float64 [layers].
        cycles: predicted for the chip with the most work in each layer, float64 [layers].
        dense_cycles: the same if all heads are dense.
    """

    patterns: tuple[tuple[Pattern, ...], ...]
    errors: np.ndarray
    density: np.ndarray
    cycles: np.ndarray
    dense_cycles: float


def choose(errors: np.ndarray, layout: AlignedLayout, budget: float, chips: int) -> Choice:
    """Choose for each head the cheapest pattern within a budget of error, and a better one where it costs nothing.

    The chip with the most work decides how long a layer takes (`head_order` shares heads among chips). So a head has
    the pattern with the least error, which may be dense, that does not give that chip more work; the heads with the
    largest errors choose first.

    Args:
        errors: relative errors, float [layers, heads, candidates], of `candidates(layout)`.
        layout: of the sequence.
        budget: the largest error of a head.
        chips: that share the heads; a divisor of their number.
    """
    options = [*candidates(layout), Pattern()]
    costs = np.array([predicted_cycles(pattern, layout) for pattern in options])
    densities = np.array([pattern.density(layout) for pattern in options])
    errors = np.pad(np.asarray(errors, np.float64), ((0, 0), (0, 0), (0, 1)))
    chosen = np.argmax(errors <= budget, axis=2)  # the first; a NaN is never within the budget
    for layer, of_heads in zip(chosen, errors, strict=True):
        _improve(layer, of_heads, costs, chips)
    return Choice(
        tuple(tuple(options[number] for number in layer) for layer in chosen),
        np.take_along_axis(errors, chosen[:, :, None], 2)[:, :, 0],
        densities[chosen].mean(1),
        np.array([slowest(costs[layer], chips) for layer in chosen]),
        costs[-1] * errors.shape[1] / chips,
    )


def _improve(chosen: np.ndarray, errors: np.ndarray, costs: np.ndarray, chips: int) -> None:
    """Give heads of a layer options with less error, as long as the slowest chip has no more work.

    Args:
        chosen: the option of each head, changed in place.
        errors: of each head under each option, [heads, options].
        costs: of each option.
        chips: that share the heads.
    """
    most = slowest(costs[chosen], chips) * (1 + 1e-9)
    first_errors = errors[np.arange(len(chosen)), chosen]
    for head in np.argsort(-first_errors, kind="stable"):
        others = costs[chosen].sum() - costs[chosen[head]]
        for option in np.argsort(errors[head], kind="stable"):
            if errors[head, option] >= first_errors[head]:
                break
            trial = chosen.copy()
            trial[head] = option
            # The chips together have no room for most options, which is quickly seen.
            if others + costs[option] <= most * chips and slowest(costs[trial], chips) <= most:
                chosen[head] = option
                break


def slowest(costs: np.ndarray, chips: int) -> float:
    """Return the work of the chip that has the most, of heads of such costs."""
    return float(costs[head_order(costs.tolist(), chips)].reshape(chips, -1).sum(1).max())
