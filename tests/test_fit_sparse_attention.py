"""The search for a map of sparse attention: on a model whose heads are known, and how its videos are compared."""

import contextlib
import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from cogvideox.models.transformer.sparse import geometry
from cogvideox.models.transformer.sparse import layout as layouts
from cogvideox.run import warm
from tests.helpers import STAGE2, TINY_MODEL, check
from tests.in_process import run_here
from tests.known_heads import make_model
from tools.frame_quality import psnr, ssim

# Four frames of 16 x 16 patches.
SIZE = ("--height", 128, "--width", 128, "--frames", 29)


LAYERS = [["frames", "dense", "positions", "dense"], ["positions", "positions", "frames", "dense"]]


@contextlib.contextmanager
def small_groups():
    """Let a small video have several groups of places, and a window be worth its while; keep nothing afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "GROUP_TILES", 4)
        for name in ("PASS_CYCLES", "BLOCK_CYCLES"):
            patch.setattr(geometry, name, 0)
        patch.setattr(warm._Kept, "of_name", None)
        yield


@pytest.fixture(scope="session")
def searched(made_once):
    """Run the tool with a model whose heads are known; returns the folder, in which `printed` is what it printed."""

    def make(folder):
        make_model(folder / "model", LAYERS)
        (folder / "prompts.txt").write_text("a panda\n")
        options = ("--model_id", folder / "model", "--prompt_file", folder / "prompts.txt", *SIZE)
        options += ("--num_inference_steps", 2, "--dense_steps", 0.5, "--guidance_scale", 1, "--error_budget", 0.01)
        with small_groups():
            process = check(run_here("tools.fit_sparse_attention", *options, folder=folder))
        (folder / "printed").write_text(process.stdout)

    return made_once("searched", make)


def test_ssim_is_that_of_the_paper():
    """Beside sums over each window of 11 x 11, written out."""
    generator = np.random.default_rng(0)
    frames = generator.integers(0, 256, (2, 16, 20, 3)).astype(np.uint8)
    reference = np.clip(frames + generator.normal(scale=30, size=frames.shape), 0, 255).astype(np.uint8)
    distance = np.arange(-5, 6)
    weights = np.exp(-(distance[:, None] ** 2 + distance**2) / (2 * 1.5**2))
    weights /= weights.sum()
    x, y = (
        np.lib.stride_tricks.sliding_window_view(array.astype(float), (11, 11), (1, 2)) for array in (frames, reference)
    )

    def mean(values):
        return (weights * values).sum((-1, -2), keepdims=True)

    of_x, of_y = mean(x), mean(y)
    variances, covariance = mean((x - of_x) ** 2) + mean((y - of_y) ** 2), mean((x - of_x) * (y - of_y))
    first, second = 2.55**2, 7.65**2
    expected = (2 * of_x * of_y + first) * (2 * covariance + second)
    expected /= (of_x**2 + of_y**2 + first) * (variances + second)
    assert ssim(frames, reference) == pytest.approx(expected.mean(), rel=1e-9) and expected.mean() < 0.98
    assert ssim(frames, frames) == 1


def test_psnr():
    frames = np.zeros((2, 4, 4, 3), np.uint8)
    other = frames.copy()
    other[0] = 51  # a fifth of 255 in half of the values
    assert psnr(frames, other) == pytest.approx(10 * np.log10(2 * 25)) and psnr(frames, frames) == np.inf


@pytest.mark.slow
def test_known_heads_are_found(searched):
    """Local in frames, local in places, or global, and nothing else."""
    printed = (searched / "printed").read_text()
    found = json.loads((searched / "model" / "transformer" / "sparse_attention.json").read_text())
    names = {"frames": "frames:0", "positions": "positions:0", "dense": "dense"}
    assert found["patterns"] == [[names[kind] for kind in layer] for layer in LAYERS], printed
    # The other keys of a local head have next to no weight.
    line = re.search(r"a panda: latents differ by ([\d.]+)% .* PSNR of ([\d.]+|inf) dB", printed)
    assert line and float(line[1]) < 0.1 and float(line[2]) > 60, printed
    assert re.search(r"with --error_budget 0\.005: 6[\d.]+% of the scores, ", printed), printed
    assert f"wrote {searched}/model/transformer/sparse_attention.json\n" in printed


@pytest.mark.slow
def test_errors_on_a_mesh(searched, run_stage, tmp_path):
    """On eight devices, of which two groups share the queries, they are those of one device."""
    runs = searched / "sparse_attention"
    options = (
        "--num_inference_steps",
        2,
        "--guidance_scale",
        1,
        *SIZE,
        "--dump",
        tmp_path / "dump",
        "--warmup_steps",
        0,
    )
    options += ("--sparse_attention", runs / "dense_sparse_attention.json", "--dump_names", "*.attn1.pattern_errors")
    with small_groups():
        run_stage(
            *(STAGE2, "--input_dir", runs / "prompts" / "prompt_0001", "--output_dir", tmp_path, *options),
            virtual_devices=True,
        )
    file = "stage2_tensors.safetensors"
    found, expected = (load_file(folder / file) for folder in (tmp_path / "dump", runs / "dump" / "prompt_0001"))
    assert len(expected) == len(LAYERS) and found.keys() > expected.keys()
    for name, errors in expected.items():
        assert errors.shape[:2] == (1, 4)
        np.testing.assert_allclose(found[name], errors, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--height", 64, "--width", 64, "--frames", 17), "at 64 x 64 x 17 no pattern is predicted to be faster"),
        (("--dense_steps", 1), "--dense_steps 1 leaves no step for the map"),
        (("--measured_steps", "9,10"), "--measured_steps 9,10: '10' is not within 0 to 9"),
        (("--attention", "splash"), "--attention splash has no --sparse_attention"),
        (("--height", 100), "--height 100 does not fit this model"),
    ],
)
def test_what_cannot_be_searched(options, error, tmp_path):
    """It is said before anything runs."""
    process = run_here(
        "tools.fit_sparse_attention", "--model_id", TINY_MODEL, "--prompt", "x", *options, folder=tmp_path
    )
    assert process.returncode == 2 and error in process.stderr and process.stderr.count("\n") == 1, process.stderr
    assert not [*tmp_path.iterdir()]
