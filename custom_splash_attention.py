"""Splash Attention in base 2 for TPUs whose MXU is wider than a head (Pallas).

The kernel computes S^T = K Q^T and O^T = V^T P^T, so that nothing is transposed in it and the wide P^T is the
stationary operand of the second product. What softmax subtracts from a row of scores, and the mask of padded keys,
ride in the first product: a head fills only a part of the MXU's 256 rows, and columns appended to Q and K use more.

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
BKVSIZE = 65536
BKVCOMPUTESIZE = 4352
BKVCOMPUTEINSIZE = 256
USE_K_SMOOTH = True
USE_CUSTOM_ATTENTION = True

LANES = 128
QUERY_TILE = 256  # queries in one product: the MXU's width
LAG = 5  # tiles between a tile's two products: time for exp2, and for pushing P^T into the MXU
VMEM_LIMIT = 64 * 2**20  # bytes
SHIFT = 32  # fast path: weights are at most 2^SHIFT; the middle of float32's range is left for small ones
LIMIT = 100  # fast path: the bound may exceed a row's maximum by this much (log2)
OFFSET_LIMIT = 2**12  # fast path: what is subtracted may be this large (log2) before float32 sums lose digits
MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """How the kernel divides its work; all in tokens.

    A grid step holds block_q queries and block_kv keys in VMEM, and goes over the keys in passes of block_kv_compute
    (the last may be shorter). A pass is unrolled: products of block_kv_compute_in keys and 256 queries.
    """

    block_q: int = BQSIZE
    block_kv: int = BKVSIZE
    block_kv_compute: int = BKVCOMPUTESIZE
    block_kv_compute_in: int = BKVCOMPUTEINSIZE

    def check(self, head_dim: int, itemsize: int) -> None:
        """Raise ValueError, naming the nearest values that work, if the kernel cannot take these sizes."""
        for field in dataclasses.fields(self):
            name, size = field.name, getattr(self, field.name)
            if size < LANES or size % LANES:
                nearest = sorted({max(size // LANES, 1) * LANES, (max(size, 0) // LANES + 1) * LANES})
                raise ValueError(
                    f"{name}={size} is not a multiple of {LANES}; the nearest that work: {_either(nearest)}"
                )
        per_query, per_key = _vmem(head_dim, itemsize)
        used = self.block_q * per_query + self.block_kv * per_key
        if used > VMEM_LIMIT:
            block_q = (VMEM_LIMIT - self.block_kv * per_key) // per_query // LANES * LANES
            block_kv = (VMEM_LIMIT - self.block_q * per_query) // per_key // LANES * LANES
            fits = [f"block_q={block_q}"] * (block_q > 0) + [f"block_kv={block_kv}"] * (block_kv > 0)
            half = [VMEM_LIMIT // 2 // size // LANES * LANES for size in (per_query, per_key)]
            fits = fits or [f"block_q={half[0]} with block_kv={half[1]}"]
            raise ValueError(
                f"block_q={self.block_q} and block_kv={self.block_kv} need {used / 2**20:.0f} MiB of VMEM, of "
                f"{VMEM_LIMIT >> 20}; the nearest that work: {_either(fits)}"
            )

    def clipped(self, q_len: int, kv_len: int) -> "BlockSizes":
        """No longer than the sequences."""
        block_q, block_kv = min(self.block_q, _up(q_len, LANES)), min(self.block_kv, _up(kv_len, LANES))
        return BlockSizes(block_q, block_kv, min(self.block_kv_compute, block_kv), self.block_kv_compute_in)

    def fitted(self, q_len: int, kv_len: int, head_dim: int, itemsize: int) -> "BlockSizes":
        """These sizes as upper limits, with the least padding, in as few blocks of keys as VMEM allows."""
        sizes = range(min(2 * QUERY_TILE, self.block_q), self.block_q + 1, QUERY_TILE)
        block_q = min(sizes, key=lambda size: (_up(q_len, size), -size))
        # The unrolled program stays as long: a float32 product takes about eight times the instructions.
        work = self.block_q * self.block_kv_compute // (8 if itemsize == 4 else 1)
        compute = max(work // block_q // self.block_kv_compute_in, 1) * self.block_kv_compute_in
        per_query, per_key = _vmem(head_dim, itemsize)
        block_kv = min(self.block_kv, (VMEM_LIMIT - block_q * per_query) // per_key)
        block_kv = _up(-(-kv_len // -(-kv_len // block_kv)), LANES)
        return BlockSizes(block_q, block_kv, compute, self.block_kv_compute_in).clipped(q_len, kv_len)


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
    if block_sizes is None:
        blocks = DEFAULT_BLOCK_SIZES.fitted(q_len, kv_len, head_dim, query.dtype.itemsize)
    else:
        blocks = block_sizes.clipped(q_len, kv_len)
        block_sizes.check(head_dim, query.dtype.itemsize)

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
    safe = ((factor * (bound - centre) <= LIMIT) & (factor * jnp.abs(bound) <= OFFSET_LIMIT)).all(1)
    bound = jnp.where(safe[:, None], bound - SHIFT / factor, 0)
    digits = jnp.finfo(dtype)
    high = lax.reduce_precision(bound, digits.nexp, digits.nmant)  # a pair of casts might be optimised away
    low = (bound - high).astype(dtype)
    spare = _rows(head_dim) - head_dim - 3

    appended = [
        -high[:, None].astype(dtype),
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
    # Its program is longer, and speed is not what it is for.
    short = dataclasses.replace(blocks, block_kv_compute=min(blocks.block_kv_compute, 4 * blocks.block_kv_compute_in))

    def repair(output):
        def head(index, output):
            def online(output):
                arrays = [lax.dynamic_slice_in_dim(array, index, 1) for array in operands]
                return lax.dynamic_update_slice_in_dim(output, call(*arrays, blocks=short, online=True), index, 0)

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

    def weigh(queries, keys):
        weights = jnp.exp2(_scores(q_ref, k_ref, queries, keys) * factor)
        sum_ref[:, queries] += _fold(weights)
        return weights.astype(v_ref.dtype)

    def add(queries, keys, weights):
        output_ref[:, queries] += _product(v_ref[0, :, keys], weights)

    _attend(o_ref, output_ref, sum_ref, blocks, weigh, add)


def _online_kernel(q_ref, k_ref, v_ref, o_ref, output_ref, sum_ref, max_ref, *, factor, blocks):
    """Weights relative to the largest score so far; what was summed before shrinks when it grows."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        max_ref[...] = jnp.full_like(max_ref, MASKED)

    def weigh(queries, keys):
        scores = _scores(q_ref, k_ref, queries, keys)
        before = max_ref[:, queries]
        largest = jnp.maximum(before, scores.max(0, keepdims=True))
        max_ref[:, queries] = largest
        shrink = jnp.exp2((before - largest) * factor)
        weights = jnp.exp2((scores - largest) * factor)
        sum_ref[:, queries] = sum_ref[:, queries] * shrink + _fold(weights)
        return weights.astype(v_ref.dtype), shrink

    def add(queries, keys, weighed):
        weights, shrink = weighed
        output_ref[:, queries] = output_ref[:, queries] * shrink + _product(v_ref[0, :, keys], weights)

    _attend(o_ref, output_ref, sum_ref, blocks, weigh, add)


def _attend(o_ref, output_ref, sum_ref, blocks, weigh, add):
    """A grid step: clear the sums before the first block of keys, add every pass, divide after the last block."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        output_ref[...] = jnp.zeros_like(output_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    passes, rest = divmod(blocks.block_kv, blocks.block_kv_compute)

    @functools.partial(lax.fori_loop, 0, passes, init_val=None)
    def _(index, _):
        first = pl.multiple_of(index * blocks.block_kv_compute, LANES)
        _pipeline(first, blocks.block_kv_compute, blocks, weigh, add)

    _pipeline(passes * blocks.block_kv_compute, rest, blocks, weigh, add)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        o_ref[0] = (output_ref[...] / sum_ref[...].sum(0, keepdims=True)).astype(o_ref.dtype)


def _pipeline(first, length, blocks, weigh, add):
    """Unroll a pass over keys first ... first + length: weigh a tile, and add its values LAG tiles later.

    The MXU takes the products in this order, so the lag is what keeps it busy while a tile's weights are made.
    """
    pending = []
    for start in range(0, length, blocks.block_kv_compute_in):
        keys = pl.ds(first + start, min(blocks.block_kv_compute_in, length - start))
        for query in range(0, blocks.block_q, QUERY_TILE):
            queries = pl.ds(query, min(QUERY_TILE, blocks.block_q - query))
            pending.append((queries, keys, weigh(queries, keys)))
            if len(pending) > LAG:
                add(*pending.pop(0))
    for tile in pending:
        add(*tile)


def _scores(q_ref, k_ref, queries, keys):
    """Scores of a tile, transposed: [keys, queries], float32."""
    return _product(k_ref[0, keys, :], q_ref[0, :, queries])


def _product(left, right):
    """left @ right in float32; float32 operands keep their digits."""
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot(left, right, precision=precision, preferred_element_type=jnp.float32)


def _fold(weights):
    """Sum a tile's rows down to 8, a register's height: no work across the rows of a register."""
    return weights.reshape(-1, 8, weights.shape[1]).sum(0)


def _rows(head_dim: int) -> int:
    """Rows of the first product: a head, the bound's two parts and the mask, in whole bfloat16 registers."""
    return _up(head_dim + 3, 16)


def _vmem(head_dim: int, itemsize: int) -> tuple[int, int]:
    """Bytes of VMEM that a query and a key take in a grid step; inputs and the output are double-buffered."""
    rows = _rows(head_dim)
    return 2 * itemsize * (rows + head_dim) + 4 * (head_dim + 16), 2 * itemsize * (_up(rows, LANES) + head_dim)


def _either(values) -> str:
    return " or ".join(map(str, values))


def _up(length: int, unit: int) -> int:
    return -(-length // unit) * unit
