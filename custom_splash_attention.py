"""Splash Attention in base 2 for TPUs whose MXU is wider than a head (Pallas).

The kernel computes S^T = K Q^T and O^T = V^T P^T, so that nothing is transposed in it and the wide P^T is the
stationary operand of the second product. The first product also subtracts what softmax subtracts from a row of scores,
and masks the padded keys: a head fills only a part of the MXU's 256 rows, and columns appended to Q and K use more.

Two kernels work in this way. The fast kernel subtracts an upper bound of the row's maximum, which is known beforehand:
with the mean of the keys taken out (any constant in a row cancels in the softmax), Cauchy-Schwarz gives
|q . (k - mean)| <= |q| max|k - mean|. Where bound and maximum are too far apart for float32, the sum of a row's weights
shows it, and the row's block of queries is computed again by the online kernel, which keeps the running maximum of
Milakov and Gimelshein (arXiv:1805.02867) and FlashAttention (arXiv:2205.14135).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.pallas import tpu as pltpu

BQSIZE = 1536
BKVSIZE = 65536
BKVCOMPUTESIZE = 8704
BKVCOMPUTEINSIZE = 256
USE_K_SMOOTH = True
USE_CUSTOM_ATTENTION = True

LANES = 128
QUERY_TILE = 256  # queries in one product: the MXU's width
VMEM_BESIDE_BLOCKS = 4 * 2**20  # bytes in which the compiler keeps weights between a tile's two products
VALUE_BITS = 8  # fast kernel: with values up to 2^VALUE_BITS no sum overflows; with larger ones it may, and is noticed
GUARD_BITS = 3  # fast kernel: what underflows is less by so many bits than what the output's dtype rounds off
OFFSET_LIMIT = 2**12  # fast kernel: what is subtracted may be this large (log2) before float32 sums lose digits
BOUND_TILES = 384  # tiles of a head that the kernels of the bound hold in VMEM at a time
MASKED = -1e30  # score of a padded key


class Core(NamedTuple):
    """What the kernels need to know of a TPU core; by the compiler's schedules, see docs/speed-log.md.

    Attributes:
        vmem: bytes of VMEM that a kernel may use.
        lag: tiles between a tile's two products: time to compute exp2, and to load P^T into the MXU.
        query_step: a block of queries is by default of a multiple of so many.
    """

    vmem: int = 64 * 2**20
    lag: int = 5
    query_step: int = QUERY_TILE

    @property
    def vmem_for_blocks(self) -> int:
        """Bytes of VMEM that blocks may take."""
        return self.vmem - VMEM_BESIDE_BLOCKS


# By generation, where it is not like v6e. On 7x an odd number of tiles in a block, or a lag of 5, leaves gaps.
CORES = {4: Core(vmem=16 * 2**20, lag=2), 7: Core(lag=4, query_step=2 * QUERY_TILE)}


def core() -> Core:
    """Return the core of the TPU that is compiled for, or v6e's where it is no TPU."""
    try:
        return CORES.get(pltpu.get_tpu_info().generation, Core())
    except ValueError:  # another device, on which kernels are interpreted
        return Core()


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """How the kernel divides its work; all sizes are in tokens.

    A grid step holds block_q queries and block_kv keys in VMEM, and goes over the keys in passes of block_kv_compute
    keys (the last pass may be shorter). A pass is unrolled into products of block_kv_compute_in keys and 256 queries.
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
                alternatives = " or ".join(map(str, nearest))
                raise ValueError(f"{name}={size} is not a multiple of {LANES}; the nearest that work: {alternatives}")
        (per_query, per_key), vmem = _vmem(head_dim, itemsize), core().vmem_for_blocks
        used = self.block_q * per_query + self.block_kv * per_key
        if used > vmem:
            block_q = (vmem - self.block_kv * per_key) // per_query // LANES * LANES
            block_kv = (vmem - self.block_q * per_query) // per_key // LANES * LANES
            fits = [f"block_q={block_q}"] * (block_q > 0) + [f"block_kv={block_kv}"] * (block_kv > 0)
            half = [vmem // 2 // size // LANES * LANES for size in (per_query, per_key)]
            fits = fits or [f"block_q={half[0]} with block_kv={half[1]}"]
            raise ValueError(
                f"block_q={self.block_q} and block_kv={self.block_kv} need {used / 2**20:.0f} MiB of VMEM, of "
                f"{vmem >> 20}; the nearest that work: {' or '.join(fits)}"
            )

    def clipped(self, q_len: int, kv_len: int) -> "BlockSizes":
        """Limit the blocks to the lengths of the sequences."""
        block_q, block_kv = min(self.block_q, round_up(q_len, LANES)), min(self.block_kv, round_up(kv_len, LANES))
        return BlockSizes(block_q, block_kv, min(self.block_kv_compute, block_kv), self.block_kv_compute_in)

    def fitted(self, q_len: int, kv_len: int, head_dim: int, itemsize: int) -> "BlockSizes":
        """Return sizes up to these with the least padding, the fewest blocks of keys, and then the fewest passes.

        A pass is unrolled, so it also has a limit: the program is no longer than with these sizes.
        """
        (per_query, per_key), device = _vmem(head_dim, itemsize), core()
        block_kv = min(self.block_kv, (device.vmem_for_blocks - self.block_q * per_query) // per_key)
        blocks = -(-kv_len // block_kv)
        block_kv = round_up(-(-kv_len // blocks), LANES)
        # Where there are several blocks of keys, each is transposed again for every block of queries: make those long.
        least = min(2 * QUERY_TILE, self.block_q) if blocks == 1 else self.block_q
        sizes = range(least, self.block_q + 1, device.query_step)
        block_q = min(round_up(q_len, LANES), min(sizes, key=lambda size: (round_up(q_len, size), -size)))
        # A float32 product takes about eight times the instructions. A shorter last pass is unrolled separately.
        unit = self.block_kv_compute_in
        limit = self.block_q * self.block_kv_compute // (8 if itemsize == 4 else 1) // block_q
        passes = [size for size in range(unit, limit + 1, unit) if size + block_kv % size <= limit] or [unit]
        best = min(passes, key=lambda size: (-(-block_kv // size), size + block_kv % size))
        return BlockSizes(block_q, block_kv, best, unit).clipped(q_len, kv_len)


DEFAULT_BLOCK_SIZES = BlockSizes()
# Those of the original project, the CogVideoX scripts in yangwhale/gpu-tpu-pedia.
ORIGINAL_BLOCK_SIZES = BlockSizes(3328, 2816, 256, 256)


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float | None = None,
    block_sizes: BlockSizes | None = None,
    k_smooth: bool = USE_K_SMOOTH,
    interpret: bool | None = None,
    kv_length: int | None = None,
) -> jax.Array:
    """Compute softmax(scale query key^T) value, without a mask.

    Args:
        query: [batch, heads, q_len, head_dim], bfloat16 or float32.
        key, value: [batch, heads, kv_len, head_dim], of the query's dtype.
        scale: positive factor of the scores; by default head_dim ** -0.5.
        block_sizes: by default DEFAULT_BLOCK_SIZES, made shorter where that saves padding.
        k_smooth: take the mean of the keys out of the bound, so that fewer heads need the online kernel; the result
            stays the same.
        interpret: run in Pallas' interpreter; by default where the call is not compiled for a TPU.
        kv_length: how many of the keys count, from the first on; by default all.

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
    kv_length = kv_len if kv_length is None else kv_length
    if not 0 < kv_length <= kv_len:
        raise ValueError(f"kv_length must be from 1 to the {kv_len} keys, got {kv_length}")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if block_sizes is not None:
        block_sizes.check(head_dim, query.dtype.itemsize)

    output, _ = tiled_attention(
        *(to_tiles(array) for array in (query, key, value)),
        kv_length=kv_length,
        scale=scale,
        block_sizes=block_sizes,
        k_smooth=k_smooth,
        interpret=interpret,
    )
    return from_tiles(output, batch, q_len)


def tiled_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    kv_length: int,
    q_length: int | None = None,
    heads: int | None = None,
    first: tuple[int, int, int] = (0, 0, 0),
    scale: float | None = None,
    block_sizes: BlockSizes | None = None,
    k_smooth: bool = USE_K_SMOOTH,
    interpret: bool | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Compute what `splash_attention` computes, from and to the kernel's own layout, so that nothing is copied.

    Args:
        queries, keys, values: [tiles, heads, head_dim, 128], see `to_tiles`; there may be fewer tiles of queries. They
            may be one array.
        q_length: how many of the queries count, from the first on; by default all. Blocks of others come out 0.
        heads: how many heads there are; by default as many as the queries' array has.
        first: the first of them in each of the three arrays.
        kv_length, scale, block_sizes, k_smooth, interpret: as for `splash_attention`.

    Returns:
        [tiles of queries, heads, head_dim, 128], and of each head the share of its blocks of queries that the online
        kernel computed, float32 [heads].
    """
    tiles, all_heads, head_dim, lanes = queries.shape
    q_length = tiles * lanes if q_length is None else q_length
    if block_sizes is None:
        blocks = DEFAULT_BLOCK_SIZES.fitted(q_length, kv_length, head_dim, queries.dtype.itemsize)
    else:
        blocks = block_sizes.clipped(q_length, kv_length)
    options = {"heads": Heads(heads or all_heads, *first), "factor": base2_factor(scale, head_dim), "kv_len": kv_length}

    def run(queries, keys, values, interpret):
        bound = _bound(queries, keys, **options, k_smooth=k_smooth, interpret=interpret)
        return _run(queries, keys, values, bound, **options, blocks=blocks, q_len=q_length, interpret=interpret)

    return for_platform(run, interpret)(queries, keys, values)


class Heads(NamedTuple):
    """How many heads there are, and the first of them in the arrays of queries, keys and values."""

    number: int
    query: int
    key: int
    value: int


def online_heads(
    query: jax.Array, key: jax.Array, value: jax.Array, *, kv_length: int | None = None, **options: Any
) -> jax.Array:
    """Tell which heads `splash_attention` computes, for some queries, by the online kernel; arguments as there.

    Only the fast kernel's result tells it: this takes as long as the attention. Returns bool [batch, heads].
    """
    tiles = (to_tiles(array) for array in (query, key, value))
    _, online = tiled_attention(*tiles, kv_length=kv_length or key.shape[2], **options)
    return online.reshape(query.shape[:2]) > 0


def to_tiles(x: jax.Array) -> jax.Array:
    """Turn [batch, heads, length, head_dim] into the kernel's own layout, [tiles, batch * heads, head_dim, 128].

    A tile is 128 tokens of one head, a column each. The last tile is padded with zeros.
    """
    batch, heads, length, head_dim = x.shape
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -length % LANES), (0, 0)))
    return x.reshape(batch * heads, -1, LANES, head_dim).transpose(1, 0, 3, 2)


def from_tiles(x: jax.Array, batch: int, length: int) -> jax.Array:
    """Turn [tiles, batch * heads, head_dim, 128] back into [batch, heads, length, head_dim]."""
    x = x.transpose(1, 0, 3, 2)
    return x.reshape(batch, -1, x.shape[1] * LANES, x.shape[3])[:, :, :length]


def base2_factor(scale: float | None, head_dim: int) -> float:
    """Return the factor of the scores in base 2."""
    return (head_dim**-0.5 if scale is None else scale) * math.log2(math.e)


def for_platform(run: Callable, interpret: bool | None) -> Callable:
    """Give `run` its argument `interpret`; None stands for interpreting where it is not compiled for a TPU."""
    if interpret is not None:
        return functools.partial(run, interpret=interpret)
    compiled, interpreted = (functools.partial(run, interpret=choice) for choice in (False, True))
    return lambda *arguments: lax.platform_dependent(*arguments, tpu=compiled, default=interpreted)


def _bound(
    queries: jax.Array,
    keys: jax.Array,
    *,
    heads: Heads,
    factor: float,
    k_smooth: bool,
    kv_len: int,
    interpret: bool,
) -> jax.Array:
    """Compute what the fast kernel subtracts from the scores of each row.

    Two kernels read the arrays once each, and the keys of a head too long for VMEM twice. XLA takes ten times as long
    as they take to read them.

    Args:
        queries, keys: [tiles, heads, head_dim, 128].

    Returns:
        The bound, less what the greatest weight is above 1, float32 [tiles, heads, 1, 128], in units of query . key.
    """
    queries, keys = in_hbm([queries, keys], interpret)
    head_dim = queries.shape[2]
    k_tiles, tile_bytes = pl.cdiv(kv_len, LANES), heads.number * head_dim * LANES * queries.dtype.itemsize
    row = jax.ShapeDtypeStruct((heads.number, 1, LANES), jnp.float32)
    row_spec = pl.BlockSpec((1, 1, LANES), lambda h, *_: (h, 0, 0))
    mean_spec = pl.BlockSpec((1, head_dim, LANES), lambda h, *_: (h, 0, 0))
    block = min(k_tiles, BOUND_TILES)
    mean, radius = pl.pallas_call(
        functools.partial(_key_statistics, kv_len=kv_len, k_smooth=k_smooth),
        name="exp2_splash_keys",
        grid=(heads.number, 2, pl.cdiv(k_tiles, block)),
        in_specs=[pl.BlockSpec((block, 1, head_dim, LANES), lambda h, phase, j: (j, heads.key + h, 0, 0))],
        out_specs=[mean_spec, row_spec],
        out_shape=[jax.ShapeDtypeStruct((heads.number, head_dim, LANES), jnp.float32), row],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=core().vmem
        ),
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=len(keys) * tile_bytes, transcendentals=0),
        interpret=interpret,
    )(keys)
    options: dict[str, Any] = {"factor": factor, "k_smooth": k_smooth, "kv_len": kv_len, "interpret": interpret}
    return query_bounds(queries, mean, radius, first=heads.query, **options)


def query_bounds(
    queries: jax.Array,
    mean: jax.Array,
    radius: jax.Array,
    *,
    factor: float,
    k_smooth: bool,
    kv_len: int,
    interpret: bool,
    first: int = 0,
) -> jax.Array:
    """Compute the bounds of queries, see `_bound`, from the statistics of each head's keys.

    Args:
        queries: [tiles, heads or more, head_dim, 128].
        mean: of the keys, the same in each lane, float32 [heads, head_dim, 128].
        radius: the keys' largest distance from it, or from 0 without `k_smooth`, float32 [heads, 1, 128].
        kv_len: how many keys there are at most.
        first: the first of the heads in the array of queries.
    """
    (q_tiles, _, head_dim, _), heads = queries.shape, len(mean)
    moved = q_tiles * heads * head_dim * LANES * queries.dtype.itemsize
    row_spec = pl.BlockSpec((1, 1, LANES), lambda h, *_: (h, 0, 0))
    mean_spec = pl.BlockSpec((1, head_dim, LANES), lambda h, *_: (h, 0, 0))
    block = min(q_tiles, BOUND_TILES)
    return pl.pallas_call(
        functools.partial(_query_bounds, factor=factor, k_smooth=k_smooth, shift=_shift(kv_len)),
        name="exp2_splash_bound",
        grid=(heads, pl.cdiv(q_tiles, block)),
        in_specs=[
            pl.BlockSpec((block, 1, head_dim, LANES), lambda h, i: (i, first + h, 0, 0)),
            mean_spec,
            row_spec,
        ],
        out_specs=pl.BlockSpec((block, 1, 1, LANES), lambda h, i: (i, h, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((q_tiles, heads, 1, LANES), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=core().vmem
        ),
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=moved, transcendentals=0),
        interpret=interpret,
    )(queries, mean, radius)


def _key_statistics(k_ref, mean_ref, radius_ref, *, kv_len, k_smooth):
    """Compute the statistics of a head's first `kv_len` keys."""

    def is_real(tile):
        return tile * LANES + lax.broadcasted_iota(jnp.int32, (1, LANES), 1) < kv_len

    key_statistics(is_real, k_ref, mean_ref, radius_ref, keys=kv_len, k_smooth=k_smooth)


def key_statistics(is_real: Callable, k_ref: Any, mean_ref: Any, radius_ref: Any, *, keys: int, k_smooth: bool) -> None:
    """Compute the mean of a head's keys, and then their largest distance from it, or from 0 without `k_smooth`.

    `is_real` tells which of a tile's keys count, bool [1, 128], by the number of the tile; in all, so many `keys` do.
    """
    phase, block = pl.program_id(1), pl.program_id(2)
    tiles, _, head_dim, _ = k_ref.shape

    def key(tile):
        return k_ref[tile, 0].astype(jnp.float32), is_real(block * tiles + tile)

    def over_tiles(function, start):
        return lax.fori_loop(0, tiles, lambda tile, found: function(found, *key(tile)), start, unroll=4)

    @pl.when((phase == 0) & (block == 0))
    def begin() -> None:
        mean_ref[...] = jnp.zeros_like(mean_ref)

    @pl.when(phase == 0)
    def add_up() -> None:
        add = lambda total, key, real: total + jnp.where(real, key, 0.0)  # noqa: E731
        mean_ref[0] = over_tiles(add, mean_ref[0])

    @pl.when((phase == 1) & (block == 0))
    def take_mean() -> None:
        mean_ref[0] = jnp.broadcast_to(mean_ref[0].sum(1, keepdims=True) / keys, (head_dim, LANES))
        radius_ref[...] = jnp.zeros_like(radius_ref)

    @pl.when(phase == 1)
    def measure() -> None:
        centre = mean_ref[0] if k_smooth else jnp.zeros_like(mean_ref[0])

        def furthest(largest, key, real):
            distance = jnp.square(key - centre).sum(0, keepdims=True)
            return jnp.maximum(largest, jnp.where(real, distance, 0.0))

        radius_ref[0] = over_tiles(furthest, radius_ref[0])

    @pl.when((phase == 1) & (block == pl.num_programs(2) - 1))
    def spread() -> None:
        largest = jnp.sqrt(radius_ref[0].max(1, keepdims=True))
        radius_ref[0] = jnp.broadcast_to(largest, (1, LANES))


def _query_bounds(q_ref, mean_ref, radius_ref, bound_ref, *, factor, k_smooth, shift):
    """Compute the bounds of a block of queries; a row for which it is not exact enough gets no weight at all."""
    mean, radius = mean_ref[0], radius_ref[0]

    def tile_bound(tile, _):
        query = q_ref[tile, 0].astype(jnp.float32)
        bound = jnp.sqrt(jnp.square(query).sum(0, keepdims=True)) * radius
        if k_smooth:
            bound += (query * mean).sum(0, keepdims=True)  # the mean score of a row
        exact = factor * jnp.abs(bound) <= OFFSET_LIMIT
        bound_ref[tile, 0] = jnp.where(exact, bound - shift / factor, -MASKED)

    lax.fori_loop(0, q_ref.shape[0], tile_bound, None, unroll=4)


def _shift(kv_len: int) -> int:
    """Return the greatest weight's exponent: kv_len such weights, times values, sum to half of float32's largest."""
    return jnp.finfo(jnp.float32).maxexp - 1 - VALUE_BITS - (kv_len - 1).bit_length()


def _run(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    bound: jax.Array,
    *,
    heads: Heads,
    factor: float,
    blocks: BlockSizes,
    q_len: int,
    kv_len: int,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Run the fast kernel, and then the online kernel for the blocks of queries, if any, for which it is not exact.

    Returns the output, and of each head the share of such blocks, float32 [heads].
    """
    call = functools.partial(_call, heads=heads, factor=factor, q_len=q_len, kv_len=kv_len, interpret=interpret)
    # The online kernel's program is longer, and it need not be fast: it is unrolled less.
    online_blocks = dataclasses.replace(
        blocks, block_kv_compute=min(blocks.block_kv_compute, 4 * blocks.block_kv_compute_in)
    )
    output, inexact = call(queries, keys, values, bound, blocks=blocks)
    written = len(inexact) * blocks.block_q // LANES
    output = output.at[written:].set(0) if written < len(output) else output
    inexact = inexact.max((2, 3)) > 0  # [blocks of queries, heads]
    order = jnp.argsort(~inexact.any(0))

    def online(index, output):
        again = Again(output, order[index], inexact[:, order[index]])
        return call(queries, keys, values, jnp.zeros_like(bound), again, blocks=online_blocks)

    output = lax.fori_loop(0, inexact.any(0).sum(), online, output)
    # Without this, XLA may choose the loop's layout for the operation that reads it, and copy what the kernel wrote.
    return with_layout_constraint(output, Layout(major_to_minor=(0, 1, 2, 3))), inexact.mean(0, dtype=jnp.float32)


class Again(NamedTuple):
    """What the online kernel computes again.

    Attributes:
        output: what there is, which it writes into, [tiles, heads, head_dim, 128].
        head: int32 scalar.
        blocks: which of the head's blocks of queries, at least one, bool [blocks of queries].
    """

    output: jax.Array
    head: jax.Array
    blocks: jax.Array


def _call(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    bound: jax.Array,
    again: Again | None = None,
    *,
    heads: Heads,
    factor: float,
    blocks: BlockSizes,
    q_len: int,
    kv_len: int,
    interpret: bool,
) -> Any:
    """Run the fast kernel, or, if there is anything to do `again`, the online kernel.

    Takes and returns tiles, [tiles, heads, head_dim, 128], and takes the bound [tiles, heads, 1, 128]. The last blocks
    may reach over the end, where a read is undefined and a write is dropped. After the block with the last of q_len
    queries nothing is written. The fast kernel also returns, in an array [blocks of queries, heads, 1, 128], what is
    not 0 where the result is not exact.
    """
    tiles, _, head_dim, _ = queries.shape
    q_tiles, kv_tiles = blocks.block_q // LANES, blocks.block_kv // LANES
    assert len(keys) == len(values) and bound.shape == (tiles, heads.number, 1, LANES)
    arrays, q_blocks = [queries, keys, values, bound], pl.cdiv(q_len, blocks.block_q)
    if online := again is not None:
        arrays.append(again.output)
        chosen = jnp.append(jnp.argsort(~again.blocks), again.head).astype(jnp.int32)
        kernel: Callable = _online_kernel
        grid: tuple = 1, again.blocks.sum(dtype=jnp.int32)
        place = lambda h, i, chosen: (chosen[i], chosen[q_blocks])  # noqa: E731
    else:
        chosen = jnp.zeros(1, jnp.int32)
        kernel, grid = functools.partial(_fast_kernel, q_len=q_len), (heads.number, q_blocks)
        place = lambda h, i, chosen: (i, h)  # noqa: E731

    def query_spec(rows: int, first: int = 0) -> pl.BlockSpec:
        def index(h, i, j, chosen):
            block, head = place(h, i, chosen)
            return block, first + head, 0, 0

        return pl.BlockSpec((q_tiles, 1, rows, LANES), index)

    def key_spec(first: int) -> pl.BlockSpec:
        block = (kv_tiles, 1, head_dim, LANES)
        return pl.BlockSpec(block, lambda h, i, j, chosen: (j, first + place(h, i, chosen)[1], 0, 0))

    inexact_spec = pl.BlockSpec((1, 1, 1, LANES), lambda h, i, j, chosen: (i, h, 0, 0))
    inexact = jax.ShapeDtypeStruct((q_blocks, heads.number, 1, LANES), jnp.float32)
    of_queries = jax.ShapeDtypeStruct((tiles, heads.number, head_dim, LANES), queries.dtype)
    return pl.pallas_call(
        functools.partial(kernel, factor=factor, blocks=blocks, kv_len=kv_len),
        name="exp2_splash_online" if online else "exp2_splash",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(*grid, pl.cdiv(kv_len, blocks.block_kv)),
            in_specs=[
                query_spec(head_dim, heads.query),
                key_spec(heads.key),
                key_spec(heads.value),
                query_spec(1),
                *[pl.BlockSpec(memory_space=pl.ANY)] * online,
            ],
            out_specs=query_spec(head_dim) if online else [query_spec(head_dim), inexact_spec],
            scratch_shapes=_scratch(head_dim, blocks, jnp.float32 if interpret else queries.dtype, online),
        ),
        out_shape=of_queries if online else [of_queries, inexact],
        input_output_aliases={5: 0} if online else {},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=core().vmem
        ),
        interpret=interpret,
    )(chosen, *in_hbm(arrays, interpret))


def in_hbm(arrays: list[jax.Array], interpret: bool) -> list[jax.Array]:
    """Keep XLA from putting a kernel's arguments into VMEM, which the kernel needs for itself."""
    return arrays if interpret else [pltpu.with_memory_space_constraint(array, pltpu.HBM) for array in arrays]


def _scratch(head_dim: int, blocks: BlockSizes, dtype: jax.typing.DTypeLike, online: bool) -> list:
    """Return the kernels' scratch memory: queries and keys with what is appended, values, output, sums, maxima.

    `dtype` is that of the products. The interpreter needs float32: XLA lacks some products of bfloat16 on a CPU.
    """
    rows, dtype = product_rows(head_dim), jnp.dtype(dtype)
    return [
        pltpu.VMEM((rows, blocks.block_q), dtype),
        pltpu.VMEM((blocks.block_kv, rows), dtype),
        pltpu.VMEM((head_dim, blocks.block_kv), dtype),
        pltpu.VMEM((head_dim, blocks.block_q), jnp.float32),
        pltpu.VMEM((8, blocks.block_q), jnp.float32),
        pltpu.VMEM((1, blocks.block_q) if online else (head_dim, LANES), jnp.float32),
    ]


def _fast_kernel(_, q_ref, k_ref, v_ref, b_ref, o_ref, inexact_ref, *scratch, factor, blocks, q_len, kv_len):
    """Compute weights relative to the bound, which the first product subtracts, and note where that is not exact."""
    query_ref, key_ref, value_ref, output_ref, sum_ref, size_ref = scratch
    weigh, add = fast_steps(*scratch[:5], factor, v_ref.dtype)
    first = pl.program_id(1) * (blocks.block_q // LANES)

    def check(total):
        exact = is_exact(total, size_ref[:1, :1], kv_len, v_ref.dtype)
        inexact = jnp.zeros((1, LANES), jnp.float32)
        for tile in range(blocks.block_q // LANES):
            fine = exact[:, tile * LANES : (tile + 1) * LANES] | (first + tile >= pl.cdiv(q_len, LANES))
            inexact = jnp.where(fine, inexact, 1.0)
        inexact_ref[0, 0] = inexact

    _append(q_ref, k_ref, v_ref, b_ref, query_ref, key_ref, value_ref, blocks, kv_len, size_ref)
    _attend(o_ref, output_ref, sum_ref, blocks, weigh, add, check)


def fast_steps(
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    output_ref: Any,
    sum_ref: Any,
    factor: float,
    dtype: jax.typing.DTypeLike,
) -> tuple[Callable, Callable]:
    """Return how the fast kernel weighs a tile of scores, and how it adds the values; `pipeline` takes both."""

    def weigh(queries, keys):
        weights = jnp.exp2(_product(key_ref[keys, :], query_ref[:, queries]) * factor)
        sum_ref[:, queries] += _sum_to_registers(weights)
        return weights.astype(dtype)

    def add(queries, keys, weights):
        output_ref[:, queries] += _product(value_ref[:, keys], weights)

    return weigh, add


def online_steps(
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    output_ref: Any,
    sum_ref: Any,
    max_ref: Any,
    factor: float,
    dtype: jax.typing.DTypeLike,
) -> tuple[Callable, Callable]:
    """Return the same of the online kernel, which keeps the largest score so far of each query in `max_ref`."""

    def weigh(queries, keys):
        scores = _product(key_ref[keys, :], query_ref[:, queries])
        before = max_ref[:, queries]
        largest = jnp.maximum(before, scores.max(0, keepdims=True))
        max_ref[:, queries] = largest
        shrink = jnp.exp2((before - largest) * factor)
        weights = jnp.exp2((scores - largest) * factor)
        sum_ref[:, queries] = sum_ref[:, queries] * shrink + _sum_to_registers(weights)
        return weights.astype(dtype), shrink

    def add(queries, keys, weighed):
        weights, shrink = weighed
        output_ref[:, queries] = output_ref[:, queries] * shrink + _product(value_ref[:, keys], weights)

    return weigh, add


def is_exact(total: jax.Array, largest: jax.Array, kv_len: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Tell for which sums of a row's weights float32's range was wide enough; `largest` is that of the values.

    Too small: each of kv_len weights, and of their products with a value, may underflow, and is then lost; together
    they are to be 2^GUARD_BITS times less than what `dtype` rounds off. Beside a sum of 1 that is so for all values but
    those that are nothing themselves. Too large: products overflow, if weights are near the bound and values are large.
    """
    info = jnp.finfo(jnp.float32)
    least = kv_len * float(info.tiny) / float(jnp.finfo(dtype).eps) * 2**GUARD_BITS
    products = total * largest
    return (total >= least) & ((products >= least) | (total >= 1)) & (products <= float(info.max) / 2)


def _online_kernel(_, q_ref, k_ref, v_ref, b_ref, __, o_ref, *scratch, factor, blocks, kv_len):
    """Compute weights relative to the largest score so far; when that grows, what was summed before is scaled down."""
    query_ref, key_ref, value_ref, output_ref, sum_ref, max_ref = scratch
    weigh, add = online_steps(*scratch, factor, v_ref.dtype)

    @pl.when(pl.program_id(2) == 0)
    def _():
        max_ref[...] = jnp.full_like(max_ref, MASKED)

    _append(q_ref, k_ref, v_ref, b_ref, query_ref, key_ref, value_ref, blocks, kv_len)
    _attend(o_ref, output_ref, sum_ref, blocks, weigh, add)


def _append(q_ref, k_ref, v_ref, b_ref, query_ref, key_ref, value_ref, blocks, kv_len, size_ref=None):
    """Append (-bound, 1) to each query and (1, mask) to each key, so that their product subtracts and masks.

    The bound takes two columns, what the query's dtype holds of it and the rest, so a key gets (1, 1, mask). Keys are
    transposed too, and keys and values beyond the end are cleared. Where one block holds all keys of a head, this is
    done once for all of the head's queries. If there is `size_ref`, all of it is set to the largest |value| so far.
    """
    head_dim, rows = q_ref.shape[2], query_ref.shape[0]
    first = pl.program_id(2) * blocks.block_kv

    @pl.when(pl.program_id(2) == 0)
    def _():
        def tile(start, length):
            bound = _columns(b_ref, start, length)
            high = bound.astype(q_ref.dtype).astype(jnp.float32)
            row = lax.broadcasted_iota(jnp.int32, (rows - head_dim, length), 0)
            appended = jnp.where(row == 0, -high, jnp.where(row == 1, high - bound, jnp.where(row == 2, 1.0, 0.0)))
            query = jnp.concatenate([_columns(q_ref, start, length), appended.astype(q_ref.dtype)], 0)
            query_ref[:, pl.ds(start, length)] = query.astype(query_ref.dtype)

        loop(blocks.block_q, 4 * LANES, tile)

    @pl.when((pl.program_id(1) == 0) | (pl.num_programs(2) > 1))
    def _():
        def tile(start, length):
            keys = pl.ds(start, length)

            def iota(rows, axis):
                return lax.broadcasted_iota(jnp.int32, (rows, length), axis)

            row, padded = iota(rows - head_dim, 0), first + start + iota(rows - head_dim, 1) >= kv_len
            appended = jnp.where(row < 2, 1.0, jnp.where((row == 2) & padded, MASKED, 0.0))
            real = first + start + iota(head_dim, 1) < kv_len
            key, value = (jnp.where(real, _columns(ref, start, length), 0) for ref in (k_ref, v_ref))
            key_ref[keys, :] = jnp.concatenate([key, appended.astype(key.dtype)], 0).T.astype(key_ref.dtype)
            value_ref[:, keys] = value.astype(value_ref.dtype)
            if size_ref is not None:
                size = jnp.abs(value)
                size = functools.reduce(jnp.maximum, [size[:, i : i + LANES] for i in range(0, length, LANES)])
                size_ref[...] = jnp.maximum(size_ref[...], size.astype(jnp.float32))

        if size_ref is not None:
            size_ref[...] = jnp.where(first == 0, jnp.zeros_like(size_ref), size_ref[...])
        loop(blocks.block_kv, 8 * LANES, tile)
        if size_ref is not None:
            size_ref[...] = jnp.broadcast_to(size_ref[...].max((0, 1), keepdims=True), size_ref.shape)


def _attend(o_ref, output_ref, sum_ref, blocks, weigh, add, check=lambda total: None):
    """Do a grid step: clear the sums before the first block of keys, add every pass, divide after the last block."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        output_ref[...] = jnp.zeros_like(output_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    loop(blocks.block_kv, blocks.block_kv_compute, functools.partial(pipeline, blocks, weigh, add))

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        total = sum_ref[...].sum(0, keepdims=True)
        check(total)
        output = (output_ref[...] / total).astype(o_ref.dtype)
        for tile in range(o_ref.shape[0]):
            o_ref[tile, 0] = output[:, tile * LANES : (tile + 1) * LANES]


def pipeline(blocks: Any, weigh: Callable, add: Callable, first: Any, length: int) -> None:
    """Unroll a pass over keys first ... first + length: weigh a tile, and add its values a few tiles later.

    The MXU takes the products in this order: the lag keeps it busy while a tile's weights are computed.
    """
    pending, lag = [], core().lag
    for start in range(0, length, blocks.block_kv_compute_in):
        keys = pl.ds(first + start, min(blocks.block_kv_compute_in, length - start))
        for query in range(0, blocks.block_q, QUERY_TILE):
            queries = pl.ds(query, min(QUERY_TILE, blocks.block_q - query))
            pending.append((queries, keys, weigh(queries, keys)))
            if len(pending) > lag:
                add(*pending.pop(0))
    for tile in pending:
        add(*tile)


def _columns(ref, start, length):
    """Read tokens start ... start + length of a block of tiles [tiles, 1, rows, 128]; returns [rows, length]."""
    first = start // LANES
    return jnp.concatenate([ref[first + tile, 0] for tile in range(length // LANES)], axis=1)


def loop(length: int, step: int, body: Callable) -> None:
    """Call body(start, size) over [0, length) in a loop of steps; a shorter last step follows the loop."""
    step = min(step, length)
    lax.fori_loop(0, length // step, lambda index, _: body(pl.multiple_of(index * step, LANES), step), None)
    if length % step:
        body(length - length % step, length % step)


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    """Compute left @ right in float32; float32 operands keep their digits."""
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot(left, right.astype(left.dtype), precision=precision, preferred_element_type=jnp.float32)


def _sum_to_registers(weights: jax.Array) -> jax.Array:
    """Sum a tile's rows down to 8, a register's height, which needs no work across the rows of a register."""
    return weights.reshape(-1, 8, weights.shape[1]).sum(0)


def product_rows(head_dim: int) -> int:
    """Return the rows of the first product: a head, the bound's two parts and the mask, in whole bfloat16 registers."""
    return round_up(head_dim + 3, 16)


def _vmem(head_dim: int, itemsize: int) -> tuple[int, int]:
    """Return the bytes of VMEM that a query and a key take in a grid step; inputs and output are double-buffered."""
    rows = product_rows(head_dim)
    per_query = itemsize * (4 * head_dim + rows) + 4 * (head_dim + 8 + 8 + 2 * 8)
    return per_query, itemsize * (5 * head_dim + round_up(rows, LANES))


def round_up(length: int, unit: int) -> int:
    """Round `length` up to a multiple of `unit`."""
    return -(-length // unit) * unit
