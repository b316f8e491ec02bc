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
from collections.abc import Callable, Sequence
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
    Heads,
    core,
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
        all_heads: where the heads are in the arrays of queries, keys and values.
        name: of the kernel.
        factor: of the scores, in base 2.
        real_keys: keys of a head that are not padding.
        online: whether it is the online kernel.
        whole: whether every block of queries is a block of the array of queries, which begins with the sequence.
        interpret: run in Pallas' interpreter.
    """

    geometry: Geometry
    all_heads: Heads
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
            queries, keys, values: [tiles, heads or more, head_dim, 128].
            bound: float32 [tiles of queries, heads, 1, 128]; None for the online kernel.
            output: like `queries`, of the heads; what the call does not compute stays as it is.

        Returns:
            The output, written into the array given, and of the fast kernel an array [heads, blocks, 1, 128] in the
            order of `scalars.heads`, which is not 0 where the result is not exact.
        """
        geometry, (heads, _, first_key, first_value) = self.geometry, self.all_heads
        q_tiles, _, head_dim, _ = queries.shape
        assert len(keys) == len(values) and keys.shape[2:] == values.shape[2:] == (head_dim, LANES), keys.shape
        assert keys.shape[0] >= geometry.tiles and q_tiles >= geometry.part_tiles, (keys.shape, queries.shape, geometry)
        assert output.shape == (q_tiles, heads, head_dim, LANES) and len(scalars.key_tiles) * LANES == geometry.key_rows
        assert (bound is None) == self.online and (bound is None or bound.shape == (q_tiles, heads, 1, LANES))
        buffers = geometry.key_buffers(head_dim, queries.dtype.itemsize)

        def of_head(tiles: int, rows: int, first: int, **options: Any) -> pl.BlockSpec:
            return pl.BlockSpec((tiles, 1, rows, LANES), lambda h, i, heads, *_: (0, first + heads[h], 0, 0), **options)

        anywhere, options = pl.BlockSpec(memory_space=pl.ANY), {"pipeline_mode": pl.Buffered(1)} if buffers == 1 else {}
        key_specs = [of_head(geometry.tiles, head_dim, first, **options) for first in (first_key, first_value)]
        arrays, specs = [queries, keys, values], [anywhere, *key_specs]
        if bound is not None:
            arrays, specs = [*arrays, bound], [*specs, of_head(q_tiles, 1, 0)]
        inexact = jax.ShapeDtypeStruct((heads, geometry.blocks, 1, LANES), jnp.float32)
        inexact_spec = pl.BlockSpec((1, 1, 1, LANES), lambda h, i, *_: (h, i, 0, 0))
        return pl.pallas_call(
            lambda *refs: _Step(self, q_tiles, _Refs.of(refs, self.online)).run(),
            name=self.name,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=(1, count) if self.online else (count, geometry.blocks),
                in_specs=[*specs, anywhere],
                out_specs=[anywhere] if self.online else [anywhere, inexact_spec],
                scratch_shapes=self._scratch(head_dim, queries.dtype),
            ),
            out_shape=[jax.ShapeDtypeStruct(output.shape, queries.dtype), *[inexact] * (not self.online)],
            input_output_aliases={len(scalars) + len(arrays): 0},
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=core().vmem
            ),
            interpret=self.interpret,
        )(*scalars, *in_hbm([*arrays, output], self.interpret))

    def _scratch(self, head_dim: int, dtype: jax.typing.DTypeLike) -> list:
        """Return scratch memory, see `_Refs`. The interpreter's products need float32: XLA lacks some of bfloat16."""
        geometry, rows, dtype = self.geometry, product_rows(head_dim), jnp.dtype(dtype)
        queries = max(geometry.block_q, geometry.text * LANES)
        product = jnp.dtype(jnp.float32) if self.interpret else dtype
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


class _Refs(NamedTuple):
    """What a kernel reads and writes.

    Attributes:
        scalars: see `Scalars`.
        queries, output: arrays in HBM, of which the kernel copies tiles itself, [tiles, heads or
            more, head_dim, 128].
        keys, values: of the head, [tiles, 1, head_dim, 128].
        bound: of the head, [tiles, 1, 1, 128]; None in the online kernel.
        inexact: see `Call.__call__`; None in the online kernel.
        products: scratch memory as `fast_steps` and `online_steps` take it, but for the last, which the fast kernel
            has for the head's largest |value|, [head_dim, 128].
        fetched: tiles of a block of queries and of the next one, [2, tiles, head_dim, 128].
        fetching: semaphores of their copies.
        written: tiles of a block of the output, [tiles, head_dim, 128].
        pending: how many tiles of it are on their way, where not all of them are written.
        writing: semaphore of their copies.
    """

    scalars: Scalars
    queries: Any
    keys: Any
    values: Any
    bound: Any
    output: Any
    inexact: Any
    products: Sequence
    fetched: Any
    fetching: Any
    written: Any
    pending: Any
    writing: Any

    @classmethod
    def of(cls, refs: Sequence, online: bool) -> "_Refs":
        """Name the references that a kernel gets: scalars, inputs, outputs and scratch memory."""
        count = len(Scalars._fields)
        queries, keys, values, *rest = refs[count:]
        if online:
            _, output, *scratch = rest
            bound = inexact = None
        else:
            bound, _, output, inexact, *scratch = rest
        scalars = Scalars(*refs[:count])
        return cls(scalars, queries, keys, values, bound, output, inexact, scratch[:6], *scratch[6:])


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


class _Step:
    """A step of the kernel's grid, which has heads and their blocks of queries.

    Args:
        call: what the kernel is made for.
        q_tiles: of the array of queries.
        refs: see `_Refs`.
    """

    def __init__(self, call: Call, q_tiles: int, refs: _Refs):
        self.call, self.geometry, self.q_tiles, self.refs = call, call.geometry, q_tiles, refs
        self.head, self.step, self.steps = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
        self.first, self.window = refs.scalars.first[0], refs.scalars.windows[self.head]

    def run(self) -> None:
        """Fetch the next block of queries, prepare the keys of a new head, and attend this step's block."""
        pl.when(self.step == 0)(lambda: self.fetch(self.step))
        pl.when(self.step + 1 < self.steps)(lambda: self.fetch(self.step + 1))
        pl.when(self.step == 0)(self.prepare_keys)
        self.for_block(self.step, self.attend)

    def block(self, step: Any) -> Any:
        """Return the number of the block of a step of this head."""
        return self.refs.scalars.blocks[step] if self.call.online else step

    def for_block(self, step: Any, function: Callable[[list[_Run], bool], None]) -> None:
        """Call function(runs, whether they are the text's) for the block of a step."""
        geometry, block = self.geometry, self.block(step)
        pl.when(block < geometry.video_blocks)(lambda: function(self.runs(block), False))
        if geometry.text:
            text = self.placed(geometry.tiles - geometry.text, geometry.text, geometry.text)
            pl.when(block == geometry.video_blocks)(lambda: function([text], True))

    def runs(self, block: Any) -> list[_Run]:
        """Return the runs of a block that is not the text's."""
        geometry, (group, inside) = self.geometry, self.divided(block)
        before = inside * geometry.part_tiles
        start = group * geometry.group_stride + before
        held = jnp.minimum(jnp.minimum(geometry.run - before, geometry.stop - start), geometry.part_tiles)
        parts = range(geometry.parts)
        return [self.placed(start + part * geometry.part_stride, held, geometry.part_tiles) for part in parts]

    def placed(self, start: Any, held: Any, tiles: int) -> _Run:
        """Return a run of which `held` tiles, from `start` on, count."""
        read = start if self.call.whole else jnp.clip(start - self.first, 0, self.q_tiles - tiles)
        return _Run(read, start, start + held, tiles)

    def divided(self, block: Any) -> tuple[Any, Any]:
        """Return the group of a block, and its number in the group."""
        by = self.geometry.blocks_per_group
        return (block, 0) if by == 1 else (lax.div(block, jnp.int32(by)), lax.rem(block, jnp.int32(by)))

    def tiles(self, runs: list[_Run]) -> list[_Tile]:
        """Return the tiles of runs."""
        found = []
        for run in runs:
            for at in [run.read + index for index in range(run.tiles)]:
                tile = at if self.call.whole else at + self.first
                found.append(_Tile(at, tile, None if self.call.whole else (tile >= run.start) & (tile < run.stop)))
        return found

    def fetches(self, step: Any, runs: list[_Run]) -> list:
        """Return the copies that bring the queries of a step's runs into VMEM."""
        head = self.call.all_heads.query + self.refs.scalars.heads[self.head]
        buffer, queries = step % 2, self.refs.queries.at[:, head]
        target, semaphore = self.refs.fetched.at[buffer], self.refs.fetching.at[buffer]
        copies = []
        for index, run in enumerate(runs):
            place = pl.ds(index * run.tiles, run.tiles)
            copies.append(pltpu.make_async_copy(queries.at[pl.ds(run.read, run.tiles)], target.at[place], semaphore))
        return copies

    def fetch(self, step: Any) -> None:
        """Start the copies of a step's queries."""

        def start(runs: list[_Run], _: bool) -> None:
            for copy in self.fetches(step, runs):
                copy.start()

        self.for_block(step, start)

    def attend(self, runs: list[_Run], is_text: bool) -> None:
        """Attend a block of queries: the text's go over all keys, others over those of their window."""
        call, refs, geometry = self.call, self.refs, self.geometry
        for copy in self.fetches(self.step, runs):
            copy.wait()
        tiles = self.tiles(runs)
        width = len(tiles) * LANES
        self.prepare_queries(tiles)
        query_ref, key_ref, value_ref, output_ref, sum_ref, last_ref = refs.products
        for ref, start in ((output_ref, 0.0), (sum_ref, 0.0), *[(last_ref, MASKED)] * call.online):
            ref[:, :width] = jnp.full((ref.shape[0], width), start, ref.dtype)
        dtype = refs.values.dtype
        if call.online:
            steps = online_steps(query_ref, key_ref, value_ref, output_ref, sum_ref, last_ref, call.factor, dtype)
        else:
            steps = fast_steps(query_ref, key_ref, value_ref, output_ref, sum_ref, call.factor, dtype)
        go_over = functools.partial(pipeline, _Products(width, geometry.keys_in), *steps)
        if is_text:
            loop(geometry.key_rows, geometry.text_pass, go_over)
        else:
            self.go_over_window(go_over)
        total = sum_ref[:, :width].sum(0, keepdims=True)
        if not call.online:
            exact = is_exact(total, last_ref[:1, :1], call.real_keys, dtype)
            refs.inexact[0, 0] = self.inexact(exact, tiles)
        self.write((output_ref[:, :width] / total).astype(refs.written.dtype), runs, tiles)

    def go_over_window(self, go_over: Callable) -> None:
        """Go over the keys of the text, and those of the groups of the block's window."""
        geometry = self.geometry
        if geometry.text:
            go_over(geometry.text_key, geometry.text * LANES)
        if geometry.groups == 1:
            return loop(geometry.group_keys, geometry.pass_keys, go_over)
        group, _ = self.divided(self.block(self.step))

        def over_group(index: Any, _: None) -> None:
            first = pl.multiple_of(index * geometry.group_keys, LANES)
            loop(geometry.group_keys, geometry.pass_keys, lambda start, length: go_over(first + start, length))

        low, high = jnp.maximum(group - self.window, 0), jnp.minimum(group + self.window + 1, geometry.groups)
        return lax.fori_loop(low, high, over_group, None)

    def prepare_queries(self, tiles: list[_Tile]) -> None:
        """Append (-bound, 1) to each query; the bound takes two columns, what the query's dtype holds and the rest."""
        query_ref, fetched_ref = self.refs.products[0], self.refs.fetched.at[self.step % 2]
        (rows, _), (_, head_dim, _), dtype = query_ref.shape, fetched_ref.shape, fetched_ref.dtype
        row = lax.broadcasted_iota(jnp.int32, (rows - head_dim, LANES), 0)
        for index, tile in enumerate(tiles):
            appended = jnp.where(row == 2, 1.0, 0.0)
            if self.refs.bound is not None:
                bound = self.refs.bound[tile.at, 0]
                high = bound.astype(dtype).astype(jnp.float32)
                appended = jnp.where(row == 0, -high, jnp.where(row == 1, high - bound, appended))
            query = jnp.concatenate([fetched_ref[index], appended.astype(dtype)], 0)
            query_ref[:, index * LANES : (index + 1) * LANES] = query.astype(query_ref.dtype)

    def prepare_keys(self) -> None:
        """Bring a head's keys into the order of groups, append (1, 1, mask), clear padding, and transpose keys.

        The fast kernel also finds the largest |value|.
        """
        scalars, keys_ref, values_ref = self.refs.scalars, self.refs.keys, self.refs.values
        _, key_ref, value_ref, _, _, last_ref = self.refs.products
        size_ref = None if self.call.online else last_ref
        head_dim, rows = keys_ref.shape[2], key_ref.shape[1]
        lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
        row = lax.broadcasted_iota(jnp.int32, (rows - head_dim, LANES), 0)
        if size_ref is not None:
            size_ref[...] = jnp.zeros_like(size_ref)

        def chunk(start: Any, length: int) -> None:
            keys, values = [], []
            for place in [start // LANES + tile for tile in range(length // LANES)]:
                tile, real = scalars.key_tiles[place], lane < scalars.key_tokens[place]
                key, value = (_cleared(ref[tile, 0], real) for ref in (keys_ref, values_ref))
                appended = jnp.where(row < 2, 1.0, jnp.where((row == 2) & ~real, MASKED, 0.0))
                keys.append(jnp.concatenate([key, appended.astype(key.dtype)], 0))
                values.append(value)
            key_ref[pl.ds(start, length), :] = jnp.concatenate(keys, 1).T.astype(key_ref.dtype)
            value_ref[:, pl.ds(start, length)] = jnp.concatenate(values, 1).astype(value_ref.dtype)
            if size_ref is not None:
                size = functools.reduce(jnp.maximum, map(jnp.abs, values))
                size_ref[...] = jnp.maximum(size_ref[...], size.astype(jnp.float32))

        loop(self.geometry.key_rows, KEY_CHUNK, chunk)
        if size_ref is not None:
            size_ref[...] = jnp.broadcast_to(size_ref[...].max((0, 1), keepdims=True), size_ref.shape)

    def inexact(self, exact: jax.Array, tiles: list[_Tile]) -> jax.Array:
        """Return a row that is not 0 where a query that counts has no exact result."""
        tile_tokens = self.refs.scalars.tile_tokens
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

    def write(self, output: jax.Array, runs: list[_Run], tiles: list[_Tile]) -> None:
        """Write a block [head_dim, tokens].

        The copies of a block end while the next one is computed, and those of a head's last block at once.
        """
        refs, is_last = self.refs, self.step == self.steps - 1
        pl.when(self.step > 0)(self.wait)
        for index in range(len(tiles)):
            refs.written[index] = output[:, index * LANES : (index + 1) * LANES]
        if self.call.whole:
            copies = [self.written(index * run.tiles, run.read, run.tiles) for index, run in enumerate(runs)]
            for copy in copies:
                copy.start()

            @pl.when(is_last)
            def _():
                for copy in copies:
                    copy.wait()

            return
        refs.pending[0] = 0
        for index, (at, _, counts) in enumerate(tiles):

            @pl.when(counts)
            def _(index: int = index, at: Any = at) -> None:
                self.written(index, at, 1).start()
                refs.pending[0] += 1

        pl.when(is_last)(self.wait)

    def written(self, index: int, at: Any, tiles: int) -> Any:
        """Return the copy of some tiles of a block, from `index` on, to their place in the output."""
        output = self.refs.output.at[:, self.refs.scalars.heads[self.head]]
        source, target = self.refs.written.at[pl.ds(index, tiles)], output.at[pl.ds(at, tiles)]
        return pltpu.make_async_copy(source, target, self.refs.writing)

    def wait(self) -> None:
        """Wait for the copies of a block that is not a head's last, so not the text's."""
        if self.call.whole:
            for _ in range(self.geometry.parts):
                self.written(0, 0, self.geometry.part_tiles).wait()
        else:
            lax.fori_loop(0, self.refs.pending[0], lambda *_: self.written(0, 0, 1).wait(), None)


def _cleared(tile: jax.Array, real: jax.Array) -> jax.Array:
    """Clear the columns of a tile that are not real, whatever is there; `jnp.where` would take more instructions."""
    return pltpu.bitcast(pltpu.bitcast(tile, jnp.uint32) & jnp.where(real, jnp.uint32(2**32 - 1), 0), tile.dtype)
