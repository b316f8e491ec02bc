"""The patterns of a chip's heads as arrays, which a program takes as data."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cogvideox.models.transformer.sparse.patterns import KINDS, Pattern


class HeadTable(NamedTuple):
    """The patterns of a chip's heads, as data: chips and layers that differ in them run one program.

    Attributes:
        order: the heads, first those with a dense pattern, then "frames", then "positions"; int32 [heads].
        windows: `Pattern.window` of each head in that order, int32 [heads].
        counts: how many heads there are of each of KINDS, int32 [3].
    """

    order: Any
    windows: Any
    counts: Any

    @classmethod
    def of(cls, patterns: Sequence[Pattern], samples: int = 1) -> "HeadTable":
        """Make the table, numpy arrays, of heads that several samples have: head h of sample b is b * heads + h."""
        patterns = list(patterns) * samples
        order = sorted(range(len(patterns)), key=lambda head: KINDS.index(patterns[head].kind))
        windows = [patterns[head].window for head in order]
        counts = [sum(pattern.kind == kind for pattern in patterns) for kind in KINDS]
        return cls(*(np.asarray(numbers, np.int32) for numbers in (order, windows, counts)))
