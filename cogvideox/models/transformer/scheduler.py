"""The diffusers scheduler as numbers that a jitted step can take.

Every step of these schedulers is affine in its three arrays: one 2 x 3 matrix of scalars, different at each step, maps
(sample, model_output, old_pred_original_sample) to (prev_sample, pred_original_sample), and the stochastic DPM
scheduler adds noise. Matrix and noise are found by calling the diffusers scheduler itself on unit vectors and on zeros.
So its formulas, its options and its order of random draws are not written again here, and the program on the device has
no branch on the timestep.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch
    from diffusers import SchedulerMixin


class Sampler(NamedTuple):
    """How a diffusers scheduler is called, and how it is chosen in the place of the model's own.

    Attributes:
        step: `step(scheduler, i, sample, model_output, old_pred_original_sample, generator)` of the i-th step, to
            (prev_sample, pred_original_sample); affine in the three arrays.
        adds_noise: whether a step draws noise from `generator` and adds it to prev_sample.
        choice: the name by which it is chosen; None for one that only a model names.
        settings: what the choice changes in the model's scheduler_config.json, beside the class.
    """

    step: "Callable[..., tuple[torch.Tensor, torch.Tensor]]"
    adds_noise: bool
    choice: str | None = None
    settings: Mapping = MappingProxyType({})


def _ddim_step(scheduler, i, sample, model_output, old_pred_original_sample, generator):
    return scheduler.step(model_output, scheduler.timesteps[i], sample, return_dict=False)


def _dpm_step(scheduler, i, sample, model_output, old_pred_original_sample, generator):
    return scheduler.step(
        model_output,
        old_pred_original_sample if i else None,
        scheduler.timesteps[i],
        scheduler.timesteps[i - 1] if i else None,
        sample,
        generator=generator,
        return_dict=False,
    )


# The schedulers that stage 2 can run, by the name of the diffusers class, as in a model's scheduler_config.json.
SAMPLERS = {
    "CogVideoXDDIMScheduler": Sampler(_ddim_step, adds_noise=False, choice="ddim"),
    # The model's authors run DPM with trailing timesteps.
    "CogVideoXDPMScheduler": Sampler(
        _dpm_step, adds_noise=True, choice="dpm", settings={"timestep_spacing": "trailing"}
    ),
}

# What each choice changes in a model's scheduler_config.json.
CHOICES = {one.choice: {"_class_name": name, **one.settings} for name, one in SAMPLERS.items() if one.choice}


def make_scheduler(config: Mapping) -> "SchedulerMixin":
    """Make the diffusers scheduler of a `scheduler_config.json` that names one of SAMPLERS."""
    import diffusers

    scheduler = getattr(diffusers, config["_class_name"])
    # `from_config` does the same, but first imports all other schedulers, to see which of them could take the config.
    known = inspect.signature(scheduler).parameters
    return scheduler(**{name: value for name, value in config.items() if name in known})


class AffineScheduler:
    """A diffusers scheduler with its timesteps set, as one affine map per step.

    Args:
        scheduler: an object of one of the classes in SAMPLERS.
        num_inference_steps: number of denoising steps.
        dropped: how many of them are left out, the first ones.

    Attributes:
        timesteps: int64 array [steps], descending, of the steps that are left.
        coefficients: float32 array [steps, 2, 3]; rows (prev_sample, pred_original_sample), columns
            (sample, model_output, old_pred_original_sample).

    Raises:
        ValueError: a step is not affine: it clips what is large, for example.
    """

    def __init__(self, scheduler: "SchedulerMixin", num_inference_steps: int, dropped: int = 0):
        scheduler.set_timesteps(num_inference_steps)
        scheduler.timesteps = scheduler.timesteps[dropped:]
        self._scheduler = scheduler
        self._sampler = SAMPLERS[type(scheduler).__name__]
        self.timesteps = scheduler.timesteps.numpy()
        self.coefficients = np.stack([self._matrix(i) for i in range(len(self.timesteps))]).astype(np.float32)

    def noise(
        self, step: int, shape: tuple[int, ...], dtype: "torch.dtype", generators: "Sequence[torch.Generator]"
    ) -> "torch.Tensor | None":
        """Return the scaled noise that step `step` adds to prev_sample; None if the scheduler adds no noise.

        Draws for each sample of the batch from its generator exactly what `scheduler.step` draws.
        """
        if not self._sampler.adds_noise:
            return None
        import torch

        zeros = torch.zeros(1, *shape[1:], dtype=dtype)
        samples = [self._sampler.step(self._scheduler, step, zeros, zeros, zeros, one)[0] for one in generators]
        return torch.cat(samples).to(dtype)

    def noisy(self, sample: "torch.Tensor", noise: "torch.Tensor") -> "torch.Tensor":
        """Return `sample` [batch, ...] with as much of `noise` as the first step begins with."""
        return self._scheduler.add_noise(sample, noise, self._scheduler.timesteps[:1].expand(len(sample)))

    def _matrix(self, step: int) -> np.ndarray:
        """Return the coefficients of step `step`, float64 [2, 3]."""
        import torch

        def evaluate(vector: list[float]) -> torch.Tensor:
            arrays = torch.tensor(vector, dtype=torch.float64).split(1)
            return torch.cat(self._sampler.step(self._scheduler, step, *arrays, torch.Generator().manual_seed(0)))

        noise = evaluate([0.0, 0.0, 0.0])
        matrix = torch.stack([evaluate(unit) - noise for unit in np.eye(3).tolist()], dim=1).numpy()
        large = np.array([1e3, -2e3, 3e3])
        if not np.allclose(matrix @ large, (evaluate(large.tolist()) - noise).numpy(), rtol=1e-6, equal_nan=True):
            raise ValueError(f"step {step} of {type(self._scheduler).__name__} is not affine; does it clip samples?")
        return matrix
