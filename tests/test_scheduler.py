"""`AffineScheduler` against the diffusers schedulers it is read from."""

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, DDIMScheduler

from cogvideox.models.transformer.scheduler import SAMPLERS, AffineScheduler, make_scheduler
from tools.make_tiny_model import SCHEDULER

SHAPE = (1, 4, 3, 2, 2)


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon", "sample"])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("scheduler_class", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
def test_steps_match_diffusers(scheduler_class, spacing, prediction_type, steps):
    options = SCHEDULER | {"prediction_type": prediction_type, "timestep_spacing": spacing}
    # Zero terminal SNR divides by zero at the first step of epsilon prediction, in diffusers too.
    options["rescale_betas_zero_snr"] = prediction_type != "epsilon"
    options["_class_name"] = scheduler_class.__name__
    affine, scheduler = AffineScheduler(make_scheduler(options), steps), make_scheduler(options)
    scheduler.set_timesteps(steps)
    stochastic = scheduler_class is CogVideoXDPMScheduler

    random = np.random.default_rng(0)
    ours = theirs = torch.from_numpy(random.standard_normal(SHAPE))
    old_ours, old_theirs = torch.zeros(SHAPE, dtype=torch.float64), None
    our_generator, their_generator = (torch.Generator().manual_seed(3) for _ in range(2))
    for i, timestep in enumerate(scheduler.timesteps):
        assert affine.timesteps[i] == timestep
        model_output = torch.from_numpy(random.standard_normal(SHAPE))
        if stochastic:
            back = scheduler.timesteps[i - 1] if i else None
            theirs, old_theirs = scheduler.step(
                model_output, old_theirs, timestep, back, theirs, generator=their_generator, return_dict=False
            )
        else:
            theirs, old_theirs = scheduler.step(model_output, timestep, theirs, return_dict=False)

        noise = affine.noise(i, SHAPE, torch.float64, [our_generator])
        matrix = torch.from_numpy(affine.coefficients[i]).double()
        ours, old_ours = torch.tensordot(matrix, torch.stack([ours, model_output, old_ours]), dims=1)
        ours = ours if noise is None else ours + noise

        for what, a, b in (("prev_sample", ours, theirs), ("pred_original_sample", old_ours, old_theirs)):
            error = (a - b).abs().max() / b.abs().max()
            assert error < 1e-5, f"step {i}: {what} differs by {error:.1e} of its scale"
    assert (affine.noise(0, SHAPE, torch.float64, [our_generator]) is not None) == stochastic


@pytest.mark.parametrize("clips", [True, False])
def test_a_scheduler_that_clips_is_refused(clips, monkeypatch):
    """Clipping does not show on small numbers; a matrix in its place would make other videos."""
    monkeypatch.setitem(SAMPLERS, "DDIMScheduler", SAMPLERS["CogVideoXDDIMScheduler"])
    scheduler = DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=clips)
    if clips:
        with pytest.raises(ValueError, match="step 0 of DDIMScheduler is not affine"):
            AffineScheduler(scheduler, 4)
    else:
        assert np.isfinite(AffineScheduler(scheduler, 4).coefficients).all()
