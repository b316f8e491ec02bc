"""LoRAs that are added while weights are loaded, against diffusers' `load_lora_weights` and `fuse_lora` in torch."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from cogvideox.cli.types import lora_option
from cogvideox.defaults import SEED
from cogvideox.errors import UserError
from cogvideox.files import lora, provenance, stage_files
from cogvideox.files.schemas import LoraConfig as LoraEntries
from cogvideox.files.schemas import VideoConfig
from cogvideox.inspection import status
from cogvideox.models.shared.layouts import LAYOUTS
from cogvideox.models.shared.sharding import Parallelism, make_mesh
from cogvideox.models.transformer.parameters import load_parameters, stored_shapes
from tests.helpers import CONFIG, EMBEDDINGS, LATENTS, SIZE, STAGE2, edit_config

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_out", "norm1.linear", "text_proj"]
# Alphas that are not the rank, and neither is the same for all; so are the ranks.
OPTIONS = dict(r=4, lora_alpha=6, alpha_pattern={"to_k": 2, r"transformer_blocks.1.attn1.to_v": 3})
SCALES = (0.7, -1.3)
FILE, PEFT_FILE = lora.DIFFUSERS, lora.PEFT


def lora_config(**options) -> LoraConfig:
    """Return a config under which A and B are random."""
    return LoraConfig(target_modules=TARGETS, init_lora_weights=False, **options)


def load_transformer(model: Path, dtype: torch.dtype = torch.float32) -> CogVideoXTransformer3DModel:
    return CogVideoXTransformer3DModel.from_pretrained(model, subfolder="transformer", dtype=dtype)


def make_lora(model: Path, folder: Path, seed: int = 0, with_metadata: bool = True, **options) -> Path:
    """Write a LoRA with random matrices for a model as diffusers' trainers do."""
    torch.manual_seed(seed)
    config, module = lora_config(**(options or OPTIONS)), load_transformer(model)
    module.add_adapter(config)
    CogVideoXPipeline.save_lora_weights(
        folder,
        get_peft_model_state_dict(module),
        transformer_lora_adapter_metadata=config.to_dict() if with_metadata else None,
    )
    return folder


def fused(model: Path, loras: list[tuple[Path, float]], dtype: torch.dtype) -> CogVideoXPipeline:
    """Return diffusers' pipeline with LoRAs fused one after the other, each with its scale."""
    pipeline = CogVideoXPipeline.from_pretrained(model, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    for path, scale in loras:
        pipeline.load_lora_weights(path)
        pipeline.fuse_lora(lora_scale=scale)
        pipeline.unload_lora_weights()
    return pipeline


def parameters(
    module: CogVideoXTransformer3DModel, loras=(), mesh=(1, 1, 1), layout="tp", head_order=None
) -> dict[str, np.ndarray]:
    """Return a torch module's weights as stage 2 loads them, in float32."""
    stored = {name: np.asarray(jnp.from_dlpack(x.detach())) for name, x in module.state_dict().items()}
    config = dict(module.config)
    changes = [lora.read_lora(lora_option(f"{path}:{scale}")) for path, scale in loras]
    for one in changes:
        one.check(stored_shapes(config))
    sizes = dict(zip(("dp", "sp", "tp"), mesh, strict=True))
    parallelism = Parallelism(make_mesh(sizes, jax.devices()[: np.prod(mesh)]), layout)
    add = [one.add for one in changes]
    dtype = stored["proj_out.weight"].dtype
    loaded = load_parameters(stored.__getitem__, config, parallelism, dtype, add, head_order=head_order)
    return {name: np.asarray(array, np.float32) for name, array in loaded.items()}


def compare(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], dtype: torch.dtype, changed: set[str]) -> None:
    """Compare weights with diffusers'; only the last bit may differ, and only where sums have another order."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        if not any(target in name for target in changed):
            assert np.array_equal(ours[name], expected), name
            continue
        difference = np.abs(ours[name] - expected)
        bound = 4 * torch.finfo(dtype).eps * np.abs(expected).max()
        assert difference.max() <= bound, f"{name}: {difference.max():.1e}, bound {bound:.1e}"
        if dtype == torch.bfloat16:
            share = np.count_nonzero(difference) / difference.size
            assert share < 1e-3, f"{name}: {share:.1e} of the values differ"


@pytest.fixture(scope="module")
def loras(random_model, other_model, tmp_path_factory) -> dict[str, list[tuple[Path, float]]]:
    """Make two LoRAs with their scales for each of two models, one with alphas and one of several ranks without."""
    folder = tmp_path_factory.mktemp("loras")
    return {
        name: [
            (make_lora(model, folder / name / "alphas"), SCALES[0]),
            (make_lora(model, folder / name / "ranks", 1, False, r=4, rank_pattern={"to_q": 2}), SCALES[1]),
        ]
        for name, model in (("random_model", random_model), ("other_model", other_model))
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", ["random_model", "other_model"])
def test_weights_are_those_of_diffusers(model, dtype, loras, request):
    path = request.getfixturevalue(model)
    for chosen in (loras[model][:1], loras[model]):
        theirs = parameters(fused(path, chosen, dtype).transformer)
        compare(parameters(load_transformer(path, dtype), chosen), theirs, dtype, set(TARGETS))
    unchanged = parameters(load_transformer(path, dtype))
    changed = {name for name in theirs if not np.array_equal(unchanged[name], theirs[name])}
    assert len(changed) == len(TARGETS), changed


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_on_eight_devices(layout, random_model, loras):
    """Each chip's part is changed where it is loaded, also in another order of heads; the sum is that of one chip."""
    module, chosen = load_transformer(random_model), loras["random_model"]
    fused_module = fused(random_model, chosen, torch.float32).transformer
    for order in (None, np.array([[2, 0, 3, 1], [1, 3, 0, 2]])):
        theirs = parameters(fused_module, head_order=order)
        compare(parameters(module, chosen, (2, 1, 4), layout, order), theirs, torch.float32, set(TARGETS))


def rewrite(source: Path, target: Path, rename=lambda name: name, change=lambda tensors: None, metadata=None) -> Path:
    """Write the tensors of a LoRA under other names, and changed, to another file."""
    tensors = {rename(name): tensor for name, tensor in load_file(source / FILE).items()}
    change(tensors)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target, metadata)
    return target


def old_name(name: str) -> str:
    """Return the name of a matrix in the oldest layout of diffusers, with attention processors."""
    name = name.replace(".lora_A", ".lora.down").replace(".lora_B", ".lora.up")
    return re.sub(
        r"attn1\.(to_[qkv])\.lora\.", r"attn1.processor.\1_lora.", name.replace("to_out.0.lora.", "to_out_lora.")
    )


def test_layouts(random_model, loras, tmp_path):
    """Files of `save_lora_adapter`, of diffusers' older layout, and of PEFT, against those who read them in torch."""
    (plain, _) = loras["random_model"][1]
    old = rewrite(plain, tmp_path / "old" / FILE, old_name)
    theirs = parameters(fused(random_model, [(old, 0.7)], torch.float32).transformer)
    compare(parameters(load_transformer(random_model), [(old, 0.7)]), theirs, torch.float32, set(TARGETS))

    torch.manual_seed(2)
    for number, options in enumerate((OPTIONS, dict(r=4, lora_alpha=6, use_rslora=True))):
        get_peft_model(load_transformer(random_model), lora_config(**options)).save_pretrained(tmp_path / str(number))
        found = PeftModel.from_pretrained(load_transformer(random_model), tmp_path / str(number)).merge_and_unload()
        for path in (tmp_path / str(number), tmp_path / str(number) / PEFT_FILE):
            ours = parameters(load_transformer(random_model), [(path, 1.0)])
            compare(ours, parameters(found), torch.float32, set(TARGETS))

    module = load_transformer(random_model)
    module.add_adapter(lora_config(**OPTIONS), "default")
    module.save_lora_adapter(tmp_path / "adapter")
    module.fuse_lora()
    module.unload_lora()
    ours = parameters(load_transformer(random_model), [(tmp_path / "adapter", 1.0)])
    compare(ours, parameters(module), torch.float32, set(TARGETS))


def test_scale_and_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a:2").touch()
    for text, expected in (
        *(("a:2", f"{tmp_path}/a:2:1.0"), ("b:2", f"{tmp_path}/b:2.0"), ("b:-1e-3", f"{tmp_path}/b:-0.001")),
        *(("b", f"{tmp_path}/b:1.0"), ("c:d/e", f"{tmp_path}/c:d/e:1.0"), ("/b:0", "/b:0.0")),
    ):
        assert lora_option(text) == expected, text
    for text in ("b:nan", "b:inf", "b:1e9", "b:", "b:x", "", ":1"):
        with pytest.raises(Exception, match=r"empty|number|from -1000"):
            lora_option(text)


def test_files_of_other_programs(random_model, loras, tmp_path, monkeypatch):
    """ComfyUI's prefix, PEFT's adapters by name, empty entries of a config, a repository of the hub: the same LoRA."""
    (whole, _) = loras["random_model"][1]
    expected = parameters(load_transformer(random_model), [(whole, 0.7)])

    def check(path: Path | str) -> None:
        compare(parameters(load_transformer(random_model), [(path, 0.7)]), expected, torch.float32, set())

    check(rewrite(whole, tmp_path / "comfy" / FILE, lambda name: name.replace("transformer.", "diffusion_model.", 1)))
    check(rewrite(whole, tmp_path / "named" / FILE, lambda name: name.replace(".weight", ".default.weight")))
    patterns = {"alpha_pattern": {"to_q": 2}, "rank_pattern": {"to_q": 2}}
    entries = {"r": 4, "lora_alpha": 4, "modules_to_save": []} | patterns
    metadata = {lora.METADATA: json.dumps({f"transformer.{name}": value for name, value in entries.items()})}
    check(rewrite(whole, tmp_path / "config" / FILE, metadata=metadata))
    config = {"r": 4, "lora_alpha": 1, "rank_pattern": None, "alpha_pattern": None}
    assert LoraEntries.model_validate(config).rank_pattern == {}

    hub, commit = tmp_path / "hub" / "models--user--lora", "c" * 40
    rewrite(whole, hub / "snapshots" / commit / FILE)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert lora_option("user/lora:0.7") == "user/lora:0.7"
    check("user/lora")
    with pytest.raises(UserError, match=r"user/other.*correct --lora or check the network"):
        lora.read_lora(lora_option("user/other"))


def test_a_lora_that_changes_nothing(random_model, loras, tmp_path):
    (whole, _) = loras["random_model"][1]
    assert not lora.read_lora(lora_option(str(whole))).changes_nothing
    assert lora.read_lora(lora_option(f"{whole}:0")).changes_nothing
    untrained = rewrite(whole, tmp_path / FILE, change=lambda t: [x.zero_() for name, x in t.items() if "_B" in name])
    assert lora.read_lora(lora_option(str(untrained))).changes_nothing


# --- What cannot be fused ----------------------------------------------------------------------------------------

Q = "transformer.transformer_blocks.0.attn1.to_q"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"


def put(name: str, tensor: torch.Tensor):
    return lambda tensors: tensors.update({name: tensor})


def with_config(**entries):
    """Return the metadata that diffusers writes, with other entries; ... takes one away."""
    config = {"r": 4, "lora_alpha": 6, "rank_pattern": {}} | entries
    found = {f"transformer.{name}": value for name, value in config.items() if value is not ...}
    return {lora.METADATA: json.dumps(found)}


OF_IMAGE = (("A", (4, 256)), ("B", (128, 4)))  # of patches with the latents of an image
# what: (another name for each tensor, a change of the tensors, metadata, words of the message)
FAULTS = {
    "A without B": (None, lambda t: t.pop(B), None, ["to_q has lora_A alone"]),
    "B without A": (None, lambda t: t.pop(A), None, ["to_q has lora_B alone"]),
    "two adapters": (None, put(A.replace("weight", "b.weight"), torch.ones(4, 128)), None, ["1 of 33", "lora_A"]),
    "2B": (
        lambda n: n.replace("blocks.1", "blocks.29"),
        lambda t: t.update({n: torch.ones(4, 1920) for n in t if "attn1.to_" in n and "_A" in n}),
        *(None, ["another model, CogVideoX-2B by its shapes"]),
    ),
    "image": (
        None,
        lambda t: t.update(
            {f"transformer.patch_embed.proj.lora_{letter}.weight": torch.ones(shape) for letter, shape in OF_IMAGE}
        ),
        *(None, ["[4, 256]", "[128, 128]", "another model, one that takes an image"]),
    ),
    "metadata: modules": (None, None, with_config(modules_to_save=["proj_out"]), ["modules_to_save", "plain LoRA"]),
    "two ranks": (None, put(A, torch.ones(3, 128)), None, [A, "[3, 128]", "[128, 4]", "same rank"]),
    "no matrix": (None, put(A, torch.ones(128)), None, [A, "[128]"]),
    "empty": (None, put(A, torch.ones(0, 128)), None, [A, "[0, 128]"]),
    "NaN": (None, put(A, torch.full((4, 128), torch.nan)), None, [A, "NaN"]),
    "integers": (None, put(A, torch.ones(4, 128, dtype=torch.int64)), None, [A, "I64"]),
    "other width": (None, put(A, torch.ones(4, 96)), None, ["[4, 96]", "[128, 4]", "[128, 128]", "another model"]),
    "more blocks": (lambda n: n.replace("blocks.1", "blocks.7"), None, None, ["7 of 16", "blocks.7", "another model"]),
    "other names": (lambda n: n.replace("attn1", "attn"), None, None, ["8 of 16", "attn.to_k", "another model"]),
    "text encoder": (lambda n: n.replace("transformer.", "text_encoder.", 1), None, None, ["text encoder"]),
    "kohya": (
        lambda n: "lora_unet_" + n.replace(".lora_A", "/lora_down").replace(".lora_B", "/lora_up").replace(".", "_"),
        *(None, None, ["32 of 32", "lora_unet_", "X.lora_A.weight"]),
    ),
    "alphas": (None, put(f"{Q}.alpha", torch.ones(1)), None, ["1 of 33", f"{Q}.alpha"]),
    "DoRA": (None, put(f"{Q}.lora_magnitude_vector", torch.ones(128)), None, ["lora_magnitude_vector"]),
    "bias": (None, put(f"{Q}.lora_B.bias", torch.ones(128)), None, ["lora_B.bias"]),
    "weights of a model": (lambda n: n.replace("lora_", ""), None, None, ["32 of 32"]),
    "nothing": (None, lambda t: t.clear(), None, ["0 of 0"]),
    "metadata: no JSON": (None, None, {lora.METADATA: "{"}, ["JSON"]),
    "metadata: list": (None, None, {lora.METADATA: "[]"}, ["--lora"]),
    "metadata: no alpha": (None, None, with_config(lora_alpha=...), ["lora_alpha", "--lora"]),
    "metadata: alpha": (None, None, with_config(lora_alpha=float("nan")), ["lora_alpha", "--lora"]),
    "metadata: rank": (None, None, with_config(r=8), ["rank of", "is 8", "4 rows"]),
    "metadata: ranks": (None, None, with_config(rank_pattern={"to_q": 2}), ["to_q is 2", "4 rows"]),
    "metadata: pattern": (None, None, with_config(alpha_pattern={"(": 2}), ["alpha_pattern", "pattern"]),
    "metadata: DoRA": (None, None, with_config(use_dora=True), ["use_dora", "plain LoRA"]),
    "metadata: PiSSA": (None, None, with_config(init_lora_weights="pissa"), ["init_lora_weights", "plain LoRA"]),
    "metadata: LoKr": (None, None, with_config(peft_type="LOKR"), ["peft_type", "plain LoRA"]),
}


def refusal(path: Path, model: Path) -> str:
    """Return why a LoRA is refused; it must be one line that names the file."""
    shapes = stored_shapes(json.loads((model / "transformer" / "config.json").read_text()))
    with pytest.raises(UserError) as caught:
        lora.read_lora(lora_option(str(path))).check(shapes)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value), caught.value
    return str(caught.value)


def test_what_cannot_be_fused_is_one_line(random_model, tmp_path):
    whole = make_lora(random_model, tmp_path / "whole", 0, False, r=4)
    for what, (rename, change, metadata, words) in FAULTS.items():
        path = tmp_path / "lora.safetensors"
        rewrite(whole, path, rename or str, change or (lambda _: None), metadata)
        message = refusal(path, random_model)
        assert all(word in message for word in words), f"{what}: {message}"


def test_files_that_are_missing_or_damaged(random_model, other_model, loras, tmp_path):
    data = (loras["random_model"][0][0] / FILE).read_bytes()
    for content in (data[:-1], b"", b"\xff" * 100):
        (tmp_path / "cut").write_bytes(content)
        assert "not a complete safetensors file" in refusal(tmp_path / "cut", random_model)
    assert "does not exist" in refusal(tmp_path / "nowhere", random_model)
    assert f"neither {FILE} nor {PEFT_FILE}" in refusal(tmp_path, random_model)
    (tmp_path / PEFT_FILE).write_bytes(data)
    assert f"{lora.PEFT_CONFIG} does not exist" in refusal(tmp_path, random_model)
    message = refusal(loras["other_model"][0][0], random_model)
    assert "3" in message and "another model" in message, message


# --- A stage -----------------------------------------------------------------------------------------------------


def test_latents_and_provenance(outputs, random_model, loras, run_stage, tmp_path):
    """Stage 2 with two LoRAs against diffusers' pipeline; config, metadata and status say what they were made from."""
    paths = [shutil.copytree(path, tmp_path / path.name) for path, _ in loras["random_model"]]
    options = [word for path, scale in zip(paths, SCALES, strict=True) for word in ("--lora", f"{path}:{scale}")]
    process = run_stage(STAGE2, "--input_dir", outputs, *SIZE, *options)
    assert f"LoRA {paths[0]}: 16 weights, rank 4, alpha 2 to 6, scale 0.7" in process.stdout, process.stdout
    assert f"LoRA {paths[1]}: 16 weights, rank 2 to 4, alpha not stated, as the rank, scale -1.3" in process.stdout
    ours = load_file(outputs / LATENTS)["latents"]

    embeddings, seen = load_file(outputs / EMBEDDINGS), {}
    names = ("height", "width", "num_frames", "num_inference_steps")
    arguments = dict(zip(names, SIZE[1::2], strict=True))
    for chosen in ([], list(zip(paths, SCALES, strict=True))):
        fused(random_model, chosen, torch.float32)(
            **arguments | embeddings,
            guidance_scale=6.0,
            generator=torch.Generator().manual_seed(SEED),
            output_type="latent",
            callback_on_step_end=lambda _, __, ___, tensors: seen.update(tensors) or {},
        )
        expected = seen["latents"][:, -ours.shape[2] :].permute(0, 2, 1, 3, 4)
        error = ((ours - expected).abs().max() / expected.abs().max()).item()
        assert (error <= 1e-3) == bool(chosen), f"{len(chosen)} LoRAs: latents differ by {error:.1e} of their scale"

    config = json.loads((outputs / CONFIG).read_text())
    assert config["lora"] == [f"{path}:{scale}" for path, scale in zip(paths, SCALES, strict=True)]
    files = {str(path / FILE) for path in paths}
    names = files | {EMBEDDINGS, f"transformer of {random_model}"}
    assert provenance.recorded(outputs / LATENTS)["inputs"].keys() == names
    provenance.check_inputs(outputs / LATENTS, refuse=pytest.fail)
    edit_config(outputs, lora=[])
    fault = status.fault_of(outputs / LATENTS, stage_files.read_config(outputs, VideoConfig))
    assert "was made with lora = ['/" in fault, fault
    rewrite(paths[1], paths[1] / FILE, metadata={"format": "other"})
    with pytest.raises(UserError, match=f"was not made from {paths[1] / FILE} as it is now"):
        provenance.check_inputs(outputs / LATENTS, stage_files.refuse)
