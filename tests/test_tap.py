"""The seam for looking inside: what it returns is what diffusers' modules give, and when it is off it is not there."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb, get_3d_rotary_pos_embed
from jax.sharding import PartitionSpec

import custom_splash_attention
from cogvideox.files.tensor_dump import merged, statistics_of
from cogvideox.models.shared import tap
from cogvideox.models.shared.sharding import Parallelism, make_mesh
from cogvideox.models.transformer import block, kernels, taps
from cogvideox.models.transformer.attention import Attention, xla_attention
from cogvideox.models.transformer.embeddings import rotary_embedding
from cogvideox.models.transformer.parameters import load_parameters
from cogvideox.models.transformer.transformer import transformer
from cogvideox.models.vae.decoder import chunk_programs
from cogvideox.models.vae.spatial_split import choose_split
from tests.test_decoders import both_decoders, make_vae
from tests.test_transformer import SMALL, make_module, relative_error

LAYERS, TEXT = SMALL["num_layers"], 10
IN_A_BLOCK = (
    *("norm1", "attn1.to_q", "attn1.norm_q", "attn1.to_k", "attn1.norm_k", "attn1.to_v", "attn1.to_out.0"),
    *("norm2", "ff.net.0", "ff.net.2", "norm1.linear", "norm2.linear"),
)
OUTSIDE = ("time_embedding.linear_2", "patch_embed", "norm_final", "norm_out.linear", "norm_out", "proj_out")
EVERYTHING = tap.Wanted(arrays=["*"], statistics=["*"], checksums=True)
WEIGHTS = [f"transformer_blocks.{i}.attn1.weights" for i in (0, 2)]
QUERIES, HEADS = [39, 0, 12, 25], [6, 0, 1, 7]
OF_THE_BLOCKS = [
    f"transformer_blocks.{i}{name}" for i in range(LAYERS) for name in ("", *(f".{n}" for n in IN_A_BLOCK))
]
SHAPE = (2, 4, 4, 6, 10)


def transformer_inputs(config) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(SHAPE), torch.randn(SHAPE[0], TEXT, config["text_embed_dim"])


def diffusers_outputs(module) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the prediction, and each module's output by its name.

    Of a pair of text and video that is both, in the order of the sequence.
    """
    seen = {}

    def record(_, __, output, name):
        tokens = output if isinstance(output, torch.Tensor) else torch.cat([output[1], output[0]], dim=1)
        one = name.endswith(("linear", "linear_2"))  # the same for all samples, which have one time step
        seen[name] = tokens[: 1 if one else None].clone().numpy()  # the rotary embedding is applied in place

    handles = [
        layer.register_forward_hook(functools.partial(record, name=name))
        for name, layer in module.named_modules()
        if name in (*OF_THE_BLOCKS, *OUTSIDE)
    ]
    latents, prompts = transformer_inputs(module.config)
    rotary = get_3d_rotary_pos_embed(
        module.config.attention_head_dim, None, (3, 5), 2, grid_type="slice", max_size=(10, 10)
    )
    with torch.no_grad():
        (prediction,) = module(
            latents, prompts, torch.full((SHAPE[0],), 37), image_rotary_emb=rotary, return_dict=False
        )
    for handle in handles:
        handle.remove()
    for name in WEIGHTS:
        q, k = (torch.from_numpy(seen[name.replace("weights", f"norm_{letter}")]) for letter in "qk")
        q, k = (
            torch.cat([x[:, :, :TEXT], apply_rotary_emb(x[:, :, TEXT:], rotary)], dim=2).double().numpy()[:, HEADS]
            for x in (q, k)
        )
        scores = q[:, :, QUERIES] @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1])
        exponentials = np.exp(scores - scores.max(-1, keepdims=True))
        seen[name] = exponentials / exponentials.sum(-1, keepdims=True)
    return prediction.numpy(), seen


def make_transformer(module, mesh: tuple[int, int, int], attention=xla_attention, query_parts: int = 1):
    """Our transformer as a function of its arguments, and these."""
    config = dict(module.config)
    devices = make_mesh(dict(zip(("dp", "sp", "tp"), mesh, strict=True)), jax.devices()[: np.prod(mesh)])
    parallelism = Parallelism(devices, query_parts=query_parts)

    def function(*arguments):
        options = {"config": config, "parallelism": parallelism, "attention": attention}
        prediction = transformer(*arguments, **options)
        return prediction.output, prediction.online_heads

    latents, prompts = (jnp.asarray(tensor.numpy()) for tensor in transformer_inputs(config))
    stored = {name: weight.numpy() for name, weight in module.state_dict().items()}
    parameters = load_parameters(stored.__getitem__, config, parallelism, stored["proj_out.weight"].dtype)
    return (
        function,
        parallelism.mesh,
        (parameters, latents, prompts, jnp.int32(37), rotary_embedding(config, SHAPE)),
    )


@pytest.mark.parametrize(
    ("mesh", "query_parts", "attention"),
    [
        *((mesh, 1, xla_attention) for mesh in [(1, 1, 1), (2, 2, 2)]),
        ((2, 2, 2), 1, Attention("splash_exp2", "cpu")),  # in tiles
        pytest.param((1, 4, 2), 2, xla_attention, marks=pytest.mark.slow),
        pytest.param((2, 4, 1), 4, Attention("splash_exp2", "cpu"), marks=pytest.mark.slow),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else getattr(value, "name", "xla"),
)
def test_transformer_modules_match_diffusers(mesh, query_parts, attention, monkeypatch):
    monkeypatch.setattr(block, "ELSEWHERE", 32)  # so that the MLP runs on several pieces
    monkeypatch.setattr(custom_splash_attention, "OFFSET_LIMIT", 11)  # so that some heads need the slower kernel
    module = make_module(SMALL)
    function, devices, arguments = make_transformer(module, mesh, attention, query_parts)
    wanted = dataclasses.replace(EVERYTHING, arrays=["*", "*.[02].attn1.weights"], queries=QUERIES, heads=HEADS)
    (prediction, online_heads), collected = jax.jit(tap.collecting(function, wanted, devices))(*arguments)
    statistics = {name: array for name, (array, _) in collected.statistics.fetched().items()}
    arrays = {name: tapped.without_padding() for name, tapped in collected.arrays.items()}
    for found in (arrays, statistics):
        online = [found.pop(name) for name in list(found) if name.endswith("online_heads")]
        assert all(heads.shape == (SHAPE[0], SMALL["num_attention_heads"]) for heads in online)
        if query_parts == 1:  # or else each part of the queries counts
            assert np.sum(online) == online_heads[0] >= online_heads[1]
        assert (0 < np.mean(online) < 1) if online else not online_heads.any()
    expected, theirs = diffusers_outputs(module)
    assert (error := relative_error(prediction, expected)) < 1e-5, f"mesh {mesh}: {error:.1e}"
    assert {*OF_THE_BLOCKS, *OUTSIDE, *WEIGHTS} == set(theirs) == set(arrays)
    assert [name for name in arrays if name not in WEIGHTS] == list(statistics)
    order = [name for name in arrays if name.startswith("transformer_blocks")]
    assert [name.split(".")[1] for name in order] == sorted(name.split(".")[1] for name in order), "not block by block"
    for name, expected in theirs.items():
        ours = arrays[name]
        assert ours.shape == expected.shape, f"{name}: {ours.shape}, diffusers {expected.shape}"
        assert (error := relative_error(ours, expected)) < 1e-5, f"{name} on mesh {mesh}: {error:.1e}"
        if name in WEIGHTS:  # of which no statistics are made
            continue
        row, truth = merged(statistics[name]), statistics_of(expected)
        error = np.abs(row - truth).max() / np.abs(truth).max()
        assert error < 1e-5, f"statistics of {name} on mesh {mesh}: {row}, of diffusers' array {truth}"


@pytest.mark.parametrize(("query_parts", "heads"), [(1, [3, 5]), (2, [3, 1]), (4, [1, 1])])
def test_heads_that_are_slow_for_some_queries(query_parts, heads):
    """Of chips 3 and 5 of eight along sp, which have other heads, or the same heads and other queries."""
    mesh = make_mesh({"dp": 1, "sp": 8, "tp": 1}, jax.devices())

    def function():
        def on_chip():
            place = jax.lax.axis_index("sp")
            taps.tap_online_heads(lambda: jnp.full((1, 1), (place == 3) | (place == 5)), query_parts)
            return place[None]

        return tap.shard_map(on_chip, mesh=mesh, in_specs=(), out_specs=PartitionSpec("sp"))()

    _, found = jax.jit(tap.collecting(function, tap.Wanted(statistics=["online_heads"]), mesh))()
    online, _ = found.statistics.fetched()["online_heads"]
    assert online.shape == (1, 8 // query_parts) and np.flatnonzero(online).tolist() == sorted(set(heads))


def test_only_what_is_asked_for():
    function, mesh, arguments = make_transformer(make_module(SMALL), (1, 2, 1))
    wanted = tap.Wanted(arrays=["transformer_blocks.1.ff.*", "proj_out"], statistics=["*.to_v"])
    _, found = jax.eval_shape(tap.collecting(function, wanted, mesh), *arguments)
    assert list(found.arrays) == ["transformer_blocks.1.ff.net.0", "transformer_blocks.1.ff.net.2", "proj_out"]
    assert [name for name, *_ in found.statistics.places] == [
        f"transformer_blocks.{i}.attn1.to_v" for i in range(LAYERS)
    ]
    with pytest.raises(tap.NoSuchNameError, match=r"no module is called \*.to_x; the nearest: .*to_[qkv]"):
        jax.eval_shape(tap.collecting(function, tap.Wanted(arrays=["*.to_x", "proj_out"]), mesh), *arguments)
    inside = r"transformer_blocks.1.attn1 has no output of its own; .*'transformer_blocks.1.attn1.\*' or one of .*to_q"
    with pytest.raises(tap.NoSuchNameError, match=inside):
        jax.eval_shape(tap.collecting(function, tap.Wanted(arrays=["transformer_blocks.1.attn1"]), mesh), *arguments)


def test_weights_of_a_few_queries_and_of_all_heads_unless_others_are_named():
    function, mesh, arguments = make_transformer(make_module(SMALL), (1, 2, 1))
    _, found = jax.eval_shape(tap.collecting(function, tap.Wanted(arrays=["*.1.attn1.weights"]), mesh), *arguments)
    tokens = TEXT + SHAPE[1] * SHAPE[3] * SHAPE[4] // 8
    assert {name: tapped.array.shape for name, tapped in found.arrays.items()} == {
        "transformer_blocks.1.attn1.weights": (SHAPE[0], SMALL["num_attention_heads"], 8, tokens)
    }
    assert taps.some_queries(tokens)[::7] == [0, tokens - 1] and taps.some_queries(3) == [0, 1, 2]


def test_one_block_takes_the_memory_of_one_block():
    """The scan keeps a slot for each block that is asked for, and one for all others."""
    function, mesh, arguments = make_transformer(make_module(SMALL | {"num_layers": 12}), (1, 1, 1))

    def temporaries(pattern):
        program = jax.jit(tap.collecting(function, tap.Wanted(arrays=[pattern]), mesh)).lower(*arguments)
        return program.compile().memory_analysis().temp_size_in_bytes

    one, all_ = temporaries("transformer_blocks.5.ff.net.0"), temporaries("transformer_blocks.*.ff.net.0")
    length = TEXT + SHAPE[1] * SHAPE[3] * SHAPE[4] // 8
    size = 4 * SHAPE[0] * length * 4 * SMALL["num_attention_heads"] * SMALL["attention_head_dim"]
    assert all_ - one > 8 * size, f"{one} bytes for one block, {all_} for all twelve, {size} for an array"


def test_sums_of_finite_and_other_values():
    x = jnp.asarray([[1.0, -8.0, 2.0], [3.0, -4.0, 5.0], [7.0, jnp.nan, 7.0]])
    real = jnp.asarray([[True], [True], [False]])
    np.testing.assert_array_equal(tap.sums(x, real, copies=1), [[6, -1, 119, -8, 5]])
    np.testing.assert_array_equal(tap.sums(x, real, copies=2), [[3, -0.5, 59.5, -8, 5]])
    row = merged(np.asarray(tap.sums(x, real, copies=1)))
    np.testing.assert_allclose(row, [-8, 5, -1 / 6, np.std([1, -8, 2, 3, -4, 5])], rtol=1e-6)
    assert np.isnan(merged(np.asarray(tap.sums(x, ~real, copies=1)))).all()
    infinite = merged(np.asarray(tap.sums(x.at[0, 0].set(jnp.inf), real, copies=1)))
    assert infinite[1] == np.inf and infinite[0] == -8


@both_decoders
@pytest.mark.parametrize(("chips", "strips"), [(1, 1), (8, 2)], ids=str)
def test_decoder_modules_match_diffusers(decoder, chips, strips):
    """The first chunk of latents that split unevenly."""
    vae = make_vae(dict(block_out_channels=(8, 8, 16), latent_channels=4, layers_per_block=1, norm_num_groups=4))
    torch.manual_seed(1)
    latents = torch.randn(1, 4, 3, 6, 10)
    seen = {}

    def record(_, __, output, name):
        seen[f"decoder.{name}"] = (output[0] if isinstance(output, tuple) else output)[0].movedim(0, 1).numpy()

    kinds = ("norm1", "conv1", "norm2", "conv2", "conv_shortcut", "conv_in", "norm_out", "conv_out", "mid_block")
    for name, layer in vae.decoder.named_modules():
        if name.endswith(kinds) or re.fullmatch(r".*(resnets|up_blocks|upsamplers)\.\d+", name):
            layer.register_forward_hook(functools.partial(record, name=name))
    with torch.no_grad():
        vae.decoder(latents)

    split = choose_split(jax.devices()[:chips], 6, 10, strips=strips)
    ours = decoder.make_decoder(dict(vae.config))
    weights = {name: jnp.asarray(weight.numpy()) for name, weight in vae.decoder.state_dict().items()}
    weights = jax.device_put(ours.convert_weights(weights), split.replicated)
    (traced,) = chunk_programs(ours, weights, latents.shape, split, wanted=EVERYTHING)
    tiles = jax.device_put(split.tiles(latents.numpy()), split.latents)
    _, collected = traced.lower().compile()(weights, tiles)
    statistics = {name: array for name, (array, _) in collected.statistics.fetched().items()}
    assert len(seen) > 30 and set(seen) <= set(collected.arrays), set(seen) - set(collected.arrays)
    for name, expected in seen.items():
        array = collected.arrays[name].without_padding()
        assert array.shape == expected.shape, f"{name}: {array.shape}, diffusers {expected.shape}"
        assert (error := relative_error(array, expected)) < 1e-4, f"{name}: {error:.1e}"
        row, truth = merged(statistics[name]), statistics_of(expected)
        error = np.abs(row - truth).max() / np.abs(truth).max()
        assert error < 1e-4, f"statistics of {name}: {row}, of diffusers' array {truth}"


def text_of(lowered: jax.stages.Lowered) -> str:
    """Return a program's text, as the compiler gets it, without the numbers in the names of its functions."""
    return re.sub(r"@\w+", "@function", lowered.as_text())


def test_off_it_is_not_in_the_program(monkeypatch):
    """The program is the same text with the seam's functions replaced by jax's own, and `tap` by nothing."""
    module = make_module(SMALL)
    function, mesh, arguments = make_transformer(module, (2, 2, 2))
    ours = text_of(jax.jit(function).lower(*arguments))

    def scan(name, function, carry, xs):
        return jax.lax.scan(lambda carry, x: (function(carry, x), None), carry, xs)[0]

    def pieces(function, arguments, axis):
        return [function(*each) for each in arguments]

    monkeypatch.setattr(tap, "tap", lambda *_, **__: None)
    monkeypatch.setattr(tap, "scan", scan)
    monkeypatch.setattr(tap, "pieces", pieces)
    monkeypatch.setattr(tap, "shard_map", functools.partial(jax.shard_map, check_vma=False))
    without, _, arguments = make_transformer(module, (2, 2, 2))
    assert ours == text_of(jax.jit(without).lower(*arguments))
    with_taps, _, _ = make_transformer(module, (2, 2, 2))
    monkeypatch.undo()
    assert ours != text_of(jax.jit(tap.collecting(with_taps, EVERYTHING, mesh)).lower(*arguments))


def test_sums_of_kernels():
    """What a kernel adds up beside its output, in blocks of 512 tokens of 640, of which the last are padding.

    Heads in two groups, here in two places of an array, have the same values, to the last bit, and their sums add up.
    """
    real, text, layer, dtype = jnp.int32(600), jnp.int32(30), jnp.int32(1), jnp.bfloat16
    embed, heads, head_dim = 128, 4, 32
    options = {"interpret": True, "real_tokens": jnp.clip(real - 128 * jnp.arange(5), 0, 128)}
    seeds = itertools.count()

    def random(*shape):
        return jax.random.normal(jax.random.key(next(seeds)), shape)

    @jax.jit
    def sums_and_arrays():
        x, stack = random(2, 640, embed).astype(dtype), (random(2, embed, embed) / 16).astype(dtype)
        weight, bias, changes, angles = kernels.Weight(stack, layer), random(embed), random(2, embed), random(640, 16)
        norm = kernels.QKNorm(random(head_dim), random(head_dim), 1e-6, jnp.cos(angles), jnp.sin(angles))
        residual = kernels.Residual(x, bias, changes, text)
        tiles, of_heads = kernels.to_heads(x, weight, bias, heads, kernels.Split(2), norm, **options)
        places, sums_of_groups = None, []
        for i in range(2):
            split = kernels.Split(2, i, 2, i, 2)
            places, found = kernels.to_heads(x, weight, bias, heads, split, norm, **options, into=places)
            sums_of_groups.append(found)
        y, of_norm = kernels.modulated_norm(x, kernels.Modulation(changes, changes, text), 1e-5, **options)
        hidden, of_residual = kernels.dense(x, weight, residual, **options)
        activated, of_activation = kernels.dense(x, weight, kernels.Gelu(bias), **options)
        attended, of_output = kernels.from_heads([tiles], weight, residual, **options)
        tiles_of_groups = jnp.split(places, 2, axis=2)
        from_groups, of_output_again = kernels.from_heads(tiles_of_groups, weight, residual, **options)
        same = (tiles, jnp.concatenate(tiles_of_groups, axis=3)), (attended, from_groups)
        of_heads_again = map(tap.added, zip(*sums_of_groups, strict=True))

        def product(x):
            return jnp.einsum("bti,oi->bto", x, stack[layer], preferred_element_type=jnp.float32)

        projected = (product(x) + bias).reshape(2, 640, heads, head_dim)
        mean, variance = projected.mean(-1, keepdims=True), projected.var(-1, keepdims=True)
        normalized = (projected - mean) / jnp.sqrt(variance + 1e-6) * norm.weight + norm.bias
        outputs = [product(y).astype(dtype) + bias for y in (x, tiles.transpose(2, 1, 5, 0, 3, 4).reshape(x.shape))]
        arrays = projected, normalized, y, outputs[0], hidden, activated, outputs[1], attended, projected, normalized
        sums = [*of_heads, *of_norm, *of_residual, *of_activation, *of_output, *of_heads_again]
        return [*sums, *of_output_again], [*arrays, outputs[1], from_groups], same

    *found, same = sums_and_arrays()
    for one, other in same:
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    for i, (sums, array) in enumerate(zip(*found, strict=True)):
        truth = statistics_of(np.asarray(array[:, :real], np.float32))
        np.testing.assert_allclose(merged(np.asarray(sums)), truth, rtol=0.01, atol=1e-3, err_msg=f"point {i}")
        assert sums[0, 0] == 2 * real * embed
