"""The reference's dump against diffusers' whole pipeline with hooks, all of it in memory: every value is the same."""

import functools
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import stage2_transformer
import stage3_vae_decoder
from cogvideox.cli import program
from cogvideox.errors import UserError
from cogvideox.files.names import IMAGE_TENSORS
from cogvideox.files.stage_files import TEXT_TENSORS, made_from
from tests.helpers import CONFIG, EMBEDDINGS, LATENTS, check, edit_config
from tests.in_process import run_here
from tools import dump_reference
from tools.make_tiny_model import make_pipeline

STEPS, SEED, HEIGHT, WIDTH, SCALE = 4, 7, 32, 48, 5.0
DDIM, DPM = CogVideoXDDIMScheduler, CogVideoXDPMScheduler
IN_A_BLOCK = (
    *("norm1.linear", "norm1", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.norm_q", "attn1.norm_k"),
    *("attn1.to_out.0", "norm2.linear", "norm2", "ff.net.0", "ff.net.2"),
)


def make_files(model: Path, folder: Path, guided: bool = True, scheduler: type = DDIM, frames: int = 9, **more) -> Path:
    """Write what stages 1 and 2 leave in `folder`, with random tensors, for a copy of `model` with this scheduler."""
    copy = folder / "model"
    shutil.copytree(model, copy)
    scheduler.from_pretrained(model, subfolder="scheduler").save_pretrained(copy / "scheduler")
    index = json.loads((copy / "model_index.json").read_text())
    index["scheduler"][1] = scheduler.__name__
    (copy / "model_index.json").write_text(json.dumps(index))
    text = dict(model_id=str(copy), prompt="a red circle", negative_prompt="blurry")
    video = dict(height=HEIGHT, width=WIDTH, frames=frames, fps=8, num_inference_steps=STEPS, seed=SEED)
    config = text | video | dict(guidance_scale=SCALE if guided else 1.0, scheduler=scheduler.__name__)
    (folder / CONFIG).write_text(json.dumps(config))

    torch.manual_seed(1)
    sizes, vae = (json.loads((copy / part / "config.json").read_text()) for part in ("transformer", "vae"))
    shape = 1, sizes["max_text_seq_length"], sizes["text_embed_dim"]
    dtype = more.get("dtype", torch.float32)
    embeddings = {name: torch.randn(shape).to(dtype) for name in ("prompt_embeds", "negative_prompt_embeds")}
    pixels = 2 ** (len(vae["block_out_channels"]) - 1)
    if sizes["in_channels"] != sizes["out_channels"]:
        image = 1, vae["latent_channels"], 1, HEIGHT // pixels, WIDTH // pixels
        embeddings |= {name: torch.randn(image).to(dtype) for name in IMAGE_TENSORS}
    save_file(embeddings, folder / EMBEDDINGS, made_from(config, text))
    latents = torch.randn(1, vae["latent_channels"], (frames + 3) // 4, HEIGHT // pixels, WIDTH // pixels)
    save_file({"latents": latents}, folder / LATENTS, made_from(config, [n for n in config if n != "fps"]))
    return folder


@pytest.fixture(scope="module")
def sine_cosine_model(made_once) -> Path:
    """Make a small model that adds positions which no file has, for a video of the size of these tests."""
    size = {"sample_size": (HEIGHT // 8, WIDTH // 8), "sample_frames": 9}
    return made_once("sine_cosine_model", lambda folder: make_pipeline(folder, kind="CogVideoX-2B", **size))


@pytest.fixture
def dump():
    """Run the tool in this process, and return the folder of its dump."""

    def run(files: Path, name: str, *options) -> Path:
        dump_reference.main([str(word) for word in (files, "--dump", files / name, *options)])
        return files / name

    return run


def names_in(path: Path) -> list[str]:
    """Return the names of a file's tensors in the order in which they lie there."""
    with safe_open(path, "np") as file:
        return file.offset_keys()


def pipeline_outputs(files: Path, dtype=torch.float32, latents=None) -> dict[str, torch.Tensor]:
    """Run diffusers' pipeline as people do, and return what it computes, by the names of a dump."""
    config, embeddings = json.loads((files / CONFIG).read_text()), load_file(files / EMBEDDINGS)
    is_of_images = IMAGE_TENSORS[0] in embeddings
    kind = CogVideoXImageToVideoPipeline if is_of_images else CogVideoXPipeline
    pipeline = kind.from_pretrained(config["model_id"], dtype=dtype)
    image = {}
    if is_of_images:  # which is what the encoder would return
        posterior = DiagonalGaussianDistribution(torch.cat([embeddings[name] for name in IMAGE_TENSORS], dim=1))
        pipeline.vae.encode = lambda _: AutoencoderKLOutput(posterior)
        image = {"image": torch.zeros(1, 3, HEIGHT, WIDTH)}
    pipeline.set_progress_bar_config(disable=True)
    layers = pipeline.transformer.config.num_layers
    guided = config["guidance_scale"] > 1
    seen, step = {}, itertools.count()
    found: dict[str, torch.Tensor] = {}

    def record(name, _, __, output):
        if isinstance(output, tuple):
            output = torch.cat([output[1], output[0]], 1)
        seen[name] = output[:1].clone() if name.endswith((".linear", "linear_2")) else output.clone()

    blocks = (f"transformer_blocks.{i}" for i in range(layers))
    in_blocks = [name for block in blocks for name in (*(f"{block}.{part}" for part in IN_A_BLOCK), block)]
    modules = dict(pipeline.transformer.named_modules())
    last = ("norm_final", "norm_out.linear", "norm_out", "proj_out")
    for name in ("time_embedding.linear_2", "patch_embed", *in_blocks, *last):
        modules[name].register_forward_hook(functools.partial(record, name))
    scheduler_step = pipeline.scheduler.step

    @functools.wraps(scheduler_step)
    def step_and_keep(noise_pred, *others, **options):
        result = scheduler_step(noise_pred, *others, **options)
        sample = others[1] if isinstance(pipeline.scheduler, DDIM) else others[3]
        end = {"noise_pred": noise_pred, "pred_original_sample": result[1], "prev_sample": result[0].to(dtype)}
        number = next(step)
        found.update({f"step_{number:03}/{n}": t.clone() for n, t in ({"latents": sample} | seen | end).items()})
        return result

    pipeline.scheduler.step = step_and_keep
    pipeline(
        **{name: embeddings[name].to(dtype) for name in TEXT_TENSORS},
        **image,
        **{name: config[name] for name in ("height", "width", "num_inference_steps", "guidance_scale")},
        num_frames=config["frames"],
        generator=torch.Generator().manual_seed(SEED),
        latents=latents,
        output_type="latent",
    )
    assert len(found) == STEPS * (4 + 6 + layers * 13) and len(found["step_000/proj_out"]) == 1 + guided
    return found


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Compare every value and every dtype."""
    assert set(ours) == set(theirs), set(ours) ^ set(theirs)
    for name, expected in theirs.items():
        assert (ours[name].shape, ours[name].dtype) == (expected.shape, expected.dtype), name
        same = torch.equal(ours[name], expected)
        assert same, f"{name} differs by {(ours[name].double() - expected.double()).abs().max():.1e}"
        assert expected.any(), f"{name} is zero"


def cases() -> list:
    """Return the models and the ways to run them, of which some are quick."""
    found = []
    for model, guided, scheduler in itertools.product(("random_model", "other_model"), (True, False), (DDIM, DPM)):
        quick = (model, guided, scheduler) in {("other_model", True, DPM), ("other_model", False, DDIM)}
        found.append(pytest.param(model, guided, scheduler, marks=[] if quick else pytest.mark.slow))
    return [*found, ("image_model", True, DPM), ("sine_cosine_model", False, DDIM)]


def readable(value):
    return {DDIM: "DDIM", DPM: "DPM", True: "guided", False: "unguided"}.get(value, str(value))


@pytest.mark.parametrize(("model", "guided", "scheduler"), cases(), ids=readable)
def test_steps_are_the_pipelines(model, guided, scheduler, request, tmp_path, dump, monkeypatch):
    monkeypatch.setattr(dump_reference, "WAITING_BYTES", 10_000)
    files = make_files(request.getfixturevalue(model), tmp_path, guided, scheduler)
    path = dump(files, "reference") / "stage2_tensors.safetensors"
    theirs = pipeline_outputs(files)
    assert_same(load_file(path), theirs)
    assert names_in(path) == list(theirs)  # in the order of execution


@pytest.mark.slow
def test_bfloat16_is_the_pipelines(random_model, tmp_path, dump):
    files = make_files(random_model, tmp_path)
    ours = load_file(dump(files, "reference", "--dtype", "bfloat16") / "stage2_tensors.safetensors")
    noise = torch.randn(ours["step_000/latents"].shape, generator=torch.Generator().manual_seed(SEED))
    assert_same(ours, pipeline_outputs(files, torch.bfloat16, latents=noise.to(torch.bfloat16)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_noise_does_not_depend_on_the_computation(dtype, random_model, tmp_path, dump):
    """The scheduler's noise is drawn in the embeddings' dtype, as stage 2 does, whatever --dtype is."""
    files = make_files(random_model, tmp_path, scheduler=DPM, dtype=dtype)
    exact, rounded = (
        load_file(dump(files, kind, "--dtype", kind, "--dump_names", "*") / "stage2_tensors.safetensors")
        for kind in ("float32", "bfloat16")
    )
    for name in ("step_000/latents", "step_002/prev_sample"):
        error = float((exact[name] - rounded[name].float()).norm() / exact[name].norm())
        assert error < 0.03, f"{name}: {error:.1e}"


@pytest.mark.parametrize("scheduler", [DDIM, DPM], ids=readable)
def test_from_step(scheduler, other_model, tmp_path, dump):
    """From the latents of a dump, the later steps are those of the whole run."""
    files = make_files(other_model, tmp_path, scheduler=scheduler)
    path = dump(files, "whole") / "stage2_tensors.safetensors"
    whole = load_file(path)
    for first in (0, 1, 3):
        part = dump(files, f"from_{first}", "--from_step", first, "--latents", path)
        later = {name: tensor for name, tensor in whole.items() if int(name[5:8]) >= first}
        assert_same(load_file(part / "stage2_tensors.safetensors"), later)

    halved = {name: tensor / 2 if name == "step_002/latents" else tensor for name, tensor in whole.items()}
    with safe_open(path, "np") as file:
        save_file(halved, tmp_path / "halved.safetensors", file.metadata())
    options = "--from_step", 2, "--latents", tmp_path / "halved.safetensors", "--dump_steps", "2"
    part = load_file(dump(files, "halved", *options, "--dump_names", "latents", "noise_pred") / path.name)
    assert sorted(part) == ["step_002/latents", "step_002/noise_pred"]
    assert torch.equal(part["step_002/latents"], whole["step_002/latents"] / 2)


def test_only_what_is_asked_for(other_model, tmp_path, dump):
    """Some names of some steps are those of the whole run; the model runs no step after the last of them."""
    files = make_files(other_model, tmp_path)
    whole = load_file(dump(files, "whole") / "stage2_tensors.safetensors")
    options = "--dump_names", "*.1.attn1.to_?", "prev_sample", "--dump_steps", "0,-2"
    some = load_file(dump(files, "some", *options) / "stage2_tensors.safetensors")
    names = ["prev_sample", *(f"transformer_blocks.1.attn1.to_{letter}" for letter in "kqv")]
    assert sorted(some) == [f"step_{step:03}/{name}" for step in (0, 2) for name in names]
    assert_same(some, {name: whole[name] for name in some})


def test_statistics(other_model, tmp_path, dump, monkeypatch):
    """A row for every step, with tensors beside it only where names are given."""
    monkeypatch.setattr(dump_reference, "VALUES_AT_A_TIME", 1000)
    files = make_files(other_model, tmp_path)
    arrays = load_file(dump(files, "arrays") / "stage2_tensors.safetensors")
    folder = dump(files, "statistics", "--dump_stats")
    assert [file.name for file in folder.iterdir()] == ["stage2_statistics.safetensors"]
    rows = load_file(folder / "stage2_statistics.safetensors")
    assert {f"step_001/{name}" for name in rows} == {name for name in arrays if name.startswith("step_001")}
    for name, row in rows.items():
        assert row.shape == (STEPS, 4)
        for step, found in enumerate(row.numpy()):
            array = arrays[f"step_{step:03}/{name}"].double().numpy()
            expected = array.min(), array.max(), array.mean(), array.std()
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7, err_msg=name)

    folder = dump(files, "both", "--dump_stats", "--dump_names", "norm_out", "--dump_steps", "1")
    both = [load_file(folder / f"stage2_{kind}.safetensors") for kind in ("statistics", "tensors")]
    assert_same(both[0], rows)
    assert_same(both[1], {"step_001/norm_out": arrays["step_001/norm_out"]})


@pytest.mark.parametrize("bad", [[np.nan], [np.inf], [-np.inf, 1], [np.inf, -np.inf, np.nan]], ids=str)
def test_statistics_of_what_is_not_finite(bad, monkeypatch):
    """They show in all of the row, as in NumPy."""
    monkeypatch.setattr(dump_reference, "VALUES_AT_A_TIME", 5)
    values = np.array([3, -1, 2, 0, 0, 0, 0, *bad, 4, 0])
    with np.errstate(invalid="ignore"):
        expected = values.min(), values.max(), values.mean(), values.std()
    assert not np.isfinite(expected).all()
    np.testing.assert_array_equal(dump_reference.statistics_of(torch.from_numpy(values)), np.float32(expected))


def test_one_part_of_the_model_at_a_time(other_model, tmp_path, dump, monkeypatch):
    """While any module runs, no more weights are there than those of a block."""
    files = make_files(other_model, tmp_path)
    transformer, live = [], []
    follow_steps = dump_reference.follow_steps

    def remember(pipeline, *others):
        transformer.append(pipeline.transformer)
        follow_steps(pipeline, *others)

    def count(*_):
        live.append(sum(p.numel() for module in transformer for p in module.parameters() if not p.is_meta))

    monkeypatch.setattr(dump_reference, "follow_steps", remember)
    hook = torch.nn.modules.module.register_module_forward_hook(count)
    dump(files, "reference", "--dump_steps", "0")
    hook.remove()
    block, whole = (
        sum(p.numel() for p in module.parameters()) for module in (transformer[0].transformer_blocks[0], transformer[0])
    )
    assert max(live) == block < whole / 3 and live[-1] == 0, f"{max(live)} of {whole}, a block has {block}"


@pytest.mark.parametrize(
    ("model", "frames"), [pytest.param("random_model", 17, marks=pytest.mark.slow), ("other_model", 13)]
)
def test_chunks_are_the_decoders(model, frames, request, tmp_path, dump):
    """Chunks of three and two latent frames, and of two and two."""
    files = make_files(request.getfixturevalue(model), tmp_path, frames=frames)
    ours = load_file(dump(files, "reference", "--stage", 3) / "stage3_tensors.safetensors")
    vae = AutoencoderKLCogVideoX.from_pretrained(tmp_path / "model", subfolder="vae")
    theirs, chunk = {}, itertools.count()
    current = []

    def record(name, _, __, output):
        output = output[0] if isinstance(output, tuple) else output
        theirs[f"chunk_{current[-1]:03}/decoder.{name}"] = output[0].movedim(0, 1).clone()

    vae.decoder.register_forward_pre_hook(lambda *_: current.append(next(chunk)))
    kinds = ("norm1", "conv1", "norm2", "conv2", "conv_shortcut", "conv_in", "norm_out", "conv_out", "mid_block")
    for name, layer in vae.decoder.named_modules():
        is_one_of_several = name.rpartition(".")[0].endswith(("resnets", "up_blocks", "upsamplers"))
        if name.endswith(kinds) or is_one_of_several:
            layer.register_forward_hook(functools.partial(record, name))
    with torch.no_grad():
        video = vae.decode(load_file(files / LATENTS)["latents"] * (1 / vae.config.scaling_factor)).sample[0]
    assert_same(ours, theirs)
    assert len(current) == 2
    decoded = torch.cat([ours[f"chunk_{i:03}/decoder.conv_out"] for i in range(2)])
    assert torch.equal(decoded, video.movedim(0, 1))

    later = dump(files, "later", "--stage", 3, "--dump_steps", "1", "--dump_names", "decoder.conv_*", "--dump_stats")
    some = load_file(later / "stage3_tensors.safetensors")
    assert_same(
        some, {f"chunk_001/decoder.{name}": theirs[f"chunk_001/decoder.{name}"] for name in ("conv_in", "conv_out")}
    )
    rows = load_file(later / "stage3_statistics.safetensors")
    assert {f"chunk_001/{name}" for name in rows} == {name for name in theirs if name.startswith("chunk_001")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "guided", "scheduler"),
    [("other_model", True, DPM), ("image_model", False, DDIM)],
    ids=readable,
)
def test_lines_up_with_the_stages(model, guided, scheduler, request, tmp_path, dump, one_device):
    """What the stages dump has all names of the reference, and its shapes and, in float32, its values."""
    files = make_files(request.getfixturevalue(model), tmp_path, guided, scheduler)
    names = ("height", "width", "frames", "num_inference_steps", "guidance_scale", "seed")
    config = json.loads((files / CONFIG).read_text())
    options = [f"--{name}={config[name]}" for name in names]
    both = ("--input_dir", str(files), "--dump", str(files / "ours"))
    stage2_transformer.main([*both, *options, "--warmup_steps", "0"])
    stage3_vae_decoder.main(both)
    start = "--from_step", 2, "--latents", files / "ours" / "stage2_tensors.safetensors"
    for stage, name, more in ((2, "whole", ()), (2, "later", start), (3, "decoder", ("--stage", 3))):
        file = f"stage{stage}_tensors.safetensors"
        ours, theirs = load_file(files / "ours" / file), load_file(dump(files, name, *more) / file)
        assert not theirs.keys() - ours.keys()
        for key, expected in theirs.items():
            assert ours[key].shape == expected.shape, f"{key}: {ours[key].shape} and {expected.shape}"
            error = float((ours[key] - expected).norm() / expected.norm())
            assert error < 1e-4, f"{name}, {key}: {error:.1e}"
    assert min(load_file(files / "later" / "stage2_tensors.safetensors")).startswith("step_002")


def without(*files: str):
    return lambda folder: [(folder / file).unlink() for file in files]


def scaled_as_the_authors_do(folder: Path) -> None:
    plan = json.dumps({"plan": {"image_latent_scale": "sat"}})
    save_file({"latents": torch.zeros(1)}, folder / LATENTS, {"provenance": plan})


def edit_json(file: str, **entries):
    return lambda folder: (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | entries))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (None, ("--dump_names", "transformer_blocks.0.attn.to_q"), r"nearest: transformer_blocks\.\*\.attn1\.to_q"),
        (None, ("--stage", "3", "--dump_names", "decoder.conv"), "nearest: decoder.conv_in"),
        (None, ("--dump_steps", "0-4"), "not within 0 to 3"),
        (None, ("--from_step", "1"), "belong together"),
        (None, ("--stage", "3", "--from_step", "1", "--latents", "x"), "belongs to --stage 2"),
        (None, ("--from_step", "1", "--latents", "x"), "x does not exist"),
        (None, ("--from_step", "1", "--latents", "x/y", "--dump", "x"), "would overwrite"),
        (None, ("--from_step", "4", "--latents", "x"), "the steps are 0 to 3"),
        (None, ("--from_step", "2", "--dump_steps", "1", "--latents", "x"), "step 1 comes before"),
        (without(CONFIG), (), "does not exist.*run stage 1"),
        (without(EMBEDDINGS), (), "does not exist.*run stage 1"),
        (without(LATENTS), ("--stage", "3"), "does not exist.*run stage 2"),
        (
            without("model/transformer/diffusion_pytorch_model.safetensors"),
            (),
            r"has no diffusion_pytorch_model\.safetensors",
        ),
        (lambda folder: edit_config(folder, prompt="a blue square"), (), "was made with prompt"),
        (lambda folder: edit_config(folder, seed=None), (), "seed is missing; run stage 2"),
        (lambda folder: edit_config(folder, height=64), ("--stage", "3"), "was made with height"),
        (edit_json("model/transformer/config.json", patch_size_t=None), (), "patch_embed.proj"),
        (lambda folder: edit_config(folder, scheduler="NoScheduler"), (), "is not supported"),
        (lambda folder: edit_config(folder, skipped_steps="1,2"), (), "with skipped_steps 1,2, which the pipeline"),
        (lambda folder: edit_config(folder, guidance_interval=[0, 1]), (), r"with guidance_interval \[0, 1\], which"),
        (edit_json("model/transformer/config.json", text_embed_dim=8), (), "the transformer takes"),
        (edit_json("model/transformer/config.json", in_channels=32), (), "has no image"),
        (scaled_as_the_authors_do, (), "with image_latent_scale sat, which the pipeline"),
    ],
)
def test_bad_input(change, options, message, random_model, tmp_path, dump):
    files = make_files(random_model, tmp_path)
    if change:
        change(files)
    with pytest.raises(UserError, match=message) as error:
        dump(files, "reference", *options)
    assert "\n" not in str(error.value)
    assert not (files / "reference").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tmp_path, dump):
    with pytest.raises(UserError, match="torch finds no GPU"):
        dump(tmp_path, "reference", "--device", "cuda")


def test_latents_that_do_not_fit(random_model, tmp_path, dump):
    """What --from_step needs of the file: the step's latents, of this run, and for DPM the estimate before."""
    files = make_files(random_model, tmp_path, scheduler=DPM)
    config = json.loads((files / CONFIG).read_text())
    shape = 1, 4, 16, HEIGHT // 8, WIDTH // 8
    for shapes, edits, message in (
        ({"step_002/latents": shape}, {}, r"no step_001/pred_original_sample; run stage 2 with .* --dump_steps 1-2$"),
        ({"step_001/latents": shape}, {}, "no step_001/pred_original_sample and no step_002/latents"),
        ({"step_002/latents": shape}, {"seed": 8}, "was made with seed = 8"),
        ({"step_002/latents": shape[1:], "step_001/pred_original_sample": shape}, {}, "latents have shape"),
    ):
        tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
        save_file(tensors, tmp_path / "ours.safetensors", made_from(config | edits, ("seed", "prompt")))
        with pytest.raises(UserError, match=message):
            dump(files, "reference", "--from_step", 2, "--latents", tmp_path / "ours.safetensors")


def test_disk_too_small(random_model, tmp_path, dump, monkeypatch):
    files = make_files(random_model, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(UserError, match="the dump needs"):
        dump(files, "reference")


@pytest.mark.slow
def test_as_a_program(random_model, tmp_path, capsys):
    """One line and status 2 for what the user can mend; else what was written and the memory."""
    files = make_files(random_model, tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        program.run(dump_reference.main, [str(files), "--dump", str(files / "reference"), "--dump_names", "nothing"])
    error = capsys.readouterr().err
    assert (
        end.value.code == 2 and len(error.splitlines()) == 1 and "--dump_names: no module is called nothing" in error
    ), error
    options = (files, "--dump", files / "reference", "--dump_steps", "0")
    process = check(run_here("tools.dump_reference", *options, folder=tmp_path))
    assert "stage2_tensors.safetensors" in process.stdout and "peak memory" in process.stdout, process.stdout
    assert "2/2" in process.stderr, process.stderr  # the blocks of one step
