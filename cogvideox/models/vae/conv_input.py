"""The input of a convolution in one pass over the activations: scale, shift, activate, enlarge, pad.

For TPUs this is a Pallas kernel, which reads and writes each row once, where XLA makes several copies.
`plain_conv_input` does the same in jax.numpy: other platforms run it, and the kernel is tested against it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

VMEM_SHARE = 0.8  # of a core's VMEM, for a kernel


def vmem() -> int:
    """Return the bytes of VMEM of a core of the TPU that is compiled for, or of v6e where it is no TPU."""
    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:  # another device, on which kernels are interpreted
        return 128 * 2**20


def nearest(index: jax.Array, size: int, source: int) -> jax.Array:
    """Return which source frame frame `index` repeats, when repetition makes `size` frames of `source` frames.

    If `size` is odd and above one, the first of several frames is not repeated (CogVideoXUpsample3D,
    CogVideoXSpatialNorm3D).
    """
    if size == source:
        return index
    if source == 1:
        return jnp.zeros_like(index)
    if size > 1 and size % 2:
        return jnp.where(index == 0, 0, 1 + (index - 1) * (source - 1) // (size - 1))
    return index * source // size


def repeated(x: jax.Array, frames: int, height: int, width: int) -> jax.Array:
    """Repeat x [frames, height, width, ...] to the given sizes; height and width are whole multiples of its own.

    The first of an odd number of frames is not repeated, as in `nearest`.
    """
    single = 1 if len(x) > 1 and frames % 2 and frames != len(x) else 0
    rest = jnp.repeat(x[single:], (frames - single) // (len(x) - single), axis=0)
    x = jnp.concatenate([x[:single], rest]) if single else rest
    for axis, size in ((1, height), (2, width)):
        x = jnp.repeat(x, size // x.shape[axis], axis=axis)
    return x


def modulated(
    x: jax.Array, scale: jax.Array | None, offset: jax.Array | None, activation: Callable | None
) -> jax.Array:
    """Compute activation(x * scale + offset) in float32, and return it in x's dtype.

    Scale and offset, which are given together or not at all, are repeated to x's size.
    """
    y = x.astype(jnp.float32)
    if scale is not None and offset is not None:
        y = y * repeated(scale, *x.shape[:3]) + repeated(offset, *x.shape[:3])
    return (activation(y) if activation else y).astype(x.dtype)


def conv_input(
    x: jax.Array,
    scale: jax.Array | None,
    offset: jax.Array | None,
    rows: jax.Array,
    columns: jax.Array,
    cache: jax.Array | None,
    *,
    activation: Callable | None,
    history: int,
    frames: int,
    factor: int,
    packed: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Do what `plain_conv_input` does, as a TPU kernel; the next cache is written over the cache.

    With `packed` the first result is [..., width + 1, strips, 2 * channels], column i beside column i + 1.
    """
    source_frames, height, width, strips, channels = x.shape
    grid = _Grid(history, frames, factor * height, cache is not None)
    padded_shape = (factor * height + 2, factor * width + 2, strips, channels)
    assert rows.shape == (source_frames, 2, padded_shape[1], 1, channels), rows.shape
    assert columns.shape == (source_frames, grid.out_height, 2, strips, channels), columns.shape
    assert cache is None or cache.shape == (history, *padded_shape), cache.shape
    assert cache is None or frames >= history, (frames, history)  # or the cache is overwritten before it is read

    operands, specs = [x, rows, columns], [grid.input_spec(x), grid.edge_spec(rows), grid.input_spec(columns)]
    if scale is not None and offset is not None:
        operands += [scale, offset]
        specs += [grid.input_spec(scale), grid.input_spec(offset)]
    if cache is not None:
        operands.append(cache)
        specs.append(grid.cache_spec(cache))
    row_shape = (padded_shape[1] - 1, strips, 2 * channels) if packed else padded_shape[1:]
    out_shapes = [jax.ShapeDtypeStruct((*grid.shape, *row_shape), x.dtype)]
    out_specs = [_row_spec(out_shapes[0], lambda t, r: (t, r))]
    if history:
        out_shapes.append(jax.ShapeDtypeStruct((history, *padded_shape), x.dtype))
        out_specs.append(grid.next_cache_spec(out_shapes[1]))
    options = {"packed": packed, "has_scale": scale is not None, "has_cache": cache is not None}
    padded, *next_cache = pl.pallas_call(
        functools.partial(
            _kernel, activation=activation, history=history, out_height=grid.out_height, factor=factor, **options
        ),
        grid=grid.shape,
        in_specs=specs,
        out_specs=out_specs,
        out_shape=out_shapes,
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=int(VMEM_SHARE * vmem())),
        input_output_aliases={} if cache is None else {len(operands) - 1: 1},
        interpret=interpret,
        name="conv_input_{}_{}x{}x{}x{}x{}".format(
            "first" if cache is None else "cached", *grid.shape, width, strips, channels
        ),
    )(*operands)
    return padded, next_cache[0] if next_cache else None


def _row_spec(array: jax.Array | jax.ShapeDtypeStruct, index: Callable) -> pl.BlockSpec:
    """Make blocks of one row of one frame of an array; `index(t, r)` gives (frame, row) for a step of the grid."""
    return pl.BlockSpec((None, None, *array.shape[2:]), lambda t, r: (*index(t, r), *(0,) * (array.ndim - 2)))


class _Grid(NamedTuple):
    """The grid of the kernel: step (t, r) writes row r of frame t of the padded output.

    Attributes:
        history: frames in front, which come from the cache or repeat the first frame.
        frames: frames after them.
        out_height: rows of a frame without the padding.
        has_cache: whether the history comes from a cache.
    """

    history: int
    frames: int
    out_height: int
    has_cache: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Frames and rows of the padded output."""
        return self.history + self.frames, self.out_height + 2

    def source(self, t: jax.Array, r: jax.Array, array_frames: int, array_height: int) -> tuple[jax.Array, jax.Array]:
        """Return (frame, row) of an array's block for step (t, r); a step that reads none keeps a neighbour's block.

        The rows above and below a strip are the last row of the strip before it and the first row of the one after it.
        """
        frame = nearest(jnp.maximum(t - self.history, 0), self.frames, array_frames)
        last = self.out_height - 1
        row = jnp.where(r == 0, last, jnp.where(r == last + 2, 0, r - 1)) * array_height // self.out_height
        return frame, jnp.where(t < self.history, 0, row) if self.has_cache else row

    def input_spec(self, array: jax.Array) -> pl.BlockSpec:
        """Make the blocks of an input that is repeated to the output's frames and rows."""
        return _row_spec(array, lambda t, r: self.source(t, r, *array.shape[:2]))

    def edge_spec(self, rows: jax.Array) -> pl.BlockSpec:
        """Make the blocks of the rows above the first strip and below the last."""
        return _row_spec(rows, lambda t, r: (self.source(t, r, len(rows), 1)[0], jnp.minimum(r, 1)))

    def cache_spec(self, cache: jax.Array) -> pl.BlockSpec:
        """Make the blocks of the cache; after it was read its last block stays, so that nothing more is fetched."""
        last = (self.history - 1, self.out_height + 1)
        return _row_spec(cache, lambda t, r: (jnp.minimum(t, last[0]), jnp.where(t < self.history, r, last[1])))

    def next_cache_spec(self, cache: jax.ShapeDtypeStruct) -> pl.BlockSpec:
        """Make the blocks of the next cache, the last frames; the steps before them all write its first block."""
        frames = self.frames
        return _row_spec(cache, lambda t, r: (jnp.maximum(t - frames, 0), jnp.where(t < frames, 0, r)))


class _Refs(NamedTuple):
    """What a step of the kernel reads and writes: one row of each array, [columns, strips, channels]."""

    x: Any
    rows: Any
    columns: Any
    scale: Any
    offset: Any
    cache: Any
    out: Any
    next_cache: Any


def _kernel(*refs, activation, history, out_height, factor, packed, has_scale, has_cache):
    """Write one padded row of one frame."""
    present = (True, True, True, has_scale, has_scale, has_cache, True, bool(history))
    given = iter(refs)
    named = _Refs(*(next(given) if each else None for each in present))
    t, r = pl.program_id(0), pl.program_id(1)
    from_cache = t < history if has_cache else False
    if has_cache:
        pl.when(from_cache)(functools.partial(_copy_cache, named, packed))
    write_row = functools.partial(_write_row, named, activation, factor, packed)
    computed = jnp.logical_not(from_cache)
    pl.when(computed & (r == 0))(functools.partial(write_row, -1))
    pl.when(computed & (r == out_height + 1))(functools.partial(write_row, 1))
    pl.when(computed & (r > 0) & (r <= out_height))(functools.partial(write_row, 0))


def _copy_cache(refs: _Refs, packed: bool) -> None:
    """Copy a row of the cache to the output, and to the next cache, where later frames may overwrite it."""
    refs.next_cache[...] = refs.cache[...]
    if packed:
        channels = refs.cache.shape[-1]
        refs.out[:, :, :channels] = refs.cache[:-1]
        refs.out[:, :, channels:] = refs.cache[1:]
    else:
        refs.out[...] = refs.cache[...]


def _write_row(refs: _Refs, activation: Callable | None, factor: int, packed: bool, neighbour: int) -> None:
    """Compute and write a row; for `neighbour` -1 and 1 the row above or below, from the strip beside."""
    width = refs.x.shape[0]

    def write(column, value, first=False, last=False):
        value = _from_neighbour(value, refs.rows, column, neighbour) if neighbour else value
        _write_column(refs, packed, column, value.astype(refs.out.dtype), first, last)

    write(0, refs.columns[0].astype(jnp.float32), first=True)
    write(factor * width + 1, refs.columns[1].astype(jnp.float32), last=True)
    pieces = width if refs.scale is None else refs.scale.shape[0]
    each = width // pieces  # columns with the same scale

    def piece(i, carry):
        for j in range(each):
            value = refs.x[i * each + j].astype(jnp.float32)
            if refs.scale is not None:
                value = value * refs.scale[i] + refs.offset[i]
            value = activation(value) if activation else value
            for k in range(factor):
                write(1 + (i * each + j) * factor + k, value)
        return carry

    jax.lax.fori_loop(0, pieces, piece, 0, unroll=min(max(1, 8 // each), pieces))


def _from_neighbour(value: jax.Array, rows: Any, column: int | jax.Array, neighbour: int) -> jax.Array:
    """Move a column [strips, channels] to the next strip for `neighbour` -1, to the previous one for 1.

    The first or the last strip, to which nothing moves, takes the pixel outside the chip's part, from `rows`.
    """
    strips = jax.lax.broadcasted_iota(jnp.int32, value.shape, 0)
    outside = strips == (0 if neighbour < 0 else value.shape[0] - 1)
    if value.shape[0] > 1:
        value = pltpu.roll(value, -neighbour % value.shape[0], 0)
    return jnp.where(outside, rows[column].astype(jnp.float32), value)


def _write_column(
    refs: _Refs, packed: bool, column: int | jax.Array, value: jax.Array, first: bool, last: bool
) -> None:
    """Write a padded column to the next cache and to its place in the output, or to its two places where packed."""
    channels = value.shape[-1]
    if refs.next_cache is not None:
        refs.next_cache[column] = value
    if not packed:
        refs.out[column] = value
        return
    if not last:
        refs.out[column, :, :channels] = value
    if not first:
        refs.out[column - 1, :, channels:] = value


def plain_conv_input(
    x: jax.Array,
    scale: jax.Array | None,
    offset: jax.Array | None,
    rows: jax.Array,
    columns: jax.Array,
    cache: jax.Array | None,
    *,
    activation: Callable | None,
    history: int,
    frames: int,
    factor: int,
) -> tuple[jax.Array, jax.Array | None]:
    """Compute the padded input of a convolution, and the next cache.

    Args:
        x: [source frames, height, width, strips, channels].
        scale, offset: float32, repeated to x's size; see `modulated`.
        rows: what lies above the first strip and below the last, already activated and enlarged, [source frames, 2,
            factor * width + 2, 1, channels].
        columns: the same for the left and the right, [source frames, factor * height, 2, strips, channels].
        cache: the last `history` frames of the chunk before, activated and padded; None to repeat the first frame.
        activation: a function that maps zero to zero; None for none.
        history: number of frames in front.
        frames: number of frames that repetition makes of x's frames; see `nearest`.
        factor: by how much repetition enlarges height and width.

    Returns:
        [history + frames, factor * height + 2, factor * width + 2, strips, channels], and its last `history` frames,
        or None if `history` is 0.
    """
    y = modulated(x, scale, offset, activation)
    y = repeated(y, len(y), factor * y.shape[1], factor * y.shape[2])
    y = jnp.concatenate([columns[:, :, :1], y, columns[:, :, 1:]], axis=2)
    above = jnp.concatenate([rows[:, :1], y[:, -1:, :, :-1]], axis=3)
    below = jnp.concatenate([y[:, :1, :, 1:], rows[:, 1:]], axis=3)
    y = jnp.concatenate([above, y, below], axis=1)
    y = repeated(y, frames, *y.shape[1:3])
    if history:
        y = jnp.concatenate([jnp.repeat(y[:1], history, axis=0) if cache is None else cache, y])
    return y, y[-history:] if history else None
