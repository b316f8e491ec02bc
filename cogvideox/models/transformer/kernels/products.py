"""The kernels of a block's other products, with what comes after them: the output projection, and the MLP's two."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from cogvideox.models.transformer.kernels.common import (
    LANES,
    PRODUCT_TILES,
    ROWS,
    TOKENS,
    Counted,
    Summed,
    Weight,
    block_of_outputs,
    by_part,
    call,
    fitting,
    matmul,
)

TOKEN_VALUES, WEIGHT_VALUES = 3 * 2**20, 9 * 2**20  # values in a block of tokens and of a weight at most, in bfloat16


class Gelu(NamedTuple):
    """The activation after a product: gelu(product + bias).

    Attributes:
        bias: [outputs] or None.
    """

    bias: jax.Array | None


class Residual(NamedTuple):
    """What a projection is added to: hidden + gate * (projection + bias).

    Attributes:
        hidden: [batch, tokens, embed].
        bias: [embed] or None.
        gates: of the two parts, float32 [2, embed].
        boundary: how many of the tokens, from the first on, are in the first part, int32 scalar.
    """

    hidden: jax.Array
    bias: jax.Array | None
    gates: jax.Array
    boundary: jax.Array


def from_heads(
    groups: Sequence[jax.Array],
    weight: Weight,
    residual: Residual | None,
    interpret: bool,
    real_tokens: jax.Array | None = None,
) -> Summed:
    """Multiply heads by the weight of the output projection, and add the result to a `residual` if there is one.

    Args:
        groups: of the heads, [parts, tiles, batch, heads of the group, head_dim, 128] each, see `to_heads`.
        weight: of embed outputs and heads * head_dim inputs.
        residual: where this chip has all heads; None for its part of the product alone.
        interpret: run in Pallas' interpreter.
        real_tokens: how many tokens of each tile are not padding, int32 [tiles]; None for no sums, as without a
            residual.

    Returns:
        [batch, tokens, embed] of the dtype of the heads; and of the projection with its bias and of the result the
        `tap.sums`, if they are asked for.
    """
    parts, tiles, batch, own, head_dim, _ = groups[0].shape
    dtype, size = groups[0].dtype, sum(group.size for group in groups)
    embed, block_tiles = weight.outputs, min(TOKENS // LANES, tiles)
    columns = block_of_outputs(embed, fitting(ROWS, dtype))
    tokens_spec = pl.BlockSpec((1, block_tiles * LANES, columns), lambda n, b, t, scalars: (b, t, n))
    boundary, arrays, specs = _epilogue(residual, tokens_spec, columns, embed)
    spec = pl.BlockSpec((parts, block_tiles, 1, own, head_dim, LANES), lambda n, b, t, scalars: (0, t, b, 0, 0, 0))
    return call(
        functools.partial(_from_heads, groups=len(groups), interpret=interpret),
        "from_heads",
        (boundary, weight.layer),
        [*groups, weight.stack, *arrays],
        grid=(embed // columns, batch, pl.cdiv(tiles, block_tiles)),
        in_specs=[*[spec] * len(groups), weight.spec(columns), *specs],
        out_specs=tokens_spec,
        out_shape=jax.ShapeDtypeStruct((batch, tiles * LANES, embed), dtype),
        products=size * embed,
        moved=size * (embed // columns) + weight.size + 2 * batch * tiles * LANES * embed,
        interpret=interpret,
        counted=_counted(real_tokens, residual, batch, embed, columns),
    )


def _from_heads(scalars_ref, *refs, groups, interpret, sums):
    """Project a block of tokens, two tiles at a time, to columns, and turn them into rows."""
    x_refs, (weight_ref, *refs), out_ref = refs[:groups], refs[groups:], refs[-1]
    tiles = x_refs[0].shape[1]
    start = pl.program_id(2) * tiles * LANES

    def heads(tile):  # in the order of the weight: those of a chip, which may be in several groups, are neighbours
        return jnp.concatenate([ref[:, tile, 0] for ref in x_refs], axis=1).reshape(-1, LANES)

    for first in range(0, tiles, PRODUCT_TILES):
        count = min(PRODUCT_TILES, tiles - first)
        rows = pl.ds(first * LANES, count * LANES)
        x = [heads(tile) for tile in range(first, first + count)]
        y = matmul(weight_ref[...], jnp.concatenate(x, axis=1), ((1,), (0,)), interpret).T
        out_ref[0, rows] = _finished(y, refs[:-1], rows, start + first * LANES, scalars_ref[0], out_ref.dtype, sums)


def dense(
    x: jax.Array, weight: Weight, after: Residual | Gelu | None, interpret: bool, real_tokens: jax.Array | None = None
) -> Summed:
    """Multiply x [batch, tokens, inputs] by a weight.

    Args:
        x: of the dtype of the weight.
        weight: of as many inputs.
        after: what is done to the product; None for a chip's part of the product alone.
        interpret: run in Pallas' interpreter.
        real_tokens: as in `from_heads`.

    Returns:
        [batch, tokens, outputs] of the dtype of x; and the `tap.sums` as of `from_heads`, or of the activation.
    """
    batch, tokens, inputs = x.shape
    outputs = weight.outputs
    block = min(TOKENS, max(fitting(TOKEN_VALUES, x.dtype) // inputs // LANES, 1) * LANES, tokens)
    columns = block_of_outputs(outputs, min(fitting(ROWS, x.dtype), fitting(WEIGHT_VALUES, x.dtype) // inputs))
    out_spec = pl.BlockSpec((1, block, columns), lambda n, b, t, scalars: (b, t, n))
    boundary, arrays, specs = _epilogue(after, out_spec, columns, outputs)
    return call(
        functools.partial(_dense, interpret=interpret),
        "dense_gelu" if isinstance(after, Gelu) else "dense",
        (boundary, weight.layer),
        [x, weight.stack, *arrays],
        grid=(outputs // columns, batch, pl.cdiv(tokens, block)),
        in_specs=[
            pl.BlockSpec((1, block, inputs), lambda n, b, t, scalars: (b, t, 0)),
            weight.spec(columns),
            *specs,
        ],
        out_specs=out_spec,
        out_shape=jax.ShapeDtypeStruct((batch, tokens, outputs), x.dtype),
        products=x.size * outputs,
        moved=x.size * (outputs // columns) + weight.size + 2 * batch * tokens * outputs,
        interpret=interpret,
        counted=_counted(real_tokens, after, batch, outputs, columns),
    )


def _dense(scalars_ref, x_ref, weight_ref, *refs, interpret, sums):
    """Multiply a block of tokens by a block of the weight."""
    start = pl.program_id(2) * x_ref.shape[1]
    y = matmul(x_ref[0], weight_ref[...], ((1,), (1,)), interpret)
    refs[-1][0] = _finished(y, refs[:-1], slice(None), start, scalars_ref[0], refs[-1].dtype, sums)


def _epilogue(
    after: Residual | Gelu | None, tokens_spec: pl.BlockSpec, columns: int, outputs: int
) -> tuple[jax.Array, list[jax.Array], list[pl.BlockSpec]]:
    """Return the boundary of text and video, and the arrays and specs that `_finished` needs after a product."""

    def table(rows: int) -> pl.BlockSpec:
        return pl.BlockSpec((rows, columns), lambda n, b, t, scalars: (0, n))

    if after is None:
        return jnp.int32(0), [], []
    bias = jnp.zeros((1, outputs), jnp.float32) if after.bias is None else after.bias.astype(jnp.float32)[None]
    if isinstance(after, Gelu):
        return jnp.int32(0), [bias], [table(1)]
    return after.boundary, [bias, after.hidden, after.gates], [table(1), tokens_spec, table(2)]


def _counted(
    real_tokens: jax.Array | None, after: Residual | Gelu | None, batch: int, outputs: int, columns: int
) -> Counted | None:
    """Return what `_finished` adds up after a product."""
    if real_tokens is None or after is None:
        return None
    return Counted(real_tokens, 2 if isinstance(after, Residual) else 1, batch * outputs, columns)


def _finished(y, refs, rows, start, boundary, dtype, sums):
    """Do to a product y [tokens, outputs] what comes after it; `refs` are blocks of the arrays of `_epilogue`."""
    if not refs:
        return y.astype(dtype)
    bias_ref, *residual_refs = refs
    if residual_refs:
        hidden_ref, gates_ref = residual_refs
        y = y.astype(hidden_ref.dtype).astype(jnp.float32) + bias_ref[...]
        if sums:
            sums.add(0, y, start, axis=0)
        y = hidden_ref[0, rows].astype(jnp.float32) + by_part(gates_ref, start, len(y), boundary) * y
    else:
        y = jax.nn.gelu(y + bias_ref[...], approximate=True)
    y = y.astype(dtype)
    if sums:
        sums.add(1 if residual_refs else 0, y, start, axis=0)
    return y
