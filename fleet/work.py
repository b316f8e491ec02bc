"""Say which prompts are to be encoded or made, under way, made or failed: the rules, without Ray and without a clock.

Whatever runs the stages takes work with `next_to_encode` and `next_to_make`, and says what became of it. A prompt is
its number in the prompt file, from 1.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable

TRIES = 2  # how often a prompt may fail by itself
MOST_LOSSES = 5  # machines that may be lost in a row with a share, before that is taken to be its fault


@dataclasses.dataclass(frozen=True)
class Share:
    """Prompts that one process takes together.

    Attributes:
        prompts: their numbers.
        losses: how often a machine was gone that had it.
    """

    prompts: tuple[int, ...]
    losses: int = 0

    @property
    def is_to_blame(self) -> bool:
        """Whether so many machines were lost with it in a row that the next one is taken to be its fault."""
        return self.losses >= MOST_LOSSES


class Work:
    """The prompts of a run, each in one state.

    Args:
        to_encode: the prompts that have no embeddings.
        to_make: those that have them, and no video.
        chunk: how many prompts are encoded together at most.
        group: how many are made together at most.
        at_once: how many are denoised at a time: the groups are of so many, twice as many, and so on.

    Attributes:
        made: the prompts that are made.
        failed: what ended the last try of the prompts that have failed for good, by prompt.
        tries: how often a prompt was begun, by prompt.
        under_way: the shares that somebody has.
    """

    def __init__(
        self, to_encode: Iterable[int], to_make: Iterable[int], chunk: int = 16, group: int = 8, at_once: int = 1
    ):
        self.chunk, self.group, self.at_once = chunk, group, at_once
        self.made: set[int] = set()
        self.failed: dict[int, str] = {}
        self.tries: collections.Counter[int] = collections.Counter()
        self.under_way: list[Share] = []
        self._to_encode, self._to_make = collections.deque(to_encode), collections.deque(to_make)
        self._back: dict[str, collections.deque[Share]] = {"encode": collections.deque(), "make": collections.deque()}
        self._encoding: list[Share] = []
        self._failures: collections.Counter[int] = collections.Counter()  # of the stage that a prompt is in

    @property
    def waiting(self) -> int:
        """How many prompts are to be encoded or made, and nobody has them."""
        back = sum(len(share.prompts) for shares in self._back.values() for share in shares)
        return len(self._to_encode) + len(self._to_make) + back

    @property
    def left(self) -> int:
        """How many prompts are neither made nor have failed for good."""
        return self.waiting + sum(len(share.prompts) for share in self.under_way)

    @property
    def is_encoding(self) -> bool:
        """Whether prompts are to be encoded, or are under way there."""
        return bool(self._to_encode or self._back["encode"] or self._encoding)

    @property
    def is_over(self) -> bool:
        """Whether all prompts are made or have failed."""
        return not self.waiting and not self.under_way

    def next_to_encode(self) -> Share | None:
        """Take prompts to encode; None if there are none now."""
        return self._next("encode", self._to_encode, self.chunk)

    def next_to_make(self, places: int) -> Share | None:
        """Take a group of prompts to denoise and decode; None if there is none now.

        At the end groups become smaller, so that the `places` that make videos end at about the same time.
        """
        even = math.ceil((len(self._to_encode) + len(self._to_make)) / max(places, 1))
        size = min(self.group, even)
        return self._next("make", self._to_make, max(self.at_once, size - size % self.at_once))

    def _next(self, step: str, waiting: collections.deque[int], most: int) -> Share | None:
        """Take a share that came back, or else at most so many of those that wait."""
        back = self._back[step]
        if not back and not waiting:
            return None
        share = back.popleft() if back else Share(tuple(waiting.popleft() for _ in range(min(most, len(waiting)))))
        self.under_way.append(share)
        if step == "make":
            self.tries.update(share.prompts)
        else:
            self._encoding.append(share)
        return share

    def encoded(self, share: Share) -> None:
        """Note that the prompts of a share have embeddings."""
        self._end(share)
        for prompt in share.prompts:
            del self._failures[prompt]
        self._to_make.extend(share.prompts)

    def finished(self, share: Share) -> None:
        """Note that the videos of a share are made."""
        self._end(share)
        self.made.update(share.prompts)

    def put_back(self, share: Share, step: str) -> None:
        """Note that a share in the step "encode" or "make" was not done, and not by its own fault.

        It stays as it is, so that videos that were denoised together go on from their last state.
        """
        self._end(share)
        self._back[step].appendleft(share)

    def lost(self, share: Share, step: str) -> None:
        """Note that the machine is gone that had a share: somebody else takes it."""
        self._end(share)
        self._back[step].appendleft(Share(share.prompts, share.losses + 1))

    def failed_with(self, share: Share, step: str, error: str) -> None:
        """Note that a share has failed; each of its prompts is tried again alone, or has failed for good.

        Args:
            share: which.
            step: "encode" or "make".
            error: what ended it, in a line.
        """
        self._end(share)
        for prompt in share.prompts:
            self._failures[prompt] += 1
            if self._failures[prompt] < TRIES:
                self._back[step].append(Share((prompt,)))
            else:
                self.failed[prompt] = error

    def _end(self, share: Share) -> None:
        """Take a share back."""
        self.under_way.remove(share)
        if share in self._encoding:
            self._encoding.remove(share)
