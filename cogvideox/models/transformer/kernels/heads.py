"""The kernel that projects tokens to heads, for queries, keys and values."""

import functools
from typing import Any, NamedTuple

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
    call,
    fitting,
    matmul,
)
from cogvideox.models.transformer.layers import moments


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


class Split(NamedTuple):
    """Which of the heads are projected to, and where they are written.

    Attributes:
        parts: chips that share the heads after the exchange.
        group: which group of each chip's heads, counted from 0; the heads of a group are neighbours.
        groups: how many there are.
        place: which of the places of an array, counted from 0: it may hold queries, keys and values.
        places: how many it has.
    """

    parts: int
    group: int = 0
    groups: int = 1
    place: int = 0
    places: int = 1


def to_heads(
    x: jax.Array,
    weight: Weight,
    bias: jax.Array | None,
    heads: int,
    split: Split,
    norm: QKNorm | None,
    interpret: bool,
    real_tokens: jax.Array | None = None,
    into: jax.Array | None = None,
) -> Summed:
    """Project x [batch, tokens, embed] to a group of the heads, and normalise and rotate them if there is a `norm`.

    Args:
        x: tokens are whole tiles.
        weight: of heads * head_dim outputs.
        bias: [heads * head_dim] or None.
        heads: of this chip before the exchange.
        split: to which of them it projects, and where it writes them.
        norm: for queries and keys.
        interpret: run in Pallas' interpreter.
        real_tokens: how many tokens of each tile are not padding, int32 [tiles]; None for no sums.
        into: what an earlier call has returned for another place of the same array; None for a new array.

    Returns:
        [parts, tiles, places * batch, heads of the group, head_dim, 128], of the dtype of x; and the `tap.sums` of the
        projection and of the norm, if they are asked for.
    """
    (batch, tokens, embed), parts = x.shape, split.parts
    head_dim, tiles, own = weight.outputs // heads, tokens // LANES, heads // parts // split.groups
    chips, block_heads = head_blocks(parts, own, fitting(ROWS, x.dtype) // head_dim)
    block_tiles, blocks = min(TOKENS // LANES, tiles), own // block_heads
    block = chips, block_heads, head_dim

    def place(n: Any) -> tuple[Any, Any, int]:  # of a block among the chips and the heads of each
        return n // blocks, split.group * blocks + n % blocks, 0

    by_chip = parts, heads // parts, head_dim
    bias = jnp.zeros(weight.outputs, jnp.float32) if bias is None else bias.astype(jnp.float32)
    arrays = [bias.reshape(*by_chip, 1)]
    specs = [pl.BlockSpec((*block, 1), lambda n, b, t, scalars: (*place(n), 0))]
    if norm:
        column = pl.BlockSpec((head_dim, 1), lambda n, b, t, scalars: (0, 0))
        rotary = pl.BlockSpec((head_dim // 2, block_tiles * LANES), lambda n, b, t, scalars: (0, t))
        arrays += [norm.weight.astype(jnp.float32)[:, None], norm.bias.astype(jnp.float32)[:, None]]
        arrays += [norm.cos.T, norm.sin.T]
        specs += [column, column, rotary, rotary]
    x_spec = pl.BlockSpec((1, block_tiles * LANES, embed), lambda n, b, t, scalars: (b, t, 0))
    weight_spec = pl.BlockSpec((None, *block, embed), lambda n, b, t, scalars: (scalars[1], *place(n), 0))
    outputs = weight.outputs // split.groups
    return call(
        functools.partial(_to_heads, eps=norm.eps if norm else None, interpret=interpret),
        "to_heads",
        (jnp.int32(0), weight.layer),
        [x, weight.stack.reshape(-1, *by_chip, embed), *arrays],
        grid=(parts // chips * blocks, batch, pl.cdiv(tiles, block_tiles)),
        in_specs=[x_spec, weight_spec, *specs],
        out_specs=pl.BlockSpec(
            (chips, block_tiles, 1, block_heads, head_dim, LANES),
            lambda n, b, t, scalars: (n // blocks, t, split.place * batch + b, n % blocks, 0, 0),
        ),
        out_shape=jax.ShapeDtypeStruct((parts, tiles, split.places * batch, own, head_dim, LANES), x.dtype),
        products=x.size * outputs,
        moved=x.size * (parts // chips * blocks) + weight.size // split.groups + batch * tokens * outputs,
        interpret=interpret,
        counted=None if real_tokens is None else Counted(real_tokens, 2 if norm else 1, batch * outputs, LANES),
        into=into,
    )


def head_blocks(parts: int, own: int, most: int) -> tuple[int, int]:
    """Choose how many of a group's chips, and how many of the `own` heads of each, a block has: `most` heads or one."""
    block_heads = max(n for n in range(1, own + 1) if own % n == 0 and n <= max(most, 1))
    chips = max(n for n in range(1, parts + 1) if parts % n == 0 and (n == 1 or n * own <= most))
    return chips, block_heads


def _to_heads(_, x_ref, weight_ref, bias_ref, *refs, eps, interpret, sums):
    """Project a block of tokens, two tiles at a time; while one pair is finished, the MXU can begin with the next."""
    out_ref = refs[-1]
    chips, tiles, _, heads, head_dim, _ = out_ref.shape
    start = pl.program_id(2) * tiles * LANES if sums else None

    def product(first, count):
        x = x_ref[0, pl.ds(first * LANES, count * LANES), :]
        weight, bias = (ref[...].reshape(-1, ref.shape[-1]) for ref in (weight_ref, bias_ref))
        return matmul(weight, x, ((1,), (1,)), interpret) + bias

    def finish(y, first, count):
        y = y.reshape(-1, head_dim, count * LANES)
        if sums:
            sums.add(0, y.reshape(-1, y.shape[-1]), start + first * LANES, axis=1)
        if eps is not None:
            columns = pl.ds(first * LANES, count * LANES)
            weight_ref, bias_ref, cos_ref, sin_ref = refs[:-1]
            norm, rotary = (weight_ref[...], bias_ref[...]), (cos_ref[:, columns], sin_ref[:, columns])
            y = _normalized(y, *norm, eps)
            if sums:
                sums.add(1, y.reshape(-1, y.shape[-1]), start + first * LANES, axis=1)
            y = _rotated(y, *rotary)
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


def _normalized(y, weight, bias, eps):
    """Apply layer norm to float32 [heads, head_dim, tokens], over the second axis."""
    mean, scale = moments(y, eps, axis=1)
    return (y - mean) * scale * weight + bias


def _rotated(y, cos, sin):
    """Apply the rotary embedding to float32 [heads, head_dim, tokens], over the second axis."""
    first, second = jnp.split(y, 2, axis=1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)
