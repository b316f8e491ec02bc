"""The tiny image-to-video model: shape, colours and place come from its picture, the direction from its prompt."""

import json
import os

import numpy as np
import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline
from PIL import Image

from benchmarks import quality
from tests.helpers import ROOT, TINY_MODEL, contents
from tools import moving_shapes, train_tiny_image_model
from tools.moving_shapes import (
    DIRECTIONS,
    FRAMES,
    SIZE,
    Caption,
    held_out_pictures,
    measure,
    prompts_of,
    render,
    same_place,
)

TINY_IMAGE_MODEL = ROOT / "tiny_model_i2v"
FEW = ("--effort", "0.0015", "--work_dir", "work", "--device", "cpu")


@pytest.fixture(scope="module")
def pipeline() -> CogVideoXImageToVideoPipeline:
    made = CogVideoXImageToVideoPipeline.from_pretrained(TINY_IMAGE_MODEL, dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    return made


def test_its_folder_has_the_transformer_and_links_to_the_rest():
    links = {path.name: os.readlink(path) for path in TINY_IMAGE_MODEL.iterdir() if path.is_symlink()}
    assert links == {name: f"../tiny_model/{name}" for name in train_tiny_image_model.SHARED}
    own = sum(
        len(content) for name, content in contents(TINY_IMAGE_MODEL).items() if name.partition("/")[0] not in links
    )
    assert own <= 8e6, f"{own:,} bytes"


def test_one_picture_goes_where_the_prompt_says(pipeline):
    """A picture that it never saw, with its shape in the middle, to all four sides; as in the prompt's two kinds."""
    picture = render(held_out_pictures()[0], np.random.default_rng(0), variety=0)[FRAMES // 2]
    expected = [held_out_pictures()[0]._replace(direction=direction) for direction in DIRECTIONS]
    frames = pipeline(
        image=[Image.fromarray(picture)] * 4,
        prompt=[prompts_of(caption)[i % 2] for i, caption in enumerate(expected)],
        height=SIZE,
        width=SIZE,
        num_frames=FRAMES,
        num_inference_steps=6,
        guidance_scale=moving_shapes.GUIDANCE_SCALE,
        generator=[torch.Generator().manual_seed(seed) for seed in range(4)],
        output_type="np",
    ).frames
    videos = np.round(frames * 255).astype(np.uint8)
    assert [measure(video) for video in videos] == expected
    assert all(same_place(video[0], picture) for video in videos)
    error = np.square(videos[:, 0].astype(float) - picture).mean(axis=(1, 2, 3))
    assert (10 * np.log10(255**2 / error) > 25).all()


@pytest.mark.slow
def test_quality_of_a_few_pictures(one_device, tmp_path, capsys):
    """Our stages against diffusers' pipeline, from the same pictures."""
    few = ("--model_id", str(TINY_IMAGE_MODEL), "--captions", "1", "--videos", "1", "--num_inference_steps", "4")
    quality.main([*few, "--output", "report.json", "--sheet", "sheet.png"])
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    for rows in report["adherence"].values():
        assert set(rows["true clips"].values()) == set(rows["through VAE"].values()) == {1.0}, printed
        assert rows["ours"].keys() == {*Caption._fields, "place"}
        assert min(rows["ours"]["place"], rows["ours"]["colour"], rows["ours"]["direction"]) == 1, printed
        assert not rows["untrained"]["place"], printed
    assert report["psnr"]["ours against diffusers"]["least"] > 40, printed
    assert report["psnr"]["the picture, ours"]["least"] > 22, printed
    assert np.asarray(Image.open(tmp_path / "sheet.png")).shape[0] > 3 * SIZE


def test_it_begins_as_the_text_model():
    """Whatever the picture and `ofs` are."""
    text = CogVideoXPipeline.from_pretrained(TINY_MODEL, dtype=torch.float32)
    transformer = train_tiny_image_model.with_picture(text.transformer)
    latents, picture = torch.randn(2, 1, 6, 16, 8, 8)
    rotary = text._prepare_rotary_positional_embeddings(SIZE, SIZE, 6, torch.device("cpu"))
    shared = {"encoder_hidden_states": torch.randn(1, 9, 64), "timestep": torch.tensor([500]), "return_dict": False}
    with torch.no_grad():
        (expected,) = text.transformer(latents, image_rotary_emb=rotary, **shared)
        both = torch.cat([latents, picture], dim=2)
        (found,) = transformer(both, image_rotary_emb=rotary, ofs=torch.tensor([2.0]), **shared)
    torch.testing.assert_close(found, expected)


def test_it_is_trained_on_what_the_pipeline_makes_of_a_picture(pipeline):
    picture = torch.from_numpy(render(held_out_pictures()[0], np.random.default_rng(0))[0]).permute(2, 0, 1) / 127.5 - 1
    with torch.no_grad():
        posterior = pipeline.vae.encode(picture[None, :, None]).latent_dist
    factor = pipeline.vae.config.scaling_factor
    clips = train_tiny_image_model.Clips(torch.empty(0), posterior.parameters, [""], factor, frames=6)
    torch.manual_seed(0)
    found = clips.picture_latents(np.array([0]))
    torch.manual_seed(0)
    with torch.no_grad():  # of 21 frames: the call adds those that the last temporal patch lacks
        _, expected = pipeline.prepare_latents(picture[None], 1, 16, 21, SIZE, SIZE, torch.float32, torch.device("cpu"))
    assert torch.equal(found, expected)


def test_the_recipe_on_a_few_batches(tmp_path, monkeypatch, capsys):
    """The text model's parts stay as they are; started again it has nothing left to do, and writes the same."""
    monkeypatch.chdir(tmp_path)
    known: set[Caption] = set()
    drawn = train_tiny_image_model.random_clips
    monkeypatch.setattr(
        train_tiny_image_model,
        "random_clips",
        lambda *arguments, captions, **options: (
            known.update(captions) or drawn(*arguments, captions=captions, **options)
        ),
    )
    train_tiny_image_model.main([*FEW, "--output_dir", "once"])
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[:-1]] == ["encoding", "image_to_video"]
    assert known and not known & {*held_out_pictures(), *moving_shapes.held_out()}
    once = contents(tmp_path / "once")
    assert once.keys() == contents(TINY_IMAGE_MODEL).keys() - {"README.md", "clips.webp", "transformer/step_cache.json"}
    assert contents(tmp_path / "once/vae") == contents(TINY_MODEL / "vae")
    for name in ("model_index.json", "generation_defaults.json", "transformer/config.json"):
        assert once[name] == (TINY_IMAGE_MODEL / name).read_bytes(), name
    made, start = (
        CogVideoXImageToVideoPipeline.from_pretrained(tmp_path / "once", dtype=torch.float32).transformer.state_dict(),
        CogVideoXPipeline.from_pretrained(TINY_MODEL, dtype=torch.float32).transformer.state_dict(),
    )
    assert not torch.equal(made["patch_embed.proj.weight"][:, :128], start["patch_embed.proj.weight"])
    assert made["patch_embed.proj.weight"][:, 128:].any() and made["ofs_embedding.linear_2.weight"].any()

    train_tiny_image_model.main([*FEW, "--output_dir", "again"])
    assert contents(tmp_path / "again") == once
