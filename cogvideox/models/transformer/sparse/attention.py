"""Attention of heads with patterns: a call of the kernel for each kind of pattern, all into one output."""

import dataclasses
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from cogvideox.models.transformer.sparse.bound import key_bounds
from cogvideox.models.transformer.sparse.geometry import WindowSizes, geometry_of
from cogvideox.models.transformer.sparse.kernel import Call, Scalars
from cogvideox.models.transformer.sparse.layout import LANES, AlignedLayout
from cogvideox.models.transformer.sparse.patterns import KINDS, Kind
from cogvideox.models.transformer.sparse.table import HeadTable
from custom_splash_attention import USE_K_SMOOTH, Heads, base2_factor, for_platform

NAMES = {kind: f"exp2_splash_{kind}" for kind in KINDS}  # of the kernels
ONLINE = "_online"  # ends the names of the online kernels


def sparse_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    table: HeadTable,
    *,
    layout: AlignedLayout,
    kinds: Collection[Kind] = KINDS,
    scale: float | None = None,
    sizes: WindowSizes | None = None,
    k_smooth: bool = USE_K_SMOOTH,
    interpret: Any = None,
    first_tile: jax.Array | None = None,
    first: tuple[int, int, int] = (0, 0, 0),
    after: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Compute softmax(scale query key^T) value over the tiles that each head's pattern names; see `Pattern`.

    Args:
        queries: [tiles, heads, head_dim, 128], of the aligned order, bfloat16 or float32.
        keys, values: like `queries`, of the whole sequence; there may be more tiles than the layout's. All three may
            have more heads than the table, and be one array.
        table: numpy or jax arrays. Where `counts` are numpy's, the grids have fixed lengths.
        layout: of the sequence.
        kinds: those that `table` may have, which are compiled; the others' counts must be 0.
        scale: positive factor of the scores; by default head_dim ** -0.5.
        sizes: of heads with a window; by default those that waste little.
        k_smooth: take the mean of the keys out of the bound.
        interpret: run in Pallas' interpreter; by default where the call is not compiled for a TPU.
        first_tile: the tile of the sequence with which the queries begin, int32 scalar, where they are only a part of
            it; None where they begin with it and are all.
        first: the first of the table's heads in each of the three arrays.
        after: what is to be computed before, which is not read; None to leave the order to XLA.

    Returns:
        An array like `queries`, of the table's heads, in which tiles beyond the layout's are 0, and of each head the
        share of its blocks of queries that the online kernel computed, float32 [heads]. What stands at padded tokens is
        undefined.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the keys of a head do not fit a core's VMEM.
    """
    _check(queries, keys, values, table, layout, first_tile, first)
    head_dim, itemsize = queries.shape[2], queries.dtype.itemsize
    heads = Heads(len(table.order), *first)
    factor, whole = base2_factor(scale, head_dim), first_tile is None and len(queries) >= layout.tiles
    fixed = table.counts.tolist() if isinstance(table.counts, np.ndarray) else [None] * len(KINDS)
    used = [kind for kind, count in zip(KINDS, fixed, strict=True) if kind in kinds and count != 0]
    geometries = {kind: geometry_of(kind, layout, itemsize, head_dim, sizes, len(queries)) for kind in used}

    def run(queries, keys, values, table, first, after, interpret):
        options = {"heads": heads, "factor": factor, "k_smooth": k_smooth, "interpret": interpret, "after": after}
        bound = key_bounds(queries, keys, layout, **options)
        # Where the queries are whole, the calls write all tiles of the layout.
        shape = len(queries), heads.number, *queries.shape[2:]
        output = lax.empty(shape, queries.dtype) if whole else jnp.zeros(shape, queries.dtype)
        online = jnp.zeros(heads.number, jnp.float32)
        for kind, geometry in geometries.items():
            index = KINDS.index(kind)
            start, count = table.counts[:index].sum(), table.counts[index] if fixed[index] is None else fixed[index]
            of_kind = _Heads(jnp.roll(table.order, -start), jnp.roll(table.windows, -start), count)
            call = Call(
                geometry=geometry,
                all_heads=heads,
                name=NAMES[kind],
                factor=factor,
                real_keys=layout.real_tokens,
                online=False,
                whole=whole and geometry.is_whole(len(queries)),
                interpret=interpret,
            )
            output, online = _run(call, of_kind, layout, first, (queries, keys, values), bound, output, online)
        if whole and len(queries) > layout.tiles:
            output = output.at[layout.tiles :].set(0)
        # Without this, XLA may choose a loop's layout for the operation that reads it, and copy what was written.
        return with_layout_constraint(output, Layout(major_to_minor=(0, 1, 2, 3))), online

    first_tiles = jnp.zeros(1, jnp.int32) if first_tile is None else jnp.reshape(first_tile, 1).astype(jnp.int32)
    return for_platform(run, interpret)(queries, keys, values, HeadTable(*map(jnp.asarray, table)), first_tiles, after)


class _Heads(NamedTuple):
    """The heads of one kind of pattern: the first `count` (an int32 scalar, or an int) of all, and their windows."""

    order: jax.Array
    windows: jax.Array
    count: Any


def _run(
    call: Call,
    heads: _Heads,
    layout: AlignedLayout,
    first: jax.Array,
    arrays: tuple[jax.Array, jax.Array, jax.Array],
    bound: jax.Array,
    output: jax.Array,
    online: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Run the fast kernel for heads of one kind, and the online kernel for their blocks for which it is not exact.

    Returns `output`, written into, and `online` with the shares of these heads.
    """
    geometry, all_heads = call.geometry, len(heads.order)
    key_tiles, held = geometry.key_tiles()
    tile_tokens = layout.tile_tokens()
    scalars = Scalars(
        heads.order,
        heads.windows,
        jnp.arange(geometry.blocks, dtype=jnp.int32),
        first,
        *(jnp.asarray(numbers) for numbers in (key_tiles, np.where(held, tile_tokens[key_tiles], 0), tile_tokens)),
    )

    def fast(_, written):
        return tuple(call(scalars, heads.count, *arrays, bound, written[0]))

    written = output, jnp.zeros((all_heads, geometry.blocks, 1, LANES), jnp.float32)
    # A grid cannot be empty. A loop, unlike a condition, writes in place.
    is_fixed = isinstance(heads.count, int)
    written = fast(0, written) if is_fixed else lax.fori_loop(0, jnp.minimum(heads.count, 1), fast, written)
    counted = (jnp.arange(all_heads) < heads.count)[:, None]
    inexact = (written[1].max((2, 3)) > 0) & counted  # [heads, blocks]
    slow_first = jnp.argsort(~inexact.any(1))
    # The online kernel's program is longer, and it need not be fast: it is unrolled less.
    slow = dataclasses.replace(geometry, pass_keys=min(geometry.pass_keys, 4 * geometry.keys_in))
    again = dataclasses.replace(call, geometry=slow, name=call.name + ONLINE, online=True)

    def repair(index, output):
        place = slow_first[index]
        blocks = inexact[place]
        chosen = scalars._replace(
            heads=heads.order[place][None],
            windows=heads.windows[place][None],
            blocks=jnp.argsort(~blocks).astype(jnp.int32),
        )
        return again(chosen, blocks.sum(dtype=jnp.int32), *arrays, None, output)[0]

    output = lax.fori_loop(0, inexact.any(1).sum(), repair, written[0])
    places = (jnp.arange(all_heads)[:, None] == heads.order) & counted[:, 0]  # [head, place in the order]
    return output, online + jnp.where(places, inexact.mean(1, dtype=jnp.float32), 0.0).sum(1)


def _check(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    table: HeadTable,
    layout: AlignedLayout,
    first_tile: jax.Array | None,
    firsts: tuple[int, int, int],
) -> None:
    """Raise ValueError if shapes or dtypes do not fit together."""
    heads = len(table.order)
    counts = [array.shape[1] - first for array, first in zip((queries, keys, values), firsts, strict=True)]
    fit = len(keys) == len(values) and queries.shape[2:] == keys.shape[2:] == values.shape[2:] and min(counts) >= heads
    if not fit or queries.shape[3] != LANES or len(keys) < layout.tiles:
        shapes = f"queries {queries.shape}, keys {keys.shape}, values {values.shape}"
        raise ValueError(f"shapes do not fit together: {shapes}, of a sequence of {layout.tiles} tiles")
    if first_tile is None and len(queries) < layout.tiles:
        raise ValueError(f"{len(queries)} tiles of queries are a part of {layout.tiles}; first_tile says which")
    if len(queries) < layout.text_tiles:
        raise ValueError(f"{len(queries)} tiles of queries are too few: the text has {layout.text_tiles}")
    if not queries.dtype == keys.dtype == values.dtype or queries.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"expected bfloat16 or float32 throughout, got {queries.dtype}, {keys.dtype}, {values.dtype}")
    found = tuple(np.shape(array) for array in table)
    if found != ((heads,), (heads,), (len(KINDS),)):
        raise ValueError(f"the table of {heads} heads has the shapes {found}")
