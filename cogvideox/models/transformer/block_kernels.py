"""The parts of a transformer block around attention as Pallas kernels for TPUs, each beside a matrix product.

Beside its products XLA goes over the whole array again for each norm, rotary embedding or residual, and it does not
write the attention kernel's layout from a product without copies. Here all that is done to a block in VMEM.

Between the projections to and from the heads arrays are tiles: 128 tokens of one head, [head_dim, 128], a token a
column, as custom_splash_attention.py takes them. A chip's tiles are [sp, tiles, batch, heads, head_dim, 128]. Before
attention the first axis counts the chips that will attend the heads, and after it the chips that they come from. So the
exchange between chips cuts and joins along the first axis of memory, and nothing is copied on either side of it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128  # tokens in a tile
PRODUCT_TILES = 2  # tiles in a product: the MXU's width
ROWS = 1536  # outputs in a block of a weight, in bfloat16
TOKENS = 512  # tokens in a block
TOKEN_VALUES, WEIGHT_VALUES = 3 * 2**20, 9 * 2**20  # values in a block of tokens and of a weight at most, in bfloat16
NORM_ROWS = 16  # tokens that it normalises at a time: the rows of a bfloat16 tile
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


class QKNorm(NamedTuple):
    """Layer norm over head_dim and rotary embedding, pairs in two halves.

    Attributes:
        weight, bias: of the norm, [head_dim].
        eps: of the norm.
        cos, sin: float32 [tokens, head_dim / 2].
    """

    weight: jax.Array
    bias: jax.Array
    eps: float
    cos: jax.Array
    sin: jax.Array


def to_heads(
    x: jax.Array,
    weight: Weight,
    bias: jax.Array | None,
    heads: int,
    sp: int,
    norm: QKNorm | None,
    interpret: bool,
) -> jax.Array:
    """Project x [batch, tokens, embed] to heads, and normalise and rotate them if there is a `norm`.

    Args:
        x: tokens are whole tiles.
        weight: of heads * head_dim outputs.
        bias: [heads * head_dim] or None.
        heads: of this chip before the exchange.
        sp: chips that share them after the exchange.
        norm: for queries and keys.
        interpret: run in Pallas' interpreter.

    Returns:
        [sp, tiles, batch, heads / sp, head_dim, 128], of the dtype of x.
    """
    batch, tokens, embed = x.shape
    head_dim, tiles, own = weight.outputs // heads, tokens // LANES, heads // sp
    chips, block_heads = head_blocks(sp, own, fitting(ROWS, x.dtype) // head_dim)
    block_tiles, groups = min(TOKENS // LANES, tiles), own // block_heads
    rows = chips * block_heads * head_dim
    bias = jnp.zeros(weight.outputs, jnp.float32) if bias is None else bias.astype(jnp.float32)
    arrays, specs = [bias[:, None]], [pl.BlockSpec((rows, 1), lambda n, b, t, scalars: (n, 0))]
    if norm:
        column = pl.BlockSpec((head_dim, 1), lambda n, b, t, scalars: (0, 0))
        rotary = pl.BlockSpec((head_dim // 2, block_tiles * LANES), lambda n, b, t, scalars: (0, t))
        arrays += [norm.weight.astype(jnp.float32)[:, None], norm.bias.astype(jnp.float32)[:, None]]
        arrays += [norm.cos.T, norm.sin.T]
        specs += [column, column, rotary, rotary]
    x_spec = pl.BlockSpec((1, block_tiles * LANES, embed), lambda n, b, t, scalars: (b, t, 0))
    return _call(
        functools.partial(_to_heads, eps=norm.eps if norm else None, interpret=interpret),
        "to_heads",
        (jnp.int32(0), weight.layer),
        [x, weight.stack, *arrays],
        grid=(sp // chips * groups, batch, pl.cdiv(tiles, block_tiles)),
        in_specs=[x_spec, weight.spec(rows), *specs],
        out_specs=pl.BlockSpec(
            (chips, block_tiles, 1, block_heads, head_dim, LANES),
            lambda n, b, t, scalars: (n // groups, t, b, n % groups, 0, 0),
        ),
        out_shape=jax.ShapeDtypeStruct((sp, tiles, batch, own, head_dim, LANES), x.dtype),
        products=x.size * weight.outputs,
        moved=x.size * (sp // chips * groups) + weight.size + batch * tokens * weight.outputs,
        interpret=interpret,
    )


def _call(kernel, name, scalars, arrays, *, grid, in_specs, out_specs, out_shape, products, moved, interpret):
    """Run a kernel that reads the scalars text_tokens and layer.

    It multiplies `products` pairs of values, and moves `moved` values between HBM and VMEM.
    """
    size = moved * out_shape.dtype.itemsize
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
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", *["arbitrary"] * (len(grid) - 1)), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(flops=2 * products, bytes_accessed=size, transcendentals=0),
        interpret=interpret,
    )(jnp.stack(scalars), *arrays)


def head_blocks(sp: int, own: int, most: int) -> tuple[int, int]:
    """Choose how many of the sp chips, and how many of the `own` heads of each, a block has: `most` heads or one."""
    block_heads = max(n for n in range(1, own + 1) if own % n == 0 and n <= max(most, 1))
    chips = max(n for n in range(1, sp + 1) if sp % n == 0 and (n == 1 or n * own <= most))
    return chips, block_heads


def _to_heads(_, x_ref, weight_ref, bias_ref, *refs, eps, interpret):
    """Project a block of tokens, two tiles at a time; while one pair is finished, the MXU can begin with the next."""
    out_ref = refs[-1]
    chips, tiles, _, heads, head_dim, _ = out_ref.shape

    def product(first, count):
        x = x_ref[0, pl.ds(first * LANES, count * LANES), :]
        return _product(weight_ref[...], x, ((1,), (1,)), interpret) + bias_ref[...]

    def finish(y, first, count):
        y = y.reshape(-1, head_dim, count * LANES)
        if eps is not None:
            columns = pl.ds(first * LANES, count * LANES)
            weight_ref, bias_ref, cos_ref, sin_ref = refs[:-1]
            y = _normalized_and_rotated(
                y, weight_ref[...], bias_ref[...], eps, cos_ref[:, columns], sin_ref[:, columns]
            )
        y = y.astype(out_ref.dtype).reshape(chips, heads, head_dim, count * LANES)
        for tile in range(count):
            out_ref[:, first + tile, 0] = y[..., tile * LANES : (tile + 1) * LANES]

    pending = None
    for first in range(0, tiles, PRODUCT_TILES):
        count = min(PRODUCT_TILES, tiles - first)
        y = product(first, count)
        if pending:
            finish(*pending)
        pending = y, first, count
    finish(*pending)


def moments(x: jax.Array, eps: float, axis: int = -1) -> tuple[jax.Array, jax.Array]:
    """Compute mean and 1 / standard deviation over an axis of float32 `x`, reading it once; also outside of kernels."""
    mean = x.mean(axis, keepdims=True)
    variance = jnp.square(x).mean(axis, keepdims=True) - jnp.square(mean)
    return mean, lax.rsqrt(jnp.maximum(variance, 0.0) + eps)


def _normalized_and_rotated(y, weight, bias, eps, cos, sin):
    """Apply layer norm and rotary embedding to float32 [heads, head_dim, tokens], over the second axis."""
    mean, scale = moments(y, eps, axis=1)
    y = (y - mean) * scale * weight + bias
    first, second = jnp.split(y, 2, axis=1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)


def _product(left, right, contracted, interpret):
    """Compute a matrix product in float32; the interpreter lacks some products of bfloat16 on a CPU."""
    if interpret:
        left, right = left.astype(jnp.float32), right.astype(jnp.float32)
    return lax.dot_general(left, right, (contracted, ((), ())), preferred_element_type=jnp.float32)


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
        gates: of text and of video, float32 [2, embed].
        text_tokens: how many of the tokens, from the first on, are text, int32 scalar.
    """

    hidden: jax.Array
    bias: jax.Array | None
    gates: jax.Array
    text_tokens: jax.Array


def fitting(most: int, dtype: jax.typing.DTypeLike) -> int:
    """Return what fits VMEM of `dtype` where `most` of bfloat16 do: a product of float32 also copies them in parts."""
    return most * 4 // jnp.dtype(dtype).itemsize ** 2


def block_of_outputs(outputs: int, most: int) -> int:
    """Choose how many outputs a block has: whole registers that divide them, up to `most`, or else all."""
    return max([n for n in range(LANES, max(most, LANES) + 1, LANES) if outputs % n == 0], default=outputs)


def from_heads(x: jax.Array, weight: Weight, residual: Residual | None, interpret: bool) -> jax.Array:
    """Multiply heads by the weight of the output projection, and add the result to a `residual` if there is one.

    Args:
        x: [sp, tiles, batch, heads / sp, head_dim, 128].
        weight: of embed outputs and heads * head_dim inputs.
        residual: where this chip has all heads; None for its part of the product alone.
        interpret: run in Pallas' interpreter.

    Returns:
        [batch, tokens, embed] of the dtype of x.
    """
    sp, tiles, batch, own, head_dim, _ = x.shape
    embed, block_tiles = weight.outputs, min(TOKENS // LANES, tiles)
    columns = block_of_outputs(embed, fitting(ROWS, x.dtype))
    tokens_spec = pl.BlockSpec((1, block_tiles * LANES, columns), lambda n, b, t, scalars: (b, t, n))
    text_tokens, arrays, specs = _epilogue(residual, tokens_spec, columns, embed)
    x_spec = pl.BlockSpec((sp, block_tiles, 1, own, head_dim, LANES), lambda n, b, t, scalars: (0, t, b, 0, 0, 0))
    return _call(
        functools.partial(_from_heads, interpret=interpret),
        "from_heads",
        (text_tokens, weight.layer),
        [x, weight.stack, *arrays],
        grid=(embed // columns, batch, pl.cdiv(tiles, block_tiles)),
        in_specs=[x_spec, weight.spec(columns), *specs],
        out_specs=tokens_spec,
        out_shape=jax.ShapeDtypeStruct((batch, tiles * LANES, embed), x.dtype),
        products=x.size * embed,
        moved=x.size * (embed // columns) + weight.size + 2 * batch * tiles * LANES * embed,
        interpret=interpret,
    )


def _from_heads(scalars_ref, x_ref, weight_ref, *refs, interpret):
    """Project a block of tokens, two tiles at a time, to columns, and turn them into rows."""
    tiles, out_ref, start = x_ref.shape[1], refs[-1], pl.program_id(2) * x_ref.shape[1] * LANES
    for first in range(0, tiles, PRODUCT_TILES):
        count = min(PRODUCT_TILES, tiles - first)
        rows = pl.ds(first * LANES, count * LANES)
        x = [x_ref[:, tile, 0].reshape(-1, LANES) for tile in range(first, first + count)]
        y = _product(weight_ref[...], jnp.concatenate(x, axis=1), ((1,), (0,)), interpret).T
        out_ref[0, rows] = _finished(y, refs[:-1], rows, start + first * LANES, scalars_ref[0]).astype(out_ref.dtype)


def _epilogue(
    after: Residual | Gelu | None, tokens_spec: pl.BlockSpec, columns: int, outputs: int
) -> tuple[jax.Array, list[jax.Array], list[pl.BlockSpec]]:
    """Return the number of text tokens, and the arrays and specs that `_finished` needs after a product."""

    def table(rows: int) -> pl.BlockSpec:
        return pl.BlockSpec((rows, columns), lambda n, b, t, scalars: (0, n))

    if after is None:
        return jnp.int32(0), [], []
    bias = jnp.zeros((1, outputs), jnp.float32) if after.bias is None else after.bias.astype(jnp.float32)[None]
    if isinstance(after, Gelu):
        return jnp.int32(0), [bias], [table(1)]
    return after.text_tokens, [bias, after.hidden, after.gates], [table(1), tokens_spec, table(2)]


def _finished(y, refs, rows, start, text_tokens):
    """Do to a product y [tokens, outputs] what comes after it; `refs` are blocks of the arrays of `_epilogue`."""
    if not refs:
        return y
    bias_ref, *residual_refs = refs
    if not residual_refs:
        return jax.nn.gelu(y + bias_ref[...], approximate=True)
    hidden_ref, gates_ref = residual_refs
    y = y.astype(hidden_ref.dtype).astype(jnp.float32) + bias_ref[...]
    return hidden_ref[0, rows].astype(jnp.float32) + _text_or_video(gates_ref, start, len(y), text_tokens) * y


def dense(x: jax.Array, weight: Weight, after: Residual | Gelu | None, interpret: bool) -> jax.Array:
    """Multiply x [batch, tokens, inputs] by a weight.

    Args:
        x: of the dtype of the weight.
        weight: of as many inputs.
        after: what is done to the product; None for a chip's part of the product alone.
        interpret: run in Pallas' interpreter.

    Returns:
        [batch, tokens, outputs] of the dtype of x.
    """
    batch, tokens, inputs = x.shape
    outputs = weight.outputs
    block = min(TOKENS, max(fitting(TOKEN_VALUES, x.dtype) // inputs // LANES, 1) * LANES, tokens)
    columns = block_of_outputs(outputs, min(fitting(ROWS, x.dtype), fitting(WEIGHT_VALUES, x.dtype) // inputs))
    out_spec = pl.BlockSpec((1, block, columns), lambda n, b, t, scalars: (b, t, n))
    text_tokens, arrays, specs = _epilogue(after, out_spec, columns, outputs)
    return _call(
        functools.partial(_dense, interpret=interpret),
        "dense_gelu" if isinstance(after, Gelu) else "dense",
        (text_tokens, weight.layer),
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
    )


def _dense(scalars_ref, x_ref, weight_ref, *refs, interpret):
    """Multiply a block of tokens by a block of the weight."""
    start = pl.program_id(2) * x_ref.shape[1]
    y = _product(x_ref[0], weight_ref[...], ((1,), (1,)), interpret)
    refs[-1][0] = _finished(y, refs[:-1], slice(None), start, scalars_ref[0]).astype(refs[-1].dtype)


def _text_or_video(ref, start, tokens, text_tokens):
    """Choose the row of `ref` [2, embed] for each of some tokens, text or video; returns [tokens, embed]."""
    token = start + lax.broadcasted_iota(jnp.int32, (tokens, 1), 0)
    return jnp.where(token < text_tokens, ref[0:1], ref[1:2])


class Modulation(NamedTuple):
    """What is done to normalised tokens: each is scaled and shifted, text and video differently.

    Attributes:
        scales, shifts: of text and of video, float32 [2, embed].
        text_tokens: how many of the tokens, from the first on, are text, int32 scalar.
    """

    scales: jax.Array
    shifts: jax.Array
    text_tokens: jax.Array


def normalized(hidden: jax.Array, modulation: Modulation, eps: float, interpret: bool) -> jax.Array:
    """Compute the layer norm of hidden states [batch, tokens, embed], modulated; returns an array like `hidden`.

    The kernel reads and writes the array once; XLA reads it twice, and takes longer over it.
    """
    batch, tokens, embed = hidden.shape
    block = min(TOKENS, tokens)
    tokens_spec = pl.BlockSpec((1, block, embed), lambda b, t, scalars: (b, t, 0))
    table = pl.BlockSpec((2, embed), lambda b, t, scalars: (0, 0))
    return _call(
        functools.partial(_normalized, eps=eps),
        "modulated_norm",
        (modulation.text_tokens, jnp.int32(0)),
        [hidden, modulation.scales, modulation.shifts],
        grid=(batch, pl.cdiv(tokens, block)),
        in_specs=[tokens_spec, table, table],
        out_specs=tokens_spec,
        out_shape=jax.ShapeDtypeStruct(hidden.shape, hidden.dtype),
        products=0,
        moved=2 * hidden.size,
        interpret=interpret,
    )


def _normalized(scalars_ref, hidden_ref, scales_ref, shifts_ref, out_ref, *, eps):
    """Normalise a block of tokens, NORM_ROWS at a time, whose values stay in registers or near them."""
    tokens = hidden_ref.shape[1]
    start = pl.program_id(1) * tokens
    for first in range(0, tokens, NORM_ROWS):
        rows = slice(first, min(first + NORM_ROWS, tokens))
        x = hidden_ref[0, rows].astype(jnp.float32)
        mean, scale = moments(x, eps)
        x = (x - mean) * scale
        scale, shift = (_text_or_video(ref, start + first, len(x), scalars_ref[0]) for ref in (scales_ref, shifts_ref))
        out_ref[0, rows] = (x * scale + shift).astype(out_ref.dtype)
