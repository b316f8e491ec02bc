"""The input of a convolution in one pass over the activations: scale, shift, activate, enlarge, pad.

For TPUs this is a Pallas kernel, which moves each row once; XLA makes several copies of it. `plain_conv_input` says the
same in jax.numpy: other platforms run it, and the kernel is tested against it.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

VMEM_BYTES = 100 * 2**20


def nearest(index, size: int, source: int):
    """Index of the source frame of frame `index` when `source` frames become `size` by repetition.

    Of an odd number of frames above one the first stays single (CogVideoXUpsample3D, CogVideoXSpatialNorm3D).
    """
    if size == source:
        return index
    if size > 1 and size % 2:
        return jnp.where(index == 0, 0, 1 + (index - 1) * (source - 1) // (size - 1))
    return index * source // size


def repeated(x: jax.Array, frames: int, height: int, width: int) -> jax.Array:
    """x [frames, height, width, ...] repeated to the given sizes, whole multiples of its own in space."""
    single = 1 if frames > 1 and frames % 2 and frames != len(x) else 0
    rest = jnp.repeat(x[single:], (frames - single) // (len(x) - single), axis=0)
    x = jnp.concatenate([x[:single], rest]) if single else rest
    for axis, size in ((1, height), (2, width)):
        x = jnp.repeat(x, size // x.shape[axis], axis=axis)
    return x


def modulated(
    x: jax.Array, scale: jax.Array | None, offset: jax.Array | None, activation: Callable | None
) -> jax.Array:
    """activation(x * scale + offset) in x's dtype, computed in float32; scale and offset are repeated to x's size."""
    y = x.astype(jnp.float32)
    if scale is not None:
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
    """`plain_conv_input` as a TPU kernel; the next cache is written over the cache.

    With `packed` the first result is [..., width + 1, strips, 2 * channels], column i beside column i + 1.
    """
    source_frames, height, width, strips, channels = x.shape
    out_height, out_width = factor * height, factor * width
    has_cache = cache is not None
    assert rows.shape == (source_frames, 2, out_width + 2, 1, channels), rows.shape
    assert columns.shape == (source_frames, out_height, 2, strips, channels), columns.shape
    assert not has_cache or cache.shape == (history, out_height + 2, out_width + 2, strips, channels), cache.shape
    assert not has_cache or frames >= history, (frames, history)  # or the cache would be overwritten before it is read

    def at(t, r, array_frames, array_height):
        """Block (frame, row) of an array that padded row r of frame t reads; the same one while it reads none.

        The rows above and below a strip are the last and the first one of its neighbours.
        """
        frame = nearest(jnp.maximum(t - history, 0), frames, array_frames)
        row = jnp.where(r == 0, out_height - 1, jnp.where(r == out_height + 1, 0, r - 1)) * array_height // out_height
        return frame, jnp.where(t < history, 0, row) if has_cache else row

    def of(array, index):
        """One row of one frame of an array, `index(t, r)` says which."""
        return pl.BlockSpec((None, None, *array.shape[2:]), lambda t, r: (*index(t, r), *(0,) * (array.ndim - 2)))

    def row_of(array):
        return of(array, lambda t, r: at(t, r, *array.shape[:2]))

    operands = [x, rows, columns]
    specs = [
        row_of(x),
        of(rows, lambda t, r: (at(t, r, len(rows), 1)[0], jnp.minimum(r, 1))),
        row_of(columns),
    ]
    if scale is not None:
        operands += [scale, offset]
        specs += [row_of(scale), row_of(offset)]
    if has_cache:
        operands.append(cache)
        last = (history - 1, out_height + 1)
        specs.append(of(cache, lambda t, r: (jnp.minimum(t, last[0]), jnp.where(t < history, r, last[1]))))
    grid = (history + frames, out_height + 2)
    padded = (out_width + 1, strips, 2 * channels) if packed else (out_width + 2, strips, channels)
    out_shapes = [jax.ShapeDtypeStruct((*grid, *padded), x.dtype)]
    out_specs = [of(out_shapes[0], lambda t, r: (t, r))]
    if history:  # the last frames once more, as the next cache; before them its first block is written and rewritten
        next_cache = jax.ShapeDtypeStruct((history, out_height + 2, out_width + 2, strips, channels), x.dtype)
        out_shapes.append(next_cache)
        out_specs.append(of(next_cache, lambda t, r: (jnp.maximum(t - frames, 0), jnp.where(t < frames, 0, r))))
    kernel = functools.partial(
        _kernel,
        activation=activation,
        history=history,
        out_height=out_height,
        factor=factor,
        packed=packed,
        has_scale=scale is not None,
        has_cache=has_cache,
    )
    padded, *cache = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=specs,
        out_specs=out_specs,
        out_shape=out_shapes,
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_BYTES),
        input_output_aliases={len(operands) - 1: 1} if has_cache else {},
        interpret=interpret,
        name=f"conv_input_{'cached' if has_cache else 'first'}_{grid[0]}x{grid[1]}x{width}x{strips}x{channels}",
    )(*operands)
    return padded, cache[0] if cache else None


def _kernel(*refs, activation, history, out_height, factor, packed, has_scale, has_cache):
    """One padded row of one frame. Rows are [columns, strips, channels]."""
    refs = iter(refs)
    x, rows, columns = next(refs), next(refs), next(refs)
    scale, offset = (next(refs), next(refs)) if has_scale else (None, None)
    cache = next(refs) if has_cache else None
    out = next(refs)
    next_cache = next(refs) if history else None
    width, _, channels = x.shape
    out_width = factor * width
    t, r = pl.program_id(0), pl.program_id(1)
    from_cache = t < history if has_cache else False

    def write(column, value, first=False, last=False):
        """Put one padded column in its place, or in its two places beside its neighbours, and in the next cache."""
        if history:
            next_cache[column] = value
        if not packed:
            out[column] = value
            return
        if not last:
            out[column, :, :channels] = value
        if not first:
            out[column - 1, :, channels:] = value

    if has_cache:

        @pl.when(from_cache)
        def _():
            next_cache[...] = cache[...]
            if packed:
                out[:, :, :channels] = cache[:-1]
                out[:, :, channels:] = cache[1:]
            else:
                out[...] = cache[...]

    def write_row(neighbour=0):
        """Write row `r`, or, for -1 and 1, the row above or below, which lies one strip further on."""

        def strip(value, column):
            if not neighbour:
                return value
            strips = jax.lax.broadcasted_iota(jnp.int32, value.shape, 0)
            outside = strips == (0 if neighbour < 0 else value.shape[0] - 1)
            if value.shape[0] > 1:
                value = pltpu.roll(value, -neighbour % value.shape[0], 0)
            return jnp.where(outside, rows[column].astype(jnp.float32), value)

        def finish(column, value, **ends):
            write(column, strip(value, column).astype(out.dtype), **ends)

        finish(0, columns[0].astype(jnp.float32), first=True)
        finish(out_width + 1, columns[1].astype(jnp.float32), last=True)
        pieces = scale.shape[0] if has_scale else width
        each = width // pieces  # columns with the same scale

        def piece(i, carry):
            for j in range(each):
                value = x[i * each + j].astype(jnp.float32)
                if has_scale:
                    value = value * scale[i] + offset[i]
                value = activation(value) if activation else value
                for k in range(factor):
                    finish(1 + (i * each + j) * factor + k, value)
            return carry

        jax.lax.fori_loop(0, pieces, piece, 0, unroll=min(max(1, 8 // each), pieces))

    computed = jnp.logical_not(from_cache)
    pl.when(computed & (r == 0))(functools.partial(write_row, -1))
    pl.when(computed & (r == out_height + 1))(functools.partial(write_row, 1))
    pl.when(computed & (r > 0) & (r <= out_height))(write_row)


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
    """The padded input of a convolution, and the next cache.

    Args:
        x: [source frames, height, width, strips, channels].
        scale, offset: float32, repeated to x's size; see `modulated`.
        rows: what lies above the first strip and below the last, finished and enlarged, [source frames, 2,
            factor * width + 2, 1, channels].
        columns: what lies on the left and right, the same, [source frames, factor * height, 2, strips, channels].
        cache: the `history` last frames of the chunk before, finished and padded; None to repeat the first frame.
        activation: keeps zero.
        history: frames put in front.
        frames: how many x's frames become, see `nearest`.
        factor: enlargement of height and width, by repetition.

    Returns:
        [history + frames, factor * height + 2, factor * width + 2, strips, channels], and its last `history` frames.
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
