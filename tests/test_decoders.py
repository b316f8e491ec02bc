"""Both decoders, split in time and space, against diffusers' decode in torch."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from cogvideox.models.shared.sizes import MOST_ELEMENTS
from cogvideox.models.vae import conv_blocks, conv_kernel, vae_flax, vae_layers, vae_torchax
from cogvideox.models.vae.conv_input import conv_input, plain_conv_input, repeated
from cogvideox.models.vae.decoder import chunk_programs, chunk_sizes, decode, to_pixels
from cogvideox.models.vae.spatial_split import Split, choose_split
from compile_for_tpu import topologies
from tests.helpers import ROOT, needs_libtpu

VAES = {
    "three levels": dict(block_out_channels=(8, 8, 16), latent_channels=4, layers_per_block=1, norm_num_groups=4),
    "no temporal compression": dict(
        block_out_channels=(8, 16),
        latent_channels=3,
        layers_per_block=2,
        norm_num_groups=2,
        temporal_compression_ratio=1,
    ),
    "mish, eightfold in time": dict(
        block_out_channels=(4, 4, 8, 8),
        latent_channels=5,
        layers_per_block=1,
        norm_num_groups=2,
        act_fn="mish",
        temporal_compression_ratio=8,
    ),
}
both_decoders = pytest.mark.parametrize("decoder", [vae_torchax, vae_flax], ids=["torchax", "flax"])


def make_vae(sizes: dict) -> AutoencoderKLCogVideoX:
    """Make a VAE with random weights."""
    torch.manual_seed(0)
    levels = len(sizes["block_out_channels"])
    blocks = dict(down_block_types=("CogVideoXDownBlock3D",) * levels, up_block_types=("CogVideoXUpBlock3D",) * levels)
    return AutoencoderKLCogVideoX(**sizes | blocks)


@functools.cache
def real_vae() -> AutoencoderKLCogVideoX:
    """Make the VAE of CogVideoX1.5-5B at its real widths."""
    config = json.loads((ROOT / "configs" / "CogVideoX1.5-5B" / "vae" / "config.json").read_text())
    return make_vae({name: value for name, value in config.items() if name in ("block_out_channels", "scaling_factor")})


def expected_pixels(vae: AutoencoderKLCogVideoX, latents: torch.Tensor) -> np.ndarray:
    """Return diffusers' frames [frames, height, width, 3] in [0, 1], without the surplus in front."""
    with torch.no_grad():
        frames = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1)[0].numpy()
    return frames[-((latents.shape[2] - 1) * vae.config.temporal_compression_ratio + 1) :]


def our_pixels(
    decoder, vae, latents: torch.Tensor, chips=1, rows=None, strips=None, for_tpu=None, dtype=jnp.float32, most=None
):
    ours = decoder.make_decoder(vae.config)
    weights = {name: jnp.asarray(weight.numpy(), dtype) for name, weight in vae.decoder.state_dict().items()}
    assert ours.weight_shapes == {name: weight.shape for name, weight in weights.items()}
    split = choose_split(jax.devices()[:chips], *latents.shape[3:], rows, strips, for_tpu)
    split = dataclasses.replace(split, most_elements=most)
    weights = jax.device_put(ours.convert_weights(weights), split.replicated)
    traced = chunk_programs(ours, weights, latents.shape, split, jnp.float32)
    largest = max(max(products(program.jaxpr.jaxpr)) for program in traced)
    assert most is None or largest <= most, largest
    programs = [program.lower().compile() for program in traced]
    latents = np.asarray(jnp.asarray(latents.numpy(), dtype))
    return np.concatenate(list(decode(programs, weights, latents, split)))


def products(jaxpr: Any) -> Iterator[int]:
    """Yield how many elements each convolution and each matrix product of a program takes or makes."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("conv_general_dilated", "dot_general"):
            yield max(variable.aval.size for variable in (*equation.invars, *equation.outvars))
        for parameter in equation.params.values():
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from products(inner)


def assert_close(pixels: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    assert pixels.shape == expected.shape and pixels.dtype == np.float32
    error = np.abs(pixels - expected).max()
    assert error < tolerance, f"pixels differ by {error:.1e}"


@pytest.mark.parametrize(
    ("decoder", "name", "latent_frames"),
    [
        (vae_torchax, "three levels", 7),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (vae_flax, "three levels", 1),
                (vae_torchax, "three levels", 2),
                (vae_flax, "no temporal compression", 7),
                (vae_torchax, "no temporal compression", 1),
                (vae_flax, "no temporal compression", 2),
                (vae_torchax, "mish, eightfold in time", 7),
                (vae_flax, "mish, eightfold in time", 1),
                (vae_flax, "mish, eightfold in time", 2),
            ]
        ),
    ],
    ids=lambda value: getattr(value, "__name__", "").rpartition("_")[2] or str(value),
)
def test_decode_matches_diffusers(decoder, name, latent_frames):
    """Each VAE for each number of frames, the decoders by turns: their layers are the same."""
    sizes = VAES[name]
    vae = make_vae(sizes)
    latents = torch.randn(1, sizes["latent_channels"], latent_frames, 4, 6)
    assert_close(our_pixels(decoder, vae, latents), expected_pixels(vae, latents))


SPLITS = {  # chips, rows of chips, strips, latent size, frames
    "strips": (1, 1, 3, (5, 4), 81),
    "even columns": (2, 1, 1, (4, 6), 17),
    "even, 2 x 2": (4, 2, 2, (8, 6), 17),
    "uneven, 4 x 2": (8, 4, 1, (9, 5), 61),
    "more strips than rows": (8, 2, 8, (3, 7), 17),
}


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_split_in_space_is_exact(split, random_model):
    """The layers are the same in both decoders, which take turns."""
    chips, rows, strips, size, frames = SPLITS[split]
    decoder = (vae_torchax, vae_flax)[list(SPLITS).index(split) % 2]
    vae = AutoencoderKLCogVideoX.from_pretrained(random_model, subfolder="vae")
    latents = torch.randn(1, vae.config.latent_channels, (frames - 1) // 4 + 1, *size, generator=torch.manual_seed(1))
    pixels = our_pixels(decoder, vae, latents, chips, rows, strips)
    assert len(pixels) == frames
    assert_close(pixels, expected_pixels(vae, latents), 1e-4)


@pytest.mark.slow
def test_real_widths():
    """At a small size: in float32 on four uneven parts, and in bfloat16 by the decoder that is the default."""
    latents = torch.randn(1, 16, 3, 3, 3, generator=torch.manual_seed(1))
    expected = expected_pixels(real_vae(), latents)
    assert_close(our_pixels(vae_flax, real_vae(), latents, chips=4, rows=2), expected, 1e-3)
    half = our_pixels(vae_torchax, real_vae(), latents, dtype=jnp.bfloat16)
    psnr = -10 * np.log10(np.square(half.astype(np.float64) - expected).mean())
    assert psnr >= 45, f"bfloat16: {psnr:.1f} dB"


@pytest.mark.parametrize(
    ("decoder", "split"), [(vae_torchax, {}), (vae_flax, {"chips": 2, "rows": 2, "strips": 2})], ids=["torchax", "flax"]
)
def test_convolutions_in_parts(decoder, split):
    """As on a GPU, where they may not be too large."""
    vae = make_vae(VAES["three levels"])
    latents = torch.randn(1, 4, 3, 3, 4, generator=torch.manual_seed(1))
    whole = our_pixels(decoder, vae, latents, **split)
    assert_close(our_pixels(decoder, vae, latents, **split, most=8_000), whole, 1e-6)


def test_a_convolution_in_frames_and_rows():
    """With so small a limit that each part is a row."""
    x, weight = (np.random.default_rng(0).standard_normal(shape).astype(np.float32) for shape in ((5, 9, 4, 2, 3),) * 2)
    weight = weight[:3, :3, :3, 0, :, None].repeat(2, -1)
    convolve = functools.partial(vae_layers._convolve, weight=weight, bias=np.ones(2, np.float32))
    parts = functools.partial(vae_layers._in_parts, convolve, window=(3, 3), most=3 * 3 * 4 * 2 * 3)
    assert max(products(jax.make_jaxpr(parts)(x).jaxpr)) == 3 * 3 * 4 * 2 * 3
    assert_close(np.asarray(parts(x)), np.asarray(convolve(x)), 1e-5)


def test_the_limit_of_a_gpu():
    """At the size at which an H200 did not come to an end: there are convolutions of 2.95e9 elements."""
    assert MOST_ELEMENTS["gpu"] == 2**31 - 1
    split = choose_split(jax.devices()[:1], 96, 170)
    ours = vae_flax.make_decoder(real_vae().config)
    weights = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in ours.weight_shapes.items()}
    weights = jax.eval_shape(ours.convert_weights, weights)
    for most, least, largest in ((None, 2.9e9, 3e9), (2**31 - 1, 1e9, 2**31 - 1)):
        split = dataclasses.replace(split, most_elements=most)
        traced = chunk_programs(ours, weights, (1, 16, 21, 96, 170), split)
        found = max(max(products(program.jaxpr.jaxpr)) for program in traced)
        assert least < found <= largest, found


@pytest.mark.slow
def test_forms_for_a_tpu():
    """The kernel in Pallas' interpreter, columns in pairs and by eights, two chips with strips that are not full."""
    vae = make_vae(dict(block_out_channels=(128, 8), latent_channels=4, layers_per_block=1, norm_num_groups=4))
    latents = torch.randn(1, 4, 5, 5, 8, generator=torch.manual_seed(1))
    pixels = our_pixels(vae_torchax, vae, latents, chips=2, rows=2, strips=2, for_tpu=True)
    assert_close(pixels, expected_pixels(vae, latents))


@pytest.mark.slow
@both_decoders
def test_a_longer_video_needs_no_other_programs(decoder):
    """So that the time to compile them does not grow: 17 and 81 frames, and 29 and 61."""
    ours = decoder.make_decoder(make_vae(VAES["three levels"]).config)
    weights = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in ours.weight_shapes.items()}
    weights = jax.eval_shape(ours.convert_weights, weights)
    split = choose_split(jax.devices()[:1], 4, 6)
    for lengths in ((5, 21), (8, 16)):
        programs = [chunk_programs(ours, weights, (1, 4, frames, 4, 6), split) for frames in lengths]
        short, long = ([program.lower().as_text() for program in both] for both in programs)
        assert len(short) == 2 and short == long


def test_uint8_pixels_are_rounded():
    x = jnp.linspace(-1.2, 1.2, 1001)
    expected = np.round(np.clip(np.asarray(x, np.float64) / 2 + 0.5, 0, 1) * 255)
    pixels = np.asarray(to_pixels(x, jnp.uint8))
    assert pixels.dtype == np.uint8 and np.abs(pixels - expected).max() <= 1 and (pixels != expected).mean() < 0.01


@pytest.mark.parametrize(("latent_frames", "sizes"), [(1, [1]), (2, [2]), (3, [3]), (5, [3, 2]), (16, [2] * 8)])
def test_chunk_sizes(latent_frames, sizes):
    assert chunk_sizes(latent_frames) == sizes


@pytest.mark.parametrize(
    ("chips", "size", "shape", "even"),
    [
        (8, (96, 170), (2, 4), False),
        (8, (80, 160), (1, 8), True),
        (4, (96, 170), (1, 4), False),
        (1, (60, 90), (1, 1), True),
    ],
)
def test_split_with_the_least_to_do(chips, size, shape, even):
    split = choose_split(jax.devices()[:chips], *size, strips=1 if chips == 1 else 8)
    assert (tuple(split.mesh.shape.values()), split.is_even) == (shape, even), str(split)


@pytest.mark.parametrize(
    ("source", "frames", "factor", "scale", "history", "cached"),
    [
        ((3, 4, 6, 3, 5), 3, 1, (3, 2, 3), 2, False),
        ((4, 4, 6, 8, 128), 4, 1, (2, 2, 3), 2, True),  # packed
        ((3, 2, 3, 2, 7), 5, 2, None, 0, False),
        ((5, 4, 6, 1, 256), 5, 1, (3, 2, 6), 2, True),
        ((1, 2, 2, 2, 128), 1, 1, None, 2, False),
        ((2, 3, 10, 8, 4), 4, 2, (2, 3, 10), 0, False),
    ],
)
@pytest.mark.parametrize("dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16])
def test_conv_input_kernel(source, frames, factor, scale, history, cached, dtype):
    """In Pallas' interpreter, against the same in jax.numpy."""
    rng = np.random.default_rng(0)
    array = lambda *shape, dtype=dtype: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    source_frames, height, width, strips, channels = source
    modulation = [array(*scale, strips, channels, dtype=jnp.float32) if scale else None for _ in range(2)]
    rows = array(source_frames, 2, factor * width + 2, 1, channels)
    columns = array(source_frames, factor * height, 2, strips, channels)
    cache = array(history, factor * height + 2, factor * width + 2, strips, channels) if cached else None
    arguments = (array(*source), *modulation, rows, columns, cache)
    options = dict(activation=jax.nn.silu if scale else None, history=history, frames=frames, factor=factor)
    expected, expected_cache = plain_conv_input(*arguments, **options)
    packed = channels == 128
    padded, next_cache = conv_input(*arguments, **options, packed=packed, interpret=True)
    if packed:
        expected = jnp.concatenate([expected[:, :, :-1], expected[:, :, 1:]], axis=-1)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(padded.astype(jnp.float32), expected.astype(jnp.float32), tolerance, tolerance)
    assert (next_cache is None) == (history == 0)
    if history:
        np.testing.assert_allclose(
            next_cache.astype(jnp.float32), expected_cache.astype(jnp.float32), tolerance, tolerance
        )


KERNELS = {  # source, out channels, frames, factor, scale, shortcut's channels, cached, blocks of columns, dtype
    "cached, in blocks": ((2, 2, 8, 128), 256, 2, 1, (2, 2, 4), 0, True, 4, jnp.bfloat16),
    "quads, in blocks": ((2, 2, 8, 128), 128, 2, 1, (2, 2, 4), 0, True, 2, jnp.float32),
    "quads with a shortcut": ((3, 4, 6, 128), 128, 3, 1, (3, 2, 3), 256, True, 1, jnp.bfloat16),
    "odd, repeated frames and a shortcut": ((2, 3, 5, 256), 256, 3, 1, (1, 3, 5), 128, False, 1, jnp.float32),
    "enlarged": ((2, 3, 4, 128), 256, 2, 2, (2, 3, 4), 0, False, 2, jnp.float32),
    "two chunks that overlap": ((2, 1, 89, 128), 256, 2, 1, (2, 1, 89), 0, True, 1, jnp.bfloat16),
}


@pytest.mark.parametrize(
    ("source", "out", "frames", "factor", "scale", "shortcut", "cached", "blocks", "dtype"),
    [
        pytest.param(*kernel, marks=[] if name == "quads, in blocks" else pytest.mark.slow, id=name)
        for name, kernel in KERNELS.items()
    ],
)
def test_conv_kernel(source, out, frames, factor, scale, shortcut, cached, blocks, dtype):
    """In Pallas' interpreter, against the padded input and a convolution of it in jax.numpy, one column unseen."""
    rng = np.random.default_rng(0)
    array = lambda *shape, dtype=dtype: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    wide = lambda x: x.astype(jnp.float32)  # noqa: E731
    stored, height, width, channels = source
    history = 2 if factor == 1 else 0
    fitted = conv_blocks.fitting(
        conv_blocks.Shape(
            frames, height, width, channels, out, history, cached, factor, dtype.dtype.itemsize, width // scale[2]
        )
    )
    fitted = dataclasses.replace(fitted, blocks=blocks, shortcut=shortcut)
    x, factors = array(*source[:3], 8, channels), [array(*scale, 8, channels, dtype=jnp.float32) for _ in range(2)]
    edges = conv_kernel.Edges(array(stored, 2, width + 2, 1, channels), array(stored, height, 2, 8, channels))
    full = array(history, height + 2, width + 2, 8, channels) if cached else None
    cache = conv_kernel.Cache(full[:, :, 1:-1], full[:, :, jnp.array([0, -1])]) if cached else None
    weight = (array(history + 1, 3, 3, channels, out) / (27 * channels) ** 0.5).astype(dtype)
    bias, residual = array(out), array(stored, height, width, 8, out)
    by = (array(stored, height, width, 8, shortcut), array(shortcut, out) / 16) if shortcut else None
    added = None if factor == 2 or shortcut else residual
    found = conv_kernel.convolve(
        *(fitted, x, *factors, edges, cache, conv_blocks.packed_weight(weight, fitted), bias, added, by),
        jnp.array([width - 1]),
        activation=jax.nn.silu,
        interpret=True,
    )

    rows, columns = edges
    if factor == 2:
        rows = jnp.concatenate([rows[:, :, :1], jnp.repeat(rows[:, :, 1:-1], 2, axis=2), rows[:, :, -1:]], axis=2)
        columns = jnp.repeat(columns, 2, axis=1)
    options = dict(activation=jax.nn.silu, history=history, frames=frames, factor=factor)
    padded, next_cache = plain_conv_input(x, *factors, rows, columns, full, **options)
    exact = dict(dimension_numbers=vae_layers.DIMENSIONS, precision="highest")
    expected = jax.lax.conv_general_dilated(wide(padded), wide(weight), (1, 1, 1), "VALID", **exact) + wide(bias)
    if added is not None:
        expected += repeated(wide(added), frames, height, width)
    if by:
        product = jnp.einsum("thwnc,cd->thwnd", *map(wide, by), precision="highest")
        expected += repeated(product, frames, height, width)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(wide(found.values), expected, tolerance, tolerance)
    seen = expected[:, :, :-factor].reshape(frames, height, factor, -1, 8, out)
    sums = jnp.stack([seen.sum((2, 3)), jnp.square(seen).sum((2, 3))], 2)
    np.testing.assert_allclose(found.sums, sums, 1e-3, 1e-3 * float(jnp.abs(sums).max()))
    if history:
        inner, beside = map(wide, found.cache)
        kept = jnp.concatenate([beside[:, :, :1], inner, beside[:, :, 1:]], axis=2)
        np.testing.assert_allclose(kept, wide(next_cache), tolerance, tolerance)


def test_which_convolutions_the_kernel_takes(monkeypatch):
    """Those of the real decoder on v6e, but not of so narrow blocks that it is no gain, nor on a TPU with less VMEM."""
    shape = functools.partial(conv_blocks.Shape, 8, 48, history=2, cached=True, factor=1, itemsize=2, each=8)
    assert conv_blocks.fitting(shape(344, 256, 128)).blocks == 1
    assert conv_blocks.fitting(shape(1360, 256, 128)).blocks > 1
    for channels, out in ((16, 512), (128, 3)):
        assert conv_blocks.fitting(shape(344, channels, out)) is None
    monkeypatch.setattr(conv_blocks, "vmem", lambda: 64 * 2**20)
    assert conv_blocks.fitting(shape(344, 256, 128)) is None  # 43 latent columns do not divide


@pytest.mark.slow
def test_a_block_in_kernels():
    """A resnet block whose convolutions are kernels, on two chips with strips that are not full, beside XLA's."""
    split = choose_split(jax.devices()[:2], 9, 6, rows=1, strips=8, for_tpu=True)
    rng = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    x, latents = (split.tiles(np.asarray(array(1, channels, 2, 9, 6))) for channels in (128, 4))
    weights = [array(*shape) / 60 for shape in ((3, 3, 3, 128, 256), (3, 3, 3, 256, 256), (128, 256), (3, 3, 256, 256))]
    factors = [(array(4, channels), array(channels)) for channels in (128, 256)]

    def block(x, latents, split: Split):
        def norm(x, factor):
            ones = jnp.ones(factor[1].shape)
            return vae_layers.spatial_norm(x, latents, (ones, ones), factor, factor, 4, split).with_activation(
                jax.nn.silu
            )

        bias, caches = jnp.ones(256), []
        hidden, cache = vae_layers.causal_conv(norm(x, factors[0]), weights[0], bias, None, split)
        caches.append(cache)
        hidden, cache = vae_layers.causal_conv(norm(hidden, factors[1]), weights[1], bias, None, split)
        hidden = hidden + vae_layers.shortcut(x, weights[2], bias, split)
        large = vae_layers.upsample(hidden, weights[3], bias, True, split)
        hidden, again = vae_layers.causal_conv(norm(large, factors[1]), weights[1], bias, None, split)
        result, caches = vae_layers.computed(hidden + large, [*caches, cache, again])
        return result, jax.tree.map(jnp.sum, caches)

    def run(for_tpu):
        part = functools.partial(block, split=dataclasses.replace(split, for_tpu=for_tpu))
        specs = split.latents.spec, jax.sharding.PartitionSpec()
        whole = jax.shard_map(part, mesh=split.mesh, in_specs=specs[:1] * 2, out_specs=specs, check_vma=False)
        return jax.jit(whole)(x, latents)[0]

    inside = np.asarray(split.tiles(np.ones((1, 1, 4, 18, 12), np.float32), scale=2)) > 0
    difference = np.where(inside, np.asarray(run(True)) - np.asarray(run(False)), 0)
    assert np.abs(difference).max() < 1e-4


@pytest.mark.slow
def test_a_chunk_for_which_the_kernel_has_no_room(monkeypatch):
    """XLA takes the kernel's cache, and returns one that the kernel takes for the chunk after it."""
    split = choose_split(jax.devices()[:1], 8, 4, rows=1, strips=8, for_tpu=True)
    rng = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    weight, bias = array(3, 3, 3, 128, 256) / 60, array(256)
    chunks = [split.tiles(np.asarray(array(1, 128, 2, 8, 4))) for _ in range(3)]

    def run(for_tpu):
        def convolve(*chunks):
            cache, results = None, []
            for index, x in enumerate(chunks):
                with monkeypatch.context() as patch:
                    if index == 1:
                        patch.setattr(conv_blocks, "vmem", lambda: 0)
                    part = dataclasses.replace(split, for_tpu=for_tpu)
                    result, cache = vae_layers.computed(*vae_layers.causal_conv(x, weight, bias, cache, part))
                assert isinstance(cache, conv_kernel.Cache) == for_tpu
                results.append(result)
            return results

        specs = split.latents.spec
        whole = jax.shard_map(convolve, mesh=split.mesh, in_specs=(specs,) * 3, out_specs=specs, check_vma=False)
        return jax.jit(whole)(*chunks)

    for ours, plain in zip(run(True), run(False), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-4)


COMPILE_CONV_INPUT = """
import functools, jax, jax.numpy as jnp
from compile_for_tpu import topologies
from cogvideox.models.vae.conv_input import conv_input
device = topologies.devices("v6e-1")[0]
array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(
    shape, dtype, sharding=jax.sharding.SingleDeviceSharding(device))
for channels, packed, factor, history in ((128, True, 1, 2), (256, False, 1, 2), (256, False, 2, 0)):
    scale = array(2, 3, 43, 8, channels, dtype=jnp.float32)
    size = 24 * factor + 2, 344 * factor + 2
    cache = array(2, *size, 8, channels) if history else None
    function = functools.partial(
        conv_input, activation=jax.nn.silu, history=history, frames=8, factor=factor, packed=packed)
    edges = array(8, 2, size[1], 1, channels), array(8, size[0] - 2, 2, 8, channels)
    with topologies.compiling_for(jax.sharding.Mesh([device], ("chips",))):
        lowered = jax.jit(function).lower(array(8, 24, 344, 8, channels), scale, scale, *edges, cache)
    print("tpu_custom_call" in lowered.compile().as_text())
"""


@pytest.mark.slow
@needs_libtpu
def test_conv_input_compiles_for_v6e():
    """The three forms that the decoder has of it, at full width on four chips."""
    environment = os.environ | topologies.compiler_environment("v6e-1", None)
    command = [sys.executable, "-c", COMPILE_CONV_INPUT]
    process = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.stdout == "True\n" * 3, process.stderr[-2000:]
