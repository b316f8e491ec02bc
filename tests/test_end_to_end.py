"""The three scripts against `CogVideoXPipeline` in torch, float32, same model and seed; more in test_family.py."""

import json
import shutil
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXPipeline
from diffusers.utils import export_to_video
from safetensors.torch import load_file

from tests.helpers import STAGE1, STAGE2, STAGE3, STAGE3_FLAX
from utils import prepare_video_for_export

PROMPT = "A panda playing guitar in a bamboo forest"
NEGATIVE = "blurry, low quality"
HEIGHT, WIDTH, STEPS, SEED, FPS = 48, 80, 4, 7, 12
LATENT_TOLERANCE = 1e-3  # of their scale
FRAME_TOLERANCE = 2 / 255
DDIM, DPM = CogVideoXDDIMScheduler, CogVideoXDPMScheduler


def model_with_scheduler(model: Path, scheduler_class, folder: Path) -> Path:
    """Copy `model` to `folder`, and let the copy name another scheduler."""
    shutil.copytree(model, folder)
    scheduler_class.from_pretrained(model, subfolder="scheduler").save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"][1] = scheduler_class.__name__
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def truth(model: Path, frames: int, guidance_scale: float) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Return what the pipeline makes.

    Returns:
        Embeddings [2, ...] (positive, negative), latents [B, T, C, H, W], and the frames [F, H, W, 3].
    """
    pipeline = CogVideoXPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    limit = pipeline.transformer.config.max_text_seq_length
    with torch.no_grad():
        embeddings = torch.cat(pipeline.encode_prompt(PROMPT, NEGATIVE, max_sequence_length=limit))
    seen = {}
    video = pipeline(
        PROMPT,
        NEGATIVE,
        height=HEIGHT,
        width=WIDTH,
        num_frames=frames,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(SEED),
        max_sequence_length=limit,
        output_type="np",
        callback_on_step_end=lambda _, __, ___, tensors: seen.update(tensors) or {},
    ).frames[0]
    return embeddings, seen["latents"], video[-frames:]


CASES = [  # the decoders by turns: each for both models, and for every number of frames
    ("random_model", 17, 6.0, DDIM, STAGE3),
    ("random_model", 61, 6.0, DPM, STAGE3_FLAX),
    ("random_model", 81, 1.0, DDIM, STAGE3),
    ("other_model", 17, 6.0, DDIM, STAGE3_FLAX),
    ("other_model", 61, 1.0, DPM, STAGE3),
    ("other_model", 81, 6.0, DPM, STAGE3_FLAX),
]


def name(value):
    names = {DDIM: "DDIM", DPM: "DPM", 6.0: "guided", 1.0: "unguided", STAGE3: "torchax", STAGE3_FLAX: "flax"}
    return names.get(value, str(value))


@pytest.mark.parametrize(
    ("model", "frames", "guidance_scale", "scheduler", "stage3"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (case != CASES[0])) for case in CASES],
    ids=name,
)
def test_stages_match_the_pipeline(model, frames, guidance_scale, scheduler, stage3, request, run_stage, tmp_path):
    model = model_with_scheduler(request.getfixturevalue(model), scheduler, tmp_path / "model")
    embeddings, latents, video = truth(model, frames, guidance_scale)
    outputs = tmp_path / "outputs"

    run_stage(STAGE1, "--prompt", PROMPT, "--negative_prompt", NEGATIVE, "--model_id", model, "--output_dir", outputs)
    saved = load_file(outputs / "stage1_embeddings.safetensors")
    assert torch.equal(torch.cat([saved["prompt_embeds"], saved["negative_prompt_embeds"]]), embeddings)

    run_stage(
        STAGE2,
        *("--input_dir", outputs, "--height", HEIGHT, "--width", WIDTH, "--frames", frames, "--fps", FPS),
        *("--num_inference_steps", STEPS, "--guidance_scale", guidance_scale, "--seed", SEED, "--warmup_steps", 1),
    )
    ours = load_file(outputs / "stage2_latents.safetensors")["latents"]
    expected = latents[:, latents.shape[1] - ours.shape[2] :].permute(0, 2, 1, 3, 4)
    assert ours.shape == expected.shape
    error = (ours - expected).abs().max() / expected.abs().max()
    assert error <= LATENT_TOLERANCE, f"latents differ by {error:.1e} of their scale"

    export_to_video(list(video), str(tmp_path / "expected.mp4"), fps=FPS, macro_block_size=2)
    expected_mp4 = imageio.imread(tmp_path / "expected.mp4")
    run_stage(stage3, "--input_dir", outputs, "--output_frames", tmp_path / "frames.safetensors")
    check_frames(stage3, outputs / "output_video.mp4", tmp_path / "frames.safetensors", video, expected_mp4)


def check_frames(script: str, mp4_path: Path, frames: Path, video: np.ndarray, expected_mp4: np.ndarray) -> None:
    """Compare saved and encoded frames with those of the pipeline, [F, H, W, 3] in [0, 1], and its own mp4."""
    saved = prepare_video_for_export(load_file(frames)["frames"].numpy())
    error = np.abs(np.stack(saved) - video).max()
    assert error <= FRAME_TOLERANCE, f"{script}: frames differ by {error * 255:.2f} / 255"

    mp4 = imageio.imread(mp4_path)
    assert mp4.shape == (len(video), HEIGHT, WIDTH, 3)
    assert imageio.immeta(mp4_path)["fps"] == FPS
    # Encoded noise follows the last bit of its input, so the files are compared by what encoding cost each.
    loss, expected_loss = (np.abs(decoded / 255 - video).mean() for decoded in (mp4, expected_mp4))
    assert loss <= 1.02 * expected_loss, f"{script}: the mp4 loses {loss:.4f}, diffusers' own {expected_loss:.4f}"


def test_frames_for_export(tmp_path):
    """From saved frames and from a VAE's output, float32 in [0, 1], and as `export_to_video` takes them."""
    random = np.random.default_rng(0)
    saved = random.integers(0, 256, (5, 16, 32, 3)).astype(np.uint8)
    decoded = random.normal(size=(1, 3, 5, 16, 32)).astype(np.float32)
    expected = np.moveaxis(np.clip(decoded[0].astype(np.float64) / 2 + 0.5, 0, 1), 0, -1)
    for video, truth in ((saved, saved / 255), (torch.from_numpy(decoded), expected)):
        frames = prepare_video_for_export(video)
        assert isinstance(frames, list) and {frame.dtype for frame in frames} == {np.dtype("float32")}
        np.testing.assert_allclose(np.stack(frames), truth, atol=1e-6)
        export_to_video(frames, str(tmp_path / "video.mp4"), fps=FPS, macro_block_size=2)
        assert imageio.imread(tmp_path / "video.mp4").shape == (5, 16, 32, 3)
    for wrong in (saved[0], saved.astype(np.float32), torch.from_numpy(decoded)[0]):
        with pytest.raises(ValueError, match="expected uint8"):
            prepare_video_for_export(wrong)
