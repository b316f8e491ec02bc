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

KEY_CHUNK = 8 * LANES  # keys that are prepared at a time


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
        buffers = geometry.key_buffers(head_dim, queries.dtype.itemsize)
        mode = {} if buffers == 2 else {"pipeline_mode": pl.Buffered(buffers)}

        def of_head(tiles: int, rows: int) -> tuple:
            return (tiles, 1, rows, LANES), lambda h, i, heads, *_: (0, heads[h], 0, 0)

        anywhere, key_spec = pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(*of_head(geometry.tiles, head_dim), **mode)
        arrays, specs = [queries, keys, values], [anywhere, key_spec, key_spec]
        if bound is not None:
            arrays, specs = [*arrays, bound], [*specs, pl.BlockSpec(*of_head(q_tiles, 1))]
        return pl.pallas_call(
            functools.partial(_kernel, call=self, q_tiles=q_tiles),
            name=self.name,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=grid,
                in_specs=[*specs, anywhere],
                out_specs=[
                    anywhere,
                    *[pl.BlockSpec((1, 1, 1, LANES), lambda h, i, *_: (h, i, 0, 0))] * (not self.online),
                ],
                scratch_shapes=self._scratch(head_dim, queries.dtype),
            ),
            out_shape=[jax.ShapeDtypeStruct(queries.shape, queries.dtype), *[inexact] * (not self.online)],
            input_output_aliases={len(scalars) + len(arrays): 0},
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
            ),
            interpret=self.interpret,
        )(*scalars, *in_hbm([*arrays, output], self.interpret))

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
            pltpu.VMEM((2, queries // LANES, head_dim, LANES), dtype),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.VMEM((queries // LANES, head_dim, LANES), dtype),
            pltpu.SMEM((1,), jnp.int32),
            pltpu.SemaphoreType.DMA,
        ]


class _Run(NamedTuple):
    """Tiles of queries that are neighbours, and belong to one block.

    Attributes:
        read: their first place in the array of queries, or, to stay in the array, a tile before.
        start, stop: which tiles of the sequence count.
        tiles: how many are read.
    """

    read: Any
    start: Any
    stop: Any
    tiles: int


def _runs(geometry: Geometry, block: Any, first: Any, q_tiles: int, text: bool) -> list[_Run]:
    """Return the runs of a block of queries, of the text's or of another one."""

    def run(start: Any, held: Any, tiles: int) -> _Run:
        return _Run(jnp.clip(start - first, 0, q_tiles - tiles), start, start + held, tiles)

    if text:
        return [run(geometry.tiles - geometry.text, geometry.text, geometry.text)]
    group, inside = _divided(block, geometry.blocks_per_group)
    before = inside * geometry.part_tiles
    start = group * geometry.group_stride + before
    held = jnp.minimum(jnp.minimum(geometry.run - before, geometry.stop - start), geometry.part_tiles)
    return [run(start + part * geometry.part_stride, held, geometry.part_tiles) for part in range(geometry.parts)]


def _divided(number: Any, by: int) -> tuple[Any, Any]:
    """Divide a number that is not negative."""
    return (number, 0) if by == 1 else (lax.div(number, jnp.int32(by)), lax.rem(number, jnp.int32(by)))


def _kernel(*refs, call: Call, q_tiles: int):
    """Do a grid step: prepare queries, and for the first of a head also keys; go over the keys; divide and write."""
    geometry, online = call.geometry, call.online
    scalars, refs = Scalars(*refs[: len(Scalars._fields)]), refs[len(Scalars._fields) :]
    queries_hbm, k_ref, v_ref, *refs = refs
    bound_ref, refs = (None, refs) if online else (refs[0], refs[1:])
    _, out_hbm, *refs = refs
    inexact_ref, scratch = (None, refs) if online else (refs[0], refs[1:])
    *scratch, fetched_ref, fetching, out_ref, pending_ref, writing = scratch
    query_ref, key_ref, value_ref, output_ref, sum_ref, last_ref = scratch  # the last: largest scores, or value
    weigh, add = (online_steps if online else fast_steps)(*scratch[: 5 + online], call.factor, v_ref.dtype)
    head, step, steps = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
    first, window = scalars.first[0], scalars.windows[head]
    queries_hbm, out_hbm = (ref.at[:, scalars.heads[head]] for ref in (queries_hbm, out_hbm))

    def block_of(step):
        return scalars.blocks[step] if online else step

    def for_kind(block, function):
        """Call function(runs, whether they are the text's) for what the block is."""
        pl.when(block < geometry.video_blocks)(lambda: function(_runs(geometry, block, first, q_tiles, False), False))
        if geometry.text:
            is_text = block == geometry.video_blocks
            pl.when(is_text)(lambda: function(_runs(geometry, block, first, q_tiles, True), True))

    def copies(runs, buffer):
        for index, run in enumerate(runs):
            source, target = pl.ds(run.read, run.tiles), pl.ds(index * run.tiles, run.tiles)
            yield pltpu.make_async_copy(queries_hbm.at[source], fetched_ref.at[buffer, target], fetching.at[buffer])

    def fetch(step):
        for_kind(block_of(step), lambda runs, _: [copy.start() for copy in copies(runs, step % 2)] and None)

    pl.when(step == 0)(lambda: fetch(step))
    pl.when(step + 1 < steps)(lambda: fetch(step + 1))

    @pl.when(step == 0)
    def _():
        _prepare_keys(k_ref, v_ref, scalars, key_ref, value_ref, None if online else last_ref, geometry.key_rows)

    def attend(runs, is_text):
        for copy in copies(runs, step % 2):
            copy.wait()
        tiles = [_Tile.of(run, index, first, call.whole) for run in runs for index in range(run.tiles)]
        _prepare_queries(fetched_ref.at[step % 2], bound_ref, tiles, query_ref)
        width = len(tiles) * LANES
        for ref, start in ((output_ref, 0.0), (sum_ref, 0.0), *[(last_ref, MASKED)] * online):
            ref[:, :width] = jnp.full((ref.shape[0], width), start, ref.dtype)
        go_over = functools.partial(pipeline, _Products(width, geometry.keys_in), weigh, add)
        if is_text:
            loop(geometry.key_rows, geometry.text_pass, go_over)
        else:
            _go_over_window(go_over, block_of(step), window, geometry)
        total = sum_ref[:, :width].sum(0, keepdims=True)
        if not online:
            exact = is_exact(total, last_ref[:1, :1], call.real_keys, v_ref.dtype)
            inexact_ref[0, 0] = _inexact(exact, tiles, scalars.tile_tokens)
        output = (output_ref[:, :width] / total).astype(out_ref.dtype)
        written = _Output(out_ref, out_hbm, pending_ref, writing, geometry, call.whole)
        written.write(output, runs, tiles, follows=step > 0, last=step == steps - 1)

    for_kind(block_of(step), attend)


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

    @classmethod
    def of(cls, run: _Run, index: int, first: Any, whole: bool) -> "_Tile":
        at = run.read + index
        return cls(at, at + first, None if whole else (at + first >= run.start) & (at + first < run.stop))


class _Products(NamedTuple):
    """The sizes that `pipeline` reads: queries of a block, and keys of a product."""

    block_q: int
    block_kv_compute_in: int


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


def _prepare_queries(fetched_ref, bound_ref, tiles, query_ref):
    """Append (-bound, 1) to each query; the bound takes two columns, what the query's dtype holds and the rest."""
    head_dim, rows, dtype = fetched_ref.shape[1], query_ref.shape[0], fetched_ref.dtype
    row = lax.broadcasted_iota(jnp.int32, (rows - head_dim, LANES), 0)
    for index, tile in enumerate(tiles):
        appended = jnp.where(row == 2, 1.0, 0.0)
        if bound_ref is not None:
            bound = bound_ref[tile.at, 0]
            high = bound.astype(dtype).astype(jnp.float32)
            appended = jnp.where(row == 0, -high, jnp.where(row == 1, high - bound, appended))
        query = jnp.concatenate([fetched_ref[index], appended.astype(dtype)], 0)
        query_ref[:, index * LANES : (index + 1) * LANES] = query.astype(query_ref.dtype)


def _prepare_keys(k_ref, v_ref, scalars, key_ref, value_ref, size_ref, key_rows):
    """Bring a head's keys into the order of groups, append (1, 1, mask) to each, clear padding, and transpose keys.

    If there is `size_ref`, all of it is set to the largest |value|.
    """
    head_dim, rows = k_ref.shape[2], key_ref.shape[1]
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    row = lax.broadcasted_iota(jnp.int32, (rows - head_dim, LANES), 0)
    if size_ref is not None:
        size_ref[...] = jnp.zeros_like(size_ref)

    def chunk(start, length):
        keys, values = [], []
        for place in [start // LANES + tile for tile in range(length // LANES)]:
            real = lane < scalars.key_tokens[place]
            key, value = (jnp.where(real, ref[scalars.key_tiles[place], 0], 0) for ref in (k_ref, v_ref))
            appended = jnp.where(row < 2, 1.0, jnp.where((row == 2) & ~real, MASKED, 0.0))
            keys.append(jnp.concatenate([key, appended.astype(key.dtype)], 0))
            values.append(value)
        key_ref[pl.ds(start, length), :] = jnp.concatenate(keys, 1).T.astype(key_ref.dtype)
        value_ref[:, pl.ds(start, length)] = jnp.concatenate(values, 1).astype(value_ref.dtype)
        if size_ref is not None:
            size = functools.reduce(jnp.maximum, map(jnp.abs, values))
            size_ref[...] = jnp.maximum(size_ref[...], size.astype(jnp.float32))

    loop(key_rows, KEY_CHUNK, chunk)
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


class _Output(NamedTuple):
    """Where a head's output goes: tiles in VMEM, from there to HBM.

    The copies of a block end while the next one is computed, those of a head's last block at once.

    Attributes:
        tiles_ref: tiles of a block, [tiles, head_dim, 128].
        hbm: of the head, [tiles, head_dim, 128].
        pending_ref: how many copies of a tile are on their way, where not all tiles of a block are written.
        semaphore: of the copies.
        geometry, whole: see `Call`.
    """

    tiles_ref: Any
    hbm: Any
    pending_ref: Any
    semaphore: Any
    geometry: Geometry
    whole: bool

    def copy(self, index: int, at: Any, tiles: int) -> Any:
        """Return a copy of `tiles` tiles of the block, from `index` on."""
        source, target = self.tiles_ref.at[pl.ds(index, tiles)], self.hbm.at[pl.ds(at, tiles)]
        return pltpu.make_async_copy(source, target, self.semaphore)

    def wait(self) -> None:
        """Wait for the copies of a block of the video: the text is a head's last block."""
        if self.whole:
            for _ in range(self.geometry.parts):
                self.copy(0, 0, self.geometry.part_tiles).wait()
        else:
            lax.fori_loop(0, self.pending_ref[0], lambda *_: self.copy(0, 0, 1).wait(), None)

    def write(self, output: jax.Array, runs: list[_Run], tiles: list[_Tile], follows: Any, last: Any) -> None:
        """Write a block [head_dim, tokens], which `follows` another one of the head or is its `last`."""
        pl.when(follows)(self.wait)
        for index in range(len(tiles)):
            self.tiles_ref[index] = output[:, index * LANES : (index + 1) * LANES]
        if self.whole:
            copies = [self.copy(index * run.tiles, run.read, run.tiles) for index, run in enumerate(runs)]
            for copy in copies:
                copy.start()
            pl.when(last)(lambda: [copy.wait() for copy in copies] and None)
            return
        self.pending_ref[0] = 0
        for index, (at, _, counts) in enumerate(tiles):

            @pl.when(counts)
            def _(index=index, at=at):
                self.copy(index, at, 1).start()
                self.pending_ref[0] += 1

        pl.when(last)(self.wait)
