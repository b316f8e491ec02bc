"""The patterns of a model's heads, and in which steps they are used."""

import dataclasses

from cogvideox.defaults import DENSE_STEPS
from cogvideox.models.transformer.sparse.patterns import Pattern


@dataclasses.dataclass(frozen=True)
class SparseAttention:
    """Which keys each head of a model attends in the later steps of a run.

    Attributes:
        patterns: of each layer and head, in the model's order.
        dense_steps: share of the scheduler's steps, from the first one on, in which every head attends everything.
    """

    patterns: tuple[tuple[Pattern, ...], ...]
    dense_steps: float = DENSE_STEPS
