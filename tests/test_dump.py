"""What --dump writes, and five runs that were spoiled on purpose, in which the tools must name what was spoiled."""

import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cogvideox.errors import UserError
from cogvideox.files import numbers, tensor_dump
from cogvideox.models.transformer import denoising
from tests.helpers import EMBEDDINGS, LATENTS, SIZE, STAGE2, STAGE3, check
from tests.in_process import run_here

TOOL = "inspect_tensors.py"
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
EVERYTHING = ("--dump_names", "*", "--dump_stats")


@pytest.fixture(scope="session")
def good(finished_run, made_once) -> Path:
    """Stages 2 and 3 of a run again, with a dump of everything."""

    def make(folder: Path) -> None:
        for name in (EMBEDDINGS, "generation_config.json"):
            shutil.copy(finished_run / name, folder / name)
        for script, *options in ((STAGE2, *SIZE, "--guidance_scale", 3), (STAGE3,)):
            options += ["--input_dir", folder, "--dump", folder / "dump", *EVERYTHING]
            check(run_here(script, *options, folder=folder))

    return made_once("good", make)


@pytest.fixture
def spoiled(good, random_model, tmp_path):
    """Return a function that changes a tensor of the model, and gives a run's folder that says it is of the other."""

    def spoil(file: str, name: str, change) -> Path:
        model, folder = tmp_path / "model", tmp_path / "spoiled"
        shutil.copytree(random_model, model)
        weights = load_file(model / file)
        weights[name] = change(weights[name].clone())
        save_file(weights, model / file)
        folder.mkdir()
        for path in good.glob("*.*"):
            text = path.read_bytes()
            if path.suffix == ".json":
                text = json.dumps(json.loads(text) | {"model_id": str(model)}).encode()
            (folder / path.name).write_bytes(text)
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt") as opened:
                made_from = json.loads(opened.metadata()["made_from"]) | {"model_id": str(model)}
            save_file(load_file(path), path, metadata={"made_from": json.dumps(made_from)})
        return folder

    return spoil


def conclusion(run_stage, ours: Path, theirs: Path, *options) -> str:
    return run_stage(TOOL, ours, "--compare", theirs, *options, status=1).stdout.splitlines()[-1]


@pytest.mark.slow
def test_a_weight_of_block_1_is_scaled(good, spoiled, run_stage):
    folder = spoiled(TRANSFORMER, "transformer_blocks.1.attn1.to_v.weight", lambda weight: weight * 1.5)
    options = ("--input_dir", folder, *SIZE, "--guidance_scale", 3, "--dump", folder / "dump")
    run_stage(STAGE2, *options, *EVERYTHING)
    for file in ("stage2_tensors.safetensors", "stage2_statistics.safetensors"):
        line = conclusion(run_stage, folder / "dump" / file, good / "dump" / file)
        assert line.startswith("first in the order of execution: step_000/transformer_blocks.1.attn1.to_v "), line
    line = conclusion(run_stage, folder, good)
    assert "embeds" not in line and "transformer_blocks.1.attn1.to_v" in line, line


@pytest.mark.slow
def test_infinity_in_norm2_of_block_0(spoiled, run_stage):
    """From a weight that is finite, for others are refused when they are read."""

    def change(weight):
        weight[5] = torch.finfo(weight.dtype).max
        return weight

    folder = spoiled(TRANSFORMER, "transformer_blocks.0.norm2.norm.weight", change)
    options = ("--input_dir", folder, *SIZE, "--dump", folder / "dump", "--dump_stats")
    printed = run_stage(STAGE2, *options).stdout
    assert "first step 0, transformer_blocks.0.norm2\n" in printed, printed
    assert not (folder / "dump" / "stage2_tensors.safetensors").exists()
    printed = run_stage(TOOL, folder / "dump").stdout
    assert "first not finite: step_000/transformer_blocks.0.norm2\n" in printed, printed


@pytest.mark.slow
def test_latents_of_one_step_are_changed(good, tmp_path, run_stage, monkeypatch):
    inputs = denoising.Denoising._inputs

    def changed(self, i, generator):
        found = inputs(self, i, generator)
        return found._replace(coefficients=found.coefficients.at[0, 0].add(0.01 * (i == 0)))

    monkeypatch.setattr(denoising.Denoising, "_inputs", changed)
    options = ("--input_dir", good, *SIZE, "--guidance_scale", 3, "--output_dir", tmp_path, "--dump", tmp_path / "dump")
    run_stage(STAGE2, *options, "--dump_stats")
    line = conclusion(run_stage, tmp_path / "dump", good / "dump", "--tolerance", 1e-5)
    assert line.startswith("first in the order of execution: step_000/prev_sample differs"), line


@pytest.mark.slow
def test_a_share_of_the_hidden_states_is_wrong(good, tmp_path, run_stage, monkeypatch):
    """One chip's result of a collective is 1 % too large: of the eight shares only its own differs at first."""
    psum_scatter = jax.lax.psum_scatter

    def wrong(x, *arguments, **options):
        here = (jax.lax.axis_index("dp") == 1) & (jax.lax.axis_index("sp") == 2)
        return psum_scatter(x, *arguments, **options) * jnp.where(here, 1.01, 1.0).astype(x.dtype)

    monkeypatch.setattr(jax.lax, "psum_scatter", wrong)
    options = ("--input_dir", good, *SIZE, "--guidance_scale", 3, "--output_dir", tmp_path, "--dump", tmp_path / "dump")
    options += ("--dump_names", "transformer_blocks.*", "--dump_steps", 0)
    run_stage(STAGE2, *options, virtual_devices=True)
    line = conclusion(run_stage, tmp_path / "dump", good / "dump", "--tolerance", 1e-4)
    assert line.startswith("first in the order of execution: step_000/transformer_blocks.0.attn1.to_out.0 "), line
    assert "only in the share of 1 of 8 chips: dp 1, sp 2, tp 0" in line, line


@pytest.mark.slow
def test_a_sum_differs_on_one_chip(good, tmp_path, run_stage, monkeypatch):
    """The moments of a group norm are the same on all chips, unless a sum is wrong on one."""
    psum = jax.lax.psum

    def wrong(x, *arguments, **options):
        here = (jax.lax.axis_index("rows") == 1) & (jax.lax.axis_index("columns") == 1)
        return psum(x, *arguments, **options) * jnp.where(here, 1.0001, 1.0)

    monkeypatch.setattr(jax.lax, "psum", wrong)
    options = ("--input_dir", good, "--output_video", tmp_path / "video.mp4", "--chip_rows", 2)
    options += ("--dump", tmp_path / "dump", "--dump_shards")
    printed = run_stage(STAGE3, *options, virtual_devices=True).stdout
    line = next(line for line in printed.splitlines() if "chips differ" in line)
    assert "chunk 0, decoder.mid_block.resnets.0.norm1.norm_layer.moments: chip 5 (rows 1, columns 1) " in line, line
    assert "differs from 7 others" in line, line


@pytest.mark.slow
def test_a_bias_of_the_decoder_is_shifted(good, spoiled, run_stage):
    name = "up_blocks.1.resnets.0.conv2"
    folder = spoiled(VAE, f"decoder.{name}.conv.bias", lambda bias: bias + 0.5)
    run_stage(STAGE3, "--input_dir", folder, "--dump", folder / "dump", "--dump_stats")
    line = conclusion(run_stage, folder / "dump", good / "dump" / "stage3_statistics.safetensors")
    assert line.startswith(f"first in the order of execution: chunk_000/decoder.{name} differs"), line


@pytest.mark.slow
def test_a_dump_changes_nothing(good, tmp_path, run_stage):
    """The latents are the same with and without a dump, and the last step's are what stage 2 saves."""
    run_stage(STAGE2, "--input_dir", good, *SIZE, "--guidance_scale", 3, "--output_dir", tmp_path)
    ours, dumped = (load_file(folder / LATENTS)["latents"] for folder in (tmp_path, good))
    assert torch.equal(ours, dumped)
    tensors = load_file(good / "dump" / "stage2_tensors.safetensors")
    last = tensors["step_001/prev_sample"].transpose(1, 2)[:, :, -ours.shape[2] :]
    assert torch.equal(last, ours)
    assert torch.equal(tensors["step_001/latents"], tensors["step_000/prev_sample"])
    with safe_open(good / "dump" / "stage2_statistics.safetensors", "pt") as file:
        rows = {name: file.get_tensor(name) for name in file.offset_keys()}
    for name, values in rows.items():
        for step in range(2):
            truth = tensor_dump.statistics_of(tensors[f"step_{step:03}/{name}"].double().numpy())
            np.testing.assert_allclose(values[step], truth, rtol=1e-4, atol=1e-6, err_msg=f"step {step}, {name}")


def test_attention_weights_of_a_run(outputs, run_stage, tmp_path):
    """On four chips, of which two share the heads; the file says of which tokens and heads they are."""
    options = ("--dump", "dump", "--dump_names", "*.1.attn1.weights", "--dump_steps", 1, "--dump_queries", "0,-1")
    run_stage(STAGE2, "--input_dir", outputs, *SIZE, *options, "--dump_heads", 1, virtual_devices=4)
    with safe_open(tmp_path / "dump" / "stage2_tensors.safetensors", "pt") as file:
        weights = file.get_tensor("step_001/transformer_blocks.1.attn1.weights")
        tokens = json.loads(file.metadata()["tokens"])
        assert len(file.keys()) == 1 and json.loads(file.metadata()["provenance"])["plan"]["attention"] == "xla"
    last = tokens["text"] + math.prod(tokens["video"]) - 1
    assert tokens["queries"] == [0, last] and tokens["heads"] == [1] and tokens["video"] == [2, 2, 3]
    assert weights.dtype == torch.float32 and weights.shape == (2, 1, 2, last + 1)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 1, 2))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--dump_stats",), "--dump_stats belongs to --dump"),
        (("--dump", "d", "--dump_steps", "7"), "'7' is not within 0 to 1"),
        (("--dump", "d", "--dump_steps", "one"), "is no number"),
        (
            ("--dump", "d", "--dump_names", "*.to_w"),
            "no module is called *.to_w; the nearest: ",
        ),
        (
            ("--dump", "d", "--dump_names", "*.attn1"),
            "*.attn1 has no output of its own; name what is inside it, '*.attn1.*' or one of norm_k, ",
        ),
        (("--dump_queries", "0"), "--dump_queries belongs to --dump"),
        (("--dump", "d", "--dump_queries", "300"), "--dump_queries 300: '300' is not within 0 to "),
        (("--dump", "d", "--dump_queries", "0-99"), "--dump_queries names 100 tokens; "),
        (("--dump", "d", "--dump_heads", "9"), "--dump_heads 9: '9' is not within 0 to "),
        (("--dump", "outputs/generation_config.json/d"), "cannot write outputs/generation_config.json/d/"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_wrong_options_are_one_line(options, words, outputs, run_stage):
    process = run_stage(STAGE2, "--input_dir", outputs, *SIZE, *options, status=2)
    assert words in process.stderr and len(process.stderr.splitlines()) == 1, process.stderr


def test_a_dump_that_does_not_fit_the_disk(tmp_path):
    planned = {0: {"x": tensor_dump.Planned((2**50,), np.dtype("float32"))}}
    with pytest.raises(UserError, match=r"the dump needs 4194304.0 GiB, and the disk of .* free; name fewer"):
        tensor_dump.Dump(tmp_path, "stage2", "step", planned, {})
    assert not list(tmp_path.iterdir())
    (tmp_path / "stage2_statistics.safetensors").write_bytes(b"an earlier dump")
    with pytest.raises(UserError):
        tensor_dump.Dump(tmp_path, "stage2", "step", planned, {})
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"an earlier dump"]


def test_an_interrupted_dump_keeps_the_steps_before(tmp_path):
    """The file is complete after each step, also where the next one breaks off in the middle."""
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    planned = {
        i: {"b": tensor_dump.Planned((3, 4), array.dtype), "a": tensor_dump.Planned((3, 4), array.dtype)}
        for i in range(3)
    }
    dump = tensor_dump.Dump(tmp_path, "stage2", "step", planned, {"made_from": "{}"})
    file = tmp_path / "stage2_tensors.safetensors"

    def arrays(step, stop=False):
        yield "b", array + step
        if stop:
            raise KeyboardInterrupt
        yield "a", array * step

    assert safe_open(file, "np").offset_keys() == []
    dump.add(0, arrays(0), {})
    dump.add(1, arrays(1), {})
    with pytest.raises(KeyboardInterrupt):
        dump.add(2, arrays(2, stop=True), {})
    with safe_open(file, "np") as opened:
        assert opened.offset_keys() == ["step_000/b", "step_000/a", "step_001/b", "step_001/a"]
        np.testing.assert_array_equal(opened.get_tensor("step_001/b"), array + 1)
        assert tensor_dump.in_order(opened.metadata())


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", [0]), ("0,3-5", [0, 3, 4, 5]), ("-1", [9]), ("-2--1,0", [0, 8, 9]), (None, [*range(10)])],
)
def test_numbers_of_steps(text, expected):
    assert numbers.named(text, 10) == expected


@pytest.mark.parametrize("text", ["", "x", "5-3", "10", "-11", "1,,2", "1-2-3"])
def test_wrong_numbers_of_steps(text):
    with pytest.raises(UserError, match="--dump_steps"):
        numbers.named(text, 10)
