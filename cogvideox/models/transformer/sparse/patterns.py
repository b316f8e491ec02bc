"""The patterns of block-sparse attention, and how chips share heads whose patterns take unequal time.

A pattern names, for each tile of queries, tiles of keys: softmax is over all their tokens that are not padding, and
over nothing else. All patterns name all text for every query, and everything for queries of the text.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, Self, get_args

import numpy as np

from cogvideox.models.transformer.sparse.layout import LANES, AlignedLayout

Kind = Literal["dense", "frames", "positions"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclasses.dataclass(frozen=True, order=True)
class Pattern:
    """Which keys a head's queries attend, beside all text.

    Attributes:
        kind: "dense" for all keys, "frames" for those of frames near the query's, or "positions" for those of all
            frames at places near the query's, in groups of tiles (`AlignedLayout.group_tiles`).
        window: the greatest distance in frames, or in groups of places; 0 for a dense head.
    """

    kind: Kind = "dense"
    window: int = 0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"{self.kind} is no pattern; there are {', '.join(KINDS)}")
        if self.window < 0 or (self.kind == "dense" and self.window):
            raise ValueError(f"{self.kind} cannot have a window of {self.window}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `str` writes: "dense", "frames:2" or "positions:1"; raises ValueError."""
        kind, _, window = text.partition(":")
        if kind not in KINDS or (kind != "dense") != window.isdecimal() or (kind == "dense" and ":" in text):
            raise ValueError(f"{text} is no pattern; dense, frames:1 and positions:2 are")
        return cls(kind, int(window or 0))

    def __str__(self):
        return self.kind if self.kind == "dense" else f"{self.kind}:{self.window}"

    def groups(self, layout: AlignedLayout) -> np.ndarray:
        """Return the group of each of the video's tiles, int32 [video tiles]; the distance of groups decides."""
        tile = np.arange(layout.video_tiles, dtype=np.int32)
        if self.kind == "frames":
            return tile // layout.frame_tiles
        return tile % layout.frame_tiles // layout.group_tiles if self.kind == "positions" else np.zeros_like(tile)

    def tile_mask(self, layout: AlignedLayout) -> np.ndarray:
        """Tell which tiles of keys each tile of queries attends, bool [tiles, tiles]."""
        groups = self.groups(layout)
        mask = np.ones((layout.tiles, layout.tiles), bool)
        mask[: len(groups), : len(groups)] = np.abs(groups[:, None] - groups) <= self.window
        return mask

    def mask(self, layout: AlignedLayout) -> np.ndarray:
        """Tell which keys each query attends, in the aligned order, bool [tokens, tokens]; padded keys never."""
        return self.tile_mask(layout).repeat(LANES, 0).repeat(LANES, 1) & layout.is_real()

    def density(self, layout: AlignedLayout) -> float:
        """Return the share of all scores, those of padding left out, that the pattern computes."""
        real = layout.tile_tokens().astype(np.float64)
        return float(real @ self.tile_mask(layout) @ real) / layout.real_tokens**2


def tile_groups(patterns: Sequence[Pattern], layout: AlignedLayout) -> np.ndarray:
    """Return the group of each tile under each pattern, int32 [patterns, tiles].

    The text's tiles are in no group, they have a 0: they attend everything, and everything attends them.
    """
    groups = np.stack([pattern.groups(layout) for pattern in patterns])
    return np.pad(groups, ((0, 0), (0, layout.text_tiles)))


def head_order(costs: Sequence[float], chips: int) -> np.ndarray:
    """Share heads among chips so that each has equally many, and the most work of a chip is small.

    The heaviest head goes first, to the chip with the least work that has room; then heads are swapped between chips
    as long as that makes the heavier of two lighter. Heads that all cost the same stay as they are.

    Args:
        costs: of each head, as `geometry.predicted_cycles` tells.
        chips: how many there are, a divisor of the number of heads.

    Returns:
        int32 [heads]: which head takes each place; of these each chip has a run of heads / chips. The weights of
        queries, keys and values are permuted by it, and those of the output along their inputs; `inverse` undoes it.

    Raises:
        ValueError: the chips do not divide the heads.
    """
    if len(costs) % chips:
        raise ValueError(f"{chips} chips cannot share {len(costs)} heads evenly")
    room, work = len(costs) // chips, np.asarray(costs, np.float64)
    if (work == work[0]).all():
        return np.arange(len(costs), dtype=np.int32)
    shares: list[list[int]] = [[] for _ in range(chips)]
    for head in np.argsort(-work, kind="stable").tolist():
        open_shares = [share for share in shares if len(share) < room]
        min(open_shares, key=lambda share: work[share].sum()).append(head)
    while _swapped(shares, work):
        pass
    return np.concatenate([sorted(share) for share in shares]).astype(np.int32)


def _swapped(shares: list[list[int]], work: np.ndarray) -> bool:
    """Swap a head of the chip with the most work for a lighter one of another chip, if the two are then closer."""
    most, least = max(shares, key=lambda share: work[share].sum()), 1e-9 * work.sum()  # rounding is less
    for other in sorted(shares, key=lambda share: work[share].sum()):
        surplus = work[most].sum() - work[other].sum()
        gains = work[most][:, None] - work[other]
        here, there = np.unravel_index(np.abs(gains - surplus / 2).argmin(), gains.shape)
        if least < gains[here, there] < surplus - least:
            most[here], other[there] = other[there], most[here]
            return True
    return False


def inverse(order: np.ndarray) -> np.ndarray:
    """Return the place that each head has in `order`: x[order][inverse(order)] is x."""
    return np.argsort(order).astype(np.int32)
