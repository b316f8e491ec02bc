"""The diffusers scheduler as numbers that a jitted step can take.

Every step of the CogVideoX schedulers is affine in its three arrays: one 2 x 3 matrix of scalars, different at each
step, maps (sample, model_output, old_pred_original_sample) to (prev_sample, pred_original_sample), and the stochastic
DPM scheduler adds noise. Matrix and noise are read off the diffusers scheduler itself, by calling it on unit vectors
and on zeros. So its formulas, its options and its order of random draws are used and not repeated, and the device
needs no branch on the timestep.
"""

import numpy as np
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

SCHEDULERS = {cls.__name__: cls for cls in (CogVideoXDDIMScheduler, CogVideoXDPMScheduler)}


class AffineScheduler:
    """A diffusers CogVideoX scheduler with its timesteps set, seen as one affine map per step.

    Attributes:
        timesteps: int64 array [num_inference_steps], descending.
        coefficients: float32 array [num_inference_steps, 2, 3]; rows (prev_sample, pred_original_sample), columns
            (sample, model_output, old_pred_original_sample).
    """

    def __init__(self, scheduler: CogVideoXDDIMScheduler | CogVideoXDPMScheduler, num_inference_steps: int):
        scheduler.set_timesteps(num_inference_steps)
        self._scheduler = scheduler
        self.timesteps = scheduler.timesteps.numpy()
        self.coefficients = np.stack([self._matrix(i) for i in range(num_inference_steps)]).astype(np.float32)

    def noise(self, step: int, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator):
        """The noise that step `step` adds to prev_sample, scaled: a torch tensor, or None where the scheduler has none.

        Draws from `generator` exactly what `scheduler.step` draws.
        """
        if not isinstance(self._scheduler, CogVideoXDPMScheduler):
            return None
        zeros = torch.zeros(shape, dtype=dtype)
        return self._step(step, zeros, zeros, zeros, generator)[0].to(dtype)

    def _matrix(self, step: int) -> np.ndarray:
        def evaluate(vector):
            sample, model_output, old = torch.tensor(vector, dtype=torch.float64).split(1)
            return torch.cat(self._step(step, sample, model_output, old, torch.Generator().manual_seed(0)))

        noise = evaluate([0.0, 0.0, 0.0])
        return torch.stack([evaluate(unit) - noise for unit in np.eye(3).tolist()], dim=1).numpy()

    def _step(self, step, sample, model_output, old_pred_original_sample, generator):
        scheduler, timesteps = self._scheduler, self._scheduler.timesteps
        if isinstance(scheduler, CogVideoXDPMScheduler):
            first = step == 0
            return scheduler.step(
                model_output,
                None if first else old_pred_original_sample,
                timesteps[step],
                None if first else timesteps[step - 1],
                sample,
                generator=generator,
                return_dict=False,
            )
        return scheduler.step(model_output, timesteps[step], sample, return_dict=False)
