"""The inspection tool: statistics against numpy in float64, comparisons whose differences were put there by hand."""

import hashlib
import json
import re

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cogvideox.inspection import causes
from cogvideox.inspection.description import appearance, statistics
from cogvideox.inspection.items import execution_order, items
from tests.helpers import SIZE, STAGE2, edit_latents

TOOL = "inspect_tensors.py"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (1,), (), (0, 4), (7, 1, 180_001)], ids=str)
def test_statistics_against_numpy(shape, dtype):
    """The last shape is of several chunks; the mean is far from zero, where a sum of squares loses digits."""
    torch.manual_seed(0)
    tensor = (torch.randn(shape) * 2 + 30).to(dtype) if dtype != torch.bool else torch.rand(shape) < 0.3
    tensor = torch.where(torch.rand(shape) < 0.1, torch.zeros((), dtype=dtype), tensor)
    found, truth = statistics(tensor), tensor.double().numpy()
    assert found["nan"] == found["inf"] == 0 and found["first_not_finite"] is None
    assert found["digest"] == hashlib.sha256(tensor.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
    if truth.size == 0:
        assert found["min"] is None and found["mean"] is None
        return
    expected = {"min": truth.min(), "max": truth.max(), "mean": truth.mean(), "std": truth.std()}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    assert found["zeros"] == (truth == 0).mean()


def test_what_is_not_finite_is_counted_and_left_out():
    array = np.random.default_rng(0).normal(size=(3, 700, 900)).astype(np.float32)
    array[1, 2, 3], array[2, 0, 0], array[2, 5, 7] = np.nan, np.inf, -np.inf
    found = statistics(torch.from_numpy(array))
    finite = array[np.isfinite(array)].astype(np.float64)
    assert (found["nan"], found["inf"], found["first_not_finite"]) == (1, 2, [1, 2, 3])
    assert found["max"] == finite.max() and found["std"] == pytest.approx(finite.std(), rel=1e-6)
    nothing = statistics(torch.full((4,), torch.nan))
    assert (nothing["nan"], nothing["min"], nothing["first_not_finite"]) == (4, None, [0])


def test_names_and_order(tmp_path):
    """Numbers count as numbers, a model's parts may be split otherwise, and stages come in their order."""
    blocks = {f"blocks.{i}.weight": torch.zeros(2) for i in range(12)}
    for split, folder in ((3, "a"), (7, "b")):
        (tmp_path / folder / "transformer").mkdir(parents=True)
        names = list(blocks)
        save_file({n: blocks[n] for n in names[:split]}, tmp_path / folder / "transformer" / "1.safetensors")
        save_file({n: blocks[n] for n in names[split:]}, tmp_path / folder / "transformer" / "2.safetensors")
    assert list(items(tmp_path / "a")) == list(items(tmp_path / "b")) == [f"transformer/{name}" for name in blocks]
    order = sorted(
        ["latents", "frames", "negative_prompt_embeds", "prompt_embeds"], key=lambda n: order_of(tmp_path, n)
    )
    assert order == ["prompt_embeds", "negative_prompt_embeds", "latents", "frames"]


def order_of(folder, name):
    file = folder / f"{name}.safetensors"
    save_file({name: torch.zeros(1)}, file)
    return execution_order(name, items(file)[name], 0)


def test_patterns_of_heads_are_said_in_words(run_stage, tmp_path):
    kinds_and_windows = torch.tensor([[0, 0], [2, 10], [1, 1], [0, 0], [0, 0], [1, 0]], dtype=torch.int32)
    save_file({"step_001/transformer_blocks.7.attn1.patterns": kinds_and_windows}, tmp_path / "a.safetensors")
    printed = run_stage(TOOL, "a.safetensors").stdout
    assert printed.endswith("  heads 0,3-4: dense; head 5: frames:0; head 2: frames:1; head 1: positions:10\n"), printed


@pytest.fixture
def two_runs(tmp_path):
    """Folders a and b whose embeddings are equal; b's latents differ from latent frame 3 on, most at one place."""
    torch.manual_seed(0)
    embeddings, latents = torch.randn(1, 6, 8), torch.randn(1, 4, 5, 3, 2)
    for folder in "ab":
        (tmp_path / folder).mkdir()
        save_file({"prompt_embeds": embeddings}, tmp_path / folder / "stage1_embeddings.safetensors")
        save_file({"latents": latents}, tmp_path / folder / "stage2_latents.safetensors")
        latents = latents.clone()
        latents[:, :, 3:] += 1e-3
        latents[0, 2, 4, 1, 0] += 0.5
    return tmp_path / "a", tmp_path / "b", latents


def test_comparison_names_the_first_difference(two_runs, run_stage):
    a, b, _ = two_runs
    process = run_stage(TOOL, a, "--compare", b, "--json", status=1)
    report = json.loads(process.stdout)
    embeddings, latents = report["tensors"]
    assert embeddings["name"] == "prompt_embeds" and embeddings["relative"] == 0 and not embeddings["differs"]
    assert latents["worst"]["place"] == [0, 2, 4, 1, 0] and latents["first"] == "latent frame 3"
    assert latents["max"] == pytest.approx(0.501, abs=1e-5)
    assert "latents differs by" in report["conclusion"] and "from latent frame 3 on" in report["conclusion"]
    assert "1 of 2 differ" in run_stage(TOOL, a, "--compare", b, status=1).stdout.splitlines()[-1]
    assert "nothing differs" in run_stage(TOOL, a, "--compare", a).stdout
    run_stage(TOOL, a, "--compare", b, "--tolerance", latents["relative"] * 1.01)
    run_stage(TOOL, a, "--compare", b, "--tolerance", latents["relative"] * 0.99, status=1)


def test_what_decided_two_runs_is_said(outputs, run_stage):
    """Of a run inside the folder of another one, which has the embeddings of both: they are no difference."""
    run_stage(STAGE2, "--input_dir", outputs, *SIZE, "--no-use_k_smooth", "--output_dir", outputs / "inside")
    (outputs / "output_video.mp4").unlink()
    printed = run_stage(TOOL, outputs, "--compare", outputs / "inside").stdout
    assert re.search(r"^  k_smooth +True and False \(stage2_latents", printed, re.MULTILINE), printed
    assert f"no part of {outputs}, but runs of their own: {outputs / 'inside'}\n" in printed, printed
    assert printed.endswith("nothing differs: 1 compared; 2 in one of the two alone\n"), printed
    assert "inside/" not in run_stage(TOOL, outputs).stdout
    edit_latents(outputs / "inside", lambda latents: latents + 1)
    report = json.loads(run_stage(TOOL, outputs, "--compare", outputs / "inside", "--json", status=1).stdout)
    assert report["conclusion"].startswith("first in the order of execution: latents differs"), report["conclusion"]
    assert [cause["name"] for cause in report["causes"]] == ["k_smooth"]


def test_causes_of_every_kind(tmp_path):
    """Of entries that both have, wherever the files lie; what is the same in several files is said once."""
    made = {"plan": {"attention": "xla", "mesh": "{'sp': 1}"}, "versions": {"jax": "1"}, "inputs": {"../e": "a" * 64}}
    made["inputs"]["transformer of one"] = "b" * 64
    other = {"plan": {"attention": "splash", "mesh": "{'sp': 1}"}, "versions": {"jax": "2"}, "inputs": {"e": "c" * 64}}
    other["inputs"]["transformer of another"] = "d" * 64
    for folder, record, seed in (("a", made, 42), ("b", other, 43), ("c", {}, 44)):
        (tmp_path / folder).mkdir()
        for name in ("x", "y"):
            metadata = {"provenance": json.dumps(record), "made_from": json.dumps({"seed": seed, "lora": []})}
            save_file({name: torch.zeros(1)}, tmp_path / folder / f"{name}.safetensors", metadata)
    found = {cause.name: cause[1:3] for cause in causes.causes(tmp_path / "a", tmp_path / "b")}
    assert found == {
        "seed": ("42", "43"),
        "attention": ("xla", "splash"),
        "jax": ("1", "2"),
        "e": ("a" * 8, "c" * 8),
        "weights of the transformer": ("b" * 8, "d" * 8),
    }
    assert [cause.name for cause in causes.causes(tmp_path / "a", tmp_path / "c")] == ["seed"]
    x, y = tmp_path / "a" / "x.safetensors", tmp_path / "b" / "y.safetensors"
    assert f"  seed{' ' * 24}42 and 43 (x.safetensors)" in list(causes.lines(x, y))
    assert not list(causes.lines(tmp_path / "a", tmp_path / "a"))


def test_noise_sets_the_tolerance(two_runs, run_stage, tmp_path):
    """Twice the error of bfloat16 passes; ten times it does not."""
    torch.manual_seed(1)
    reference = torch.randn(1, 4, 5, 3, 2)
    noise = reference.bfloat16().float() - reference
    for name, factor in (("reference", 0), ("noise", 1), ("good", 2), ("bad", 10)):
        save_file({"latents": reference + factor * noise}, tmp_path / f"{name}.safetensors")
    options = ("--compare", "reference.safetensors", "--noise", "noise.safetensors")
    run_stage(TOOL, "good.safetensors", *options)
    assert "for the noise" in run_stage(TOOL, "bad.safetensors", *options, status=1).stdout
    run_stage(TOOL, "bad.safetensors", *options, "--tolerance", 11)


def test_shapes_missing_tensors_and_nan(two_runs, run_stage):
    a, b, latents = two_runs
    for change, words in (
        (lambda: save_file({"latents": latents[:, :2]}, b / "stage2_latents.safetensors"), "has shape [1, 4, 5, 3, 2]"),
        (lambda: save_file({"latents": latents / 0}, b / "stage2_latents.safetensors"), "is not finite at [0, 0, 0"),
        ((b / "stage2_latents.safetensors").unlink, "latents is not in"),
    ):
        change()
        assert words in run_stage(TOOL, a, "--compare", b, status=1).stdout.splitlines()[-1]


def test_videos(run_stage, tmp_path):
    random = np.random.default_rng(0).integers(0, 256, (6, 32, 48, 3)).astype(np.uint8)
    gray = np.full_like(random, 128)
    frozen = np.repeat(random[:1], 6, axis=0)
    for frames, looks in ((random, "moving"), (gray, "plain: "), (gray // 40, "black"), (frozen, "frozen")):
        assert appearance(frames).startswith(looks)
    imageio.imwrite(tmp_path / "a.mp4", random, fps=8)
    imageio.imwrite(tmp_path / "b.mp4", frozen, fps=8)
    printed = run_stage(TOOL, "a.mp4").stdout
    assert "6 frames, 48 x 32, 8 frames per second: moving" in printed and "brightness" in printed
    report = json.loads(run_stage(TOOL, "a.mp4", "--compare", "b.mp4", "--json", status=1).stdout)
    psnr = report["tensors"][0]["psnr"]
    assert len(psnr) == 6 and psnr[0] > max(psnr[1:]), psnr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere",), "nowhere does not exist"),
        (("empty",), "empty has no safetensors file and no video"),
        (("cut.safetensors",), "is not a complete safetensors file"),
        (("noise.mp4",), "cannot read the video noise.mp4"),
        (("whole.safetensors", "--tolerance", 1), "belong to --compare"),
        (("whole.safetensors", "whole.safetensors", "--compare", "whole.safetensors"), "one path"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_wrong_uses_are_one_line(arguments, words, run_stage, tmp_path):
    (tmp_path / "empty").mkdir()
    save_file({"x": torch.zeros(100)}, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-8])
    (tmp_path / "noise.mp4").write_bytes(b"not a video" * 100)
    process = run_stage(TOOL, *arguments, status=2)
    assert len(process.stderr.splitlines()) == 1 and words in process.stderr, process.stderr
