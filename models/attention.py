"""Attention implementations, one of which stage 2 chooses by name.

Each is a function(query, key, value, kv_length) over the heads of one chip: arrays [batch, heads, sequence, head_dim],
of whose keys only the first `kv_length` count. Scale is head_dim ** -0.5. Returns [batch, heads, sequence, head_dim].
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

import custom_splash_attention


def xla_attention(query: jax.Array, key: jax.Array, value: jax.Array, kv_length: int) -> jax.Array:
    """Plain softmax attention, left to XLA; keeps the scores [batch, heads, sequence, sequence] in memory."""
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    lengths = jnp.full(query.shape[0], kv_length, jnp.int32) if kv_length < key.shape[1] else None
    return jnp.swapaxes(jax.nn.dot_product_attention(query, key, value, key_value_seq_lengths=lengths), 1, 2)


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Block sizes of JAX's Splash Attention; the defaults are those that the seed project began with."""

    block_q: int = 2048
    block_kv: int = 1024
    block_kv_compute: int = 512


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    kv_length: int,
    block_sizes: BlockSizes = BlockSizes(),
    interpret: bool = False,
) -> jax.Array:
    """JAX's Splash Attention for TPU; the sequence is padded to whole blocks, and padded keys are masked."""
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


def block_sizes_of(name: str) -> type:
    """The dataclass of the block sizes that the kernel `name` takes as `block_sizes`."""
    return {"splash_exp2": custom_splash_attention.BlockSizes, "splash": BlockSizes}[name]


def default_attention(platform: str) -> str:
    """The name of the best implementation for devices of `platform` ("tpu", "cpu", "gpu")."""
    return "splash_exp2" if platform == "tpu" else "xla"


def attention_function(name: str, platform: str) -> Callable:
    """The implementation `name` for devices of `platform` ("tpu", "cpu", "gpu")."""
    interpret = platform != "tpu"
    return {
        "splash_exp2": functools.partial(custom_splash_attention.splash_attention, interpret=interpret),
        "splash": functools.partial(splash_attention, interpret=interpret),
        "xla": xla_attention,
    }[name]
