"""Stages run again one at a time, and what a person sees while they run."""

from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import safetensors.torch
import torch

from cogvideox.files.names import VIDEO, VIDEO_SUFFIXES
from cogvideox.files.video_file import video_writer
from tests.helpers import (
    EMBEDDINGS,
    LATENTS,
    SIZE,
    STAGE1,
    STAGE2,
    STAGE3,
    STAGE3_FLAX,
    contents,
    edit_latents,
    poison,
    values,
)


@pytest.mark.slow
def test_stage2_alone_with_another_seed(outputs, run_stage):
    before = contents(outputs)
    process = run_stage(STAGE2, "--input_dir", outputs, *SIZE, "--seed", 1)
    changed = {name for name, content in contents(outputs).items() if before.get(name) != content}
    assert changed == {"stage2_latents.safetensors", "generation_config.json", "timings.json"}
    assert process.stdout.rstrip().endswith(f"stage3_vae_decoder.py --input_dir {outputs}"), process.stdout
    run_stage(STAGE3, "--input_dir", outputs)


@pytest.mark.slow
def test_stage2_to_another_folder(outputs, run_stage, tmp_path):
    before = contents(outputs)
    run_stage(STAGE2, "--input_dir", outputs, "--output_dir", tmp_path / "other", *SIZE)
    assert contents(outputs) == before
    run_stage(STAGE3, "--input_dir", tmp_path / "other")
    assert values(tmp_path / "other" / LATENTS) == values(outputs / LATENTS)


@pytest.mark.slow
def test_stage2_on_eight_devices(outputs, run_stage, tmp_path):
    """dp, sp and tp of two each give the latents of one device."""
    options = ("--sp_num", 2, "--use_fsdp", "--output_dir", tmp_path / "mesh")
    process = run_stage(STAGE2, "--input_dir", outputs, *SIZE, *options, virtual_devices=True)
    assert "{'dp': 2, 'sp': 2, 'tp': 2}" in process.stdout, process.stdout
    one, eight = (safetensors.torch.load_file(f / "stage2_latents.safetensors") for f in (outputs, tmp_path / "mesh"))
    error = (one["latents"] - eight["latents"]).abs().max() / one["latents"].abs().max()
    assert error < 1e-4, f"latents differ by {error:.1e} of their scale"


@pytest.mark.slow
def test_stage3_alone(outputs, run_stage):
    before = contents(outputs)
    run_stage(STAGE3, "--input_dir", outputs, "--fps", 24)
    changed = {name for name, content in contents(outputs).items() if before.get(name) != content}
    assert changed == {"output_video.mp4", "timings.json"}


@pytest.mark.slow
def test_stage3_on_eight_devices(outputs, run_stage, tmp_path):
    """Split over a mesh and into strips: the frames of one device."""
    run_stage(STAGE3, "--input_dir", outputs, "--output_frames", tmp_path / "one.safetensors")
    options = ("--chip_rows", 2, "--strips", 2, "--output_frames", tmp_path / "eight.safetensors")
    process = run_stage(STAGE3, "--input_dir", outputs, *options, virtual_devices=True)
    assert "2 x 4 chips" in process.stdout and "2 strips" in process.stdout, process.stdout
    one, eight = (safetensors.torch.load_file(tmp_path / f"{n}.safetensors")["frames"].int() for n in ("one", "eight"))
    assert (one - eight).abs().max() <= 1


@pytest.mark.parametrize("suffix", VIDEO_SUFFIXES)
def test_every_video_suffix(suffix, tmp_path):
    frames = np.zeros((3, 16, 32, 3), np.uint8)
    with video_writer(str(tmp_path / f"video{suffix}"), fps=8) as append:
        for frame in frames:
            append(frame)
    assert imageio.imread(tmp_path / f"video{suffix}").shape == frames.shape


@pytest.mark.slow
def test_nan_is_decoded_if_allowed(outputs, run_stage):
    edit_latents(outputs, poison)
    assert "wrote" in run_stage(STAGE3, "--input_dir", outputs, "--allow_nan").stdout


@pytest.mark.slow
def test_nothing_but_the_progress_bar_on_stderr(processes):
    """Nor on stdout, where the title comes first: libraries print what they have to say when they are imported."""
    for script, process in processes.items():
        lines = [line for line in process.stderr.splitlines() if line.strip() and not line.startswith("import time:")]
        assert all(line.startswith(("  denoising:", "  decoding:")) for line in lines), lines
        assert process.stdout.startswith(f"Stage {script[5]}: "), process.stdout


@pytest.mark.slow
def test_a_process_of_its_own_makes_what_the_tests_process_makes(processes_folder, finished_run):
    """So that the other tests, which start none, show what a person gets."""
    folder = processes_folder / "stage_outputs"
    for name in (EMBEDDINGS, LATENTS):
        assert values(folder / name) == values(finished_run / name), name
    ours, theirs = (imageio.imread(one / VIDEO) for one in (folder, finished_run))
    assert ours.std() > 1 and np.array_equal(ours, theirs)
    assert np.array_equal(imageio.imread(processes_folder / "flax.mp4"), ours)


@pytest.mark.slow
def test_long_prompt_is_cut_with_a_warning(other_model, run_stage, tmp_path):
    prompt = "a red circle moving left on a white background, " * 20 + "and one last panda"
    process = run_stage(STAGE1, "--prompt", prompt, "--model_id", other_model, "--output_dir", tmp_path)
    (warning,) = (line for line in process.stdout.splitlines() if "WARNING" in line)
    assert "--prompt" in warning and "40 tokens" in warning and "and one last panda" in warning, warning
    embeddings = safetensors.torch.load_file(tmp_path / "stage1_embeddings.safetensors")
    assert embeddings["prompt_embeds"].shape == (1, 40, 48)


@pytest.mark.slow
def test_bfloat16_stays_bfloat16(random_model, run_stage, tmp_path):
    """A model stored in bfloat16, as the published one is: no file holds another dtype."""
    from diffusers import CogVideoXPipeline

    model = Path(tmp_path / "model")
    CogVideoXPipeline.from_pretrained(random_model, dtype=torch.bfloat16).save_pretrained(model)
    run_stage(STAGE1, "--prompt", "a red circle", "--model_id", model, "--output_dir", tmp_path)
    run_stage(STAGE2, "--input_dir", tmp_path, *SIZE)
    run_stage(STAGE3, "--input_dir", tmp_path)
    run_stage(STAGE3_FLAX, "--input_dir", tmp_path)
    for name in ("stage1_embeddings", "stage2_latents"):
        for tensor in safetensors.torch.load_file(tmp_path / f"{name}.safetensors").values():
            assert tensor.dtype == torch.bfloat16
