"""Read and write numbers as an option names them, such as 0,3-5."""

import re
from collections.abc import Iterable

from cogvideox.errors import UserError


def named(text: str | None, count: int, option: str = "--dump_steps", first: int = 0) -> list[int]:
    """Return which of `count` numbers from `first` on a text such as "0,3-5,-1" names; -1 is the last, None all.

    `option` is named in the errors.

    Raises:
        UserError: the text is no such list, or names what is not there.
    """
    if text is None:
        return list(range(first, first + count))
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(-?\d+)(?:-(-?\d+))?", part.strip())
        if not match:
            raise UserError(f"{option} {text}: '{part}' is no number and no range such as 3-5")
        begin, end = (
            int(bound) % count + first if -count <= int(bound) < 0 else int(bound)
            for bound in (match[1], match[2] or match[1])
        )
        if not first <= begin <= end < first + count:
            raise UserError(f"{option} {text}: '{part}' is not within {first} to {first + count - 1}")
        found.update(range(begin, end + 1))
    return sorted(found)


def as_text(numbers: Iterable[int]) -> str:
    """Return the text that `named` reads as these numbers, which ascend, with ranges for neighbours."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
