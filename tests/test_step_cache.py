"""Steps that skip the blocks: which, against TeaCache's rule in torch, and what comes of it, against a torch loop."""

import json

import numpy as np
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.numpy import save_file
from safetensors.torch import load_file

from cogvideox.files import numbers
from cogvideox.files.step_polynomial import polynomial_of
from cogvideox.models.transformer import step_cache
from cogvideox.models.transformer.step import time_embeddings
from tests import oracle
from tests.helpers import EMBEDDINGS, LATENTS, SIZE, STAGE2
from tools import fit_step_cache

STEPS, SEED = 8, 5
SKIPPED = "2-3,5"
TOLERANCE = 1e-3  # of the latents' scale


def rule(embeddings: torch.Tensor, polynomial: list[float], threshold: float) -> list[int]:
    """Decide step by step, as TeaCache does while it runs."""
    skipped, accumulated, previous = [], 0.0, None
    for step, embedding in enumerate(embeddings):
        if step in (0, len(embeddings) - 1):
            accumulated = 0.0
        else:
            change = ((embedding - previous).abs().mean() / previous.abs().mean()).item()
            accumulated += np.poly1d(polynomial)(change)
            if accumulated < threshold:
                skipped.append(step)
            else:
                accumulated = 0.0
        previous = embedding
    return skipped


@pytest.mark.parametrize(
    ("model", "has_ofs"), [("random_model", False), ("other_model", False), ("random_model", True)]
)
def test_which_steps_are_skipped(model, has_ofs, request):
    """With the embeddings of diffusers' own modules; thresholds from nothing to all that may be skipped."""
    model = request.getfixturevalue(model)
    module = CogVideoXTransformer3DModel.from_pretrained(model, subfolder="transformer").double()
    if has_ofs:
        of_image = {"in_channels": 32, "ofs_embed_dim": module.config.time_embed_dim}
        module = CogVideoXTransformer3DModel.from_config(dict(module.config) | of_image).double()
    timesteps = np.linspace(999, 0, 25).astype(int)
    with torch.no_grad():
        theirs = module.time_embedding(module.time_proj(torch.tensor(timesteps)).double())
        if has_ofs:
            theirs = theirs + module.ofs_embedding(module.ofs_proj(torch.tensor([2.0])).double())
    plan = type("Plan", (), {"transformer": dict(module.config), "dtype": np.dtype(np.float32)})
    stored = {name: weight.float().numpy() for name, weight in module.state_dict().items()}
    ours = time_embeddings(plan, timesteps, stored.__getitem__)
    error = np.abs(ours - theirs.numpy()).max() / theirs.abs().max()
    # Where two machines' exponentials differ in the last bit of float32, an angle of 999 differs by 6e-5.
    assert error < 5e-5, f"time embeddings differ by {error:.1e}"
    assert len(polynomial_of("zai-org/CogVideoX1.5-5B")) == 5
    polynomial, counts = [0.3, 1.0, 1e-6], set()
    most = step_cache.distance(ours[1:], ours[:-1])
    for threshold in most * np.array([0.0, 0.9, 1.7, 3.1, 9.3, 1e6]):
        expected = rule(theirs, polynomial, threshold)
        assert step_cache.skipped_steps(ours, polynomial, threshold) == expected, threshold
        counts.add(len(expected))
    assert min(counts) == 0 and max(counts) == 23 and len(counts) >= 4, counts


def test_as_text_is_what_steps_reads():
    for steps in ([], [3], [1, 2, 3], [0, 2, 3, 7, 8, 11]):
        text = numbers.as_text(steps)
        assert not steps or numbers.named(text, 12) == steps, text


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["draft", "authors"])
def test_latents_against_a_torch_loop(preset, outputs, random_model, run_stage, tmp_path):
    """On one device and on eight, where each keeps its share of the residual, with DDIM and with DPM."""
    options = ("--preset", preset, "--num_inference_steps", STEPS, "--seed", SEED, "--cache_schedule", SKIPPED)
    expected = oracle.latents(
        random_model,
        outputs / EMBEDDINGS,
        STEPS,
        seed=SEED,
        dpm=preset == "authors",
        use_dynamic_cfg=preset == "authors",
        skipped=numbers.named(SKIPPED, STEPS),
    )
    uncached = load_file(outputs / LATENTS)["latents"]
    for devices in (1, 8):
        folder = tmp_path / str(devices)
        printed = run_stage(
            STAGE2,
            *("--input_dir", outputs, "--output_dir", folder, *SIZE[:-2], *options),
            virtual_devices=devices == 8,
        ).stdout
        assert f"3 of {STEPS} steps skip the blocks: {SKIPPED};" in printed, printed
        ours = load_file(folder / LATENTS)["latents"]
        error = oracle.difference(ours, expected)
        assert error <= TOLERANCE, f"{devices} devices: latents differ by {error:.1e} of their scale"
        assert ours.shape == uncached.shape and not torch.allclose(ours, uncached), "nothing was skipped"
    config = json.loads((folder / "generation_config.json").read_text())
    assert config["skipped_steps"] == SKIPPED


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--cache_schedule", "0"), ("first and the last", "--cache_schedule 0")),
        (("--cache_schedule", "1"), ("first and the last",)),
        (("--cache_schedule", "2-7"), ("--cache_schedule 2-7", "0 to 1")),
        (("--cache_schedule", "x"), ("--cache_schedule x",)),
        (("--cache_threshold", "-1"), ("--cache_threshold", "at least 0")),
        (("--cache_threshold", "0.1"), ("has none", "tools.fit_step_cache")),
        (("--cache_threshold", "0.1", "--cache_schedule", "1"), ("not allowed with",)),
    ],
)
def test_wrong_options(options, words, outputs, run_stage):
    error = run_stage(STAGE2, "--input_dir", outputs, *SIZE, *options, status=2).stderr
    assert len(error.splitlines()) == 1 and all(word in error for word in words), error


@pytest.mark.parametrize("has_ofs", [False, True])
def test_fit(has_ofs, tmp_path, capsys):
    """From dumps whose output changes as a known polynomial of how the time embedding changes, with that of ofs."""
    known = [0.5, -0.2, 0.05]
    generator = np.random.default_rng(0)
    for run in range(2):
        embedding, output, arrays = np.ones((1, 8), np.float32), np.ones((1, 4, 2), np.float32), {}
        for step in range(20):
            arrays[f"step_{step:03}/time_embedding.linear_2"] = embedding - 3 * has_ofs
            if has_ofs:
                arrays[f"step_{step:03}/ofs_embedding.linear_2"] = np.full_like(embedding, 3)
            arrays[f"step_{step:03}/noise_pred"] = output
            change = generator.uniform(0.01, 0.4)
            embedding, output = embedding * (1 + change), output * (1 + np.polyval(known, change))
            embedding, output = embedding.astype(np.float32), output.astype(np.float32)
        (tmp_path / str(run)).mkdir()
        save_file(arrays, tmp_path / str(run) / "stage2_tensors.safetensors")
    (tmp_path / "model" / "transformer").mkdir(parents=True)
    config = {"ofs_embed_dim": 512, "in_channels": 32} if has_ofs else {}
    (tmp_path / "model" / "transformer" / "config.json").write_text(json.dumps(config))
    dumps = [str(tmp_path / str(run)) for run in range(2)]
    fit_step_cache.main([*dumps, "--model_id", str(tmp_path / "model"), "--degree", "2"])
    fitted = polynomial_of(str(tmp_path / "model"))
    np.testing.assert_allclose(fitted, known, atol=1e-4)
    assert "38 pairs of steps" in capsys.readouterr().out
