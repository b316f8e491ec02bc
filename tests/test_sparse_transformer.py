"""The transformer with patterns of heads, and stage 2, beside diffusers', whose scores are masked token by token."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from safetensors.torch import load_file

from cogvideox.files import sparse_map
from cogvideox.files.sparse_map import SparseMap
from cogvideox.files.tensor_dump import merged, statistics_of
from cogvideox.models.shared import tap
from cogvideox.models.shared.sharding import Parallelism, make_mesh, query_parts
from cogvideox.models.transformer.attention import Attention
from cogvideox.models.transformer.embeddings import rotary_embedding
from cogvideox.models.transformer.parameters import load_parameters
from cogvideox.models.transformer.sparse import layout as layouts
from cogvideox.models.transformer.sparse.heads import SparseAttention
from cogvideox.models.transformer.sparse.layout import AlignedLayout
from cogvideox.models.transformer.sparse.patterns import KINDS, Pattern
from cogvideox.models.transformer.transformer import transformer
from tests import oracle
from tests.helpers import EMBEDDINGS, LATENTS, SIZE, STAGE1, STAGE2, check
from tests.in_process import run_here
from tests.test_transformer import SMALL, make_module, relative_error

TEXT, GRID = 10, (3, 10, 14)  # three frames of two tiles, of which the second has twelve tokens
LAYOUT = AlignedLayout.of(GRID, TEXT)
SHAPE = (2, 2 * GRID[0], 4, 2 * GRID[1], 2 * GRID[2])
QUERIES, HEADS = [5, 429, 300], [6, 0, 3]
WANTED = tap.Wanted(
    arrays=["*.attn1.*", "*.attn1.weights", "*.attn1.patterns", "proj_out", "transformer_blocks.1"],
    statistics=["*"],
    queries=QUERIES,
    heads=HEADS,
)


def map_of(layers, heads, kinds=KINDS):
    """Patterns of which no two layers have the same, and which cost unequally."""
    choices = [Pattern.parse(text) for text in ("dense", "frames:0", "positions:0", "frames:1", "dense", "frames:0")]
    choices = [pattern for pattern in choices if pattern.kind in kinds]
    return tuple(
        tuple(choices[(layer + head * (head + 1)) % len(choices)] for head in range(heads)) for layer in range(layers)
    )


def masked_outputs(module, patterns):
    """Return the prediction of diffusers' module with each head's scores masked, and its modules' outputs by name."""
    config, places, seen = module.config, LAYOUT.positions(), {}
    masks = [np.stack([pattern.mask(LAYOUT)[places][:, places] for pattern in of_layer]) for of_layer in patterns]
    attend, layers = torch.nn.functional.scaled_dot_product_attention, iter(range(config.num_layers))

    def masked(query, key, value, **options):
        layer = next(layers)
        mask = torch.from_numpy(masks[layer])
        scores = query[:, :, QUERIES] @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        weights = scores.masked_fill(~mask[:, QUERIES], -torch.inf).softmax(-1)
        seen[f"transformer_blocks.{layer}.attn1.weights"] = weights[
            :, [head for head in HEADS if head < weights.shape[1]]
        ].numpy()
        return attend(query, key, value, **(options | {"attn_mask": mask[None]}))

    def record(_, __, output, name):
        tokens = output if isinstance(output, torch.Tensor) else torch.cat([output[1], output[0]], dim=1)
        seen[name] = tokens.clone().numpy()

    wanted = ("to_q", "to_k", "to_v", "norm_q", "norm_k", "to_out.0", "transformer_blocks.1", "proj_out")
    for name, layer in module.named_modules():
        if name.endswith(wanted):
            layer.register_forward_hook(functools.partial(record, name=name))
    latents, prompts = inputs(config)
    rotary = get_3d_rotary_pos_embed(
        config.attention_head_dim, None, GRID[1:], GRID[0], grid_type="slice", max_size=GRID[1:]
    )
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", masked)
        (prediction,) = module(latents, prompts, torch.full((2,), 37), image_rotary_emb=rotary, return_dict=False)
    return prediction.numpy(), seen


def inputs(config):
    torch.manual_seed(1)
    return torch.randn(SHAPE), torch.randn(SHAPE[0], TEXT, config["text_embed_dim"])


def ours(module, patterns, mesh, name, wanted=None):
    config, sizes = dict(module.config), dict(zip(("dp", "sp", "tp"), mesh, strict=True))
    heads = config["num_attention_heads"]
    devices = make_mesh(sizes, jax.devices()[: np.prod(mesh)])
    parallelism = Parallelism(devices, query_parts=query_parts(sizes, heads))
    sparse = SparseAttention(patterns, dense_steps=0)
    placed = sparse.placed(LAYOUT, parallelism.tp * parallelism.head_parts, parallelism.head_groups(heads))
    stored = {name: weight.numpy() for name, weight in module.state_dict().items()}
    parameters = load_parameters(stored.__getitem__, config, parallelism, jnp.float32, head_order=placed.order)

    def function(*arguments):
        attention = Attention(name, "cpu", kinds=sparse.kinds)
        options = {"config": config, "parallelism": parallelism, "attention": attention, "patterns": placed}
        return transformer(*arguments, **options).output

    latents, prompts = (jnp.asarray(tensor.numpy()) for tensor in inputs(config))
    arguments = parameters, latents, prompts, jnp.int32(37), rotary_embedding(config, SHAPE)
    if wanted is None:
        return np.asarray(jax.jit(function)(*arguments)), None
    prediction, collected = jax.jit(tap.collecting(function, wanted, devices))(*arguments)
    return np.asarray(prediction), collected


@pytest.fixture(autouse=True)
def narrow_groups(monkeypatch):
    """Let groups of places have one tile of each frame, so that a small video has several."""
    monkeypatch.setattr(layouts, "GROUP_TILES", 4)


@pytest.mark.parametrize(("mesh", "name"), [((2, 2, 2), "xla"), ((2, 2, 2), "splash_exp2")], ids=str)
def test_modules_match_masked_diffusers(mesh, name):
    """Prediction, tapped arrays in the model's order of heads and tokens, and statistics without padding."""
    module = make_module(SMALL)
    kinds = KINDS if name == "xla" else ("dense", "frames")  # of which each is two kernels to compile
    patterns = map_of(SMALL["num_layers"], SMALL["num_attention_heads"], kinds)
    expected, theirs = masked_outputs(module, patterns)
    prediction, collected = ours(module, patterns, mesh, name, WANTED)
    assert (error := relative_error(prediction, expected)) < 2e-5, f"{error:.1e}"
    arrays = {name: tapped.without_padding() for name, tapped in collected.arrays.items()}
    statistics = {name: array for name, (array, _) in collected.statistics.fetched().items()}
    for layer, of_layer in enumerate(patterns):
        found = arrays.pop(f"transformer_blocks.{layer}.attn1.patterns")
        assert [(KINDS[kind], window) for kind, window in found] == [dataclasses.astuple(p) for p in of_layer]
    arrays = {name: array for name, array in arrays.items() if not name.endswith("online_heads")}
    assert set(arrays) == set(theirs)
    for point, array in theirs.items():
        assert arrays[point].shape == array.shape, point
        assert (error := relative_error(arrays[point], array)) < 2e-5, f"{point}: {error:.1e}"
        if not point.endswith("weights"):
            row, truth = merged(statistics[point]), statistics_of(array)
            error = np.abs(row - truth).max() / np.abs(truth).max()
            assert error < 2e-5, f"statistics of {point}: {row}, of diffusers' array {truth}"


def test_chips_that_do_not_divide_the_heads():
    """Two groups of four chips, of which each attends a part of the queries."""
    module = make_module(SMALL | {"num_attention_heads": 4, "num_layers": 2})
    patterns = map_of(2, 4, ["frames"])
    expected, _ = masked_outputs(module, patterns)
    prediction, _ = ours(module, patterns, (1, 8, 1), "splash_exp2")
    assert (error := relative_error(prediction, expected)) < 2e-5, f"{error:.1e}"


# --- Stage 2 -------------------------------------------------------------------------------------------------------

STEPS, SEED, SKIPPED = 8, 5, [3, 5]


@pytest.fixture(scope="session")
def mapped_run(made_once, random_model):
    """Encode a prompt, and write a map of the model."""

    def make(folder):
        stage1 = (STAGE1, "--prompt", "a red circle", "--model_id", random_model, "--output_dir", folder)
        check(run_here(*stage1, folder=folder))
        config = json.loads((random_model / "transformer" / "config.json").read_text())
        patterns = map_of(config["num_layers"], config["num_attention_heads"])
        found = SparseMap(
            **{name[2:]: value for name, value in zip(SIZE[:6:2], SIZE[1:6:2], strict=True)},
            weights=sparse_map.weights_of(str(random_model), None),
            loras=(),
            error_budget=None,
            found={},
            patterns=tuple(tuple(map(str, of_layer)) for of_layer in patterns),
        )
        sparse_map.write(folder / sparse_map.FILE, found)

    return made_once("mapped_run", make)


@pytest.mark.parametrize("devices", [1, 8])
def test_stage2_against_a_masked_torch_loop(devices, mapped_run, random_model, run_stage, tmp_path):
    """With dense steps at first, steps that skip the blocks, and guidance in some steps."""
    texts = sparse_map.read(mapped_run / sparse_map.FILE).patterns
    layout = AlignedLayout.of((2, 2, 3), 226)
    places = layout.positions()
    masks = [np.stack([Pattern.parse(t).mask(layout)[places][:, places] for t in of_layer]) for of_layer in texts]
    run_stage(
        STAGE2,
        *("--input_dir", mapped_run, "--output_dir", tmp_path, *SIZE[:6], "--num_inference_steps", STEPS),
        *("--seed", SEED, "--cache_schedule", "3,5", "--guidance_interval", "1,6"),
        *("--sparse_attention", mapped_run, "--dense_steps", "0.2"),
        virtual_devices=devices,
    )
    expected = oracle.latents(
        random_model,
        mapped_run / EMBEDDINGS,
        STEPS,
        seed=SEED,
        interval=(1, 6),
        skipped=SKIPPED,
        masks=masks,
        dense_steps=2,
    )
    error = oracle.difference(load_file(tmp_path / LATENTS)["latents"], expected)
    assert error < 1e-3, f"latents differ by {error:.1e} of their scale"
