"""Choose the denoising steps that leave out the blocks, and take over what the blocks added in the last full step.

Source: TeaCache for CogVideoX 1.5 (ali-vilab/TeaCache). There the choice depends on the time embedding alone, so here
it is made before the run.
"""

from collections.abc import Sequence

import numpy as np


def distance(new: np.ndarray, old: np.ndarray) -> float:
    """Return the mean absolute difference of two arrays, as a share of the mean absolute value of the old one."""
    new, old = (np.asarray(array, np.float64) for array in (new, old))
    return float(np.abs(new - old).mean() / np.abs(old).mean())


def skipped_steps(embeddings: np.ndarray, polynomial: Sequence[float], threshold: float) -> list[int]:
    """Return the steps that leave out the blocks.

    The polynomial estimates from the distance of two time embeddings how far the model's outputs are apart. A step
    is skipped as long as the estimates since the last full step add up to less than the threshold. The first and the
    last step are full.

    Args:
        embeddings: the time embedding of each step, before its activation, [steps, width].
        polynomial: coefficients, the highest power first.
        threshold: 0 skips nothing; larger ones skip more.
    """
    skipped, sum_of_estimates = [], 0.0
    for step in range(1, len(embeddings) - 1):
        sum_of_estimates += float(np.polyval(polynomial, distance(embeddings[step], embeddings[step - 1])))
        if sum_of_estimates < threshold:
            skipped.append(step)
        else:
            sum_of_estimates = 0.0
    return skipped
