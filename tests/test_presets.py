"""The settings of the model's authors: scheduler, dynamic guidance, --preset; against `CogVideoXPipeline` in torch."""

import json
import math

import pytest
from safetensors.torch import load_file

import stage2_transformer
from cogvideox.defaults import PRESETS
from tests import oracle
from tests.helpers import CONFIG, EMBEDDINGS, LATENTS, SIZE, STAGE1, STAGE2

STEPS, SEED, SCALE = 6, 11, 3.5
TOLERANCE = 1e-3  # of the latents' scale


@pytest.mark.slow
@pytest.mark.parametrize("model", ["random_model", "other_model"])
def test_latents_of_the_authors_settings(model, request, run_stage, tmp_path):
    """The models name DDIM; DPM with trailing timesteps and the guidance of each step are those of the pipeline."""
    model = request.getfixturevalue(model)
    run_stage(STAGE1, "--prompt", "a cat", "--negative_prompt", "dog", "--model_id", model, "--output_dir", tmp_path)
    options = ("--preset", "authors", "--num_inference_steps", STEPS, "--guidance_scale", SCALE, "--seed", SEED)
    printed = run_stage(STAGE2, "--input_dir", tmp_path, *SIZE[:-2], *options).stdout
    assert "guidance scale 3.5, dynamic" in printed and "trailing timesteps, 6 steps" in printed, printed
    assert "--preset authors sets" not in printed, printed

    settings = {"seed": SEED, "guidance_scale": SCALE, "dpm": True, "use_dynamic_cfg": True}
    expected = oracle.latents(model, tmp_path / EMBEDDINGS, STEPS, **settings)
    error = oracle.difference(load_file(tmp_path / LATENTS)["latents"], expected)
    assert error <= TOLERANCE, f"latents differ by {error:.1e} of their scale"
    config = json.loads((tmp_path / CONFIG).read_text())
    settings = {name: config[name] for name in ("scheduler", "timestep_spacing", "use_dynamic_cfg", "fps")}
    assert settings == {
        "scheduler": "CogVideoXDPMScheduler",
        "timestep_spacing": "trailing",
        "use_dynamic_cfg": True,
        "fps": 16,
    }


def parsed(*options: str) -> dict:
    return vars(stage2_transformer.parse_arguments(options))


def test_presets():
    """Without one the defaults are those of the original project; an option wins over a preset, wherever it stands."""
    draft, authors = PRESETS["draft"], PRESETS["authors"]
    assert draft.keys() == authors.keys() and len(draft) == 5
    assert parsed().items() >= draft.items()
    assert parsed("--preset", "seed") == parsed()
    assert parsed("--preset", "authors").items() >= authors.items()
    options = ("--fps", "3", "--preset", "authors", "--no-use_dynamic_cfg", "--scheduler", "ddim")
    expected = authors | {"fps": 3, "use_dynamic_cfg": False, "scheduler": "ddim"}
    assert parsed(*options).items() >= expected.items()


@pytest.mark.slow
def test_contradictions_and_remarks(outputs, run_stage):
    """Dynamic guidance without guidance is refused; what the model was not trained on runs, with a line for each."""
    options = ("--input_dir", outputs, *SIZE, "--guidance_scale", 1)
    error = run_stage(STAGE2, *options, "--preset", "authors", status=2).stderr
    assert "--guidance_scale 1" in error and "--no-use_dynamic_cfg" in error and error.count("\n") == 1, error
    printed = run_stage(STAGE2, "--input_dir", outputs, *SIZE).stdout
    assert "; 32 x 48 may look worse" in printed, printed
    assert "16n + 1 frames, 81 and 161; 9 may look worse" in printed, printed
    assert "settings of a draft; --preset authors" not in printed, "--num_inference_steps is not a draft's"


def test_dynamic_guidance_is_a_number_for_every_timestep():
    """The power is of a negative base: a float's, not a fractional one's."""
    plan = type("DenoisingPlan", (), {"use_dynamic_cfg": True, "num_inference_steps": 50, "guidance_scale": 6.0})
    from cogvideox.models.transformer.plan import DenoisingPlan

    values = [DenoisingPlan.guidance_at(plan, timestep) for timestep in range(1000)]
    assert all(math.isfinite(value) and 1 <= value <= 7 for value in values), (min(values), max(values))
