"""Attention implementations, one of which stage 2 chooses by name.

Each is a function(query, key, value, kv_length) over the heads of one chip: arrays [batch, heads, sequence, head_dim],
of whose keys only the first `kv_length` count. Scale is head_dim ** -0.5. Returns [batch, heads, sequence, head_dim].
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

import custom_splash_attention


def xla_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, kv_length: int, platform: str = "cpu"
) -> jax.Array:
    """Plain softmax attention, left to XLA; keeps the scores [batch, heads, sequence, sequence] in memory.

    On an NVIDIA GPU, in 16 bits, it is cuDNN's fused attention, which does not.
    """
    fused = platform == "gpu" and query.dtype.itemsize == 2
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    lengths = jnp.full(query.shape[0], kv_length, jnp.int32) if kv_length < key.shape[1] else None
    out = jax.nn.dot_product_attention(
        query, key, value, key_value_seq_lengths=lengths, implementation="cudnn" if fused else "xla"
    )
    return jnp.swapaxes(out, 1, 2)


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Block sizes of JAX's Splash Attention; the defaults are those that the seed project began with."""

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
    """JAX's Splash Attention for TPU; the sequence is padded to whole blocks, and padded keys are masked.

    With `k_smooth` the mean of the keys is taken out first, which leaves the softmax as it is.
    """
    block_sizes = block_sizes or BlockSizes()
    if k_smooth:
        key = key - key[:, :, :kv_length].mean(axis=2, keepdims=True, dtype=jnp.float32).astype(key.dtype)
    batch, heads, length, head_dim = query.shape
    whole = -(-length // 128) * 128
    blocks = {field.name: min(getattr(block_sizes, field.name), whole) for field in dataclasses.fields(block_sizes)}
    step = math.lcm(blocks["block_q"], blocks["block_kv"])
    padded = -(-length // step) * step

    def prepare(x):  # the kernel knows no batch: it counts as heads
        return jnp.pad(x, ((0, 0), (0, 0), (0, padded - length), (0, 0))).reshape(-1, padded, head_dim)

    mask = splash_attention_mask.MultiHeadMask(
        [splash_attention_mask.FullMask((padded, padded)) for _ in range(batch * heads)]
    )
    kernel = splash_attention_kernel.make_splash_mha_single_device(
        mask, block_sizes=splash_attention_kernel.BlockSizes(**blocks), interpret=interpret
    )
    # The segments keep padded keys out; by the compiler's schedule they cost 7 % (299 scores a cycle, not 320).
    is_padding = (jnp.arange(padded) >= kv_length).astype(jnp.int32)
    segments = splash_attention_kernel.SegmentIds(q=jnp.zeros(padded, jnp.int32), kv=is_padding)
    out = kernel(prepare(query * head_dim**-0.5), prepare(key), prepare(value), segments)
    return out.reshape(batch, heads, padded, head_dim)[:, :, :length]


BLOCK_SIZES = {"splash_exp2": custom_splash_attention.BlockSizes, "splash": BlockSizes}


@dataclasses.dataclass(frozen=True)
class Attention:
    """One of the implementations with its options; call it as described at the head of this file.

    Attributes:
        name: "splash_exp2", "splash" or "xla".
        platform: of the devices, "tpu", "cpu" or "gpu"; off a TPU the kernels run in Pallas' interpreter.
        block_sizes: of the kernel; None for its own choice.
        k_smooth: take the mean of the keys out; see the kernels.
    """

    name: str
    platform: str
    block_sizes: BlockSizes | custom_splash_attention.BlockSizes | None = None
    k_smooth: bool = True

    @classmethod
    def choose(
        cls,
        name: str | None,
        platform: str,
        block_sizes: Sequence[int] | None,
        k_smooth: bool | None,
        head_dim: int,
        dtype,
    ) -> "Attention":
        """The implementation `name`, by default the best for the platform, with block sizes in their kernel's order.

        None stands for the default of each option.

        Raises:
            ValueError: block sizes that the kernel cannot take; says which it can.
        """
        kernel = "splash_exp2" if custom_splash_attention.USE_CUSTOM_ATTENTION else "splash"
        name = name or (kernel if platform == "tpu" else "xla")
        k_smooth = custom_splash_attention.USE_K_SMOOTH if k_smooth is None else k_smooth
        if block_sizes is None:
            return cls(name, platform, None, k_smooth)
        if name not in BLOCK_SIZES:
            raise ValueError(f"attention {name} has no block sizes")
        fields = [field.name for field in dataclasses.fields(BLOCK_SIZES[name])]
        if len(block_sizes) != len(fields):
            raise ValueError(f"{name} takes {len(fields)} block sizes, not {len(block_sizes)}: {', '.join(fields)}")
        sizes = BLOCK_SIZES[name](*block_sizes)
        sizes.check(head_dim, jnp.dtype(dtype).itemsize)
        return cls(name, platform, sizes, k_smooth)

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, kv_length: int) -> jax.Array:
        if self.name == "xla":
            return xla_attention(query, key, value, kv_length, self.platform)
        function = {"splash_exp2": custom_splash_attention.splash_attention, "splash": splash_attention}[self.name]
        return function(
            query,
            key,
            value,
            kv_length=kv_length,
            block_sizes=self.block_sizes,
            k_smooth=self.k_smooth,
            interpret=self.platform != "tpu",
        )
