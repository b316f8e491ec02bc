"""Choose how many videos stage 2 makes at a time: as many as give the most videos an hour, by prediction.

Videos that dp splits over the chips exchange nothing, so the more of them, the less the chips exchange; but a batch
that is not full computes in vain.
"""

import functools
from collections.abc import Callable

from cogvideox.errors import PlanError
from cogvideox.models.transformer.plan import DenoisingPlan

NEGLIGIBLE = 1e-3  # of the seconds: a larger batch must gain more


def fastest(make: Callable[..., DenoisingPlan], videos: int, devices: int) -> DenoisingPlan:
    """Return `make(batch=...)` for the batch which makes `videos` in the least predicted time.

    Raises:
        PlanError: no batch can be carried out.
    """
    plans: list[DenoisingPlan] = []
    errors: list[PlanError] = []
    for batch in range(1, min(videos, devices) + 1):
        if devices % batch == 0:
            try:
                plans.append(make(batch=batch))
            except PlanError as error:
                errors.append(error)
    if not plans:
        raise errors[0]

    def better(best: DenoisingPlan, plan: DenoisingPlan) -> DenoisingPlan:
        least, seconds = (-(-videos // one.batch) * one.step_seconds for one in (best, plan))
        return plan if seconds < (1 - NEGLIGIBLE) * least else best

    return functools.reduce(better, plans)
