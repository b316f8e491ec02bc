"""Guidance in an interval of steps: against `CogVideoXPipeline` in torch with a scale of 1 in the other steps."""

import json

import pytest
import torch
from diffusers import CogVideoXDPMScheduler, CogVideoXPipeline
from safetensors.torch import load_file

import tensor_dump
from tests.helpers import CONFIG, EMBEDDINGS, LATENTS, SIZE, STAGE1, STAGE2
from tests.test_step_cache import SkippableBlocks

STEPS, SEED, SCALE = 8, 5, 30.0  # the model is not trained: a usual scale changes little
TOLERANCE = 1e-4  # of the latents' scale; the interval changes ten times as much


class Pipeline(CogVideoXPipeline):
    """The pipeline with a guidance scale of 1, which leaves the positive prompt's prediction, outside `interval`."""

    interval = (0, STEPS)
    step = -1

    @property
    def guidance_scale(self):
        first, last = self.interval
        return self._guidance_scale if first <= self.step <= last else 1.0

    def count(self, *_):
        self.step += 1


def by_torch(model, embeddings, preset: str, interval: tuple[int, int], skipped: str | None) -> torch.Tensor:
    """Return the latents of diffusers, [1, C, T, H, W], surplus frames included."""
    pipeline = Pipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.interval = interval
    pipeline.transformer.register_forward_pre_hook(pipeline.count)
    if preset == "authors":
        config = pipeline.scheduler.config
        pipeline.scheduler = CogVideoXDPMScheduler.from_config(config, timestep_spacing="trailing")
    if skipped:
        blocks = SkippableBlocks(pipeline.transformer.transformer_blocks, tensor_dump.steps(skipped, STEPS))
        pipeline.transformer.transformer_blocks = torch.nn.ModuleList([blocks])
    frames = pipeline(
        **load_file(embeddings),
        **{"height": SIZE[1], "width": SIZE[3], "num_frames": SIZE[5], "num_inference_steps": STEPS},
        guidance_scale=SCALE,
        use_dynamic_cfg=preset == "authors",
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
    ).frames
    assert pipeline.step == STEPS - 1
    return frames.permute(0, 2, 1, 3, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "devices", "preset", "interval", "skipped"),
    [
        ("random_model", 1, "authors", (2, 5), "1,3,6"),  # skipped before, in and after the interval
        ("random_model", 4, "seed", (2, 5), "1,3,6"),
        ("other_model", 1, "seed", (0, 3), None),
        ("other_model", 3, "authors", (3, 7), None),
    ],
)
def test_latents(model, devices, preset, interval, skipped, request, run_stage, tmp_path):
    model = request.getfixturevalue(model)
    text = ("--prompt", "a cat", "--negative_prompt", "dog", "--model_id", model, "--output_dir", tmp_path)
    run_stage(STAGE1, *text)
    options = ["--preset", preset, "--num_inference_steps", STEPS, "--guidance_scale", SCALE, "--seed", SEED]
    options += ["--guidance_interval", "{},{}".format(*interval)] + ["--cache_schedule", skipped] * bool(skipped)
    printed = run_stage(STAGE2, "--input_dir", tmp_path, *SIZE[:-2], *options, virtual_devices=devices).stdout
    assert "in steps {} to {} alone".format(*interval) in printed, printed
    ours = load_file(tmp_path / LATENTS)["latents"]
    theirs = by_torch(model, tmp_path / EMBEDDINGS, preset, interval, skipped)[:, :, -ours.shape[2] :]
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error <= TOLERANCE, f"latents differ by {error:.1e} of their scale"
    whole = by_torch(model, tmp_path / EMBEDDINGS, preset, (0, STEPS), skipped)[:, :, -ours.shape[2] :]
    assert (ours - whole).abs().max() / whole.abs().max() > 10 * TOLERANCE, "the interval changes nothing"
    assert json.loads((tmp_path / CONFIG).read_text())["guidance_interval"] == list(interval)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--guidance_interval", "3"), ("--guidance_interval: 3 is no interval such as",)),
        (("--guidance_interval", "a,b"), ("no interval",)),
        (("--guidance_interval", "1,0"), ("--guidance_interval 1,0 is no interval of the steps 0 to 1",)),
        (("--guidance_interval", "0,2"), ("0,2 is no interval of the steps 0 to 1",)),
        (("--guidance_interval", "0,1", "--guidance_scale", 1), ("--guidance_scale 1", "there is none")),
        (
            ("--num_inference_steps", 6, "--guidance_interval", "2,4", "--cache_schedule", "2"),
            ("--cache_schedule 2 names step 2", "the first one with guidance"),
        ),
    ],
)
def test_wrong_options(options, words, outputs, run_stage):
    error = run_stage(STAGE2, "--input_dir", outputs, *SIZE, *options, status=2).stderr
    assert len(error.splitlines()) == 1 and all(word in error for word in words), error
