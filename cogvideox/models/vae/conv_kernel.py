"""A convolution with all that comes before and after it in one TPU kernel, which reads each activation once.

Before: scale, shift and activation, edges of neighbouring parts, the frames before the chunk. After: bias, residual or
shortcut, and the sums of the next group norm. `conv_input.py` with XLA's convolution does the same for other platforms
and for shapes that `fitting` (`conv_blocks.py`) refuses.

A step of the grid brings a padded row of frame t (or two rows) into a ring of three rows (or four) of all frames, and
multiplies these rows of the frames up to t - 1: so the vector work on one frame lies beside the products of another.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from cogvideox.models.vae.conv_blocks import LANES, STRIPS, Shape, Steps
from cogvideox.models.vae.conv_input import VMEM_SHARE, vmem

NEVER = 0x7FC12345  # the bits of a NaN that no product makes
PIECE = 8  # columns that are activated, or finished, at a time between two products
COPIED = 64  # rows of 32 bits that are copied at a time

Sums = tuple[jax.Array, ...]  # of each row's values, and of their squares, float32 [strips, out channels]
Work = Callable[[Sums, jax.Array | None], Sums]
Operands = Callable[[], tuple[jax.Array, jax.Array]]


class Edges(NamedTuple):
    """What lies around a chip's part, activated; see `plain_conv_input`: rows and columns of the same names."""

    rows: jax.Array
    columns: jax.Array


class Cache(NamedTuple):
    """The last frames of a chunk, activated, with the rows around them.

    Attributes:
        inner: [history, height + 2, width, strips, channels].
        columns: on the left and the right, [history, height + 2, 2, strips, channels].
    """

    inner: jax.Array
    columns: jax.Array

    @classmethod
    def of(cls, padded: jax.Array) -> "Cache":
        """Return what `conv_input` keeps, [history, height + 2, width + 2, strips, channels], in this form."""
        return cls(padded[:, :, 1:-1], jnp.concatenate([padded[:, :, :1], padded[:, :, -1:]], axis=2))

    def padded(self) -> jax.Array:
        """Return it as `conv_input` keeps it."""
        return jnp.concatenate([self.columns[:, :, :1], self.inner, self.columns[:, :, 1:]], axis=2)


class Results(NamedTuple):
    """What the kernel returns.

    Attributes:
        values: [frames, factor * height, factor * width, strips, out channels].
        sums: sums and sums of squares over the columns, float32 [frames, height, 2, strips, out channels]: of all
            that repetition made of one row.
        cache: the next cache.
    """

    values: jax.Array
    sums: jax.Array | None
    cache: Cache | None


@functools.partial(jax.jit, static_argnames=("shape", "activation", "interpret"))  # one kernel for equal layers
def convolve(
    shape: Shape,
    x: jax.Array,
    scale: jax.Array | None,
    offset: jax.Array | None,
    edges: Edges,
    cache: Cache | None,
    weight: jax.Array,
    bias: jax.Array,
    residual: jax.Array | None,
    shortcut: tuple[jax.Array, jax.Array] | None,
    limit: jax.Array | None,
    *,
    activation: Callable | None,
    interpret: bool = False,
) -> Results:
    """Compute a convolution of the padded activation(x * scale + offset), plus bias, and residual or shortcut.

    Args:
        shape: from `fitting`.
        x: [frames, height, width, strips, channels]; fewer frames are repeated, as by `nearest`.
        scale, offset: float32, repeated to x's size; see `modulated`.
        edges: around x.
        cache: of the chunk before; None where `shape.cached` is False. The next one is written over it.
        weight: from `packed_weight`.
        bias: [out channels], of the convolution and of the shortcut together.
        residual: what is added, of the result's shape, or None; fewer frames are repeated.
        shortcut: an array [frames, height, width, strips, shortcut channels] and weights [shortcut channels, out
            channels] whose product is added, or None.
        limit: int32 [1], the number of columns that lie within the frame: others do not count for the sums. None if all
            do.
        activation: a function that maps zero to zero; None for none.
        interpret: whether Pallas' interpreter runs the kernel.
    """
    s = shape
    steps = Steps(s)
    columns, out = s.columns, s.out_channels
    blocked = s.frames, s.height // s.side, s.side, s.width // s.side, s.side, STRIPS
    operands: dict[str, Any] = {}
    specs: dict[str, pl.BlockSpec] = {}

    def add(name: str, array: jax.Array, spec: pl.BlockSpec) -> None:
        operands[name], specs[name] = array, spec

    if limit is not None:
        add("limit", limit, pl.BlockSpec(memory_space=pltpu.SMEM))
    factors = {"scale": scale, "offset": offset} if scale is not None and offset is not None else {}
    for q in range(s.side):
        add(f"x{q}", x, steps.of_input(x, q, columns))
        add(f"rows{q}", edges.rows, steps.of_edge(edges.rows, q))
        add(f"columns{q}", edges.columns, steps.of_input(edges.columns, q, 2, fixed=True))
        for name, array in factors.items():
            add(f"{name}{q}", array, steps.of_input(array, q, columns // s.each))
        for side in ("left", "right") if s.blocks > 1 else ():
            add(f"x{q}_{side}", x, steps.beside(x, q, side, columns))
            for name, array in factors.items():
                add(f"{name}{q}_{side}", array, steps.beside(array, q, side, columns // s.each))
    if cache is not None:
        add("cache", cache.inner, steps.of_cache(columns))
        add("cache_columns", cache.columns, steps.of_cache(2, fixed=True))
        if s.blocks > 1:
            # Columns of their own: the cache is overwritten, and would be copied whole if it were read in another way.
            add("cache_right", cache.inner[:, :, columns::columns], steps.cache_right())
    once = pl.Buffered(1)
    add("weight", weight, pl.BlockSpec(weight.shape, lambda b, j, t: (0, 0, 0), pipeline_mode=once))
    add("bias", bias.astype(jnp.float32)[None], pl.BlockSpec((1, out), lambda b, j, t: (0, 0)))
    if residual is not None:
        add("residual", residual.reshape(-1, *blocked[1:], out), steps.of_output(out, len(residual)))
    if shortcut is not None:
        array, matrix = shortcut
        matrix = jax.scipy.linalg.block_diag(*[matrix] * s.side)
        array = array.reshape(-1, *blocked[1:], s.shortcut)
        add("shortcut", array, steps.of_output(s.shortcut, len(array)))
        add("matrix", matrix, pl.BlockSpec(matrix.shape, lambda b, j, t: (0, 0), pipeline_mode=once))

    if s.factor == 2:
        out_shapes = {"y": jax.ShapeDtypeStruct((s.frames, s.height, 2, s.width, 2, STRIPS, out), x.dtype)}
        out_specs = {"y": steps.of_output(out, s.frames, rows=2, members=2)}
    else:
        out_shapes = {"y": jax.ShapeDtypeStruct((*blocked, out), x.dtype)}
        out_specs = {"y": steps.of_output(out, s.frames)}
    sums_shape = (s.blocks, s.frames, s.height // s.side, s.side, 2 * STRIPS, out)
    out_shapes["sums"] = jax.ShapeDtypeStruct(sums_shape, jnp.float32)
    out_specs["sums"] = steps.of_sums(out)
    if s.history:
        for name, width, fixed in (("next", s.width, False), ("next_columns", 2, True)):
            full = (s.history, s.height + 2, width, STRIPS, s.channels)
            out_shapes[name] = jax.ShapeDtypeStruct(full, x.dtype)
            out_specs[name] = steps.of_next(2 if fixed else columns, fixed)
    names = list(operands)
    aliases = {
        names.index(a): list(out_shapes).index(b)
        for a, b in (("cache", "next"), ("cache_columns", "next_columns"))
        if a in operands
    }
    words = jnp.uint32 if s.itemsize == 2 else jnp.float32
    scratch = {"ring": pltpu.VMEM(s.ring, words), "fresh": pltpu.VMEM((s.side, *s.row), words)}
    scratch["products"] = pltpu.VMEM((s.side, s.chunks[1] * STRIPS, s.side * out), jnp.float32)
    if s.blocks > 1 and cache is not None:
        saved = s.history, (s.height + 2) // s.side, s.side, STRIPS, s.channels
        scratch["saved"] = pltpu.VMEM(saved, jnp.float32)

    def kernel(*refs):
        by_name = dict(zip([*names, *out_shapes, *scratch], refs, strict=True))
        _Kernel(s, activation, by_name).run()

    arrays = [*{id(array): array for array in operands.values()}.values(), *out_shapes.values()]
    moved = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
    window = 9 * (s.history + 1)
    pixels = s.frames * s.height * s.width * STRIPS
    values, sums, *next_cache = pl.pallas_call(
        kernel,
        grid=(s.blocks, (s.height + 2) // s.side, s.ring_frames + 1),
        in_specs=list(specs.values()),
        out_specs=list(out_specs.values()),
        out_shape=list(out_shapes.values()),
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=int(VMEM_SHARE * vmem())),
        cost_estimate=pl.CostEstimate(
            flops=2 * pixels * out * (s.channels * (window if s.factor == 1 else 16) + s.shortcut),
            bytes_accessed=moved,
            transcendentals=2 * pixels * s.channels if activation else 0,
        ),
        input_output_aliases=aliases,
        interpret=interpret,
        name="conv_{}_{}x{}x{}x{}to{}{}{}".format(
            "cached" if s.cached else "first" if s.history else "up",
            s.frames,
            s.height,
            s.width,
            s.channels,
            out,
            "_residual" if residual is not None else "",
            f"_shortcut{s.shortcut}" if shortcut is not None else "",
        ),
    )(*operands.values())
    values = values.reshape(s.frames, s.factor * s.height, s.factor * s.width, STRIPS, out)
    sums = sums.sum(0).reshape(s.frames, s.height, 2, STRIPS, out)
    return Results(values, sums, Cache(*next_cache) if next_cache else None)


class _Kernel:
    """One step of the kernel; `refs` are the blocks and the scratch by name."""

    def __init__(self, shape: Shape, activation: Callable | None, refs: dict[str, Any]):
        self.shape, self.activation, self.refs = shape, activation, refs
        self.before = shape.ring_frames - shape.frames
        self.block, self.step, self.frame = (pl.program_id(i) for i in range(3))
        self.dtype = refs["x0"].dtype
        self.precision = jax.lax.Precision.HIGHEST if shape.itemsize == 4 else None
        self.count, self.pairs = shape.chunks
        units = shape.columns // shape.each  # groups of columns with one scale
        self.units = -(-units // self.count)  # of a chunk
        if self.units * shape.each % shape.side:
            self.units += 1
        self.units = min(self.units, units)

    def run(self) -> None:
        """Bring rows into the ring, and multiply."""
        s, t = self.shape, self.frame
        multiplies = (self.step >= 2 // s.side) & (t >= self.before + 1)
        brings = (t >= self.before) & (t < s.ring_frames)
        if self.before:
            pl.when(t < self.before)(self.copy_cache)
        pl.when(brings & jnp.logical_not(multiplies))(functools.partial(self.loop, multiplies=False))
        pl.when(multiplies)(functools.partial(self.loop, multiplies=True))
        first, last = self.step == 0, self.step == (s.height + 2) // s.side - 1
        for q, is_edge in enumerate((first, last) if s.side == 2 else (first | last,)):
            pl.when(is_edge & (t >= self.before))(functools.partial(self.activate_edge, q))
        pl.when(t < s.ring_frames)(self.keep)

    def loop(self, multiplies: bool) -> None:
        """Activate the rows, chunk by chunk; beside it multiply as many chunks of the rows before."""
        s = self.shape
        zero = jnp.zeros((STRIPS, s.out_channels), jnp.float32)

        def chunk(i, sums):
            work = [part for q in range(s.side) for part in self.activating(i, q)]
            return self.multiply(i, sums, work) if multiplies else _done(work, sums)

        sums = jax.lax.fori_loop(0, self.count, chunk, (zero,) * (2 * s.side))
        if multiplies:
            sums = _done(self.finishing(self.count, 0), sums)
            for q in range(s.side):
                self.refs["sums"][q, :STRIPS], self.refs["sums"][q, STRIPS:] = sums[2 * q : 2 * q + 2]
        for q in range(s.side):
            for place, side in enumerate(("left", "right")):
                value = self.edge(q, place, side)
                self.put_column(q, value, place)
                if s.history:
                    write = functools.partial(self.next_column, q, place, value)
                    pl.when(self.block == place * (s.blocks - 1))(write)

    # --- Rows of the input ---------------------------------------------------------------------------------------

    def activating(self, i: jax.Array, q: int, is_edge: bool = False) -> list[Work]:
        """Return the work to activate a chunk of row q."""
        s = self.shape
        at_once = max(1, PIECE // s.each)
        if s.side == 2 and s.each % 2:
            at_once += at_once % 2
        first = jnp.minimum(i * self.units, s.columns // s.each - self.units)
        return [
            functools.partial(self.activate, is_edge, q, first + unit, min(at_once, self.units - unit))
            for unit in range(0, self.units, at_once)
        ]

    def activate_edge(self, q: int) -> None:
        """Activate row q once more: it lies above or below its strip."""
        jax.lax.fori_loop(0, self.count, lambda i, sums: _done(self.activating(i, q, is_edge=True), sums), ())

    def activate(self, is_edge: bool, q: int, unit: jax.Array, units: int, sums: Sums, after: jax.Array | None) -> Sums:
        """Activate the columns of some units of row q, which may be an edge of its strip, and write them.

        Returns the sums as they are.
        """
        s, each = self.shape, self.shape.each
        start, columns = unit * each, units * each
        value = self.refs[f"x{q}"][pl.ds(start, columns)].astype(jnp.float32)
        if f"scale{q}" in self.refs:
            factors = [self.refs[f"{name}{q}"][pl.ds(unit, units)] for name in ("scale", "offset")]
            if after is not None:
                bits = jnp.concatenate([pltpu.bitcast(after, jnp.int32)] * (s.channels // LANES), 1)
                factors[0] = jnp.where(bits[None] == NEVER, 0.0, factors[0])
            value = self.modulated(value.reshape(units, each, *value.shape[1:]), *factors)
            value = value.reshape(columns, *value.shape[2:])
        elif self.activation:
            value = self.activation(value)
        if is_edge:
            outside = self.refs[f"rows{q}"][pl.ds(self.block * s.columns + 1 + start, columns)]
            value = self.of_strips(q, value, outside)
        self.put(q, value, start, columns)
        if s.history:
            self.refs["next"][q, pl.ds(start, columns)] = value.astype(self.dtype)
        return sums

    def modulated(self, value: jax.Array, scale: jax.Array, offset: jax.Array) -> jax.Array:
        """Return the activation of columns [units, each, strips, channels] with factors of each unit."""
        value = value * scale[:, None] + offset[:, None]
        return self.activation(value) if self.activation else value

    def of_strips(self, q: int, value: jax.Array, outside: jax.Array) -> jax.Array:
        """Turn columns of a strip's last or first row into the row above or below, from the strip beside it.

        The first or the last strip, to which nothing moves, takes the pixel outside the chip's part.
        """
        s = self.shape
        row = self.step * s.side + q
        is_first, is_last = row == 0, row == s.height + 1
        value = pltpu.roll(value, jnp.where(is_first, 1, jnp.where(is_last, STRIPS - 1, 0)), 1)
        strip = jax.lax.broadcasted_iota(jnp.int32, (1, STRIPS, 1), 1)
        edge = jnp.where(is_first, 0, jnp.where(is_last, STRIPS - 1, STRIPS))
        return jnp.where(strip == edge, outside.astype(jnp.float32), value)

    def edge(self, q: int, place: int, side: str) -> jax.Array:
        """Return the padded column on the left (`place` 0) or on the right (1) of a block, [1, strips, channels]."""
        s = self.shape
        value = self.refs[f"columns{q}"][pl.ds(place, 1)].astype(jnp.float32)
        if s.blocks > 1:
            beside = self.refs[f"x{q}_{side}"][...].astype(jnp.float32)
            if f"scale{q}" in self.refs:
                factors = (self.refs[f"{name}{q}_{side}"][...] for name in ("scale", "offset"))
                beside = self.modulated(beside[:, None], *factors)[:, 0]
            elif self.activation:
                beside = self.activation(beside)
            value = jnp.where(self.block == place * (s.blocks - 1), value, beside)
        outside = self.refs[f"rows{q}"][pl.ds(self.block * s.columns + place * (s.columns + 1), 1)]
        return self.of_strips(q, value, outside)

    def next_column(self, q: int, place: int, value: jax.Array) -> None:
        """Write a column of the next cache."""
        self.refs["next_columns"][q, pl.ds(place, 1)] = value.astype(self.dtype)

    def copy_cache(self) -> None:
        """Bring rows of the cache into the ring."""
        s, refs = self.shape, self.refs
        columns = self.units * s.each

        def chunk(i, carry):
            start = jnp.minimum(i * columns, s.columns - columns)
            for q in range(s.side):
                self.put(q, refs["cache"][q, pl.ds(start, columns)].astype(jnp.float32), start, columns)
            return carry

        jax.lax.fori_loop(0, self.count, chunk, 0)
        for q in range(s.side):
            edges = [refs["cache_columns"][q, pl.ds(place, 1)].astype(jnp.float32) for place in range(2)]
            if s.blocks > 1:  # what lay on the left was overwritten by the block before
                saved, right = refs["saved"].at[self.frame, self.step, q], refs["cache_right"][q]
                edges[0] = jnp.where(self.block == 0, edges[0], saved[...][None])
                edges[1] = jnp.where(self.block == s.blocks - 1, edges[1], right.astype(jnp.float32))
                saved[...] = refs["cache"][q, s.columns - 1].astype(jnp.float32)
            for place, value in enumerate(edges):
                self.put_column(q, value, place)

    # --- The ring ------------------------------------------------------------------------------------------------

    def put(self, q: int, values: jax.Array, start: jax.Array, columns: int) -> None:
        """Write columns, float32 [columns, strips, channels], from column `start` on behind the left edge."""
        if self.shape.side == 1:
            self.store(q, values, 1 + start, 0)
            return
        values = values.reshape(columns // 2, 2, *values.shape[1:])
        self.store(q, values[:, 0], start // 2, 1)  # the edge is the first column of the first pair
        self.store(q, values[:, 1], start // 2 + 1, 0)

    def put_column(self, q: int, value: jax.Array, place: int) -> None:
        """Write the padded column on the left (`place` 0) or on the right (1)."""
        s = self.shape
        last = s.columns // 2 if s.side == 2 else s.columns + 1
        self.store(q, value, place * last, place * (s.side - 1))

    def store(self, q: int, values: jax.Array, start: jax.Array | int, member: int) -> None:
        """Write columns, or one member of pairs of columns, from column, or pair, `start` on."""
        s = self.shape
        length, parts = len(values) * s.sublanes, s.channels // LANES
        flat = values.astype(jnp.float32).reshape(-1, s.channels)
        for number in range(parts):
            part = flat[:, number * LANES : (number + 1) * LANES]
            if s.itemsize == 2 and len(flat) % 16:  # a register holds two columns
                part = pltpu.bitcast(jnp.concatenate([part, part]).astype(self.dtype), jnp.uint32)[:length]
            elif s.itemsize == 2:
                part = pltpu.bitcast(part.astype(self.dtype), jnp.uint32)
            self.refs["fresh"][q, member * parts + number, pl.ds(start * s.sublanes, length), :] = part

    def keep(self) -> None:
        """Copy the fresh rows into the ring.

        If they were written there at once, the compiler would first load all that the products read from the ring.
        """
        s = self.shape
        planes, length, _ = s.row

        def copy(at, size):
            for q in range(s.side):
                slot = jax.lax.rem(self.step * s.side + q, s.ring_rows)
                for plane in range(planes):
                    rows = self.refs["fresh"][q, plane, pl.ds(at, size), :]
                    self.refs["ring"][slot, self.frame, plane, pl.ds(at, size), :] = rows

        def some(i, carry):
            copy(pl.multiple_of(i * COPIED, COPIED), COPIED)
            return carry

        if length >= COPIED:
            jax.lax.fori_loop(0, length // COPIED, some, 0)
        if length % COPIED:
            copy(length - length % COPIED, length % COPIED)

    def load(self, row: int, frame: jax.Array, start: jax.Array, member: int = 0) -> jax.Array:
        """Read a chunk's columns, or members of pairs, of row `row` of the window: [columns * strips, channels]."""
        s = self.shape
        slot = jax.lax.rem(self.step * s.side + (s.ring_rows - 2 + row), s.ring_rows)  # the first is two rows back
        at = pl.ds(start * s.sublanes, self.pairs * s.sublanes)
        parts = s.channels // LANES
        found = [self.refs["ring"][slot, frame, member * parts + part, at, :] for part in range(parts)]
        if s.itemsize == 2:
            found = [pltpu.bitcast(part, self.dtype) for part in found]
        return jnp.concatenate(found, axis=1)

    # --- The products --------------------------------------------------------------------------------------------

    def multiply(self, i: jax.Array, sums: Sums, work: list[Work]) -> Sums:
        """Multiply a chunk; beside that do other work, and finish the products before. Return the sums of the rows."""
        phases = self.shape.factor**2
        for phase in range(phases):
            share = work[phase * len(work) // phases : (phase + 1) * len(work) // phases]
            sums = self.products(phase, self.start(i), self.finishing(i, phase), share, sums)
            if phase == 0:  # with the first chunk, that was nothing of this row
                sums = tuple(jnp.where(i == 0, 0.0, each) for each in sums)
        return sums

    def start(self, i: jax.Array | int) -> jax.Array:
        """Return the first column, or pair, of a chunk."""
        return jnp.clip(i * self.pairs, 0, self.shape.columns // self.shape.side - self.pairs)

    def products(self, phase: int, start: jax.Array, finishing: list[Work], work: list[Work], sums: Sums) -> Sums:
        """Write the products of a chunk's windows; return the sums after the work, which is done between them."""
        groups = self.quads(start) if self.shape.quads else [([(0, 0)], self.window(phase, start))]
        out, written = self.shape.out_channels, set()
        others = sum(len(steps) for _, steps in groups[1:])
        done = 0
        for number, (places, steps) in enumerate(groups):
            # The products before lie where these will lie: they are finished before the first are written.
            share = finishing if number == 0 else work[done : done + -(-len(work) * len(steps) // others)]
            if number == 0 and not others:
                share = [*finishing, *work]
            elif number:
                done += len(share)
            total, sums = self.product(steps, share, sums)
            for i, place in enumerate(places):
                member, q = place
                part = total[:, i * out : (i + 1) * out]
                at = self.refs["products"].at[member, :, q * out : (q + 1) * out]
                at[...] = at[...] + part if place in written else part
                written.add(place)
        return sums

    def product(self, steps: list[Operands], work: list[Work], sums: Sums) -> tuple[jax.Array, Sums]:
        """Return the sum of some products, and the sums after the work."""
        total: jax.Array | None = None
        done = 0
        for number, step in enumerate(steps, 1):
            part = jnp.dot(*step(), precision=self.precision, preferred_element_type=jnp.float32)
            total = part if total is None else total + part
            due = number * len(work) // len(steps)
            sums = _done(work[done:due], sums, part[:STRIPS, :LANES])
            done = due
        assert total is not None
        return total, sums

    def frame_of(self, t: int) -> jax.Array:
        """Return the ring's frame that is frame t of the window."""
        output = self.frame - 1 - self.before
        return output + t if self.before else jnp.maximum(output + t - self.shape.history, 0)

    def window(self, phase: int, start: jax.Array) -> list[Operands]:
        """Return what gives the operands of each product of a window."""
        s = self.shape
        first_row, first_column = divmod(phase, 2)
        first = phase * len(s.taps)
        at_once = 2 if s.channels % (2 * LANES) else 1  # taps that fill the MXU

        def step(numbers):
            taps = [s.taps[number] for number in numbers]
            found = [self.load(first_row + y, self.frame_of(t), start + first_column + x) for t, y, x in taps]
            weights = [self.refs["weight"][first + number] for number in numbers]
            return jnp.concatenate(found, 1), jnp.concatenate(weights, 0)

        numbers = range(len(s.taps))
        steps: list[Operands] = [functools.partial(step, numbers[i : i + at_once]) for i in numbers[::at_once]]
        return [*steps, lambda: self.shortcut(0, start)] if s.shortcut else steps

    def quads(self, start: jax.Array) -> list[tuple[list[tuple[int, int]], list[Operands]]]:
        """Return groups of products of quads: the (member, row) of the results beside each other, and operands.

        `packed_weight` says which pixels go together. The products of a group are added up in registers.
        """
        s = self.shape
        frames = range(s.history + 1)

        def column(t, row, x):
            return self.load(row, self.frame_of(t), start + x // 2, x % 2)

        def middle(t, x, member):
            left = jnp.concatenate([column(t, row, member + x) for row in (1, 2)], 1)
            return left, self.refs["weight"][7 * t + x]

        def outer(t, q, x):
            left = jnp.concatenate([column(t, 3 * q, 2 * x + i) for i in range(2)], 1)
            return left, self.refs["weight"][7 * t + 3 + 2 * q + x]

        groups = []
        for member in range(2):
            steps: list[Operands] = [functools.partial(middle, t, x, member) for t in frames for x in range(3)]
            if s.shortcut:
                steps.append(functools.partial(self.shortcut, member, start))
            groups.append(([(member, 0), (member, 1)], steps))
        for q in range(2):
            steps = [functools.partial(outer, t, q, x) for t in frames for x in range(2)]
            groups.append(([(0, q), (1, q)], steps))
        return groups

    def shortcut(self, member: int, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the operands of the shortcut: of both rows of quads [columns * strips, rows * channels]."""
        s = self.shape
        parts = [self.refs["shortcut"][q, pl.ds(start, self.pairs), member] for q in range(s.side)]
        flat = [part.astype(jnp.float32).reshape(-1, s.shortcut).astype(self.dtype) for part in parts]
        return jnp.concatenate(flat, 1), self.refs["matrix"][...]

    def finishing(self, i: jax.Array | int, phase: int) -> list[Work]:
        """Return the work to finish the products before those of a chunk and phase, which lie in VMEM."""
        s = self.shape
        i, phase = (i, phase - 1) if phase else (i - 1, s.factor**2 - 1)
        return [
            functools.partial(self.finish, i, phase, at, min(PIECE, self.pairs - at), member, q)
            for at in range(0, self.pairs, PIECE)
            for member in range(s.side)
            for q in range(s.side)
        ]

    def finish(
        self,
        i: jax.Array | int,
        phase: int,
        at: int,
        columns: int,
        member: int,
        q: int,
        sums: Sums,
        after: jax.Array | None,
    ) -> Sums:
        """Add bias and residual to products of some columns, and write them; return the sums with them."""
        s, refs = self.shape, self.refs
        channels = slice(q * s.out_channels, (q + 1) * s.out_channels)
        value = refs["products"][member, at * STRIPS : (at + columns) * STRIPS, channels]
        value = value.reshape(columns, STRIPS, s.out_channels) + refs["bias"][...]
        first = self.start(i) + at
        place = pl.ds(first, columns)
        if "residual" in refs:
            value = value + refs["residual"][q, place, member].astype(jnp.float32)
        if s.factor == 1:
            refs["y"][q, place, member] = value.astype(self.dtype)
        else:
            refs["y"][phase // 2, place, phase % 2] = value.astype(self.dtype)
        # Columns beyond the frame do not count, nor those that the chunk before had, too.
        number = jax.lax.broadcasted_iota(jnp.int32, (columns, 1, 1), 0)
        if "limit" in refs:
            least = refs["limit"][0] - self.block * s.columns - member
            value = jnp.where(number * s.side < least - first * s.side, value, 0.0)
        if self.count * self.pairs > s.columns // s.side:
            value = jnp.where(number >= i * self.pairs - first, value, 0.0)
        added = list(sums)
        added[2 * q] += value.sum(0)
        added[2 * q + 1] += (value * value).sum(0)
        return tuple(added)


def _done(work: list[Work], sums: Sums, after: jax.Array | None = None) -> Sums:
    """Do the work, none of it before `after` is there, and return the sums after it."""
    for each in work:
        sums = each(sums, after)
    return sums
