"""How much a chip's kernels of block-sparse attention compute in a step, which a program takes as data."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from cogvideox.models.transformer.plan import DenoisingPlan
    from cogvideox.models.transformer.sparse.layout import AlignedLayout


class SparseWork(NamedTuple):
    """What the kernels of the chip with the most work compute, on the mean of all layers; all by the kernels' names.

    Attributes:
        lengths: heads that a call attends, of all samples.
        trips: groups of keys that a block of queries goes over.
        scores: useful scores of a call.
    """

    lengths: dict[str, float]
    trips: dict[str, float]
    scores: dict[str, float]


def sparse_work(plan: "DenoisingPlan", samples: int) -> SparseWork:
    """Count the work of a step that is not dense.

    Args:
        plan: with patterns.
        samples: that a chip has: the prompts of the step, shared over dp.
    """
    from cogvideox.models.transformer.sparse import attention, geometry, patterns
    from cogvideox.models.transformer.sparse.layout import AlignedLayout

    layout, placed, parallelism = plan.order, plan.patterns(plan.steps - 1), plan.parallelism
    assert placed is not None and isinstance(layout, AlignedLayout)
    head_dim, itemsize = plan.transformer["attention_head_dim"], plan.dtype.itemsize
    chips, groups = parallelism.tp * parallelism.head_parts, parallelism.head_groups(placed.kinds.shape[1])
    kinds, windows = (array.reshape(len(array), chips, -1) for array in (placed.kinds, placed.windows))
    work = SparseWork({}, {}, {})
    of_slowest = _slowest(kinds, windows, layout)
    kinds, windows = (np.take_along_axis(array, of_slowest, 1)[:, 0] for array in (kinds, windows))
    for number, kind in enumerate(patterns.KINDS):
        found = windows[kinds == number].tolist()
        if kind not in plan.attention.kinds:
            continue
        name, calls = attention.NAMES[kind], len(kinds) * groups
        chosen = geometry.geometry_of(kind, layout, itemsize, head_dim)
        work.lengths[name] = samples * len(found) / calls
        work.trips[name] = float(np.mean([chosen.mean_window(window) for window in found])) if found else 1.0
        density = sum(patterns.Pattern(kind, window).density(layout) for window in found) / calls
        work.scores[name] = samples * density * plan.tokens**2 / parallelism.query_parts
    return work


def _slowest(kinds: np.ndarray, windows: np.ndarray, layout: "AlignedLayout") -> np.ndarray:
    """Return the chip with the most work of each layer, int [layers, 1, 1]; the arrays are [layers, chips, heads]."""
    from cogvideox.models.transformer.sparse.geometry import predicted_cycles
    from cogvideox.models.transformer.sparse.patterns import KINDS, Pattern

    different = set(zip(kinds.flat, windows.flat, strict=True))
    cycles = np.zeros(kinds.shape)
    for kind, window in different:
        here = (kinds == kind) & (windows == window)
        cycles[here] = predicted_cycles(Pattern(KINDS[kind], int(window)), layout)
    return cycles.sum(2).argmax(1)[:, None, None]
