"""The search for a map of sparse attention: on a model whose heads are known, and how its videos are compared."""

import json

import numpy as np
import pytest

from cogvideox.models.transformer.sparse import layout as layouts
from cogvideox.run import warm
from tests.helpers import check
from tests.in_process import run_here
from tests.known_heads import make_model
from tools.frame_quality import psnr, ssim

# Six frames of 16 x 32 patches, for which some windows are predicted to be faster than dense attention.
SIZE = ("--height", 128, "--width", 256, "--frames", 41)


@pytest.fixture
def known(monkeypatch):
    """Let groups of places have few tiles, so that a small video has several, and keep nothing after the test."""
    monkeypatch.setattr(layouts, "GROUP_TILES", 6)
    monkeypatch.setattr(warm._Kept, "of_name", None)


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
@pytest.mark.usefixtures("known")
def test_known_heads_are_found(tmp_path):
    """Local in frames, local in places, or global, and nothing else; a file of two prompts."""
    layers = [["frames", "dense", "positions", "dense"], ["positions", "positions", "frames", "dense"]]
    make_model(tmp_path / "model", layers)
    (tmp_path / "prompts.txt").write_text("a panda\na red circle\n")
    options = ("--model_id", tmp_path / "model", "--prompt_file", tmp_path / "prompts.txt", *SIZE)
    options += ("--num_inference_steps", 2, "--dense_steps", 0.5, "--guidance_scale", 1)
    printed = check(run_here("tools.fit_sparse_attention", *options, folder=tmp_path)).stdout
    found = json.loads((tmp_path / "model" / "transformer" / "sparse_attention.json").read_text())
    names = {"frames": "frames:0", "positions": "positions:0", "dense": "dense"}
    assert found["patterns"] == [[names[kind] for kind in layer] for layer in layers], printed
