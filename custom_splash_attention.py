"""Splash Attention in base 2 for TPUs whose MXU is wider than a head (Pallas).

The kernel computes S^T = K Q^T and O^T = V^T P^T, so that nothing is transposed in it and the wide P^T is the
stationary operand of the second product. What softmax subtracts from a row of scores, and the mask of padded keys,
ride in the first product: a head fills only a part of the MXU's 256 rows, and columns appended to Q and K use some more.

Two kernels share this. The fast one subtracts an upper bound of the row's maximum, known beforehand: with the mean of
the keys taken out (any constant in a row cancels in the softmax), |q . (k - mean)| <= |q| max|k - mean| by
Cauchy-Schwarz, and the row's maximum is at least its mean, 0. A head where the two are too far apart for float32 takes
the online kernel, with the running maximum of Milakov and Gimelshein (arXiv:1805.02867) and FlashAttention
(arXiv:2205.14135).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

BQSIZE = 1536
BKVSIZE = 8704
BKVCOMPUTESIZE = 256
BKVCOMPUTEINSIZE = 256
USE_K_SMOOTH = True
USE_CUSTOM_ATTENTION = True

LANES = 128
QUERY_TILE = 256  # queries in one product: the MXU's width
LAG = 4  # tiles between a tile's two products: time for exp2, and for pushing P^T into the MXU
VMEM_LIMIT = 64 * 2**20  # bytes
SHIFT = 32  # fast path: weights are at most 2^SHIFT; the middle of float32's range is left for small ones
LIMIT = 100  # fast path: the bound may exceed a row's maximum by this much (log2)
OFFSET_LIMIT = 2**12  # fast path: what is subtracted may be this large (log2) before float32 sums lose digits
MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """How the kernel divides its work; all in tokens.

    block_q x block_kv is one grid step, unrolled. A step goes over its keys in passes of block_kv_compute, each over
    all queries, in products of block_kv_compute_in keys; the last pass of a block may be shorter.
    """

    block_q: int = BQSIZE
    block_kv: int = BKVSIZE
    block_kv_compute: int = BKVCOMPUTESIZE
    block_kv_compute_in: int = BKVCOMPUTEINSIZE

    def check(self, head_dim: int, itemsize: int) -> None:
        """Raise ValueError, naming the nearest values that work, if the kernel cannot take these sizes."""
        for field in dataclasses.fields(self):
            name, size = field.name, getattr(self, field.name)
            unit = self.block_kv_compute_in if name == "block_kv_compute" else LANES
            if size < unit or size % unit:
                below, above = size // unit * unit, (size // unit + 1) * unit
                nearest = f"{below} and {above}" if below > 0 else above
                raise ValueError(f"{name}={size} is not a multiple of {unit}; the nearest that work: {nearest}")
        used, per_query, per_key = self._vmem(head_dim, itemsize)
        if used > VMEM_LIMIT:
            spare = VMEM_LIMIT // 2 // LANES * LANES
            fits_q = (VMEM_LIMIT - self.block_kv * per_key) // per_query // LANES * LANES
            fits_kv = (VMEM_LIMIT - self.block_q * per_query) // per_key // LANES * LANES
            nearest = [f"block_q={fits_q}"] * (fits_q > 0) + [f"block_kv={fits_kv}"] * (fits_kv > 0)
            nearest = nearest or [f"block_q={spare // per_query} with block_kv={spare // per_key}"]
            raise ValueError(
                f"block_q={self.block_q}, block_kv={self.block_kv} need {used / 2**20:.0f} MiB of VMEM, the kernel has "
                f"{VMEM_LIMIT >> 20}; the nearest that work: {' or '.join(nearest)}"
            )

    def _vmem(self, head_dim: int, itemsize: int) -> tuple[int, int, int]:
        """Bytes that a grid step needs, per query and per key; inputs and the output are double-buffered."""
        rows = _rows(head_dim)
        per_query = 2 * itemsize * (rows + head_dim) + 4 * (head_dim + 16) + (4 + itemsize) * self.block_kv_compute
        per_key = 2 * itemsize * (-(-rows // LANES) * LANES + head_dim)
        return self.block_q * per_query + self.block_kv * per_key, per_query, per_key

    def fitted(self, q_len: int, kv_len: int) -> "BlockSizes":
        """The same number of blocks, no longer than these lengths need."""

        def fit(length, size, unit):
            return min(size, _up(-(-length // -(-length // size)), unit))

        return dataclasses.replace(
            self, block_q=fit(q_len, self.block_q, QUERY_TILE), block_kv=fit(kv_len, self.block_kv, LANES)
        )


DEFAULT_BLOCK_SIZES = BlockSizes()
SEED_BLOCK_SIZES = BlockSizes(3328, 2816, 256, 256)


def splash_attention(
    query, key, value, *, scale=None, block_sizes=None, k_smooth=USE_K_SMOOTH, interpret=None
) -> jax.Array:
    """softmax(scale query key^T) value, without a mask.

    Args:
        query: [batch, heads, q_len, head_dim], bfloat16 or float32.
        key, value: [batch, heads, kv_len, head_dim], of the query's dtype.
        scale: positive factor of the scores; by default head_dim ** -0.5.
        block_sizes: by default DEFAULT_BLOCK_SIZES, made shorter where that saves padding.
        k_smooth: take the mean of the keys out of the bound, exact for softmax; fewer heads need the online kernel.
        interpret: run in Pallas' interpreter; by default where the call is not compiled for a TPU.

    Returns:
        [batch, heads, q_len, head_dim] of the query's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit together, or block sizes that the kernel cannot take.
    """
    batch, heads, q_len, head_dim = query.shape
    kv_len = key.shape[2]
    if key.shape != (batch, heads, kv_len, head_dim) or value.shape != key.shape or not kv_len:
        raise ValueError(f"shapes do not fit together: query {query.shape}, key {key.shape}, value {value.shape}")
    if not query.dtype == key.dtype == value.dtype or query.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"expected bfloat16 or float32 throughout, got {query.dtype}, {key.dtype}, {value.dtype}")
    scale = head_dim**-0.5 if scale is None else scale
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    (block_sizes or DEFAULT_BLOCK_SIZES).check(head_dim, query.dtype.itemsize)
    if block_sizes is None:
        blocks = DEFAULT_BLOCK_SIZES.fitted(q_len, kv_len)
    else:
        short = min(block_sizes.block_q, _up(q_len, LANES)), min(block_sizes.block_kv, _up(kv_len, LANES))
        blocks = dataclasses.replace(block_sizes, block_q=short[0], block_kv=short[1])

    flat = [array.reshape(batch * heads, -1, head_dim) for array in (query, key, value)]
    operands, safe = _operands(*flat, scale * math.log2(math.e), blocks, k_smooth)
    run = functools.partial(_run, factor=scale * math.log2(math.e), blocks=blocks)
    if interpret is None:
        output = lax.platform_dependent(
            operands,
            safe,
            tpu=functools.partial(run, interpret=False),
            default=functools.partial(run, interpret=True),
        )
    else:
        output = run(operands, safe, interpret=interpret)
    return output[:, :, :q_len].swapaxes(1, 2).reshape(query.shape)


def _operands(query, key, value, factor, blocks, k_smooth):
    """What the kernels read, and which heads [heads] may take the fast one.

    Appended to a query: minus its bound in two parts, the second for what bfloat16 drops from the first, and 1.
    Appended to a key: 1, 1, and the mask. The online kernel gets no bound.
    """
    dtype = query.dtype
    heads, q_len, head_dim = query.shape
    kv_len = key.shape[1]
    queries, keys = query.astype(jnp.float32), key.astype(jnp.float32)
    mean = keys.mean(1, keepdims=True)
    centre = jnp.einsum("hqd,hkd->hqk", queries, mean, precision="highest")[..., 0]  # the mean score of a row
    length = jnp.linalg.norm(queries, axis=-1)
    if k_smooth:
        bound = centre + length * jnp.linalg.norm(keys - mean, axis=-1).max(1, keepdims=True)
    else:
        bound = length * jnp.linalg.norm(keys, axis=-1).max(1, keepdims=True)
    safe = (factor * (bound - centre) <= LIMIT) & (factor * jnp.abs(bound) <= OFFSET_LIMIT)
    safe = safe.all(1)
    bound = jnp.where(safe[:, None], bound - SHIFT / factor, 0)
    high = bound.astype(dtype)
    low = (bound - high.astype(jnp.float32)).astype(dtype)
    spare = _rows(head_dim) - head_dim - 3

    appended = [
        -high[:, None],
        -low[:, None],
        jnp.ones((heads, 1, q_len), dtype),
        jnp.zeros((heads, spare, q_len), dtype),
    ]
    queries = jnp.concatenate([query.swapaxes(1, 2), *appended], 1)
    pad = -kv_len % blocks.block_kv
    row = jnp.zeros(3 + spare, dtype).at[:2].set(1)
    appended = jnp.where(jnp.arange(kv_len + pad)[:, None] < kv_len, row, row.at[2].set(MASKED))
    keys = jnp.pad(key, ((0, 0), (0, pad), (0, 0)))
    keys = jnp.concatenate([keys, jnp.broadcast_to(appended, (heads, *appended.shape))], 2)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, -q_len % blocks.block_q)))
    return (queries, keys, jnp.pad(value.swapaxes(1, 2), ((0, 0), (0, 0), (0, pad)))), safe


def _run(operands, safe, *, factor, blocks, interpret):
    """The fast kernel for all heads, then the online kernel over those, if any, that may not take it."""
    call = functools.partial(_call, factor=factor, blocks=blocks, interpret=interpret)

    def repair(output):
        def head(index, output):
            def online(output):
                arrays = [lax.dynamic_slice_in_dim(array, index, 1) for array in operands]
                return lax.dynamic_update_slice_in_dim(output, call(*arrays, online=True), index, 0)

            return lax.cond(safe[index], lambda output: output, online, output)

        return lax.fori_loop(0, safe.size, head, output)

    output = call(*operands)
    return lax.cond(safe.all(), lambda output: output, repair, output)


def _call(queries, keys, values, *, factor, blocks, interpret, online=False):
    """One kernel over [heads, rows, q_len], [heads, kv_len, rows], [heads, head_dim, kv_len], lengths padded to blocks.

    Returns [heads, head_dim, q_len].
    """
    heads, rows, q_len = queries.shape
    head_dim, kv_len = values.shape[1:]
    block_q, block_kv = blocks.block_q, blocks.block_kv
    assert q_len % block_q == 0 and kv_len % block_kv == 0 and keys.shape == (heads, kv_len, rows)
    return pl.pallas_call(
        functools.partial(_online_kernel if online else _fast_kernel, factor=factor, blocks=blocks),
        name="exp2_splash_online" if online else "exp2_splash",
        grid=(heads, q_len // block_q, kv_len // block_kv),
        in_specs=[
            pl.BlockSpec((1, rows, block_q), lambda h, i, j: (h, 0, i)),
            pl.BlockSpec((1, block_kv, rows), lambda h, i, j: (h, j, 0)),
            pl.BlockSpec((1, head_dim, block_kv), lambda h, i, j: (h, 0, j)),
        ],
        out_specs=pl.BlockSpec((1, head_dim, block_q), lambda h, i, j: (h, 0, i)),
        out_shape=jax.ShapeDtypeStruct((heads, head_dim, q_len), queries.dtype),
        scratch_shapes=[
            pltpu.VMEM((head_dim, block_q), jnp.float32),
            pltpu.VMEM((8, block_q), jnp.float32),
            *[pltpu.VMEM((1, block_q), jnp.float32)] * online,
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=interpret,
    )(queries, keys, values)


def _fast_kernel(q_ref, k_ref, v_ref, o_ref, output_ref, sum_ref, *, factor, blocks):
    """Weights relative to the bound, which is part of the first product."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        output_ref[...] = jnp.zeros_like(output_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def weights(queries, keys):
        weight = jnp.exp2(_scores(q_ref, k_ref, queries, keys) * factor)
        sum_ref[:, queries] += _fold(weight, jnp.add)
        return weight

    def add(queries, keys, weight):
        output_ref[:, queries] += _product(v_ref[0, :, keys], weight)

    _pipeline(blocks, weights, add)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        o_ref[0] = (output_ref[...] / sum_ref[...].sum(0, keepdims=True)).astype(o_ref.dtype)


def _online_kernel(q_ref, k_ref, v_ref, o_ref, output_ref, sum_ref, max_ref, *, factor, blocks):
    """Weights relative to the largest score so far; what was summed before shrinks when it grows."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        output_ref[...] = jnp.zeros_like(output_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        max_ref[...] = jnp.full_like(max_ref, MASKED)

    def weights(queries, keys):
        scores = _scores(q_ref, k_ref, queries, keys)
        largest = jnp.maximum(max_ref[:, queries], scores.max(0, keepdims=True))
        shrink = jnp.exp2((max_ref[:, queries] - largest) * factor)
        max_ref[:, queries] = largest
        weight = jnp.exp2((scores - largest) * factor)
        sum_ref[:, queries] = sum_ref[:, queries] * shrink + _fold(weight, jnp.add)
        return weight, shrink

    def add(queries, keys, weight):
        weight, shrink = weight
        output_ref[:, queries] = output_ref[:, queries] * shrink + _product(v_ref[0, :, keys], weight)

    _pipeline(blocks, weights, add)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        o_ref[0] = (output_ref[...] / sum_ref[...].sum(0, keepdims=True)).astype(o_ref.dtype)


def _pipeline(blocks, weights, add):
    """Unroll a grid step's tiles: weights(queries, keys) of a tile, and add(queries, keys, weights) LAG tiles later.

    The MXU takes the products in this order, so the lag is what keeps it busy while a tile's weights are made.
    """
    pending = []
    for start in range(0, blocks.block_kv, blocks.block_kv_compute):
        stop = min(start + blocks.block_kv_compute, blocks.block_kv)
        for queries in _slices(0, blocks.block_q, QUERY_TILE):
            for keys in _slices(start, stop, blocks.block_kv_compute_in):
                pending.append((queries, keys, weights(queries, keys)))
                if len(pending) > LAG:
                    add(*pending.pop(0))
    for tile in pending:
        add(*tile)


def _scores(q_ref, k_ref, queries, keys):
    """Scores of a tile, transposed: [keys, queries], float32."""
    return _product(k_ref[0, keys, :], q_ref[0, :, queries])


def _product(left, right):
    """left @ right in float32; a float32 operand keeps its digits."""
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot(left, right.astype(left.dtype), precision=precision, preferred_element_type=jnp.float32)


def _fold(tile, operation):
    """Combine a tile's rows down to 8, a register's height: no work across the rows of a register."""
    rows = [tile[row : row + 8] for row in range(0, tile.shape[0], 8)]
    return functools.reduce(operation, rows)


def _slices(start, stop, step):
    return [slice(low, min(low + step, stop)) for low in range(start, stop, step)]


def _rows(head_dim: int) -> int:
    """Rows of the first product: a head, the bound's two parts and the mask, in whole bfloat16 registers."""
    return _up(head_dim + 3, 16)


def _up(length: int, unit: int) -> int:
    return -(-length // unit) * unit
