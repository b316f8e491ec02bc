"""What all kernels of a block share: how they are called, and how they read a weight."""

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
VMEM_LIMIT = 64 * 2**20  # bytes


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


def call(
    kernel: Callable,
    name: str,
    scalars: Sequence[jax.Array],
    arrays: Sequence[jax.Array],
    *,
    grid: tuple[int, ...],
    in_specs: Sequence[pl.BlockSpec],
    out_specs: pl.BlockSpec,
    out_shape: Any,
    products: int,
    moved: int,
    interpret: bool,
) -> jax.Array:
    """Run a kernel that reads the scalars text_tokens and layer.

    It multiplies `products` pairs of values, and moves `moved` values between HBM and VMEM.
    """
    size = moved * out_shape.dtype.itemsize
    semantics: Any = ("parallel", *["arbitrary"] * (len(grid) - 1))
    if not interpret:  # otherwise XLA puts what fits into VMEM, which the kernel needs for itself
        arrays = [pltpu.with_memory_space_constraint(array, pltpu.HBM) for array in arrays]
        out_shape = pltpu.HBM(out_shape.shape, out_shape.dtype)
    return pl.pallas_call(
        kernel,
        name=name,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=grid, in_specs=in_specs, out_specs=out_specs
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_LIMIT),
        cost_estimate=pl.CostEstimate(flops=2 * products, bytes_accessed=size, transcendentals=0),
        interpret=interpret,
    )(jnp.stack(scalars), *arrays)


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


def text_or_video(ref: Any, start: Any, tokens: int, text_tokens: Any) -> jax.Array:
    """Choose the row of `ref` [2, embed] for each of some tokens, text or video; returns [tokens, embed]."""
    token = start + lax.broadcasted_iota(jnp.int32, (tokens, 1), 0)
    return jnp.where(token < text_tokens, ref[0:1], ref[1:2])
