"""Block-sparse attention without the kernel, by XLA, for devices that are no TPUs: all scores, masked."""

import jax
import jax.numpy as jnp
from jax import lax

from cogvideox.models.transformer.sparse.layout import LANES, AlignedLayout
from cogvideox.models.transformer.sparse.patterns import KINDS, Pattern, tile_groups
from cogvideox.models.transformer.sparse.table import HeadTable


def xla_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    table: HeadTable,
    *,
    layout: AlignedLayout,
    scale: float | None = None,
    first_tile: jax.Array | None = None,
) -> jax.Array:
    """Compute what `sparse_attention` does, a tile of queries at a time, all heads together; arguments as there.

    It saves no work: all scores are computed, heads x 128 x tokens of them at a time in float32.

    Returns:
        An array like `queries`, in which tiles beyond the layout's are 0. What stands at padded tokens is undefined.
    """
    head_dim, first = queries.shape[2], jnp.int32(0) if first_tile is None else first_tile
    scale, tiles = head_dim**-0.5 if scale is None else scale, layout.tiles
    place = jnp.argsort(jnp.asarray(table.order))
    kind = (place[:, None] >= jnp.cumsum(jnp.asarray(table.counts))).sum(1)  # of each head, its place in KINDS
    window = jnp.asarray(table.windows)[place]
    of_head = jnp.asarray(tile_groups([Pattern(name) for name in KINDS], layout))[kind]  # [heads, tiles]
    is_text = jnp.arange(tiles) >= layout.video_tiles
    real = jnp.asarray(layout.is_real().reshape(tiles, 1, 1, LANES))
    # XLA lacks some products of bfloat16 on a CPU; the default precision holds all digits of bfloat16.
    keys, values = (jnp.where(real, x[:tiles], 0).astype(jnp.float32) for x in (keys, values))
    precision = lax.Precision.HIGHEST if queries.dtype == jnp.float32 else lax.Precision.DEFAULT

    def one(numbered: tuple[jax.Array, jax.Array]) -> jax.Array:
        query, tile = numbered
        here = jnp.minimum(tile, tiles - 1)
        near = jnp.abs(of_head[:, here][:, None] - of_head) <= window[:, None]
        near = (near | is_text | is_text[here])[:, None, :, None] & real[:, 0, 0]
        scores = jnp.einsum("hdq,khdl->hqkl", query.astype(jnp.float32), keys, precision=precision)
        weights = jax.nn.softmax(jnp.where(near, scores * scale, -jnp.inf), axis=(2, 3))
        output = jnp.einsum("hqkl,khdl->hdq", weights, values, precision=precision)
        return jnp.where(tile < tiles, output, 0).astype(query.dtype)

    return lax.map(one, (queries, first + jnp.arange(len(queries))))
