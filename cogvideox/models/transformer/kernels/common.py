"""What all kernels of a block share: how they are called, and how they read a weight."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128  # tokens in a tile
PRODUCT_TILES = 2  # tiles in a product: the MXU's width
ROWS = 1536  # outputs in a block of a weight, in bfloat16
TOKENS = 512  # tokens in a block
SUBLANES = 8  # rows of a register
VMEM_LIMIT = 64 * 2**20  # bytes

# The rows of `Sums`: how values are reduced, and how two parts are joined.
REDUCTIONS: tuple[Callable, ...] = (jnp.sum, jnp.sum, jnp.min, jnp.max)
JOINS: tuple[Callable, ...] = (jnp.add, jnp.add, jnp.minimum, jnp.maximum)


class Weight(NamedTuple):
    """One layer's weight in the stack of all: a kernel reads it there, where a slice would be copied first.

    Attributes:
        stack: [layers, outputs, inputs].
        layer: int32 scalar.
    """

    stack: jax.Array
    layer: jax.Array

    @property
    def outputs(self) -> int:
        """How many outputs it has."""
        return self.stack.shape[1]

    @property
    def size(self) -> int:
        """How many values it has."""
        return self.stack.shape[1] * self.stack.shape[2]

    def spec(self, outputs: int) -> pl.BlockSpec:
        """Return the spec of a block of so many outputs, for a grid whose first axis counts these blocks."""
        return pl.BlockSpec((None, outputs, self.stack.shape[2]), lambda n, b, t, scalars: (scalars[1], n, 0))


# A kernel's output, and the `tap.sums` of what it held in VMEM, where they are asked for, else nothing.
Summed = tuple[jax.Array, list[jax.Array]]


class Sums:
    """What a kernel adds up of values that it holds in VMEM, for statistics: one to a few points of the model.

    A kernel's second output has, for each step of its grid and each point, four rows: sum, sum of squares, least and
    largest value of what is in a column of lanes. Padding counts as zero.

    Args:
        ref: of the output's block, [1 for each axis of the grid, 4 * points, lanes].
        real_tokens: of each tile of tokens, how many, from its first on, are not padding.
    """

    def __init__(self, ref: Any, real_tokens: Callable[[Any], jax.Array]):
        self._ref, self._real_tokens = ref, real_tokens
        self._found: dict[int, list[jax.Array]] = {}

    def add(self, point: int, x: jax.Array, start: Any, axis: int) -> None:
        """Add values [rows, columns] of a point; `axis` has the tokens from `start` on.

        It takes a column of registers after the other: so few are alive that none has to be put aside.
        """
        rows, columns, lanes = *x.shape, self._ref.shape[-1]
        assert axis == 0 or lanes == LANES, (axis, lanes)  # so that a part has tokens of one tile
        for row, column in itertools.product(range(0, rows, LANES), range(0, columns, lanes)):
            part = x[row : row + LANES, column : column + lanes].astype(jnp.float32)
            token = lax.broadcasted_iota(jnp.int32, (len(part), 1) if axis == 0 else (1, lanes), axis)
            tile = start // LANES + (row if axis == 0 else column) // LANES
            part = jnp.where(token < self._real_tokens(tile), part, 0.0)
            part = part.reshape(-1, math.gcd(len(part), SUBLANES), lanes)
            found = [part.sum(0), jnp.square(part).sum(0), part.min(0), part.max(0)]
            before = self._found.get(point)
            if before:
                found = [join(*pair) for join, *pair in zip(JOINS, before, found, strict=True)]
            self._found[point] = found

    def write(self) -> None:
        """Write what was added, at the end of a step of the grid."""
        rows = [
            reduce(part, axis=0, keepdims=True)
            for point in sorted(self._found)
            for reduce, part in zip(REDUCTIONS, self._found[point], strict=True)
        ]
        self._ref[...] = jnp.concatenate(rows).reshape(self._ref.shape)


class Counted(NamedTuple):
    """Of what a kernel is to return `Sums`.

    Attributes:
        real_tokens: how many tokens of each of the chip's tiles, from its first on, are not padding, int32 [tiles].
        points: for how many points of the model the kernel has sums.
        values: how many values of each point a token has, all prompts together.
        columns: of the blocks of values.
    """

    real_tokens: jax.Array
    points: int
    values: int
    columns: int

    @property
    def lanes(self) -> int:
        """Of a row of the sums."""
        return LANES if self.columns % LANES == 0 else self.columns

    def merged(self, rows: jax.Array) -> list[jax.Array]:
        """Merge what the steps of a grid have written into the `tap.sums` of each point."""
        rows = jnp.moveaxis(rows.reshape(-1, self.points, len(REDUCTIONS), self.lanes), 2, 0)
        total = [reduce(row, axis=(1, 2)) for reduce, row in zip(REDUCTIONS, jnp.swapaxes(rows, 1, 2), strict=True)]
        count = self.real_tokens.sum().astype(jnp.float32) * self.values  # as an integer it may be too large
        return [jnp.stack([count, *(row[point] for row in total)])[None] for point in range(self.points)]


def call(
    kernel: Callable,
    name: str,
    scalars: Sequence[jax.Array],
    arrays: Sequence[jax.Array],
    *,
    grid: tuple[int, ...],
    in_specs: Sequence[pl.BlockSpec],
    out_specs: Any,
    out_shape: Any,
    products: int,
    moved: int,
    interpret: bool,
    counted: Counted | None = None,
    into: jax.Array | None = None,
) -> Summed:
    """Run a kernel that reads the scalars `boundary` and layer.

    It multiplies `products` pairs of values, and moves `moved` values between HBM and VMEM. Each step of its grid has
    blocks of its own to write, so that two cores of a device can share the grid. Its argument `sums` is where it adds
    what is counted, or None. It writes into the array `into`, if there is one, in the place of a new one.
    """
    size = moved * out_shape.dtype.itemsize
    if not interpret:  # otherwise XLA puts what fits into VMEM, which the kernel needs for itself
        arrays = [pltpu.with_memory_space_constraint(array, pltpu.HBM) for array in arrays]
        out_shape = pltpu.HBM(out_shape.shape, out_shape.dtype)
    inputs = 1 + len(arrays)  # the scalars are the first input
    arrays, in_specs = [*arrays], [*in_specs]
    if into is not None:
        arrays.append(into)
        in_specs.append(pl.BlockSpec(memory_space=pl.ANY))
    if counted:
        # An input of its own: joined with the scalars, which differ from layer to layer, it keeps XLA from letting an
        # exchange between chips go on beside the kernels.
        arrays.append(jnp.pad(counted.real_tokens, (0, TOKENS // LANES)))  # the last block may reach beyond them
        in_specs.append(pl.BlockSpec(memory_space=pltpu.SMEM))
        block = len(REDUCTIONS) * counted.points, counted.lanes
        sums_shape: Any = jax.ShapeDtypeStruct((*grid, *block), jnp.float32)
        out_shape = [out_shape, sums_shape]
        ones = (1,) * len(grid)
        out_specs = [out_specs, pl.BlockSpec((*ones, *block), lambda *indices: (*indices[:-1], 0, 0))]

    def function(*refs: Any) -> None:
        read, out_ref = refs[:inputs], refs[1 + len(arrays)]
        sums = Sums(refs[-1], lambda tile: refs[len(arrays)][tile]) if counted else None
        kernel(*read, out_ref, sums=sums)
        if sums:
            sums.write()

    found = pl.pallas_call(
        function,
        name=name,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=grid, in_specs=in_specs, out_specs=out_specs
        ),
        out_shape=out_shape,
        input_output_aliases={} if into is None else {inputs: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=[pltpu.PARALLEL] * len(grid), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(flops=2 * products, bytes_accessed=size, transcendentals=0),
        interpret=interpret,
    )(jnp.stack(scalars), *arrays)
    return (found[0], counted.merged(found[1])) if counted else (found, [])


def matmul(left: jax.Array, right: jax.Array, contracted: tuple[tuple[int], tuple[int]], interpret: bool) -> jax.Array:
    """Compute a matrix product in float32; the interpreter lacks some products of bfloat16 on a CPU."""
    if interpret:
        left, right = left.astype(jnp.float32), right.astype(jnp.float32)
    return lax.dot_general(left, right, (contracted, ((), ())), preferred_element_type=jnp.float32)


def fitting(most: int, dtype: jax.typing.DTypeLike) -> int:
    """Return what fits VMEM of `dtype` where `most` of bfloat16 do: a product of float32 also copies them in parts."""
    return most * 4 // jnp.dtype(dtype).itemsize ** 2


def block_of_outputs(outputs: int, most: int) -> int:
    """Choose how many outputs a block has: whole registers that divide them, up to `most`, or else all."""
    return max([n for n in range(LANES, max(most, LANES) + 1, LANES) if outputs % n == 0], default=outputs)


def by_part(ref: Any, start: Any, tokens: int, boundary: Any) -> jax.Array:
    """Choose the row of `ref` [2, embed] for each of some tokens, before the boundary or not; [tokens, embed]."""
    token = start + lax.broadcasted_iota(jnp.int32, (tokens, 1), 0)
    return jnp.where(token < boundary, ref[0:1], ref[1:2])
