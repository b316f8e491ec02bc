"""Guidance in an interval of steps: against `CogVideoXPipeline` in torch with a scale of 1 in the other steps."""

import json

import pytest
from safetensors.torch import load_file

from cogvideox.files import numbers
from tests import oracle
from tests.helpers import CONFIG, EMBEDDINGS, LATENTS, SIZE, STAGE1, STAGE2

STEPS, SEED, SCALE = 8, 5, 30.0  # the model is not trained: a usual scale changes little
TOLERANCE = 1e-4  # of the latents' scale; the interval changes ten times as much


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "devices", "preset", "interval", "skipped"),
    [
        ("random_model", 1, "authors", (2, 5), "1,3,6"),  # skipped before, in and after the interval
        ("random_model", 8, "draft", (2, 5), "1,3,6"),  # two groups of chips share the four heads
        ("other_model", 1, "draft", (0, 3), None),
        ("other_model", 8, "authors", (3, 7), None),  # no two chips share the three heads
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
    assert devices == 1 or "for 8 chips along sp, so" in printed, printed
    ours = load_file(tmp_path / LATENTS)["latents"]
    settings = {"seed": SEED, "guidance_scale": SCALE} | dict.fromkeys(("dpm", "use_dynamic_cfg"), preset == "authors")
    settings["skipped"] = numbers.named(skipped, STEPS) if skipped else ()
    error = oracle.difference(ours, oracle.latents(model, tmp_path / EMBEDDINGS, STEPS, interval=interval, **settings))
    assert error <= TOLERANCE, f"latents differ by {error:.1e} of their scale"
    whole = oracle.latents(model, tmp_path / EMBEDDINGS, STEPS, **settings)
    assert oracle.difference(ours, whole) > 10 * TOLERANCE, "the interval changes nothing"
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
