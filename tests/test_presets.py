"""The settings of the model's authors: scheduler, dynamic guidance, --preset; against `CogVideoXPipeline` in torch."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file

import stage2_transformer
from cogvideox.defaults import DRAFT, PRESETS
from cogvideox.errors import UserError
from cogvideox.files import checkpoint, generation_defaults, published
from cogvideox.files.step_polynomial import polynomial_of
from cogvideox.models.transformer.parameters import stored_shapes
from cogvideox.models.transformer.scheduler import CHOICES
from compile_for_tpu.__main__ import parse_arguments as compile_arguments
from tests import oracle
from tests.helpers import CONFIG, EMBEDDINGS, LATENTS, SIZE, STAGE1, STAGE2, TINY_MODEL

STEPS, SEED, SCALE = 6, 11, 3.5
TOLERANCE = 1e-3  # of the latents' scale


@pytest.mark.slow
def test_latents_of_the_authors_settings(other_model, run_stage, tmp_path):
    """The model names DDIM; DPM with trailing timesteps and the guidance of each step are those of the pipeline."""
    model = other_model
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


PUBLISHED = "zai-org/CogVideoX1.5-5B"
AUTHORS = {"num_inference_steps": 50, "guidance_scale": 6.0, "scheduler": "dpm", "use_dynamic_cfg": True, "fps": 16}


def parsed(*options: str, model: str | Path = PUBLISHED) -> dict:
    """Return the options of stage 2 as a run with this model has them."""
    arguments = stage2_transformer.parse_arguments(options)
    generation_defaults.complete(arguments, generation_defaults.of_model(str(model)))
    return vars(arguments)


def test_presets():
    """Without one the defaults are those of the original project; an option wins over a preset, wherever it stands."""
    assert PRESETS == ("draft", "authors") and DRAFT.keys() == AUTHORS.keys()
    assert parsed().items() >= DRAFT.items()
    assert parsed("--preset", "seed") == parsed() | {"preset": "draft"}
    assert parsed("--preset", "authors").items() >= AUTHORS.items()
    options = ("--fps", "3", "--preset", "authors", "--no-use_dynamic_cfg", "--scheduler", "ddim")
    expected = AUTHORS | {"fps": 3, "use_dynamic_cfg": False, "scheduler": "ddim"}
    assert parsed(*options).items() >= expected.items()


FIRST = {"height": 480, "width": 720, "frames": 49, "fps": 8}
LATER = {"height": 768, "width": 1360, "frames": 81, "fps": 16}


@pytest.mark.parametrize(
    ("name", "made_for", "others"),
    [
        ("THUDM/CogVideoX-2b", FIRST, {"scheduler": "ddim", "use_dynamic_cfg": False}),
        ("THUDM/CogVideoX-5b", FIRST, {}),
        ("zai-org/CogVideoX-5b-I2V", FIRST, {}),
        (PUBLISHED, LATER, {}),
        ("zai-org/CogVideoX1.5-5B-I2V", LATER, {}),
    ],
)
def test_published_models(name, made_for, others, tmp_path):
    """Each by its name, as the hub writes it; a fine-tune of another name has its features, and so its defaults."""
    settings = parsed("--preset", "authors", model=name)
    assert settings.items() >= (AUTHORS | others | made_for).items() and settings["scheduler"] in CHOICES
    assert parsed(model=name).items() >= (made_for | DRAFT).items()
    folder = published.by_name(Path(name).name)
    shutil.copytree(folder / "transformer", tmp_path / "transformer")
    assert generation_defaults.of_model(str(tmp_path)) == generation_defaults.of_model(name)
    assert len(polynomial_of(name)) == 5


@pytest.mark.parametrize("folder", published.folders().values(), ids=lambda folder: folder.name)
def test_parameters_of_published_models(folder):
    """All that diffusers' class has with the same config, and no others, in the same shapes."""
    config = checkpoint.read_config(str(folder), "transformer")
    with torch.device("meta"):
        theirs = CogVideoXTransformer3DModel.from_config(config).state_dict()
    assert stored_shapes(config) == {name: tuple(weight.shape) for name, weight in theirs.items()}


PUBLISHED_SIZE = {"height": 768, "width": 1360, "frames": 81}
TINY = {"height": 64, "width": 64, "frames": 17, "num_inference_steps": 10, "guidance_scale": 2.0, "fps": 8}


@pytest.mark.parametrize(
    ("content", "options", "expected"),
    [
        (None, (), PUBLISHED_SIZE | DRAFT),  # a copy of the published one, or another training of it
        (TINY, (), DRAFT | TINY),
        (TINY, ("--preset", "draft"), TINY | DRAFT),  # what is asked for wins over the model
        (TINY, ("--preset", "authors"), TINY | AUTHORS),
        (TINY, ("--preset", "authors", "--height", "32"), TINY | AUTHORS | {"height": 32}),
        ({"frames": 9, "height": None}, (), PUBLISHED_SIZE | {"frames": 9}),
    ],
    ids=["no file", "tiny", "draft", "authors", "options", "some entries"],
)
def test_what_a_model_is_made_for(content, options, expected, tmp_path):
    if content:
        (tmp_path / generation_defaults.FILE).write_text(json.dumps(content))
    assert parsed(*options, model=tmp_path).items() >= expected.items()
    compiled_for = compile_arguments(["stage2", "--model_id", str(tmp_path)]) if not options else None
    assert not compiled_for or all(getattr(compiled_for, name, value) == value for name, value in expected.items())


@pytest.mark.parametrize(
    ("model", "video", "remarks"),
    [
        (PUBLISHED, (768, 1360, 81), []),
        (PUBLISHED, (1360, 768, 161), []),
        (PUBLISHED, (480, 720, 49), ["768 x 1360 and 1360 x 768; 480 x 720 may", "81 and 161 frames; 49 may"]),
        ("/a/copy", (2400, 2400, 81), ["CogVideoX1.5-5B was trained on 768 x 1360 and 1360 x 768; 2400 x 2400 may"]),
        ("CogVideoX1.5-5B-I2V", (768, 1104, 81), []),
        ("CogVideoX1.5-5B-I2V", (720, 768, 81), ["768 x 768 to 1360 and 768 to 1360 x 768; 720 x 768 may look worse"]),
        ("CogVideoX-5B", (480, 720, 41), ["CogVideoX-5B was trained on 49 frames; 41 may look worse"]),
        (TINY_MODEL, (64, 64, 17), []),
        (TINY_MODEL, (480, 480, 17), ["tiny_model was trained on 64 x 64; 480 x 480 may look worse"]),
    ],
)
def test_what_a_model_was_not_trained_on(model, video, remarks):
    found = [*generation_defaults.of_model(str(model)).untrained(*video)]
    assert len(found) == len(remarks) and all(map(str.__contains__, found, remarks)), found


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"num_frames": 17}', "num_frames: Extra inputs are not permitted"),
        ('{"height": 64.5}', "height: Input should be a valid integer"),
        ('{"trained_sizes": [[64]]}', "trained_sizes.0: "),
        ('{"authors": {"fps": 8}}', "authors.num_inference_steps is missing"),
        ("[", "JSON"),
    ],
)
def test_wrong_generation_defaults(content, words, tmp_path):
    (tmp_path / generation_defaults.FILE).write_text(content)
    with pytest.raises(UserError, match="correct the file, or remove it") as error:
        generation_defaults.of_model(str(tmp_path))
    assert words in str(error.value) and "\n" not in str(error.value), error.value


@pytest.mark.slow
def test_contradictions_and_remarks(outputs, run_stage):
    """Dynamic guidance without guidance is refused; what the model was not trained on runs, with a line for each."""
    options = ("--input_dir", outputs, *SIZE, "--guidance_scale", 1)
    error = run_stage(STAGE2, *options, "--preset", "authors", status=2).stderr
    assert "--guidance_scale 1" in error and "--no-use_dynamic_cfg" in error and error.count("\n") == 1, error
    printed = run_stage(STAGE2, "--input_dir", outputs, *SIZE).stdout
    assert "; 32 x 48 may look worse" in printed, printed
    assert "81 and 161 frames; 9 may look worse" in printed, printed
    assert "settings of a draft; --preset authors" not in printed, "--num_inference_steps is not a draft's"


def test_dynamic_guidance_is_a_number_for_every_timestep():
    """The power is of a negative base: a float's, not a fractional one's."""
    plan = type("DenoisingPlan", (), {"use_dynamic_cfg": True, "steps": 50, "guidance_scale": 6.0})
    from cogvideox.models.transformer.plan import DenoisingPlan

    values = [DenoisingPlan.guidance_at(plan, timestep) for timestep in range(1000)]
    assert all(math.isfinite(value) and 1 <= value <= 7 for value in values), (min(values), max(values))
