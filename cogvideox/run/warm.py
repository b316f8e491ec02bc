"""Keep what a stage has loaded, for the next run of a stage in the same process.

A stage that is run by hand loads its weights, runs and ends, and nothing is kept. A process that runs stages for many
videos calls `keep` once: then a run finds the weights and programs of the one before, if they are the same.
"""

import gc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import jax

T = TypeVar("T")


class _Kept:
    """What this process keeps, by name, each with what it was made from; None if it keeps nothing."""

    of_name: dict[str, tuple[Any, Any]] | None = None


def keep() -> None:
    """Keep from now on in this process what `kept` makes."""
    _Kept.of_name = _Kept.of_name or {}


def kept(name: str, made_from: Any, make: Callable[[], T]) -> T:
    """Return what an earlier call with this name has made from the same, or else what `make` makes now.

    One thing is kept of each name. What it was made from is compared with ==.
    """
    if _Kept.of_name is None:
        return make()
    found = _Kept.of_name.get(name)
    if found is None or found[0] != made_from:
        let_go(name)  # before its memory is needed
        found = _Kept.of_name[name] = made_from, make()
    return found[1]


def let_go(*names: str) -> None:
    """Give up what is kept of these names, with its memory on the devices."""
    if _Kept.of_name and any([_Kept.of_name.pop(name, None) for name in names]):
        gc.collect()


def make_room(
    programs: "Sequence[jax.stages.Compiled]", devices: "Sequence[jax.Device]", others: Sequence[str]
) -> None:
    """Give up what is kept of other stages by these names, if the programs do not fit beside it on one of `devices`.

    With one chip the transformer's weights and a decoder do not; with four they do. What the programs take as arguments
    is counted, though a part of it, their weights, is on the devices already.
    """
    if not _Kept.of_name or not programs:
        return
    about = [found for program in programs if (found := program.memory_analysis())]
    needed = max(
        (one.argument_size_in_bytes + one.temp_size_in_bytes + one.output_size_in_bytes for one in about), default=0
    )
    for device in devices:
        memory = device.memory_stats() or {}
        if memory.get("bytes_limit", needed) - memory.get("bytes_in_use", 0) < needed:
            let_go(*others)
            return
