"""Read the TPU compiler's static schedule of a Pallas kernel from the compiler's dumps.

A TPU core issues one bundle a cycle. So the number of bundles that a kernel's grid loop issues predicts its cycles, as
long as its DMA is hidden and it waits for no unit. This is the compiler's prediction, not a measurement.
"""

import dataclasses
import gzip
import itertools
import math
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from jax.extend import core

DELAY_SLOTS = 4  # bundles after a branch that run whether it is taken or not
PIPELINE_STEPS = 2  # at most so many extra runs of the grid loop start and drain the pipeline of its DMA

BUNDLE = re.compile(r"^ *(0x[0-9a-f]+|0) +(?:[A-Z]{2})? *:", re.MULTILINE)
BRANCH = re.compile(r"sbr\.rel (?:\((!?)%(\w+)\) )?target = \$region(\d+)")
EXIT_TEST = re.compile(r"scmp\.ge\.s32\.totalorder %(\w+), (\d+) /\* loop exit test \*/")


class ScheduleError(ValueError):
    """A dump lacks something or cannot be read; the message names the kernel and the missing part."""


@dataclasses.dataclass(frozen=True)
class Region:
    """Bundles [start, stop) of a program that run `times` times for each run of the enclosing region.

    `kind` is "grid" (one run a grid step), "loop" or "predicated". A predicated region has times < 1 where its
    condition compares grid indices with constants, and 1, an upper bound, for any other condition.
    """

    kind: str
    start: int
    stop: int
    times: float

    @property
    def bundles(self) -> int:
        """The number of bundles."""
        return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class KernelSchedule:
    """The final schedule of one Pallas kernel.

    Attributes:
        name: the kernel's name in the compiled program.
        grid: grid steps along each axis.
        bundles: static length of the program.
        regions: loops and predicated regions, outer before inner.
        body_bundles: bundles issued in one grid step, averaged over the steps.
        used: slots that each unit issues in one grid step: MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE,
            VSTORE:SPILL, SALU; fills and spills are counted separately only if the compiler does so.
        capacity: slots that each unit offers in one bundle.
    """

    name: str
    grid: tuple[float, ...]
    bundles: int
    regions: tuple[Region, ...]
    body_bundles: float
    used: Mapping[str, float]
    capacity: Mapping[str, int]

    @property
    def body(self) -> Region:
        """The grid loop's body."""
        return self.regions[0]

    @property
    def cycles(self) -> float:
        """The predicted cycles of a whole call: those of all grid steps, and those outside the grid loop once."""
        return self.body_bundles * self.body.times + self.bundles - self.body.bundles

    def utilization(self, unit: str) -> float:
        """Return the share of a unit's slots that is used in the grid loop's body, 0 to 1."""
        return self.used[unit] / (self.body_bundles * self.capacity[unit])


def read_schedules(
    folder: Path,
    grids: Mapping[str, tuple[float, ...]],
    runs: Sequence[float] | None = None,
    trips: Mapping[str, float] | None = None,
) -> dict[str, KernelSchedule]:
    """Read the schedules of Pallas kernels from a folder of the compiler's dumps (plain or .gz), by kernel name.

    Args:
        folder: the folder of the dumps.
        grids: the grid of each kernel to read, by its name in `pallas_call`; a float is the mean of a length that
            depends on data.
        runs: as in `parse_schedule`.
        trips: by the kernels' names, for those with loops whose length depends on data: their mean length.

    Raises:
        ScheduleError: the files of a kernel are missing, or a trip count cannot be read.
    """
    schedules = {}
    for program in sorted(Path(folder).glob("*-final_bundles.txt*")):
        parts = re.match(r"(\d+)-(.*)-\d+-", program.name)
        if parts is None or "schedule-analysis" in program.name:
            continue
        number, name = parts.groups()
        grid = grids.get(base_name(name))
        if grid is None:
            continue
        usage = [*Path(folder).glob(f"{number}-*-final_hlo-static-per-bundle-utilization.txt*")]
        if not usage:
            raise ScheduleError(f"{name}: no *-final_hlo-static-per-bundle-utilization.txt in {folder}")
        length = (trips or {}).get(base_name(name))
        schedules[name] = parse_schedule(name, tuple(grid), _text(program), _text(usage[0]), runs, length)
    if missing := grids.keys() - set(map(base_name, schedules)):
        raise ScheduleError(f"no schedule of {', '.join(sorted(missing))} kernel in {folder}")
    return schedules


def base_name(name: str) -> str:
    """Return a kernel's name without the number of its call: the compiler keeps one program for all calls."""
    return re.sub(r"\.\d+$", "", name)


def parse_schedule(
    name: str,
    grid: tuple[float, ...],
    program: str,
    utilization: str,
    runs: Sequence[float] | None = None,
    trips: float | None = None,
) -> KernelSchedule:
    """Parse the text of a kernel's `*final_bundles.txt` and `*final_hlo-static-per-bundle-utilization.txt`.

    Args:
        runs: for a kernel whose loops and conditions depend on data: how often each region that says nothing about it
            runs for each run of the enclosing region, in the order of the program. A grid's loop then is a loop like
            any other, and the whole program counts as one grid step.
        trips: how often a loop runs whose length cannot be read, where that is no error.

    Raises:
        ScheduleError: a trip count or a branch target cannot be read, the program has another grid, or `runs` has
            another length.
    """
    marks = [*BUNDLE.finditer(program)]
    bundles = [program[mark.start() : stop.start()] for mark, stop in itertools.pairwise(marks)]
    bundles.append(program[marks[-1].start() :] if marks else "")
    head, _, rows = utilization.partition("== UTILIZATION:")
    units, slots = head.splitlines()[1:3]
    capacity = dict(zip(units.split(", "), map(int, slots.split()), strict=True))
    usage = [[int(count) for count in row.split()] for row in rows.split("\n") if row.strip()]
    if [int(mark[1], 16) for mark in marks] != list(range(len(usage))):
        raise ScheduleError(f"{name}: {len(marks)} bundles, but the use of {len(usage)}")

    values = _Scalars(bundles)
    found = _regions(name, None if runs is not None else grid, bundles, values, trips)
    regions = sorted(found, key=lambda region: (region.start, -region.stop))
    if runs is not None:
        unknown = [index for index, region in enumerate(regions) if math.isnan(region.times)]
        if len(unknown) != len(runs):
            places = ", ".join(f"{regions[index].kind} {regions[index].start:#x}" for index in unknown)
            raise ScheduleError(f"{name}: the runs of {len(unknown)} regions are unknown ({places}), got {len(runs)}")
        for index, times in zip(unknown, runs, strict=True):
            regions[index] = dataclasses.replace(regions[index], times=times)
    if _depends_on_data(grid):  # then a condition around the grid's loop asks whether it has any step
        loop = next((region for region in regions if region.kind == "grid"), None)
        regions = [region for region in regions if loop is None or not _encloses(region, loop)]
    if not regions or regions[0].kind != "grid":
        raise ScheduleError(f"{name}: no single grid loop around the kernel's body")

    weights = [1.0] * len(bundles)
    for region in regions[1:]:
        for address in range(region.start, region.stop):
            weights[address] *= region.times
    inside = range(regions[0].start, regions[0].stop)
    used = {unit: sum(weights[i] * usage[i][column] for i in inside) for column, unit in enumerate(capacity)}
    return KernelSchedule(name, grid, len(bundles), tuple(regions), sum(weights[i] for i in inside), used, capacity)


def _depends_on_data(grid: Iterable[float]) -> bool:
    """Tell whether a grid has a length that depends on data, of which a float is the mean."""
    return any(isinstance(length, float) for length in grid)


def _encloses(region: Region, other: Region) -> bool:
    """Tell whether a predicated region has all bundles of another region."""
    return region.kind == "predicated" and region.start <= other.start and other.stop <= region.stop


def _regions(
    name: str, grid: tuple[float, ...] | None, bundles: list[str], values: "_Scalars", trips: float | None
) -> Iterator[Region]:
    """Yield the regions of a program: one for each backward branch (a loop) and each forward branch (predicated).

    With no grid, the whole program is one grid step, and `times` is nan where it cannot be read.
    """
    loops, forward = [], []
    labels = {}
    for address, text in enumerate(bundles):
        for label in re.findall(r"Start(?:/End empty)? region (\d+)", text):
            labels[label] = address
    for address, text in enumerate(bundles):
        for negated, predicate, label in BRANCH.findall(text):
            if label not in labels and f"End region {int(label) - 1} " in bundles[-1]:
                continue  # to the end: a second core has no part of a grid that cannot be divided
            if label not in labels:
                raise ScheduleError(f"{name}: the branch at {address:#x} goes to region {label}, which is not there")
            target = labels[label]
            if target <= address:
                loops.append((target, address + 1 + DELAY_SLOTS))
            else:
                forward.append((address + 1 + DELAY_SLOTS, target, predicate, bool(negated)))

    steps = math.prod(grid or ())
    looped = grid is not None and (steps > 1 or any("iteration index" in bundles[start] for start, _ in loops))
    if not looped:
        yield Region("grid", 0, len(bundles), 1)
    for start, stop in loops:
        around = [other for other in loops if other[0] <= start and stop <= other[1] and other != (start, stop)]
        is_grid = looped and not around
        inner = [other for other in loops if start <= other[0] and other[1] <= stop and other != (start, stop)]
        text = "".join(
            text
            for address, text in enumerate(bundles[start:stop], start)
            if not any(low <= address < high - DELAY_SLOTS for low, high in inner)
        )
        tests = EXIT_TEST.findall(text)
        if grid is None:
            count: float | None = values.trips(*tests[0]) if len(tests) == 1 else None
            yield Region("loop", start, stop, math.nan if count is None else count)
            continue
        if is_grid and _depends_on_data(grid):
            yield Region("grid", start, stop, steps)
            continue
        if len(tests) != 1 and (trips is None or is_grid):
            raise ScheduleError(f"{name}: the loop at {start:#x} has no readable trip count")
        count = values.trips(*tests[0]) if len(tests) == 1 else None
        if count is None and trips is not None and not is_grid:
            yield Region("loop", start, stop, trips)
            continue
        if count is None and is_grid:  # its counter lies in memory; what is wrong does not fit the grid
            count = int(tests[0][1])
        if count is None:
            raise ScheduleError(f"{name}: the loop at {start:#x} starts or steps by what is not a constant")
        if is_grid:
            # Where a device has two cores, each of them runs half of the grid, or the first one step more.
            shares = [-(-steps // cores) for cores in (1, 2)]
            shares = [share for share in shares if 0 <= count - share <= PIPELINE_STEPS]
            if not shares:
                raise ScheduleError(
                    f"{name}: the program's grid loop runs {count} times, the grid {grid} has {steps} steps"
                )
            count = shares[0]
        yield Region("grid" if is_grid else "loop", start, stop, count)
    for start, stop, predicate, negated in forward:
        share = values.share(predicate, negated)
        yield Region("predicated", start, stop, (math.nan if grid is None else 1.0) if share is None else share)


class _Scalars:
    """The definitions of a program's scalar registers, to find trip counts, grid indices and predicates."""

    def __init__(self, bundles: Iterable[str]):
        text = "\n".join(bundles)
        defined = [*re.finditer(r"%(\w+) = (\S+) ([^;{}\n]*)", text)]
        self.definitions = {match[1]: (match[2], match[3]) for match in defined}
        self.places = {match[1]: match.start() for match in defined}
        self.spilled: dict[str, list[tuple[int, str]]] = {}
        for spill in re.finditer(r"sst \[smem:\[(#\w+)\]\] %(\w+)", text):
            self.spilled.setdefault(spill[1], []).append((spill.start(), spill[2]))
        self.bounds = {
            counter: int(bound) for counter, bound in re.findall(r"scmp\.ge\.s32\.totalorder %(\w+), (\d+)", text)
        }
        for counter, _ in EXIT_TEST.findall(text):
            self.bounds.pop(counter, None)
        # A grid index is a register that is counted up, perhaps only when an inner index is at its end, and that is
        # compared with the length of its axis.
        self.axes = {}
        for name, (operation, operands) in self.definitions.items():
            old = re.match(r"(?:\(!?%\w+, %\w+\), )?%(\w+)", operands) if operation == "smov" else None
            new = re.match(r"\(!?%\w+, %(\w+)\)", operands) if old else None
            counted = self.definitions.get(new[1]) if new else (operation, operands)
            match = re.match(r"1, %(\w+)", counted[1]) if counted and counted[0] == "sadd.s32" else None
            if name in self.bounds and match and (not old or old[1] == match[1]):
                self.axes[self.copied(match[1])] = self.bounds[name]

    def trips(self, counter: str, bound: str) -> int | None:
        """Return the trips of a loop that counts `counter` up from a constant to `bound`, or None."""
        operation, operands = self.definitions.get(counter, ("", ""))
        step = re.match(r"(\d+), %(\w+)", operands)
        if operation != "sadd.s32" or not step:
            return None
        operation, operands = self.definitions.get(self.unspilled(step[2]), ("", ""))
        first = re.match(r"%(\w+), %(\w+)", operands)
        if operation != "sphi" or not first or not self.is_counted(first[2], counter, step.groups()):
            return None
        operation, operands = self.definitions.get(first[1], ("", ""))
        start = re.match(r"(?:\(.*?\), )?(\d+)\b", operands)
        return -((int(start[1]) - int(bound)) // int(step[1])) if operation == "smov" and start else None

    def is_counted(self, name: str, counter: str, step: tuple[str, ...]) -> bool:
        """Tell whether a register holds what `counter` does: it is that one, a copy, or the same sum once more."""
        operation, operands = self.definitions.get(name, ("", ""))
        again = re.match(r"(\d+), %(\w+)", operands) if operation == "sadd.s32" else None
        return self.copied(name) == counter or bool(again and again.groups() == step)

    def unspilled(self, name: str) -> str:
        """Return the register that was spilled if `name` is loaded from a spill slot, else `name`."""
        stored = self.stored(name)
        return name if stored is None else [*stored, ""][0]

    def stored(self, name: str) -> list[str] | None:
        """Return what is written to the spill slot that `name` is loaded from, or None if it is not loaded.

        A slot may hold one register after the other: that which is written last before `name` is loaded comes first.
        """
        operation, operands = self.definitions.get(name, ("", ""))
        slot = re.match(r"\[smem:\[(#\w+)\]\]", operands)
        if operation != "sld" or not slot:
            return None
        written = self.spilled.get(slot[1], [])
        return [value for _, value in sorted(written, key=lambda each: (each[0] > self.places[name], -each[0]))]

    def copied(self, name: str) -> str:
        """Return the register that `name` is a copy of, or `name`."""
        while (found := self.definitions.get(name, ("", ""))) and found[0] == "smov":
            copy = re.match(r"%(\w+)\s*(?:/\*.*)?$", found[1])
            if not copy:
                break
            name = copy[1]
        return name

    def axis(self, name: str) -> str | None:
        """Return the grid index (a key of `axes`) that a register holds, or None; follow copies and spills."""
        waiting, seen = [name], {name}
        while waiting:
            name = waiting.pop()
            if name in self.axes:
                return name
            before = self.stored(name)
            if before is None:
                operation, operands = self.definitions.get(name, ("", ""))
                match = re.match(r"(?:%\w+, )?%(\w+)", operands) if operation in ("sphi", "smov") else None
                before = [match[1]] if match else []
            waiting += [each for each in reversed(before) if each not in seen]  # the likeliest is the next
            seen.update(before)
        return None

    def predicate(self, name: str) -> "np.ndarray | None":
        """Return a predicate register's value in each grid step, or None if it is not known.

        The value is a bool array with an axis for each of `axes`. It is known if it combines comparisons of grid
        indices with constants.
        """
        import numpy as np

        operation, operands = self.definitions.get(name, ("", ""))
        compare = re.fullmatch(r"scmp\.(eq|ne|lt|le|gt|ge)\.s32\.totalorder", operation)
        index = re.match(r"(?:\(.*?\), )?%(\w+), (\d+)", operands)
        if compare and index and (axis := self.axis(index[1])):
            shape = [-1 if other == axis else 1 for other in self.axes]
            return getattr(operator, compare[1])(np.arange(self.axes[axis]), int(index[2])).reshape(shape)
        names = re.findall(r"%(p\w+)", operands)
        values = [value for name in names if (value := self.predicate(name)) is not None]
        logic = {"por": np.logical_or, "pand": np.logical_and, "pnor": np.logical_or, "pnand": np.logical_and}
        if len(values) < len(names):
            return None
        if operation in logic and len(values) == 2:
            value = logic[operation](*values)
            return ~value if operation in ("pnor", "pnand") else value
        return ~values[0] if operation == "pneg" and len(values) == 1 else None

    def share(self, predicate: str, negated: bool) -> float | None:
        """Return the share of the grid steps that run a region which `predicate` can skip, or None."""
        value = self.predicate(predicate)
        return None if value is None else float((value if negated else ~value).mean())


def grids(jaxpr: "core.Jaxpr | core.ClosedJaxpr") -> dict[str, tuple[int, ...]]:
    """Return the grid of every Pallas kernel in a jaxpr, by its name in `pallas_call`."""
    return {equation.params["name"]: equation.params["grid_mapping"].grid for equation in _pallas(jaxpr)}


def stated_bytes(jaxpr: "core.Jaxpr | core.ClosedJaxpr") -> dict[str, int]:
    """Return the bytes between HBM and VMEM of each Pallas kernel in a jaxpr that states its own cost, by its name."""
    estimates = ((equation.params["name"], equation.params["cost_estimate"]) for equation in _pallas(jaxpr))
    return {name: estimate.bytes_accessed for name, estimate in estimates if estimate}


def _pallas(jaxpr: "core.Jaxpr | core.ClosedJaxpr") -> Iterator:
    """Yield the pallas_call equations of a jaxpr and of those inside it."""
    import jax

    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
        else:
            for value in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
                if hasattr(value, "eqns"):
                    yield from _pallas(value)


def _text(path: Path) -> str:
    """Read a text file, plain or .gz."""
    return gzip.open(path, "rt").read() if path.suffix == ".gz" else path.read_text()
