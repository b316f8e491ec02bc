"""What the fast kernel subtracts from a row's scores: a bound for all keys of the head that are not padding.

It is also a bound for the keys of a window. It may be too far above them, where a head's weight lies outside its
window; then the row's sum of weights shows it, and the row is computed again by the online kernel.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from cogvideox.models.transformer.sparse.layout import LANES, AlignedLayout
from custom_splash_attention import BOUND_TILES, Heads, core, in_hbm, key_statistics, query_bounds


def key_bounds(
    queries: jax.Array,
    keys: jax.Array,
    layout: AlignedLayout,
    *,
    heads: Heads,
    factor: float,
    k_smooth: bool,
    interpret: Any,
    after: jax.Array | None = None,
) -> jax.Array:
    """Compute the bound of each query, see `custom_splash_attention.query_bounds`, float32 [tiles, heads, 1, 128].

    Args:
        queries, keys: [tiles, heads or more, head_dim, 128]; the keys are those of the whole sequence.
        layout: of the sequence.
        heads: where they are in the arrays.
        factor: of the scores, in base 2.
        k_smooth: take the mean of the keys out.
        interpret: run in Pallas' interpreter.
        after: see `sparse_attention`.
    """
    queries, keys = in_hbm([queries, keys], interpret)
    before = [] if after is None else [after]
    head_dim = keys.shape[2]
    block = min(layout.tiles, BOUND_TILES)
    blocks = -(-layout.tiles // block)
    tile_tokens = np.pad(layout.tile_tokens(), (0, blocks * block - layout.tiles))
    moved = len(keys) * heads.number * head_dim * LANES * keys.dtype.itemsize
    row = jax.ShapeDtypeStruct((heads.number, 1, LANES), jnp.float32)
    mean, radius = pl.pallas_call(
        functools.partial(_key_statistics, real_keys=layout.real_tokens, k_smooth=k_smooth),
        name="exp2_splash_aligned_keys",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(heads.number, 2, blocks),
            in_specs=[
                pl.BlockSpec((block, 1, head_dim, LANES), lambda h, phase, j, _: (j, heads.key + h, 0, 0)),
                *[pl.BlockSpec(memory_space=pl.ANY)] * len(before),
            ],
            out_specs=[
                pl.BlockSpec((1, head_dim, LANES), lambda h, *_: (h, 0, 0)),
                pl.BlockSpec((1, 1, LANES), lambda h, *_: (h, 0, 0)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((heads.number, head_dim, LANES), jnp.float32), row],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=core().vmem
        ),
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=moved, transcendentals=0),
        interpret=interpret,
    )(jnp.asarray(tile_tokens), keys, *before)
    return query_bounds(
        queries,
        mean,
        radius,
        factor=factor,
        k_smooth=k_smooth,
        kv_len=layout.real_tokens,
        interpret=interpret,
        first=heads.query,
    )


def _key_statistics(tile_tokens, k_ref, *refs, real_keys, k_smooth):
    """Compute the statistics of a head's keys, of which each tile has its own number."""

    def is_real(tile):
        return lax.broadcasted_iota(jnp.int32, (1, LANES), 1) < tile_tokens[tile]

    *_, mean_ref, radius_ref = refs
    key_statistics(is_real, k_ref, mean_ref, radius_ref, keys=real_keys, k_smooth=k_smooth)
