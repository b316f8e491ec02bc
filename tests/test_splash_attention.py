"""The Splash Attention kernel in Pallas' interpreter beside attention in float64, and its compilation for v6e."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from custom_splash_attention import (
    DEFAULT_BLOCK_SIZES,
    ORIGINAL_BLOCK_SIZES,
    BlockSizes,
    from_tiles,
    online_heads,
    splash_attention,
    tiled_attention,
    to_tiles,
)

TOLERANCE = {"bfloat16": 5e-3, "float32": 1e-3}
SMALL = BlockSizes(256, 256, 128, 128)
HEAD_DIM = 64
FACTOR = HEAD_DIM**-0.5 / np.log(2)


def attention(query, key, value, scale=None):
    query, key, value = (np.asarray(array, np.float64) for array in (query, key, value))
    scores = np.einsum("bhqd,bhkd->bhqk", query, key) * (scale or query.shape[-1] ** -0.5)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bhkd->bhqd", weights, value) / weights.sum(-1, keepdims=True)


def check(query, key, value, dtype, scale=None, block_sizes=SMALL, **options):
    """Compare with the reference, head by head, on inputs rounded to `dtype`."""
    query, key, value = (jnp.asarray(array, dtype) for array in (query, key, value))
    run = jax.jit(lambda *arrays: splash_attention(*arrays, scale=scale, block_sizes=block_sizes, **options))
    output = run(query, key, value)
    assert output.dtype == dtype and output.shape == query.shape
    errors = errors_of_heads(output, attention(query, key, value, scale))
    assert errors.max() <= TOLERANCE[dtype], f"normwise relative error {errors.max():.2e}, {dtype}"


def errors_of_heads(output, expected):
    difference = np.linalg.norm(np.asarray(output, np.float64) - expected, axis=(2, 3))
    return difference / np.linalg.norm(expected, axis=(2, 3))


def random(q_len, kv_len, heads=2, head_dim=HEAD_DIM, batch=1, seed=0):
    generator = np.random.default_rng(seed)
    shapes = [(batch, heads, length, head_dim) for length in (q_len, kv_len, kv_len)]
    return [generator.normal(size=shape) for shape in shapes]


def layer_norm(array):
    return (array - array.mean(-1, keepdims=True)) / array.std(-1, keepdims=True)


def layer_normed():
    query, key, value = random(300, 500)
    return layer_norm(query) * 2.5, layer_norm(key) * 2.5 + 1, value


def huge_norms():
    query, key, value = random(300, 500)
    return 1000 * query, 1000 * key, value


def one_dominant_key():
    query, key, value = random(300, 500)
    key[:, :, 137] = 40 * query.mean(2)
    return query + query.mean(2, keepdims=True), key, value


def equal_keys():
    query, key, value = random(300, 500)
    key[:] = 30 * key[:, :, :1]
    return 30 * query, key, value


def far_bound():
    """Rows whose bound is hundreds above their maximum: one long key that is orthogonal to every query."""
    query, key, value = random(300, 500)
    query[..., 0] = 0
    key[:, :, 400] = 0
    key[:, :, 400, 0] = 2000
    return query, key, value


def negative_scores():
    """All scores hundreds below 0, where a padded key that is not masked would win."""
    query, key, value = random(300, 300)
    query[..., 0], key[..., 0] = 60, -60
    return query, key, value


def large_common_offset():
    query, key, value = random(300, 500)
    return query, key + 50, value


def mixed_heads():
    """One head for each kernel and back."""
    query, key, value = random(300, 500, heads=4)
    factor = np.array([1, 40, 1, 1000])[:, None, None]
    return query * factor, key * factor, value


INPUTS = [layer_normed, huge_norms, one_dominant_key, equal_keys, far_bound, negative_scores]
INPUTS += [large_common_offset, mixed_heads]


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("inputs", INPUTS, ids=lambda inputs: inputs.__name__)
def test_accuracy(inputs, dtype):
    check(*inputs(), dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lengths", "dtype"),
    [
        *((lengths, "bfloat16") for lengths in [(1, 1), (1, 300), (257, 255), (40, 513)]),
        *((lengths, "float32") for lengths in [(300, 1), (255, 257), (256, 256), (512, 511)]),
    ],
)
def test_lengths(lengths, dtype):
    check(*random(*lengths), dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("queries", "keys", "kv_length"),
    [(slice(0, 128), 640, 513), (slice(384, 512), 640, 200), (slice(300, 321), 321, 300)],
)
@pytest.mark.parametrize("inputs", [random, lambda q_len, kv_len: [40 * x for x in random(q_len, kv_len)]])
def test_a_part_of_the_queries(inputs, queries, keys, kv_length):
    """With padded keys, whose values would show, by either kernel: what the same queries get among all."""
    query, key, value = (jnp.asarray(array, "float32") for array in inputs(keys, keys))
    run = functools.partial(splash_attention, kv_length=kv_length, block_sizes=SMALL)
    key, value = (x.at[:, :, kv_length:].set(1e3) for x in (key, value))
    ours = np.asarray(run(query[:, :, queries], key, value), np.float64)
    expected = attention(query, key[:, :, :kv_length], value[:, :, :kv_length])[:, :, queries]
    error = np.linalg.norm(ours - expected) / np.linalg.norm(expected)
    assert error <= TOLERANCE["float32"], f"normwise relative error {error:.2e}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "block_sizes",
    [
        BlockSizes(128, 512, 384, 128),  # two passes of unequal length in a block
        BlockSizes(384, 128, 256, 256),  # a pass longer than the block
        BlockSizes(640, 1024, 512, 256),  # tiles of 128 queries at the end
        ORIGINAL_BLOCK_SIZES,
        None,
    ],
    ids=str,
)
def test_block_sizes(block_sizes):
    check(*random(700, 1000), "bfloat16", block_sizes=block_sizes)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_without_k_smooth(dtype):
    check(*layer_normed(), dtype, k_smooth=False)
    check(*large_common_offset(), dtype, k_smooth=False)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [16, 48, 128])
def test_head_dims_batch_and_scale(head_dim):
    check(*random(200, 300, head_dim=head_dim, batch=2), "bfloat16", scale=0.3)


def apart(distance, q_len=300, kv_len=500):
    """One head whose bound is so far (log2) above the greatest score of each row, by keys that are long elsewhere."""
    query, key, value = random(q_len, kv_len, heads=1)
    query[..., 0] = 0
    query *= 16 / np.linalg.norm(query, axis=-1, keepdims=True)
    key[..., 0] = (distance / FACTOR / 16 + 3) * np.where(np.arange(kv_len) % 2, 1, -1)
    return query, key, value


def far_text():
    """One head that is far apart for its first queries alone."""
    query, key, value = apart(190)
    query[:, :, :100] *= 1.5
    return query, key, value


def one_key():
    """One head whose rows have all their weight on one key, whose score is the bound."""
    query, key, value = random(300, 500, heads=1)
    query, key = 0.05 * query, 0.1 * key
    query[..., 0] = 16
    key[:, :, 137] = 20 * np.eye(HEAD_DIM)[0]
    return query, key, value


@pytest.mark.slow
def test_uninitialized_memory_is_never_read():
    strict = pltpu.InterpretParams(uninitialized_memory="nan")
    heads = (apart(distance, 256, 512) for distance in (0, 190, 2000))
    check(*(np.concatenate(arrays, 1) for arrays in zip(*heads, strict=True)), "bfloat16", interpret=strict)


ENDS = [  # of float32: a head, the exponent of its largest value, its share of blocks for the online kernel
    (apart(100), 0, 0),
    (apart(190), 0, 0),
    (apart(190), 8, 0),
    (apart(190), -60, 1),  # products that would underflow
    (far_text(), 0, 0.5),
    (apart(240), 0, 1),
    (apart(2000), 0, 1),
    (equal_keys(), 8, 0),  # all weights are the greatest that there can be
    (equal_keys(), 40, 1),
    (one_key(), 8, 0),
    (one_key(), 120, 1),
    (layer_normed(), -60, 0),
]


@pytest.mark.parametrize(
    ("dtype", "block_sizes"),
    [("bfloat16", SMALL), pytest.param("float32", BlockSizes(256, 512, 256, 128), marks=pytest.mark.slow)],
)
def test_both_ends_of_the_range(dtype, block_sizes):
    """With padding and another head that would show; keys and values in one array, in two blocks of keys and in one."""
    scaled = [(query, key, value / np.abs(value).max() * 2.0**exponent) for (query, key, value), exponent, _ in ENDS]
    query, key, value = (
        jnp.asarray(np.concatenate([array[:, :1] for array in arrays], 1), dtype)
        for arrays in zip(*scaled, strict=True)
    )
    length = 450

    @jax.jit
    def run(*arrays):
        queries, *others = (to_tiles(array) for array in arrays)
        queries = jnp.pad(queries, ((0, 3), (1, 0), (0, 0), (0, 0)), constant_values=jnp.nan)
        others = jnp.concatenate(others, axis=1)
        options = {"q_length": query.shape[2], "kv_length": length, "block_sizes": block_sizes}
        options |= {"heads": len(ENDS), "first": (1, 0, len(ENDS))}
        output, online = tiled_attention(queries, others, others, **options)
        return from_tiles(output, 1, len(queries) * 128), online

    output, online = run(query, *(array.at[:, :, length:].set(1e30) for array in (key, value)))
    output, _, rest = jnp.split(output, [query.shape[2], 512], axis=2)
    assert not rest.any()  # of the block with no query that counts
    assert online.tolist() == [share for *_, share in ENDS]
    errors = errors_of_heads(output, attention(query, key[:, :, :length], value[:, :, :length]))
    assert (errors <= TOLERANCE[dtype]).all(), errors


def test_each_head_takes_the_kernel_that_it_needs():
    query, key, value = (jnp.asarray(array[0], "float32") for array in mixed_heads())
    factor = HEAD_DIM**-0.5 / np.log(2)
    assert online_heads(query[None], key[None], value[None]).tolist() == [[False, True, False, True]]
    # The bound holds, and no row's maximum is further below it than the fast kernel can represent.
    for head in (0, 2):
        scores = np.asarray(query[head] @ (key[head] - key[head].mean(0)).T) * factor
        bound = (
            factor * np.linalg.norm(query[head], axis=1) * np.linalg.norm(key[head] - key[head].mean(0), axis=1).max()
        )
        assert (scores.max(1) >= 0).all() and (scores.max(1) <= bound).all() and bound.max() <= 100


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ((100, 256, 128, 128), "block_q=100 is not a multiple of 128; the nearest that work: 128"),
        ((256, 300, 128, 128), "block_kv=300 is not a multiple of 128; the nearest that work: 256 or 384"),
        ((256, 256, 0, 128), "block_kv_compute=0 is not a multiple of 128; the nearest that work: 128"),
        ((256, 256, 128, 130), "block_kv_compute_in=130 is not a multiple of 128; the nearest that work: 128 or 256"),
    ],
)
def test_block_sizes_that_are_no_multiples(sizes, named):
    with pytest.raises(ValueError, match=rf"^{named}\b"):
        check(*random(8, 8), "bfloat16", block_sizes=BlockSizes(*sizes))


@pytest.mark.parametrize(("block_q", "block_kv"), [(1536, 99968), (65536, 65536), (262144, 262144)])
def test_block_sizes_beyond_vmem(block_q, block_kv):
    arrays = [jax.ShapeDtypeStruct((1, 1, 300000, HEAD_DIM), "bfloat16")] * 3

    def trace(block_q, block_kv):
        blocks = BlockSizes(block_q, block_kv, 256, 256)
        return jax.eval_shape(lambda *arrays: splash_attention(*arrays, block_sizes=blocks), *arrays)

    with pytest.raises(ValueError, match=f"block_q={block_q} and block_kv={block_kv} need .* of VMEM") as error:
        trace(block_q, block_kv)
    nearest = error.value.args[0].partition("nearest that work: ")[2]
    for choice in nearest.split(" or "):
        sizes = dict(block_q=block_q, block_kv=block_kv) | {
            name: int(size) for name, size in re.findall(r"(block_\w+)=(\d+)", choice)
        }
        BlockSizes(**sizes).check(HEAD_DIM, 2)


@pytest.mark.parametrize(
    ("q_len", "kv_len"), [(1, 1), (25826, 25826), (45106, 45106), (11277, 45106), (300000, 300000)]
)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_default_block_sizes_fit_any_length(q_len, kv_len, itemsize):
    blocks = DEFAULT_BLOCK_SIZES.fitted(q_len, kv_len, HEAD_DIM, itemsize)
    blocks.check(HEAD_DIM, itemsize)
    padded = -(-q_len // blocks.block_q) * blocks.block_q, -(-kv_len // blocks.block_kv) * blocks.block_kv
    assert padded[0] <= 1.1 * q_len + 128 and padded[1] <= 1.01 * kv_len + 128


def test_wrong_shapes_and_dtypes():
    query, key, value = random(8, 8)
    with pytest.raises(ValueError, match="shapes do not fit together"):
        splash_attention(query, key, value[:, :, :7])
    with pytest.raises(ValueError, match="expected bfloat16 or float32"):
        splash_attention(*(jnp.asarray(array, "float16") for array in (query, key, value)))
    with pytest.raises(ValueError, match="scale must be positive"):
        splash_attention(*(jnp.asarray(array, "float32") for array in (query, key, value)), scale=0)
