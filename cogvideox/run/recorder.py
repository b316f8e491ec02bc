"""Record what programs collect through cogvideox/models/shared/tap.py: write it to a dump, and say what it shows."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from cogvideox.files.tensor_dump import Dump, Planned, chip_places, in_words, merged
from cogvideox.models.shared.sharding import mesh_axes
from cogvideox.models.shared.tap import CHECKSUMS, Collected, Tapped

ONLINE_HEADS = ".attn1.online_heads"  # of a block, see cogvideox/models/transformer/attention.py


class Recorder:
    """Takes what programs collect, step by step, or chunk by chunk.

    Args:
        directory, stage, unit, metadata: see `Dump`.
        mesh: the devices.
        programs: for each step the program that it runs, which returns its result and what is `Collected`.
        chosen: the steps of which arrays are written; statistics are written of all.

    Raises:
        UserError: see `Dump`.
    """

    def __init__(
        self,
        directory: Path,
        stage: str,
        unit: str,
        metadata: Mapping[str, str],
        mesh: Mesh,
        programs: Sequence[jax.stages.Traced],
        chosen: Sequence[int],
    ):
        self._unit, self._mesh, self._chosen = unit, mesh, set(chosen)
        self._number = 0
        self._points = 0
        self._not_finite: str | None = None
        self._differing: list[str] = []
        self._online: list[np.ndarray] = []  # for each step [blocks, prompts, heads]
        collected: list[Collected] = [program.out_info[1] for program in programs]
        planned = {i: {name: _planned(tapped) for name, tapped in collected[i].arrays.items()} for i in chosen}
        names = collected[0].arrays
        shares = {name: [tapped.array.shape, mesh_axes(tapped.spec)] for name, tapped in names.items()}
        split = {"mesh": json.dumps(dict(mesh.shape)), "shares": json.dumps(shares)} if mesh.size > 1 else {}
        self._dump = Dump(directory, stage, unit, planned if names else {}, dict(metadata) | split)

    def recording(self, program: Callable) -> Callable:
        """Return a function that runs the program, records what it collects and returns its result alone."""

        def run(*arguments: Any) -> Any:
            result, collected = program(*arguments)
            self._record(collected)
            return result

        return run

    @staticmethod
    def ignoring(program: Callable) -> Callable:
        """Return a function that runs the program and returns its result alone, as in a warm-up."""
        return lambda *arguments: program(*arguments)[0]

    def _record(self, collected: Collected) -> None:
        number, self._number = self._number, self._number + 1
        statistics = {name: self._row(name, *found) for name, found in collected.statistics.fetched().items()}
        chosen = collected.arrays if number in self._chosen else {}
        self._dump.add(number, ((name, tapped.without_padding()) for name, tapped in chosen.items()), statistics)
        online = [row for name, row in statistics.items() if name.endswith(ONLINE_HEADS)]
        if online:
            self._online.append(np.stack(online))
        self._points = len(statistics)

    def _row(self, name: str, array: np.ndarray, tapped_spec: PartitionSpec | None) -> np.ndarray:
        """Return what the dump has of a point, whose sums are `array`, and note what is wrong with it."""
        if tapped_spec is None:
            return array
        where = f"{self._unit} {self._number - 1}, {name}"
        row = merged(array)
        if self._not_finite is None and not np.isfinite(row).all():
            self._not_finite = f"first {where}"
        checksums = array[:, CHECKSUMS]
        if checksums.size:
            chips = differing_chips(checksums, self._mesh, tapped_spec)
            self._differing += [f"{where}: {chip}" for chip in chips]
        return row

    def summary(self) -> Iterator[tuple[str, str]]:
        """Yield rows for the stage's closing table."""
        yield "dump", " and ".join(map(str, self._dump.paths)) or "nothing"
        if self._points:
            yield "not finite", self._not_finite or f"nothing at {self._points:,} points"
        if self._online and (most := most_often_online(np.concatenate(self._online, axis=1))):
            yield "most often online", most
        for line in self._differing[:5]:
            yield "chips differ", line
        if len(self._differing) > 5:
            yield "chips differ", f"and at {len(self._differing) - 5:,} more points"


class NoRecorder:
    """What does nothing in the place of a `Recorder`, without --dump."""

    def recording(self, program: Callable) -> Callable:
        """Return the program."""
        return program

    ignoring = recording

    def summary(self) -> Iterator[tuple[str, str]]:
        """Yield nothing."""
        yield from ()


def most_often_online(heads: np.ndarray) -> str:
    """Say which head took the online kernel most often, if any did; bool [blocks, prompts of all steps, heads]."""
    often = heads.sum(1)
    block, head = np.unravel_index(often.argmax(), often.shape)
    return f"block {block}, head {head}: {often.max()} of {heads.shape[1]} times" if often.any() else ""


def differing_chips(checksums: np.ndarray, mesh: Mesh, spec: PartitionSpec) -> Iterator[str]:
    """Say which chips hold another share than the others that should have the same; `checksums` is [chips, n]."""
    axes = [axis for axes in mesh_axes(spec) for axis in axes]
    places = chip_places(mesh.shape)
    groups: dict[tuple, list[int]] = {}
    for chip, place in enumerate(places):
        groups.setdefault(tuple(place[axis] for axis in axes), []).append(chip)
    for chips in groups.values():
        found = {chip: checksums[chip].tobytes() for chip in chips}
        most, _ = Counter(found.values()).most_common(1)[0]
        for chip in chips:
            if found[chip] != most:
                others = sum(checksum == most for checksum in found.values())
                yield f"chip {chip} ({in_words(places[chip])}) differs from {others} others"


def _planned(tapped: Tapped) -> Planned:
    """Return the shape and dtype of an array without its padding."""
    shape = list(tapped.array.shape)
    for axis, runs in tapped.bounds:
        shape[axis] = sum(stop - start for start, stop in runs)
    return Planned(tuple(shape), tapped.array.dtype)
