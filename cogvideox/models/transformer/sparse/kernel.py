"""The kernel of block-sparse attention: custom_splash_attention.py over the tiles that a pattern names (Pallas).

Tiles of queries and keys are in groups, see `Geometry`. A block of queries lies in one group, and its keys are those of
the groups of its window, one run of VMEM, and the text's. Which head is next, and its window, come from tables that are
read before the kernel starts, so heads of different windows share one program.

What the fast kernel subtracts from a row's scores is a bound for all keys of the head, so also for those of a window.
The row's own weights tell at its end whether float32's range was wide enough, and if not, the online kernel computes
the row's block again: that holds for every pattern.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from cogvideox.models.transformer.sparse.geometry import Geometry
from cogvideox.models.transformer.sparse.layout import LANES
from custom_splash_attention import (
    MASKED,
    VMEM_LIMIT,
    fast_steps,
    in_hbm,
    is_exact,
    loop,
    online_steps,
    pipeline,
    product_rows,
)

QUERY_CHUNK, KEY_CHUNK = 4 * LANES, 8 * LANES  # tokens that are prepared at a time


class Scalars(NamedTuple):
    """What a kernel reads before it starts; all are int32.

    Attributes:
        heads: the heads in the order of the grid.
        windows: of each of them, `Pattern.window`.
        blocks: the blocks of queries in the order of the grid.
        first: the tile of the sequence with which the queries begin, [1].
        key_tiles: the tile that each place in VMEM holds.
        key_tokens: how many tokens each place in VMEM has that are not padding.
        tile_tokens: how many tokens of each tile of the sequence are not padding.
    """

    heads: Any
    windows: Any
    blocks: Any
    first: Any
    key_tiles: Any
    key_tokens: Any
    tile_tokens: Any


@dataclasses.dataclass(frozen=True)
class Call:
    """What a call of the kernel is made for.

    Attributes:
        geometry: see `Geometry`.
        name: of the kernel.
        factor: of the scores, in base 2.
        real_keys: keys of a head that are not padding.
        online: whether it is the online kernel.
        whole: whether every block of queries is a block of the array of queries, which begins with the sequence.
        interpret: run in Pallas' interpreter.
    """

    geometry: Geometry
    name: str
    factor: float
    real_keys: int
    online: bool
    whole: bool
    interpret: Any

    def __call__(
        self,
        scalars: Scalars,
        count: Any,
        queries: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        bound: jax.Array | None,
        output: jax.Array,
    ) -> list[jax.Array]:
        """Compute the attention of `count` heads for all blocks of queries, or of one head for `count` of its blocks.

        Args:
            scalars: see `Scalars`; the online kernel has one head, and its blocks in rising order.
            count: int32 scalar or int, at least 1.
            queries, keys, values: [tiles, heads, head_dim, 128].
            bound: float32 [tiles of queries, heads, 1, 128]; None for the online kernel.
            output: like `queries`; what the call does not compute stays as it is.

        Returns:
            The output, written into the array given, and of the fast kernel an array [heads, blocks, 1, 128] in the
            order of `scalars.heads`, which is not 0 where the result is not exact.
        """
        geometry, (q_tiles, heads, head_dim, _) = self.geometry, queries.shape
        assert keys.shape == values.shape == (keys.shape[0], heads, head_dim, LANES), (keys.shape, values.shape)
        assert keys.shape[0] >= geometry.tiles and q_tiles >= geometry.part_tiles, (keys.shape, queries.shape, geometry)
        assert output.shape == queries.shape and len(scalars.key_tiles) * LANES == geometry.key_rows
        assert (bound is None) == self.online and (bound is None or bound.shape == (q_tiles, heads, 1, LANES))
        blocks = geometry.blocks
        grid = (1, count) if self.online else (count, blocks)
        inexact = jax.ShapeDtypeStruct((heads, blocks, 1, LANES), jnp.float32)
        arrays, specs = [], []
        for array, rows in ((queries, head_dim), (bound, 1)):
            if array is not None:
                found = self._query_specs(q_tiles, rows)
                arrays, specs = arrays + [array] * len(found), specs + found
        buffers = geometry.key_buffers(head_dim, queries.dtype.itemsize)
        mode = {} if buffers == 2 else {"pipeline_mode": pl.Buffered(buffers)}
        shape = (geometry.tiles, 1, head_dim, LANES)
        specs += [pl.BlockSpec(shape, lambda h, i, heads, *_: (0, heads[h], 0, 0), **mode)] * 2
        arrays = [*arrays, keys, values, output]
        return pl.pallas_call(
            functools.partial(_kernel, call=self, q_tiles=q_tiles),
            name=self.name,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=grid,
                in_specs=[*specs, pl.BlockSpec(memory_space=pl.ANY)],
                out_specs=[
                    pl.BlockSpec(memory_space=pl.ANY),
                    *[pl.BlockSpec((1, 1, 1, LANES), lambda h, i, *_: (h, i, 0, 0))] * (not self.online),
                ],
                scratch_shapes=self._scratch(head_dim, queries.dtype),
            ),
            out_shape=[jax.ShapeDtypeStruct(queries.shape, queries.dtype), *[inexact] * (not self.online)],
            input_output_aliases={len(scalars) + len(arrays) - 1: 0},
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
            ),
            interpret=self.interpret,
        )(*scalars, *in_hbm(arrays, self.interpret))

    def _query_specs(self, q_tiles: int, rows: int) -> list[pl.BlockSpec]:
        """Return the specs of a block's runs of tiles, and then of the text's tiles, each a block of its own."""
        geometry = self.geometry

        def run(part: int) -> pl.BlockSpec:
            def whole(h, i, heads, windows, blocks, *_):
                block = jnp.minimum(blocks[i] if self.online else i, geometry.video_blocks - 1)
                return block + part * (geometry.part_stride // geometry.part_tiles), heads[h], 0, 0

            def element(h, i, heads, windows, blocks, first, *_):
                block = jnp.minimum(blocks[i] if self.online else i, geometry.video_blocks - 1)
                return _read(geometry, block, part, first[0], q_tiles), heads[h], 0, 0

            if self.whole:
                return pl.BlockSpec((geometry.part_tiles, 1, rows, LANES), whole)
            return pl.BlockSpec((pl.Element(geometry.part_tiles), 1, rows, LANES), element)

        def text(tile: int) -> pl.BlockSpec:
            def place(h, i, heads, windows, blocks, first, *_):
                return jnp.clip(tile - first[0], 0, q_tiles - 1), heads[h], 0, 0

            return pl.BlockSpec((1, 1, rows, LANES), place)

        tiles = range(geometry.tiles - geometry.text, geometry.tiles)
        return [*map(run, range(geometry.parts)), *map(text, tiles)]

    def _scratch(self, head_dim: int, dtype: jax.typing.DTypeLike) -> list:
        """Return scratch memory: that of the dense kernel, and for the output its tiles and what counts its copies.

        The interpreter's products need float32: XLA lacks some of bfloat16 on a CPU.
        """
        geometry, rows = self.geometry, product_rows(head_dim)
        queries, product = (
            max(geometry.block_q, geometry.text * LANES),
            jnp.dtype(jnp.float32 if self.interpret else dtype),
        )
        return [
            pltpu.VMEM((rows, queries), product),
            pltpu.VMEM((geometry.key_rows, rows), product),
            pltpu.VMEM((head_dim, geometry.key_rows), product),
            pltpu.VMEM((head_dim, queries), jnp.float32),
            pltpu.VMEM((8, queries), jnp.float32),
            pltpu.VMEM((1, queries) if self.online else (head_dim, LANES), jnp.float32),
            pltpu.VMEM((queries // LANES, head_dim, LANES), dtype),
            pltpu.SMEM((1,), jnp.int32),
            pltpu.SemaphoreType.DMA,
        ]


def _first(geometry: Geometry, block: Any, part: int) -> Any:
    """Return the tile of the sequence with which a run of a block of queries begins."""
    group, inside = _divided(block, geometry.blocks_per_group)
    return group * geometry.group_stride + inside * geometry.part_tiles + part * geometry.part_stride


def _read(geometry: Geometry, block: Any, part: int, first: Any, q_tiles: int) -> Any:
    """Return the tile of the array of queries from which a run of a block is read, so that it lies in the array."""
    return jnp.clip(_first(geometry, block, part) - first, 0, q_tiles - geometry.part_tiles)


def _divided(number: Any, by: int) -> tuple[Any, Any]:
    """Divide a number that is not negative."""
    return (number, 0) if by == 1 else (lax.div(number, jnp.int32(by)), lax.rem(number, jnp.int32(by)))


def _kernel(*refs, call: Call, q_tiles: int):
    """Do a grid step: prepare queries, and for the first of a head also keys; go over the keys; divide and write."""
    geometry, runs = call.geometry, call.geometry.parts + call.geometry.text
    scalars, refs = Scalars(*refs[: len(Scalars._fields)]), refs[len(Scalars._fields) :]
    query_refs, bound_refs = refs[:runs], () if call.online else refs[runs : 2 * runs]
    k_ref, v_ref, _, out_hbm, *rest = refs[len(query_refs) + len(bound_refs) :]
    inexact_ref, scratch = (None, rest) if call.online else (rest[0], rest[1:])
    size_ref, steps = (None, online_steps) if call.online else (scratch[5], fast_steps)
    weigh, add = steps(*scratch[: 6 if call.online else 5], call.factor, v_ref.dtype)
    head, step, steps_of_head = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
    block = scalars.blocks[step] if call.online else step
    first, window, out_hbm = scalars.first[0], scalars.windows[head], out_hbm.at[:, scalars.heads[head]]

    @pl.when(step == 0)
    def _():
        _prepare_keys(k_ref, v_ref, scalars, scratch, geometry, size_ref)

    def attend(refs: slice, tiles: "list[_Tile]", run_tiles: int, go_over: Callable):
        """Attend the queries of some runs of `run_tiles` tiles; `go_over` goes over their keys."""
        width = len(tiles) * LANES
        _prepare_queries(query_refs[refs], bound_refs[refs], scratch[0])
        for ref, start in ((scratch[3], 0.0), (scratch[4], 0.0), *[(scratch[5], MASKED)] * call.online):
            ref[:, :width] = jnp.full((ref.shape[0], width), start, ref.dtype)
        go_over(functools.partial(pipeline, _Products(width, geometry.keys_in), weigh, add))
        total = scratch[4][:, :width].sum(0, keepdims=True)
        if inexact_ref is not None:
            exact = is_exact(total, size_ref[:1, :1], call.real_keys, v_ref.dtype)
            inexact_ref[0, 0] = _inexact(exact, tiles, scalars.tile_tokens)
        output = (scratch[3][:, :width] / total).astype(out_hbm.dtype)
        _write(output, tiles, run_tiles, scratch[6:], out_hbm, call, step > 0, step == steps_of_head - 1)

    @pl.when(block < geometry.video_blocks)
    def _():
        tiles, stop = [], _held(geometry, block)
        for part in range(geometry.parts):
            start, read = _first(geometry, block, part), _read(geometry, block, part, first, q_tiles)
            for at in [read + tile for tile in range(geometry.part_tiles)]:
                counts = None if call.whole else (at + first >= start) & (at + first < start + stop)
                tiles.append(_Tile(at, at + first, counts))
        go_over = functools.partial(_go_over_window, block=block, window=window, geometry=geometry)
        attend(slice(0, geometry.parts), tiles, geometry.part_tiles, go_over)

    if geometry.text:

        @pl.when(block == geometry.video_blocks)
        def _():
            tiles = []
            for tile in range(geometry.tiles - geometry.text, geometry.tiles):
                counts = None if call.whole else (tile >= first) & (tile < first + q_tiles)
                tiles.append(_Tile(tile - first, tile, counts))
            go_over = functools.partial(loop, geometry.key_rows, geometry.text_pass)
            attend(slice(geometry.parts, runs), tiles, geometry.text, go_over)


class _Tile(NamedTuple):
    """A tile of queries of a block.

    Attributes:
        at: its place in the array of queries.
        tile: its place in the sequence.
        counts: whether it is to be written; None where all are.
    """

    at: Any
    tile: Any
    counts: Any


class _Products(NamedTuple):
    """The sizes that `pipeline` reads: queries of a block, and keys of a product."""

    block_q: int
    block_kv_compute_in: int


def _held(geometry: Geometry, block: Any) -> Any:
    """Return how many tiles of a block's runs are the group's."""
    group, inside = _divided(block, geometry.blocks_per_group)
    start = inside * geometry.part_tiles
    rest = jnp.minimum(geometry.run - start, geometry.stop - group * geometry.group_stride - start)
    return jnp.minimum(rest, geometry.part_tiles)


def _go_over_window(run, block, window, geometry):
    """Go over the keys of a block's window, and the text's."""
    if geometry.text:
        run(geometry.text_key, geometry.text * LANES)
    if geometry.groups == 1:
        return loop(geometry.group_keys, geometry.pass_keys, run)
    group, _ = _divided(block, geometry.blocks_per_group)

    def over_group(index, _):
        first = pl.multiple_of(index * geometry.group_keys, LANES)
        loop(geometry.group_keys, geometry.pass_keys, lambda start, length: run(first + start, length))

    low, high = jnp.maximum(group - window, 0), jnp.minimum(group + window + 1, geometry.groups)
    lax.fori_loop(low, high, over_group, None)


def _prepare_queries(query_refs, bound_refs, query_ref):
    """Append (-bound, 1) to each query; the bound takes two columns, what the query's dtype holds and the rest."""
    head_dim, rows = query_refs[0].shape[2], query_ref.shape[0]
    before = 0
    for index, ref in enumerate(query_refs):

        def chunk(start, length, ref=ref, index=index, before=before):
            tiles = [start // LANES + tile for tile in range(length // LANES)]
            row = lax.broadcasted_iota(jnp.int32, (rows - head_dim, length), 0)
            appended = jnp.where(row == 2, 1.0, 0.0)
            if bound_refs:
                bound = jnp.concatenate([bound_refs[index][tile, 0] for tile in tiles], axis=1)
                high = bound.astype(ref.dtype).astype(jnp.float32)
                appended = jnp.where(row == 0, -high, jnp.where(row == 1, high - bound, appended))
            query = jnp.concatenate([ref[tile, 0] for tile in tiles], axis=1)
            query = jnp.concatenate([query, appended.astype(ref.dtype)], 0)
            query_ref[:, pl.ds(before + start, length)] = query.astype(query_ref.dtype)

        length = ref.shape[0] * LANES
        loop(length, QUERY_CHUNK, chunk)
        before += length


def _prepare_keys(k_ref, v_ref, scalars, scratch, geometry, size_ref):
    """Bring a head's keys into the order of groups, append (1, 1, mask) to each, clear padding, and transpose keys.

    If there is `size_ref`, all of it is set to the largest |value|.
    """
    _, key_ref, value_ref = scratch[:3]
    head_dim, rows = k_ref.shape[2], key_ref.shape[1]
    if size_ref is not None:
        size_ref[...] = jnp.zeros_like(size_ref)
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)

    def chunk(start, length):
        found = []
        for tile in range(length // LANES):
            place = start // LANES + tile
            real = lane < scalars.key_tokens[place]
            key, value = (jnp.where(real, ref[scalars.key_tiles[place], 0], 0) for ref in (k_ref, v_ref))
            row = lax.broadcasted_iota(jnp.int32, (rows - head_dim, LANES), 0)
            appended = jnp.where(row < 2, 1.0, jnp.where((row == 2) & ~real, MASKED, 0.0))
            found.append((jnp.concatenate([key, appended.astype(key.dtype)], 0), value))
            if size_ref is not None:
                size_ref[...] = jnp.maximum(size_ref[...], jnp.abs(value).astype(jnp.float32))
        key, value = (jnp.concatenate(arrays, 1) for arrays in zip(*found, strict=True))
        key_ref[pl.ds(start, length), :] = key.T.astype(key_ref.dtype)
        value_ref[:, pl.ds(start, length)] = value.astype(value_ref.dtype)

    loop(geometry.key_rows, KEY_CHUNK, chunk)
    if size_ref is not None:
        size_ref[...] = jnp.broadcast_to(size_ref[...].max((0, 1), keepdims=True), size_ref.shape)


def _inexact(exact, tiles, tile_tokens):
    """Return a row that is not 0 where a query that counts has no exact result."""
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    inexact = jnp.zeros((1, LANES), jnp.float32)
    for index, (_, tile, counts) in enumerate(tiles):
        if counts is None:
            tokens = tile_tokens[tile]
        else:  # the tile may lie beyond the sequence
            tokens = jnp.where(counts, tile_tokens[jnp.minimum(tile, tile_tokens.shape[0] - 1)], 0)
        fine = exact[:, index * LANES : (index + 1) * LANES] | (lane >= tokens)
        inexact = jnp.where(fine, inexact, 1.0)
    return inexact


def _write(output, tiles, run_tiles, scratch, out_hbm, call, follows, last):
    """Write the tiles that count, which are runs of `run_tiles`.

    The copies of a block end while the next one is computed, which it `follows`, and those of a head's last at once.
    """
    tile_ref, pending_ref, semaphore = scratch

    def copy(index, at, count):
        return pltpu.make_async_copy(tile_ref.at[pl.ds(index, count)], out_hbm.at[pl.ds(at, count)], semaphore)

    def wait_for_tiles():
        lax.fori_loop(0, pending_ref[0], lambda *_: copy(0, 0, 1).wait(), None)

    def wait_for_runs():  # of the video: the text is a head's last block
        for _ in range(call.geometry.parts):
            copy(0, 0, call.geometry.part_tiles).wait()

    pl.when(follows)(wait_for_runs if call.whole else wait_for_tiles)
    for index in range(len(tiles)):
        tile_ref[index] = output[:, index * LANES : (index + 1) * LANES]
    if call.whole:
        copies = [copy(index, tiles[index].at, run_tiles) for index in range(0, len(tiles), run_tiles)]
        for one in copies:
            one.start()
        pl.when(last)(lambda: [one.wait() for one in copies] and None)
        return
    pending_ref[0] = 0
    for index, (at, _, counts) in enumerate(tiles):

        @pl.when(counts)
        def _(index=index, at=at):
            copy(index, at, 1).start()
            pending_ref[0] += 1

    pl.when(last)(wait_for_tiles)
