"""The JAX transformer against diffusers' in torch float32, on one device and on meshes of eight."""

import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from jax.sharding import PartitionSpec

from cogvideox.models.shared.layouts import LAYOUTS
from cogvideox.models.shared.sharding import Parallelism, make_mesh, possible_mesh_sizes, query_parts
from cogvideox.models.transformer.attention import Attention, xla_attention
from cogvideox.models.transformer.embeddings import rotary_embedding
from cogvideox.models.transformer.parameters import (
    abstract_parameters,
    declaration,
    load_parameters,
    parameter_shapes,
    parameter_spec,
)
from cogvideox.models.transformer.plan import check_layout, make_denoising_plan
from cogvideox.models.transformer.transformer import transformer
from tests.helpers import ROOT

MESHES = [(1, 1, 1), (2, 1, 4), (2, 2, 2), (1, 2, 4), (1, 8, 1), (1, 1, 8), (2, 4, 1)]
SMALL = dict(num_attention_heads=8, attention_head_dim=16, num_layers=3, time_embed_dim=32, text_embed_dim=24)
REAL_WIDTH = dict(num_attention_heads=48, attention_head_dim=64, num_layers=1, time_embed_dim=512, text_embed_dim=4096)


def make_module(sizes: dict) -> CogVideoXTransformer3DModel:
    torch.manual_seed(0)
    common = dict(patch_size=2, patch_size_t=2, use_rotary_positional_embeddings=True, patch_bias=False)
    common |= dict(in_channels=4, out_channels=4, max_text_seq_length=10, sample_width=20, sample_height=20)
    module = CogVideoXTransformer3DModel(**common | sizes).eval()
    for name, parameter in module.named_parameters():
        if "norm" in name and name.endswith("weight") and parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.2)  # at its initial value of 1 a misplaced weight goes unseen
        else:
            torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    return module


def run_both(module, batch, mesh, layout="tp", dtype=torch.float32, attention=xla_attention):
    """Return the module's prediction in float32 and ours, of the same random input."""
    config, shape = dict(module.config), (batch, 4, 4, 6, 10)
    torch.manual_seed(1)
    latents, prompts = torch.randn(shape), torch.randn(batch, 10, config["text_embed_dim"])
    rotary = get_3d_rotary_pos_embed(
        config["attention_head_dim"], None, (3, 5), 2, grid_type="slice", max_size=(10, 10)
    )
    with torch.no_grad():
        (theirs,) = module(latents, prompts, torch.full((batch,), 37), image_rotary_emb=rotary, return_dict=False)
    to_numpy = lambda tensor: np.asarray(jnp.from_dlpack(tensor.to(dtype).contiguous()))  # noqa: E731
    stored = {name: to_numpy(weight) for name, weight in module.state_dict().items()}
    sizes = dict(zip(("dp", "sp", "tp"), mesh, strict=True))
    parts = query_parts(sizes, config["num_attention_heads"])
    parallelism = Parallelism(make_mesh(sizes, jax.devices()[: np.prod(mesh)]), layout, parts)
    ours = jax.jit(
        lambda *arguments: transformer(*arguments, config=config, parallelism=parallelism, attention=attention).output
    )(
        load_parameters(stored.__getitem__, config, parallelism, stored["proj_out.weight"].dtype),
        to_numpy(latents),
        to_numpy(prompts),
        jnp.int32(37),
        rotary_embedding(config, shape),
    )
    return theirs.numpy(), np.asarray(ours)


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


POSITIONS = dict(attention_head_dim=64, patch_size=2, sample_height=8, sample_width=6)
POSITIONS |= dict(use_rotary_positional_embeddings=True)


@pytest.mark.parametrize("size", [(4, 6), (8, 3), (48, 85)])
def test_positions_go_on_beyond_the_config(size):
    """They are those of diffusers with larger sizes in the config."""
    ours = rotary_embedding(POSITIONS | dict(patch_size_t=2), (1, 6, 4, 2 * size[0], 2 * size[1]))
    theirs = get_3d_rotary_pos_embed(64, None, size, 3, grid_type="slice", max_size=(100, 100))
    for one, other in zip(ours, theirs, strict=True):
        assert np.array_equal(one.repeat(2, 1), other.numpy())


@pytest.mark.parametrize("size", [(4, 3), (4, 6), (9, 3), (3, 9), (7, 5), (2, 2)])
def test_positions_of_flat_patches_are_those_of_the_sample(size):
    """Stretched over a video of another size, as in diffusers, in portrait and in landscape."""
    ours = rotary_embedding(POSITIONS, (1, 5, 4, 2 * size[0], 2 * size[1]))
    theirs = get_3d_rotary_pos_embed(64, get_resize_crop_region_for_grid(size, 3, 4), size, 5)
    for one, other in zip(ours, theirs, strict=True):
        assert np.array_equal(one.repeat(2, 1), other.numpy())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "mesh", [pytest.param(mesh, marks=[] if mesh == (2, 2, 2) else pytest.mark.slow) for mesh in MESHES], ids=str
)
def test_sharded_transformer_matches_diffusers(mesh, layout):
    """Of the two prompts of guidance, which dp splits, and without dp, from mesh to mesh, also of one alone."""
    guided = mesh[0] == 2 or (MESHES.index(mesh) + list(LAYOUTS).index(layout)) % 2 == 0
    theirs, ours = run_both(make_module(SMALL), 2 if guided else 1, mesh, layout)
    assert (error := relative_error(ours, theirs)) < 1e-5, f"mesh {mesh}, {layout}: {error:.1e}"


@pytest.mark.parametrize(
    ("mesh", "layout", "bias"),
    [
        ((2, 2, 2), "tp", True),
        ((2, 2, 2), "fsdp", False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ((2, 1, 4), "fsdp", True),
                ((1, 2, 4), "tp", False),
                ((1, 8, 1), "fsdp", True),
                ((1, 1, 8), "tp", True),
                ((2, 4, 1), "fsdp", False),
            ]
        ),
    ],
    ids=str,
)
def test_tiles_match_diffusers(mesh, layout, bias):
    """The attention kernel's own layout, written and read by the projections' kernels, all in Pallas' interpreter."""
    module = make_module(SMALL | {"attention_bias": bias})
    theirs, ours = run_both(module, 2, mesh, layout, attention=Attention("splash_exp2", "cpu"))
    assert (error := relative_error(ours, theirs)) < 1e-5, f"mesh {mesh}, {layout}: {error:.1e}"


@pytest.mark.parametrize(
    ("heads", "mesh", "layout", "attention"),
    [
        (4, (1, 8, 1), "tp", Attention("splash_exp2", "cpu")),  # two groups of four
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (3, (1, 8, 1), "fsdp", xla_attention),  # each chip is a group
                (6, (2, 4, 1), "tp", Attention("splash_exp2", "cpu")),  # three groups of a chip's heads
                (4, (1, 4, 2), "fsdp", Attention("splash_exp2", "cpu")),
                (4, (1, 8, 1), "fsdp", Attention("splash", "cpu")),
                (4, (1, 7, 1), "tp", xla_attention),
            ]
        ),
    ],
    ids=lambda value: getattr(value, "name", None) or getattr(value, "__name__", str(value)),
)
def test_chips_that_do_not_divide_the_heads(heads, mesh, layout, attention):
    theirs, ours = run_both(make_module(SMALL | {"num_attention_heads": heads}), 2, mesh, layout, attention=attention)
    assert (error := relative_error(ours, theirs)) < 1e-5, f"{heads} heads on mesh {mesh}, {layout}: {error:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=str)
def test_tiles_of_real_width_match_diffusers(dtype, tolerance):
    module = make_module(REAL_WIDTH).to(dtype).to(torch.float32)
    theirs, ours = run_both(module, 1, (1, 1, 1), dtype=dtype, attention=Attention("splash_exp2", "cpu"))
    assert (error := relative_error(ours, theirs)) < tolerance, f"{dtype}: {error:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=str)
def test_real_width_matches_diffusers(dtype, tolerance):
    """48 heads x 64; the truth is float32 with the weights rounded as ours are."""
    module = make_module(REAL_WIDTH).to(dtype).to(torch.float32)
    theirs, ours = run_both(module, 1, (1, 1, 1), dtype=dtype)
    assert (error := relative_error(ours, theirs)) < tolerance, f"{dtype}: {error:.1e}"


@pytest.mark.slow
def test_optional_parameters():
    """Models without attention biases, and without affine norms."""
    for options in (dict(attention_bias=False), dict(norm_elementwise_affine=False)):
        theirs, ours = run_both(make_module(SMALL | options), 1, (1, 1, 1))
        assert (error := relative_error(ours, theirs)) < 1e-5, f"{options}: {error:.1e}"


@pytest.mark.parametrize("name", ["splash", "splash_exp2"])
@pytest.mark.parametrize("queries", [300, pytest.param(140, marks=pytest.mark.slow)])
def test_kernels_match_xla(name, queries):
    """In the Pallas interpreter: a length that is no multiple of the blocks, padded keys ignored, fewer queries."""
    random = np.random.default_rng(0)
    query, key, value = (jnp.asarray(random.standard_normal((2, 2, 300, 64)), jnp.float32) for _ in range(3))
    query = query[:, :, :queries]
    ours = Attention(name, "cpu")(query, key, value, kv_length=270)
    assert (error := relative_error(ours, xla_attention(query, key, value, 270))) < 1e-3, f"{name}: {error:.1e}"


@pytest.mark.parametrize(("platform", "pieces", "barriers"), [("tpu", 4, 9), ("gpu", 1, 0), ("cpu", 1, 0)])
def test_the_mlp_has_the_form_of_the_platform(platform, pieces, barriers, monkeypatch):
    """In 8,192 tokens a TPU has four pieces, with barriers before their products; others have neither."""
    config = dict(make_module(SMALL | {"num_layers": 1}).config)
    parallelism = Parallelism(make_mesh(dict.fromkeys(("dp", "sp", "tp"), 1), jax.devices()[:1]))
    monkeypatch.setattr(Parallelism, "platform", platform)
    shapes = abstract_parameters(config, jnp.bfloat16, parallelism)
    latents, prompts = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((1, 2, 4, 128, 254), (1, 10, 24)))
    rotary = (jax.ShapeDtypeStruct((8128, 8), jnp.float32),) * 2
    run = functools.partial(transformer, config=config, parallelism=parallelism, attention=xla_attention)
    text = str(jax.make_jaxpr(run)(shapes, latents, prompts, jax.ShapeDtypeStruct((), jnp.int32), rotary))
    assert (text.count("tanh"), text.count("optimization_barrier")) == (pieces, barriers)


def test_attention_of_one_sequence_after_the_other():
    """As on a GPU, where no array may be too large."""
    random = np.random.default_rng(0)
    arrays = [jnp.asarray(random.standard_normal((3, 2, 30, 8)), jnp.float32) for _ in range(3)]
    parts = functools.partial(xla_attention, kv_length=27, most_elements=1439)
    assert "f32[1,30,2,8]" in str(jax.make_jaxpr(parts)(*arrays))
    error = relative_error(parts(*arrays), xla_attention(*arrays, 27))
    assert error < 1e-6, f"{error:.1e}"


def test_every_parameter_of_the_5b_model_has_one_rule():
    config = ROOT / "configs" / "CogVideoX1.5-5B" / "transformer" / "config.json"
    shapes = parameter_shapes(json.loads(config.read_text()))
    for name, shape in shapes.items():
        assert len(declaration(name).axes) == len(shape), name
    assert sum(map(np.prod, shapes.values())) == pytest.approx(5.57e9, rel=1e-3)
    assert declaration("blocks.ff.net.0.proj.bias").axes == ("layers", "mlp")
    with pytest.raises(ValueError, match=r"parameter blocks\.attn2\.to_q\.weight"):
        declaration("blocks.attn2.to_q.weight")


@pytest.mark.parametrize(("layout", "chips"), [("tp", ("tp",)), ("fsdp", ("tp", "sp", "dp"))])
def test_only_heads_and_mlp_are_split(layout, chips):
    """In 5B: the rows of what makes heads and MLP, the columns of what reads them, and nothing else."""
    config = ROOT / "configs" / "CogVideoX1.5-5B" / "transformer" / "config.json"
    rows, columns = ("to_q.", "to_k.", "to_v.", "net.0.proj."), ("to_out.0.weight", "net.2.weight")
    for name, shape in parameter_shapes(json.loads(config.read_text())).items():
        axis = 1 if any(part in name for part in rows) else 2 if any(part in name for part in columns) else None
        assert parameter_spec(name, layout) == PartitionSpec(*(chips if i == axis else None for i in range(len(shape))))


@pytest.mark.parametrize(
    ("devices", "heads", "batch", "use_dp", "sp_num", "expected"),
    [
        (1, 48, 2, True, 1, [(1, 1, 1)]),
        (8, 48, 2, True, 1, [(2, 1, 4)]),
        (8, 48, 2, True, 4, [(2, 4, 1)]),
        (8, 48, 1, True, 1, [(1, 1, 8)]),
        (8, 48, 2, False, 2, [(1, 2, 4)]),
        (8, 48, 2, True, None, [(2, 4, 1)]),
        (4, 48, 1, True, None, [(1, 4, 1)]),
        (8, 30, 2, True, None, [(2, 4, 1), (2, 2, 2)]),
        (32, 48, 1, True, None, [(1, 32, 1), (1, 16, 2), (1, 8, 4), (1, 4, 8), (1, 2, 16)]),
        (7, 48, 1, True, None, [(1, 7, 1)]),
        (8, 6, 1, True, 4, [(1, 4, 2)]),
        (8, 48, 2, True, 3, [r"3 does not split the 4 chips .* \[1, 2, 4\] work"]),
        (8, 6, 1, True, 2, [r"divide 6 attention heads; \[4, 8\] work"]),
    ],
)
def test_mesh_sizes(devices, heads, batch, use_dp, sp_num, expected):
    if isinstance(expected[0], str):
        with pytest.raises(ValueError, match=expected[0]):
            possible_mesh_sizes(devices, heads, batch, use_dp, sp_num)
    else:
        found = possible_mesh_sizes(devices, heads, batch, use_dp, sp_num)
        assert [tuple(sizes.values()) for sizes in found] == expected


@pytest.mark.parametrize(
    ("heads", "guidance_scale", "size", "expected"),
    [
        (48, 1.0, (768, 1360, 81), (1, 8, 1, 1, 2)),
        (30, 6.0, (768, 1360, 81), (2, 4, 1, 2, 3)),
        (30, 1.0, (768, 1360, 81), (1, 8, 1, 4, 3)),
        (30, 1.0, (320, 320, 9), (1, 4, 2, 4, 1)),  # sp 8 would pad 1,026 tokens to 2,048, sp 4 pads them to 1,536
    ],
)
def test_the_fastest_mesh(heads, guidance_scale, size, expected):
    folder = ROOT / "configs" / "CogVideoX1.5-5B"
    config, vae = (json.loads((folder / name / "config.json").read_text()) for name in ("transformer", "vae"))
    plan = make_denoising_plan(
        transformer=config | {"num_attention_heads": heads},
        vae=vae,
        scheduler=json.loads((folder / "scheduler" / "scheduler_config.json").read_text()),
        devices=jax.devices(),
        platform="tpu",
        **dict(zip(("height", "width", "frames"), size, strict=True)),
        num_inference_steps=10,
        guidance_scale=guidance_scale,
    )
    *mesh, parts, groups = expected
    assert (*plan.mesh.shape.values(), plan.parallelism.query_parts) == (*mesh, parts)
    assert plan.parallelism.head_groups(heads) == groups
    assert ("query_parts" in plan.program_options) == (parts > 1)
    assert plan.attended_heads(plan.kinds({3})) == 9 * plan.prompts * 42 * heads * parts


def test_weights_that_the_chips_cannot_share():
    parallelism = Parallelism(make_mesh({"dp": 1, "sp": 7, "tp": 1}, jax.devices()[:7]), "fsdp")
    config = {"num_attention_heads": 3, "attention_head_dim": 16}
    plan = types.SimpleNamespace(transformer=config, parallelism=parallelism, mesh=parallelism.mesh)
    with pytest.raises(ValueError, match="fsdp does not work: 7 chips cannot share weights of width 48 evenly"):
        check_layout(plan)


@pytest.mark.parametrize(
    ("mesh", "heads", "expected"),
    [((1, 4, 1), 48, 1), ((2, 4, 1), 30, 2), ((1, 32, 1), 48, 2), ((1, 8, 1), 3, 8), ((1, 2, 2), 30, 2)],
)
def test_parts_of_the_queries(mesh, heads, expected):
    assert query_parts(dict(zip(("dp", "sp", "tp"), mesh, strict=True)), heads) == expected


@pytest.mark.parametrize(
    ("name", "sizes", "words"),
    [
        ("xla", [128], "xla has no block sizes"),
        ("splash", [2048, 1024], "3 block sizes, not 2: block_q, block_kv, block_kv_compute"),
        ("splash", [2000, 1024, 512], "block_q=2000 .* 2048 works"),
        ("splash", [2048, 1024, 384], "does not divide block_kv=1024; 128 does"),
        ("splash", [65536, 1024, 1024], "VMEM"),
        ("splash_exp2", [1536, 25856, 6400, 200], "block_kv_compute_in=200"),
        ("splash_exp2", [65536, 65536, 8704, 256], "VMEM"),
    ],
)
def test_block_sizes_that_do_not_work(name, sizes, words):
    with pytest.raises(ValueError, match=words):
        Attention.choose(name, "tpu", sizes, True, 64, jnp.bfloat16)


def test_default_attention():
    assert Attention.choose(None, "tpu", None, True, 64, jnp.bfloat16).name == "splash_exp2"
    assert Attention.choose(None, "cpu", None, True, 64, jnp.float32).name == "xla"
