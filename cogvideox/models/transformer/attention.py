"""Attention implementations, of which stage 2 chooses one by its name in the table IMPLEMENTATIONS.

Each is a function over the heads of one chip, called as `function(query, key, value, kv_length=..., **options)`. The
arrays are [batch, heads, tokens, head_dim], and there may be fewer queries than keys; only the first `kv_length` keys
count; the scale is head_dim ** -0.5. The function returns an array like the queries. The table says which other options
it takes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

import custom_splash_attention
from cogvideox.errors import PlanError
from cogvideox.models.shared.sizes import MOST_ELEMENTS
from cogvideox.models.transformer.kernels.common import VMEM_LIMIT
from cogvideox.models.transformer.sparse.attention import sparse_attention
from cogvideox.models.transformer.sparse.layout import AlignedLayout
from cogvideox.models.transformer.sparse.patterns import Kind
from cogvideox.models.transformer.sparse.table import HeadTable
from cogvideox.models.transformer.sparse.xla import xla_attention as masked_xla_attention


def xla_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    kv_length: int,
    use_cudnn: bool = False,
    most_elements: int | None = None,
) -> jax.Array:
    """Compute plain softmax attention by XLA, which keeps the scores [batch, heads, sequence, sequence] in memory.

    With `use_cudnn`, for NVIDIA GPUs, arrays of 16 bits take cuDNN's fused attention, which does not keep the scores.
    Batches of which an array has more than `most_elements` are attended one sequence after the other.
    """
    if most_elements is not None and max(query.size, key.size) > most_elements and len(query) > 1:
        one = functools.partial(xla_attention, kv_length=kv_length, use_cudnn=use_cudnn)
        return jax.lax.map(lambda arrays: one(*(x[None] for x in arrays))[0], (query, key, value))
    fused = use_cudnn and query.dtype.itemsize == 2
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    lengths = jnp.full(query.shape[0], kv_length, jnp.int32) if kv_length < key.shape[1] else None
    out = jax.nn.dot_product_attention(
        query, key, value, key_value_seq_lengths=lengths, implementation="cudnn" if fused else "xla"
    )
    return jnp.swapaxes(out, 1, 2)


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Block sizes of JAX's Splash Attention; the defaults are those that the original project began with."""

    block_q: int = 2048
    block_kv: int = 1024
    block_kv_compute: int = 512

    def check(self, head_dim: int, itemsize: int) -> None:
        """Raise ValueError, naming the nearest values that work, if the kernel cannot take these sizes."""
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if size < 128 or size % 128:
                raise ValueError(
                    f"{field.name}={size} is not a multiple of 128; {max(round(size / 128), 1) * 128} works"
                )
        if self.block_kv % self.block_kv_compute:
            raise ValueError(
                f"block_kv_compute={self.block_kv_compute} does not divide block_kv={self.block_kv}; "
                f"{math.gcd(self.block_kv_compute, self.block_kv)} does"
            )
        # Queries, keys, values, output and one block of float32 scores, the first four twice.
        used = 4 * (self.block_q + self.block_kv) * head_dim * itemsize + 4 * self.block_q * self.block_kv_compute
        if used > 64 * 2**20:
            raise ValueError(
                f"these block sizes need about {used / 2**20:.0f} MiB of VMEM, of 64; "
                f"block_q={64 * 2**20 // (8 * self.block_kv_compute) // 128 * 128} works"
            )


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    kv_length: int,
    block_sizes: BlockSizes | None = None,
    k_smooth: bool = True,
    interpret: bool = False,
) -> jax.Array:
    """Run JAX's Splash Attention for TPUs; queries and keys are padded to whole blocks, and padded keys are masked.

    With `k_smooth` the mean of the keys is subtracted first, which does not change the softmax.
    """
    block_sizes = block_sizes or BlockSizes()
    if k_smooth:
        key = key - key[:, :, :kv_length].mean(axis=2, keepdims=True, dtype=jnp.float32).astype(key.dtype)
    batch, heads, q_len, head_dim = query.shape
    limits = {"block_q": _round_up(q_len, 128)}
    blocks = {
        field.name: min(getattr(block_sizes, field.name), limits.get(field.name, _round_up(key.shape[2], 128)))
        for field in dataclasses.fields(block_sizes)
    }
    step = math.lcm(blocks["block_q"], blocks["block_kv"])
    q_padded, kv_padded = _round_up(q_len, step), _round_up(key.shape[2], step)

    def prepare(x: jax.Array) -> jax.Array:  # the kernel has no batch axis: batch and heads become one
        padded = _round_up(x.shape[2], step)
        return jnp.pad(x, ((0, 0), (0, 0), (0, padded - x.shape[2]), (0, 0))).reshape(-1, padded, head_dim)

    mask = splash_attention_mask.MultiHeadMask(
        [splash_attention_mask.FullMask((q_padded, kv_padded)) for _ in range(batch * heads)]
    )
    kernel = splash_attention_kernel.make_splash_mha_single_device(
        mask, block_sizes=splash_attention_kernel.BlockSizes(**blocks), interpret=interpret
    )
    # The segments keep padded keys out; by the compiler's schedule they cost 7 % (299 scores a cycle, not 320).
    is_padding = (jnp.arange(kv_padded) >= kv_length).astype(jnp.int32)
    segments = splash_attention_kernel.SegmentIds(q=jnp.zeros(q_padded, jnp.int32), kv=is_padding)
    out = kernel(prepare(query * head_dim**-0.5), prepare(key), prepare(value), segments)
    return out.reshape(batch, heads, q_padded, head_dim)[:, :, :q_len]


def _round_up(length: int, multiple: int) -> int:
    """Return the least multiple that is not below `length`."""
    return -(-length // multiple) * multiple


class Implementation(NamedTuple):
    """One line of the table.

    Attributes:
        function: see the top of this file.
        block_sizes: the frozen dataclass of its block sizes, with a method `check(head_dim, itemsize)`; None where it
            has none. A function with block sizes also takes `k_smooth` and `interpret`.
        platform_options: options of the function by platform of the devices, for those that need some.
        online_heads: a function of the same arguments that tells which heads, bool [batch, heads], take the slower of
            the function's two kernels for some queries; None where it has one.
        tiled: the function from and to arrays [tiles, batch * heads, head_dim, 128], which also returns of each head
            the share of the queries that did, float32 [batch * heads]; None where there is none. It takes the options
            `heads` and `first`, see custom_splash_attention.py. With it, a TPU copies nothing between projection and
            kernel.
    """

    function: Callable[..., jax.Array]
    block_sizes: type | None = None
    platform_options: Mapping[str, Mapping] = MappingProxyType({})
    online_heads: Callable[..., jax.Array] | None = None
    tiled: Callable[..., tuple[jax.Array, jax.Array]] | None = None


IMPLEMENTATIONS = {
    "splash_exp2": Implementation(
        custom_splash_attention.splash_attention,
        custom_splash_attention.BlockSizes,
        online_heads=custom_splash_attention.online_heads,
        tiled=custom_splash_attention.tiled_attention,
    ),
    "splash": Implementation(splash_attention, BlockSizes),
    "xla": Implementation(
        xla_attention, platform_options={"gpu": {"use_cudnn": True, "most_elements": MOST_ELEMENTS["gpu"]}}
    ),
}


class Tiles(NamedTuple):
    """Queries, keys or values as tiles [tiles, batch, heads, head_dim, 128], or one of several in one array.

    Attributes:
        array: [tiles, places * batch, heads, head_dim, 128].
        place: which of them it is, counted from 0.
        places: how many there are.
    """

    array: jax.Array
    place: int = 0
    places: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tiles, [tiles, batch, heads, head_dim, 128]."""
        tiles, all_batches, *rest = self.array.shape
        return tiles, all_batches // self.places, *rest

    @property
    def by_heads(self) -> jax.Array:
        """The array as kernels take it, [tiles, places * batch * heads, head_dim, 128]."""
        return self.array.reshape(len(self.array), -1, *self.array.shape[3:])

    @property
    def first(self) -> int:
        """The first of its heads in `by_heads`."""
        _, batch, heads, *_ = self.shape
        return self.place * batch * heads

    def alone(self) -> jax.Array:
        """Return the tiles in an array of their own."""
        batch = self.shape[1]
        return self.array[:, self.place * batch : (self.place + 1) * batch]


@dataclasses.dataclass(frozen=True)
class Attention:
    """One of IMPLEMENTATIONS with its options; call it as `attention(query, key, value, kv_length)`.

    Attributes:
        name: its key in IMPLEMENTATIONS.
        platform: of the devices, "tpu", "cpu" or "gpu"; off a TPU the kernels run in Pallas' interpreter.
        block_sizes: of the kernel, an object of the table's class; None for the kernel's own choice.
        k_smooth: subtract the mean of the keys; see the kernels.
        kinds: of the patterns that heads may have, of block-sparse attention; none for dense attention, which is all
            that `__call__` and `tiled` compute.
    """

    name: str
    platform: str
    block_sizes: Any = None
    k_smooth: bool = True
    kinds: tuple[Kind, ...] = ()

    @classmethod
    def choose(
        cls,
        name: str | None,
        platform: str,
        block_sizes: Sequence[int] | None,
        k_smooth: bool | None,
        head_dim: int,
        dtype: jax.typing.DTypeLike,
    ) -> "Attention":
        """Choose the implementation `name`, by default the best for the platform.

        Args:
            name: a key of IMPLEMENTATIONS.
            platform: see `Attention`.
            block_sizes: in the order of the fields of the implementation's class.
            k_smooth: see `Attention`.
            head_dim, dtype: of the arrays, which limit the block sizes.

        None stands for the default of each option.

        Raises:
            PlanError: the name is unknown, or the kernel cannot take the block sizes; the message says what works.
        """
        kernel = "splash_exp2" if custom_splash_attention.USE_CUSTOM_ATTENTION else "splash"
        name = name or (kernel if platform == "tpu" else "xla")
        if name not in IMPLEMENTATIONS:
            raise PlanError("attention", f"{name} is unknown; there are {', '.join(IMPLEMENTATIONS)}")
        k_smooth = custom_splash_attention.USE_K_SMOOTH if k_smooth is None else k_smooth
        if block_sizes is None:
            return cls(name, platform, None, k_smooth)
        kind = IMPLEMENTATIONS[name].block_sizes
        if kind is None:
            raise PlanError("block_sizes", f"attention {name} has no block sizes")
        fields = [field.name for field in dataclasses.fields(kind)]
        if len(block_sizes) != len(fields):
            raise PlanError(
                "block_sizes", f"{name} takes {len(fields)} block sizes, not {len(block_sizes)}: {', '.join(fields)}"
            )
        attention = cls(name, platform, kind(*block_sizes), k_smooth)
        attention.check(head_dim, dtype)
        return attention

    def check(self, head_dim: int, dtype: jax.typing.DTypeLike) -> None:
        """Raise PlanError if the kernel cannot take the block sizes for heads of this size and arrays of this dtype."""
        if self.block_sizes is None:
            return
        try:
            self.block_sizes.check(head_dim, jnp.dtype(dtype).itemsize)
        except ValueError as error:
            raise PlanError("block_sizes", str(error)) from error

    @property
    def is_kernel(self) -> bool:
        """Whether it is a kernel with block sizes, which keeps no scores in memory."""
        return IMPLEMENTATIONS[self.name].block_sizes is not None

    @property
    def has_online_kernel(self) -> bool:
        """Whether some queries may take a slower kernel, which `tiled` tells."""
        return IMPLEMENTATIONS[self.name].online_heads is not None

    @property
    def interpret(self) -> bool:
        """Whether kernels run in Pallas' interpreter."""
        return self.platform != "tpu"

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, kv_length: int) -> jax.Array:
        """Compute attention; see the top of this file."""
        implementation = IMPLEMENTATIONS[self.name]
        options = dict(implementation.platform_options.get(self.platform, {})) | self._kernel_options()
        return implementation.function(query, key, value, kv_length=kv_length, **options)

    def tiled(self, queries: Tiles, keys: Tiles, values: Tiles, kv_length: int) -> tuple[jax.Array, jax.Array]:
        """Compute attention of tiles; only where `is_tiled`.

        Where there are as many queries as keys they are of the same tokens, of which the first `kv_length` count:
        blocks of other queries come out 0.

        Returns tiles [tiles of queries, batch, heads, head_dim, 128], and of each head the share of the queries that
        took the slower of the two kernels, float32 [batch, heads].
        """
        tiled, shape = IMPLEMENTATIONS[self.name].tiled, queries.shape
        assert tiled
        of_all = (queries, keys, values)
        options = {
            "kv_length": kv_length,
            "q_length": kv_length if shape[0] == keys.shape[0] else None,
            "heads": shape[1] * shape[2],
            "first": tuple(tiles.first for tiles in of_all),
        }
        output, online = tiled(*(tiles.by_heads for tiles in of_all), **options, **self._kernel_options())
        return output.reshape(shape), online.reshape(shape[1:3])

    def sparse_tiled(
        self,
        queries: Tiles,
        keys: Tiles,
        values: Tiles,
        table: HeadTable,
        layout: AlignedLayout,
        first_tile: jax.Array | None,
        after: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Compute block-sparse attention of tiles; only where `is_tiled`.

        Args:
            queries, keys, values: of the aligned order; there may be fewer tiles of queries.
            table, layout, first_tile, after: see `sparse_attention`.

        Returns what `tiled` does.
        """
        shape = queries.shape
        output, online = sparse_attention(
            *(queries.by_heads, keys.by_heads, values.by_heads, table),
            layout=layout,
            kinds=self.kinds,
            k_smooth=self.k_smooth,
            interpret=self.interpret,
            first_tile=first_tile,
            first=(queries.first, keys.first, values.first),
            after=after,
        )
        return output.reshape(shape), online.reshape(shape[1:3])

    def sparse(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        table: HeadTable,
        layout: AlignedLayout,
        first_tile: jax.Array | None,
    ) -> jax.Array:
        """Compute block-sparse attention by XLA of arrays [batch, heads, tokens, head_dim] of the aligned order."""
        queries, keys, values = map(custom_splash_attention.to_tiles, (query, key, value))
        output = masked_xla_attention(queries, keys, values, table, layout=layout, first_tile=first_tile)
        return custom_splash_attention.from_tiles(output, len(query), query.shape[2])

    def _kernel_options(self) -> dict[str, Any]:
        """Return the options of a function that has block sizes."""
        if not self.is_kernel:
            return {}
        return {"block_sizes": self.block_sizes, "k_smooth": self.k_smooth, "interpret": self.interpret}


def pattern_kinds(attention: Callable) -> tuple[Kind, ...]:
    """Return the kinds of patterns that heads of an attention may have; none if it is dense."""
    return attention.kinds if isinstance(attention, Attention) else ()


def is_tiled(attention: Callable) -> TypeGuard[Attention]:
    """Tell whether `attention` is an `Attention` that takes tiles; see `Implementation`.

    The kernels that make the tiles need more VMEM than a core of v4 has.
    """
    takes_tiles = isinstance(attention, Attention) and IMPLEMENTATIONS[attention.name].tiled is not None
    return takes_tiles and custom_splash_attention.core().vmem >= VMEM_LIMIT
