"""The tiny model makes sense: what its prompt says is what its video shows."""

import json
import re

import imageio.v3 as imageio
import numpy as np
import pytest
from PIL import Image

from tests.helpers import ROOT, STAGE1, STAGE2, STAGE3, STAGE3_FLAX, TINY_MODEL
from tools.moving_shapes import ALL, FRAMES, SIZE, held_out, measure

QUALITY = "benchmarks.quality"


def test_at_most_10_megabytes_in_the_published_layout():
    files = {str(file.relative_to(TINY_MODEL)): file.stat().st_size for file in TINY_MODEL.rglob("*") if file.is_file()}
    assert sum(files.values()) <= 10e6, f"{sum(files.values()):,} bytes"
    assert "tokenizer/spiece.model" in files and "tokenizer/tokenizer.json" not in files


def demo_prompt() -> str:
    return re.search(r"^PROMPT := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]


def demo_options() -> list[str]:
    """Stage 2's options in the Makefile, sizes and guidance."""
    command = re.search(r"stage2_transformer.py --input_dir \S+ (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return command[1].split()


@pytest.mark.slow
@pytest.mark.parametrize("decoder", [STAGE3, STAGE3_FLAX])
def test_the_demo_shows_what_its_prompt_says(decoder, run_stage, tmp_path):
    """In the model's own dtype with the options of `make demo`, judged on the mp4 itself."""
    caption = next(caption for caption in held_out() if str(caption) == demo_prompt())
    run_stage(STAGE1, "--prompt", caption, "--model_id", TINY_MODEL)
    run_stage(STAGE2, *demo_options())
    run_stage(decoder)
    assert measure(imageio.imread(tmp_path / "stage_outputs" / "output_video.mp4")) == caption


@pytest.mark.slow
def test_quality_of_a_few_captions(run_stage, tmp_path):
    """Our stages with the project's kernel, in its reference form on the CPU, against diffusers."""
    outputs = ("--output", "report.json", "--sheet", "sheet.png", "--animation", "clips.webp")
    process = run_stage(QUALITY, "--captions", 3, "--videos", 1, *outputs, "--", "--attention", "splash_exp2")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["settings"]["stage2_options"] == ["--attention", "splash_exp2"]
    for group in ("held out", "trained on"):
        shares = {source: np.mean(list(rows.values())) for source, rows in report["adherence"][group].items()}
        assert shares["true clips"] == 1, process.stdout
        assert min(shares["ours"], shares["diffusers"], shares["through VAE"]) > 0.9, process.stdout
        assert shares["untrained"] < 0.6 and 0.2 < shares["chance"] < 0.3, process.stdout
    assert report["psnr"]["ours against diffusers"]["least"] > 40, process.stdout
    assert report["psnr"]["clips through the VAE"]["median"] > 28, process.stdout
    assert Image.open(tmp_path / "clips.webp").n_frames == FRAMES
    sheet = imageio.imread(tmp_path / "sheet.png")
    assert sheet.shape[2] == 3 and sheet.shape[1] > 3 * SIZE and sheet.std() > 20
    assert all(f"wrote {name}" in process.stdout for name in ("report.json", "sheet.png", "clips.webp"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model_id", "nowhere"), "nowhere"),
        (("--captions", 0), "--captions"),
        (("--output", "/"), "cannot write /"),
        (("--captions", 1, "--videos", 1, "--", "--sp_num", 3), "--sp_num"),
        (("--captions", 1, "--videos", 1, "--", "--fast"), "--fast"),
    ],
    ids=["model", "captions", "output", "stage 2's value", "stage 2's option"],
)
def test_wrong_options_of_the_benchmark(arguments, words, run_stage):
    process = run_stage(QUALITY, *arguments, status=2)
    assert words in process.stderr.splitlines()[-1] and "Traceback" not in process.stderr


def test_every_caption_is_in_the_tokenizer():
    """A word is a token, so that ten carry the caption."""
    from transformers import T5Tokenizer

    tokenizer = T5Tokenizer.from_pretrained(TINY_MODEL / "tokenizer")
    for caption in ALL:
        assert tokenizer.tokenize(str(caption)) == [f"▁{word}" for word in str(caption).split()]
