"""Stage 1 with images: what it encodes is what diffusers' pipeline encodes, of every kind of picture."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline
from diffusers.utils import load_image
from PIL import Image
from safetensors.torch import load_file

from cogvideox.files import provenance
from cogvideox.files.images import read_image
from cogvideox.files.names import IMAGE_TENSORS
from tests.helpers import CONFIG, EMBEDDINGS, STAGE1, STAGE2, check
from tests.in_process import run_here

HEIGHT, WIDTH = 48, 32
SIZE = ("--height", HEIGHT, "--width", WIDTH)
SIDEWAYS = 6  # in EXIF: to be turned by a quarter


def pixels(height: int, width: int, channels: int) -> np.ndarray:
    """Return noise, uint8 [height, width, channels]."""
    return np.random.default_rng(height).integers(0, 256, (height, width, channels), np.uint8)


def draw_pictures(folder: Path) -> list[str]:
    """Draw pictures of all kinds in a folder; return their names."""
    color = Image.fromarray(pixels(37, 53, 3))
    see_through = Image.fromarray(pixels(64, 64, 4))
    exif = Image.Exif()
    exif[0x0112] = SIDEWAYS
    palette = color.quantize(16)
    palette.info["transparency"] = 3
    others = [Image.fromarray(pixels(20 + i, 31, 3)) for i in range(2)]
    pictures = {
        "odd.png": (color, {}),
        "photo.jpg": (color, {"exif": exif}),
        "print.jpg": (color.convert("CMYK"), {}),
        "alpha.png": (see_through, {}),
        "alpha.webp": (see_through, {"lossless": True}),
        "palette.png": (palette, {}),
        "gray.png": (color.convert("L"), {}),
        "gray_alpha.png": (see_through.convert("LA"), {}),
        "black_and_white.png": (color.convert("1"), {}),
        "animated.gif": (others[0], {"save_all": True, "append_images": others[1:]}),
        "animated.png": (others[0], {"save_all": True, "append_images": others[1:]}),
        "one_pixel.png": (Image.new("RGB", (1, 1), (200, 100, 50)), {}),
        "long.png": (Image.fromarray(pixels(3, 20_000, 3)), {}),
    }
    for name, (picture, options) in pictures.items():
        picture.save(folder / name, **options)
    return list(pictures)


@pytest.fixture(scope="module")
def encoded(made_once, image_model) -> Path:
    """Run stage 1 on a line of JSON for each picture; the folder has the pictures and the outputs."""

    def make(folder: Path) -> None:
        (folder / "pictures").mkdir()
        lines = [
            {"prompt": f"a {name}", "image": name} | ({"seed": i} if i % 2 else {})
            for i, name in enumerate(draw_pictures(folder / "pictures"))
        ]
        text = "\n\n".join(json.dumps(line) for line in lines)
        (folder / "pictures" / "prompts.jsonl").write_text(text)
        options = ("--prompt_file", "pictures/prompts.jsonl", *SIZE, "--model_id", image_model, "--output_dir", "out")
        (folder / "printed").write_text(check(run_here(STAGE1, *options, folder=folder)).stdout)

    return made_once("encoded_images", make)


@torch.no_grad()
def test_as_the_pipeline_encodes(encoded, image_model):
    """To the last bit; the prompts' folders say which picture and which seed are theirs."""
    pipeline = CogVideoXImageToVideoPipeline.from_pretrained(image_model, dtype=torch.float32)
    lines = (encoded / "pictures" / "prompts.jsonl").read_text().split("\n\n")
    assert len(lines) == 13
    for number, line in enumerate(map(json.loads, lines), 1):
        picture = encoded / "pictures" / line["image"]
        loaded = load_image(str(picture))
        posterior = pipeline.vae.encode(pipeline.video_processor.preprocess(loaded, HEIGHT, WIDTH)[:, :, None])
        folder = encoded / "out" / f"prompt_{number:04}"
        found = load_file(folder / EMBEDDINGS)
        assert found["image_mean"].shape == (1, 16, 1, HEIGHT // 8, WIDTH // 8), line
        assert torch.equal(found["image_mean"], posterior.latent_dist.mean), line
        assert torch.equal(found["image_logvar"], posterior.latent_dist.logvar), line
        config = json.loads((folder / CONFIG).read_text())
        assert config["image"] == str(picture) and (config["height"], config["width"]) == (HEIGHT, WIDTH), config
        assert config.get("prompt_seed") == line.get("seed") and config["prompt"] == line["prompt"], config
        assert f"{picture}: {loaded.height} x {loaded.width} pixels" in (encoded / "printed").read_text()


def test_gray_of_16_bits(tmp_path):
    """diffusers would make all of it white."""
    values = np.arange(12).reshape(3, 4) * 5900
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "gray.png")
    found = np.asarray(read_image(tmp_path / "gray.png"))
    assert found.shape == (3, 4, 3) and (found == (values >> 8)[..., None]).all(), found


def test_a_picture_that_changes_or_goes(image_model, tmp_path):
    """Another picture makes what was encoded stale; a missing one does not, for its latents are in the file."""
    picture, outputs = tmp_path / "a.png", tmp_path / "out"
    Image.new("RGB", (5, 7), "red").save(picture)
    options = ("--prompt", "red", "--image", "a.png", *SIZE, "--model_id", image_model, "--output_dir", "out")
    printed = check(run_here(STAGE1, *options, folder=tmp_path)).stdout
    assert printed.strip().splitlines()[-1].endswith(f"{STAGE2} --input_dir out"), printed  # which takes the size

    looked_at = check(run_here("inspect_tensors.py", "out", folder=tmp_path)).stdout
    names = re.findall(r"^  (\w+) +1x\d+x", looked_at, re.MULTILINE)
    assert names == ["prompt_embeds", "negative_prompt_embeds", *IMAGE_TENSORS], looked_at

    def status() -> str:
        return check(run_here("utils.py", "status", "out", folder=tmp_path)).stdout.strip()

    picture.unlink()
    assert not list(provenance.stale_inputs(outputs / EMBEDDINGS)) and "stale" not in status()
    assert status().splitlines()[-1] == printed.strip().splitlines()[-1]
    picture.write_bytes(b"another one")
    said = status()
    assert f"{EMBEDDINGS}: is stale: it was made from another {picture}" in said, said
    assert said.endswith(f"--model_id {image_model} --image a.png --height {HEIGHT} --width {WIDTH}"), said
    process = run_here(STAGE2, "--input_dir", "out", folder=tmp_path)
    assert process.returncode == 2 and f"was not made from {picture} as it is now" in process.stderr, process.stderr


def test_in_bfloat16(image_model, tmp_path):
    """In the dtype of --dtype, as the text; one image for all lines of a file of plain text."""
    Image.fromarray(pixels(9, 9, 3)).save(tmp_path / "a.png")
    (tmp_path / "prompts.txt").write_text("red\nblue")
    options = ("--prompt_file", "prompts.txt", "--image", "a.png", *SIZE, "--model_id", image_model)
    printed = check(run_here(STAGE1, *options, "--dtype", "bfloat16", folder=tmp_path)).stdout
    assert printed.count("encoded ") == 1 and "VAE's encoder: dtype: bfloat16, as --dtype says" in printed, printed
    first, second = (load_file(path) for path in sorted((tmp_path / "stage_outputs").rglob(EMBEDDINGS)))
    for name in IMAGE_TENSORS:
        assert first[name].dtype == torch.bfloat16 and torch.equal(first[name], second[name]) and first[name].any()
