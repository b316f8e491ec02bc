"""The kernel of a block's norms, whose result the time embedding scales and shifts."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from cogvideox.models.transformer.kernels.common import TOKENS, Counted, Summed, by_part, call
from cogvideox.models.transformer.layers import moments

NORM_ROWS = 16  # tokens that it normalises at a time: the rows of a bfloat16 tile


class Modulation(NamedTuple):
    """What is done to normalised tokens: each is scaled and shifted, those of text and of video differently.

    Attributes:
        scales, shifts: of the two parts, float32 [2, embed].
        boundary: how many of the tokens, from the first on, are in the first part, int32 scalar.
    """

    scales: jax.Array
    shifts: jax.Array
    boundary: jax.Array


def modulated_norm(
    hidden: jax.Array, modulation: Modulation, eps: float, interpret: bool, real_tokens: jax.Array | None = None
) -> Summed:
    """Compute the layer norm of hidden states [batch, tokens, embed], modulated.

    Returns an array like `hidden`, and its `tap.sums` if there are `real_tokens`: how many of each tile are real.

    The kernel reads and writes the array once; XLA reads it twice, and takes longer over it.
    """
    batch, tokens, embed = hidden.shape
    block = min(TOKENS, tokens)
    tokens_spec = pl.BlockSpec((1, block, embed), lambda b, t, scalars: (b, t, 0))
    table = pl.BlockSpec((2, embed), lambda b, t, scalars: (0, 0))
    return call(
        functools.partial(_modulated_norm, eps=eps),
        "modulated_norm",
        (modulation.boundary, jnp.int32(0)),
        [hidden, modulation.scales, modulation.shifts],
        grid=(batch, pl.cdiv(tokens, block)),
        in_specs=[tokens_spec, table, table],
        out_specs=tokens_spec,
        out_shape=jax.ShapeDtypeStruct(hidden.shape, hidden.dtype),
        products=0,
        moved=2 * hidden.size,
        interpret=interpret,
        counted=None if real_tokens is None else Counted(real_tokens, 1, batch * embed, embed),
    )


def _modulated_norm(scalars_ref, hidden_ref, scales_ref, shifts_ref, out_ref, *, eps, sums):
    """Normalise a block of tokens, NORM_ROWS at a time, whose values stay in registers or near them."""
    tokens = hidden_ref.shape[1]
    start = pl.program_id(1) * tokens
    for first in range(0, tokens, NORM_ROWS):
        rows = slice(first, min(first + NORM_ROWS, tokens))
        x = hidden_ref[0, rows].astype(jnp.float32)
        mean, scale = moments(x, eps)
        x = (x - mean) * scale
        scale, shift = (by_part(ref, start + first, len(x), scalars_ref[0]) for ref in (scales_ref, shifts_ref))
        out_ref[0, rows] = (x * scale + shift).astype(out_ref.dtype)
    if sums:
        sums.add(0, out_ref[0], start, axis=0)
