"""Every kind of CogVideoX that is published, through the stages, against diffusers' pipeline in torch, float32."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXImageToVideoPipeline, CogVideoXPipeline
from PIL import Image
from safetensors.torch import load_file

from cogvideox.files import sparse_map
from tests import oracle
from tests.helpers import STAGE1, STAGE2, STAGE3, STAGE3_FLAX, check
from tests.in_process import run_here
from tests.test_lora import make_lora
from tools.make_tiny_model import KINDS, make_pipeline
from utils import prepare_video_for_export

PROMPT, NEGATIVE = "A panda playing guitar", "blurry"
HEIGHT, WIDTH, STEPS, SEED = 48, 80, 3, 5
SIZE = ("--height", HEIGHT, "--width", WIDTH, "--num_inference_steps", STEPS, "--seed", SEED)
LATENT_TOLERANCE = 1e-3  # of their scale
FRAME_TOLERANCE = 2 / 255

# Settings of a small model of each kind: no two share a size.
MODELS = {
    "CogVideoX1.5-5B": dict(num_attention_heads=4, attention_head_dim=16, num_layers=2, latent_channels=4),
    "CogVideoX1.5-5B-I2V": dict(num_attention_heads=2, attention_head_dim=48, num_layers=3, latent_channels=6),
    "CogVideoX-5B": dict(num_attention_heads=6, attention_head_dim=32, num_layers=2, latent_channels=16),
    "CogVideoX-2B": dict(num_attention_heads=10, attention_head_dim=64, num_layers=3, latent_channels=8),
    "CogVideoX-5B-I2V": dict(num_attention_heads=8, attention_head_dim=80, num_layers=1, latent_channels=12),
}
MODELS = {
    kind: settings | dict(time_embed_dim=24 + 8 * n, text_width=32 + 16 * n, text_layers=1, max_text_seq_length=20 + n)
    for n, (kind, settings) in enumerate(MODELS.items())
}
FRAMES = dict(zip(MODELS, (13, 17, 9, 21, 17), strict=True))
# What is sampled: scheduler, guidance scale, whether it is dynamic.
DDIM, DPM = CogVideoXDDIMScheduler, CogVideoXDPMScheduler
SAMPLED = [(DPM, 6.0, True), (DDIM, 1.0, False)]
MESHES = {
    "dp 2 sp 2 tp 2": (8, ("--sp_num", 2)),
    "sp": (4, ("--no-use_dp",)),
    "tp": (2, ("--no-use_dp", "--sp_num", 1)),
}


@pytest.fixture(scope="module", params=MODELS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def encoded(kind, tmp_path_factory) -> Path:
    folder = make_and_encode(kind, tmp_path_factory.mktemp(kind))
    write_map(kind, folder)
    return folder


def make_and_encode(kind: str, folder: Path) -> Path:
    """Make a model of this kind, and run stage 1 on it; the folder has the model, the picture and the outputs."""
    settings = MODELS[kind] | dict(vae_channels=(8, 8, 16, 16), vae_groups=4, seed=len(kind))
    make_pipeline(
        folder / "model", kind=kind, **settings, sample_size=(HEIGHT // 8, WIDTH // 8), sample_frames=FRAMES[kind]
    )
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (50, 70, 3), np.uint8)).save(folder / "picture.png")
    options = ["--prompt", PROMPT, "--negative_prompt", NEGATIVE, "--model_id", folder / "model"]
    if KINDS[kind].takes_image:
        options += ["--image", folder / "picture.png", "--height", HEIGHT, "--width", WIDTH]
    check(run_here(STAGE1, *options, folder=folder))
    return folder


def write_map(kind: str, folder: Path) -> None:
    """Write a map of sparse attention whose heads cost unequally, so that they are reordered."""
    heads = MODELS[kind]["num_attention_heads"]
    of_layer = tuple("dense" if head == heads - 1 else "frames:0" for head in range(heads))
    found = sparse_map.SparseMap(
        height=HEIGHT,
        width=WIDTH,
        frames=FRAMES[kind],
        weights=sparse_map.weights_of(str(folder / "model"), None),
        found={},
        patterns=(of_layer,) * MODELS[kind]["num_layers"],
    )
    sparse_map.write(folder / sparse_map.FILE, found)


def pipeline_of(kind: str, model: Path, scheduler: type) -> CogVideoXPipeline | CogVideoXImageToVideoPipeline:
    """Return diffusers' pipeline of this kind of model, with a scheduler as stage 2 chooses it."""
    found = CogVideoXImageToVideoPipeline if KINDS[kind].takes_image else CogVideoXPipeline
    pipeline = found.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    return pipeline


def truth(kind: str, folder: Path, sampled: tuple, output_type: str = "latent", pipeline=None) -> Any:
    """Return the latents [1, T, C, H, W], or the frames [F, H, W, 3], that diffusers' pipeline makes."""
    scheduler, guidance_scale, dynamic = sampled
    pipeline = pipeline or pipeline_of(kind, folder / "model", scheduler)
    picture = {"image": Image.open(folder / "picture.png")} if KINDS[kind].takes_image else {}
    return pipeline(
        **picture,
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES[kind],
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        use_dynamic_cfg=dynamic,
        generator=torch.Generator().manual_seed(SEED),
        max_sequence_length=MODELS[kind]["max_text_seq_length"],
        output_type=output_type,
    ).frames[0 if output_type == "np" else slice(None)]


@pytest.fixture(scope="module")
def true_latents(kind, encoded) -> dict[tuple, torch.Tensor]:
    """Return what diffusers' pipeline makes, by what is sampled."""
    return {sampled: truth(kind, encoded, sampled) for sampled in SAMPLED}


def denoise(kind: str, folder: Path, sampled: tuple, *options: object, devices: int = 1) -> torch.Tensor:
    """Run stage 2 and return the latents, [B, C, T, H, W]."""
    scheduler, guidance_scale, dynamic = sampled
    settings = ["--scheduler", {DDIM: "ddim", DPM: "dpm"}[scheduler], "--guidance_scale", guidance_scale]
    settings += ["--use_dynamic_cfg"] * dynamic + ["--warmup_steps", 0, "--frames", FRAMES[kind], *SIZE]
    done = check(run_here(STAGE2, *settings, *options, folder=folder, devices=devices))
    assert ("online kernel      none of" in done.stdout) == ("splash_exp2" in options), done.stdout
    return load_file(folder / "stage_outputs" / "stage2_latents.safetensors")["latents"]


def check_latents(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    expected = theirs[:, theirs.shape[1] - ours.shape[2] :].permute(0, 2, 1, 3, 4)
    assert ours.shape == expected.shape
    error = ((ours - expected).abs().max() / expected.abs().max()).item()
    assert error <= LATENT_TOLERANCE, f"latents differ by {error:.1e} of their scale"


@pytest.mark.parametrize("sampled", SAMPLED, ids=["dpm-dynamic", "ddim-unguided"])
def test_latents_match_the_pipeline(kind, encoded, true_latents, sampled):
    """Without guidance also in the order of tokens that a map of sparse attention makes, with dense steps alone."""
    aligned = () if sampled is SAMPLED[0] else ("--sparse_attention", encoded, "--dense_steps", 1)
    check_latents(denoise(kind, encoded, sampled, *aligned), true_latents[sampled])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_latents_match_on_meshes(kind, encoded, true_latents, mesh):
    devices, options = MESHES[mesh]
    check_latents(denoise(kind, encoded, SAMPLED[0], *options, devices=devices), true_latents[SAMPLED[0]])


@pytest.mark.slow
def test_latents_match_with_kernels(kind, encoded, true_latents):
    """The kernels that a TPU has, in Pallas' interpreter."""
    check_latents(denoise(kind, encoded, SAMPLED[0], "--attention", "splash_exp2"), true_latents[SAMPLED[0]])


@pytest.mark.slow
def test_lora_and_step_cache_with_an_image(tmp_path_factory):
    """What changes the weights, and what leaves out blocks, of a model that takes an image."""
    kind, sampled, scale = "CogVideoX1.5-5B-I2V", SAMPLED[0], 0.7
    folder = make_and_encode(kind, tmp_path_factory.mktemp("lora"))
    lora = make_lora(folder / "model", folder / "lora")
    pipeline = pipeline_of(kind, folder / "model", sampled[0])
    pipeline.load_lora_weights(lora)
    pipeline.fuse_lora(lora_scale=scale)
    pipeline.unload_lora_weights()
    blocks = oracle.SkippableBlocks(pipeline.transformer.transformer_blocks, skipped=[1])
    pipeline.transformer.transformer_blocks = torch.nn.ModuleList([blocks])
    ours = denoise(kind, folder, sampled, "--lora", f"{lora}:{scale}", "--cache_schedule", 1)
    check_latents(ours, truth(kind, folder, sampled, pipeline=pipeline))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["CogVideoX-2B", "CogVideoX1.5-5B-I2V"], indirect=True)
def test_frames_match_the_pipeline(kind, encoded):
    """Stage 3, with a scale of the latents of its own, and with one that is inverted for the image."""
    denoise(kind, encoded, SAMPLED[0])
    frames, expected = encoded / "frames.safetensors", truth(kind, encoded, SAMPLED[0], "np")[-FRAMES[kind] :]
    for script in (STAGE3, STAGE3_FLAX):
        check(run_here(script, "--output_frames", frames, folder=encoded))
        ours = np.stack(prepare_video_for_export(load_file(frames)["frames"].numpy()))
        error = np.abs(ours - expected).max()
        assert error <= FRAME_TOLERANCE, f"{script}: frames differ by {error * 255:.2f} / 255"
