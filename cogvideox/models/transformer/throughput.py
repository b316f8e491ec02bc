"""Predict the seconds of a step, and choose by them how many videos stage 2 makes at a time.

Videos that dp splits over the chips exchange nothing, so the more of them, the less the chips exchange; but a batch
that is not full computes in vain.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from cogvideox.errors import PlanError
from cogvideox.models.transformer.transformer import hidden_states_shape

if TYPE_CHECKING:
    from cogvideox.models.transformer.plan import DenoisingPlan

# Figures of a v6e chip. Only their ratio counts here, and other chips have a similar one.
FLOPS = 0.35 * 918e12  # a second: the peak, times the share of it that a step reaches in the compiler's schedule
BANDWIDTH = 100e9  # bytes a second of a link between chips, one way
NEGLIGIBLE = 1e-3  # of the seconds: a larger batch must gain more


def fastest(make: "Callable[..., DenoisingPlan]", videos: int, devices: int) -> "DenoisingPlan":
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

    def better(best: "DenoisingPlan", plan: "DenoisingPlan") -> "DenoisingPlan":
        least, seconds = (-(-videos // one.batch) * step_seconds(one) for one in (best, plan))
        return plan if seconds < (1 - NEGLIGIBLE) * least else best

    return functools.reduce(better, plans)


def step_seconds(plan: "DenoisingPlan") -> float:
    """Predict the seconds of a guided, full step, up to a factor: of its products, and of its exchanges.

    In each block the chips that share a sample exchange query, key, value and output: over sp from shares of the
    sequence to shares of the heads and back, over tp twice a gather and twice a sum of the hidden states. Where sp
    splits the queries into parts, it also gathers the keys and values of the other parts.
    """
    config, parallelism = plan.transformer, plan.parallelism
    heads, tp = parallelism.head_parts, parallelism.tp
    samples = plan.batch * plan.prompts
    samples, tokens, width = hidden_states_shape(samples, plan.tokens, config, parallelism, plan.attention)
    weights = 12 * width**2  # of the products of a block: four in attention, the MLP has four times the width
    products = samples * config["num_layers"] * (2 * weights * tokens + 4 * width * tokens * plan.tokens)
    share = samples * tokens * width * plan.dtype.itemsize / plan.mesh.size  # bytes of a chip's hidden states
    moved = 4 * ((heads - 1) / heads + (tp - 1)) + 2 * (parallelism.query_parts - 1)
    exchanged = config["num_layers"] * share * moved
    return products / plan.mesh.size / FLOPS + exchanged / BANDWIDTH
