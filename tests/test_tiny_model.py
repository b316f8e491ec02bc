"""The tiny model makes sense: what its prompt says is what its video shows."""

import json
import re

import imageio.v3 as imageio
import numpy as np
import pytest
from PIL import Image

import stage1_text_encoder
import stage2_transformer
import stage3_vae_decoder
from benchmarks import quality
from cogvideox.errors import UserError
from cogvideox.files.names import VIDEO
from cogvideox.files.video_file import video_writer
from tests.helpers import ROOT, TINY_MODEL
from tools.moving_shapes import ALL, FRAMES, SIZE, Caption, held_out, measure, render, same_place


def test_at_most_10_megabytes_in_the_published_layout():
    files = {str(file.relative_to(TINY_MODEL)): file.stat().st_size for file in TINY_MODEL.rglob("*") if file.is_file()}
    assert sum(files.values()) <= 10e6, f"{sum(files.values()):,} bytes"
    assert "tokenizer/spiece.model" in files and "tokenizer/tokenizer.json" not in files


def demo_prompt() -> str:
    return re.search(r"^PROMPT := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]


@pytest.mark.slow
def test_the_demo_shows_what_its_prompt_says(one_device, tmp_path):
    """In the model's own dtype, size and settings, as `make demo`, by both decoders, judged on the mp4 itself."""
    caption = next(caption for caption in held_out() if str(caption) == demo_prompt())
    stage1_text_encoder.main(["--prompt", str(caption), "--model_id", str(TINY_MODEL)])
    stage2_transformer.main([])
    for decoder in ("torchax", "flax"):
        stage3_vae_decoder.main(["--output_video", f"{decoder}.mp4"], decoder)
        assert measure(imageio.imread(tmp_path / f"{decoder}.mp4")) == caption, decoder


@pytest.mark.slow
def test_a_video_is_changed_as_the_prompt_says(one_device, tmp_path):
    """At strength 0.5 by the prompt alone, for the tiny model; at 0.1 what the prompt does not say stays as it is."""
    caption = Caption("red", "circle", "left", "black")
    wanted = caption._replace(colour="blue", background="white")
    clip = render(caption, np.random.default_rng(0))
    with video_writer("clip.mp4", 8) as append:
        for frame in clip:
            append(frame)
    shown = []
    for prompt, strength in ((wanted, 0.5), (caption, 0.1)):
        of_video = ["--video", "clip.mp4", "--strength", str(strength)]
        stage1_text_encoder.main(["--prompt", str(prompt), "--model_id", str(TINY_MODEL), *of_video])
        stage2_transformer.main([])
        stage3_vae_decoder.main([])
        shown.append(imageio.imread(tmp_path / "stage_outputs" / VIDEO))
        assert shown[-1].shape == clip.shape and measure(shown[-1]) == prompt
    assert same_place(shown[1][0], clip[0]) and not same_place(shown[0][0], clip[0])


@pytest.mark.slow
def test_quality_of_a_few_captions(one_device, tmp_path, capsys):
    """Our stages with the project's kernel, in its reference form on the CPU, against diffusers."""
    outputs = ("--output", "report.json", "--sheet", "sheet.png", "--animation", "clips.webp")
    few = ("--captions", "2", "--videos", "1", "--num_inference_steps", "4")
    quality.main([*few, *outputs, "--", "--attention", "splash_exp2"])
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["settings"]["stage2_options"] == ["--attention", "splash_exp2"]
    for group in ("held out", "trained on"):
        shares = {source: np.mean(list(rows.values())) for source, rows in report["adherence"][group].items()}
        assert shares["true clips"] == 1, printed
        assert min(shares["ours"], shares["diffusers"], shares["through VAE"]) > 0.9, printed
        assert shares["untrained"] < 0.6 and 0.2 < shares["chance"] < 0.3, printed
    assert report["psnr"]["ours against diffusers"]["least"] > 40, printed
    assert report["psnr"]["clips through the VAE"]["median"] > 28, printed
    assert Image.open(tmp_path / "clips.webp").n_frames == FRAMES
    sheet = imageio.imread(tmp_path / "sheet.png")
    assert sheet.shape[2] == 3 and sheet.shape[1] > 3 * SIZE and sheet.std() > 20
    assert all(f"wrote {name}" in printed for name in ("report.json", "sheet.png", "clips.webp"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model_id", "nowhere"), "nowhere"),
        (("--captions", "0"), "--captions"),
        (("--output", "/"), "cannot write /"),
        (("--", "--sp_num", "3"), "--sp_num"),
        (("--variant", "--cache_schedule 0"), "--cache_schedule"),
        (("--", "--fast"), "--fast"),
    ],
    ids=["model", "captions", "output", "stage 2's value", "a variant's value", "stage 2's option"],
)
def test_wrong_options_of_the_benchmark(arguments, words, capsys):
    """They are said before the first video is made."""
    with pytest.raises((UserError, SystemExit)) as error:
        quality.main(list(arguments))
    message = str(error.value) if error.type is UserError else capsys.readouterr().err
    assert words in message and len(message.splitlines()) == 1, message


def test_every_caption_is_in_the_tokenizer():
    """A word is a token, so that ten carry the caption."""
    from transformers import T5Tokenizer

    tokenizer = T5Tokenizer.from_pretrained(TINY_MODEL / "tokenizer")
    for caption in ALL:
        assert tokenizer.tokenize(str(caption)) == [f"▁{word}" for word in str(caption).split()]
