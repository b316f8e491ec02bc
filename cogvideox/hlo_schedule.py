"""Predict where the time of a compiled TPU program goes, from its scheduled HLO text.

Each fusion has the compiler's `estimated_cycles`. The cost of a loop's body is multiplied by the trip count. A Pallas
kernel takes the time of its own schedule. A collective takes the time that its bytes need on the links, minus the work
that is scheduled between its start and its end. Copies between HBM and VMEM that the compiler starts before they are
needed count as hidden. All of these are predictions, not measurements.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

CATEGORIES = ("Pallas kernels", "matrix products", "collectives", "layout copies", "elementwise and rest")

DTYPE_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
DTYPE_BYTES |= {"s64": 8, "u64": 8, "f64": 8}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
MATRIX = {"convolution", "dot"}
# fmt: off
MOVEMENT = {
    "parameter", "constant", "bitcast", "copy", "transpose", "reshape", "slice", "dynamic-slice",
    "dynamic-update-slice", "concatenate", "pad", "broadcast", "iota", "get-tuple-element", "tuple", "convert",
    "fusion", "bitcast-convert",
}


# fmt: on


class HloError(ValueError):
    """A part of the program that the prediction needs cannot be read."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of the HLO text."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    text: str  # what follows the operands

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate, or None if it gives none."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        return int(match[1]) if match else None

    def called(self, attribute: str) -> str:
        """Return the computation that an attribute such as "calls" or "body" names, "" if it has no such attribute."""
        match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.text)
        return match[1] if match else ""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Predicted seconds of one instruction, all its runs together."""

    name: str
    category: str
    seconds: float
    times: int
    source: str


@dataclasses.dataclass
class Program:
    """A parsed HLO module: computations by name, the entry's name, source lines by stack frame."""

    computations: dict[str, list[Instruction]]
    entry: str
    frames: dict[str, str]

    @classmethod
    def parse(cls, text: str) -> "Program":
        """Parse `compiled.as_text()`; raises HloError if there is no entry computation."""
        lines: list[str] = []
        for line in text.splitlines():  # the metadata of a Pallas kernel holds line breaks
            if lines and is_continuation(line):
                lines[-1] += " " + line
            else:
                lines.append(line)
        computations: dict[str, list[Instruction]] = {}
        entry: str | None = None
        current: list[Instruction] | None = None
        for line in lines:
            if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                current = computations.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
            elif line == "}":
                current = None
            elif current is not None and (instruction := parse_instruction(line)):
                current.append(instruction)
        if entry is None:
            raise HloError("the program has no entry computation")
        return cls(computations, entry, parse_frames(text))

    def opcodes(self, computation: str) -> set[str]:
        """Return the opcodes in a computation and in the fusions inside it."""
        found = set()
        for instruction in self.computations[computation]:
            found.add(instruction.opcode)
            if instruction.opcode == "fusion":
                found |= self.opcodes(instruction.called("calls"))
        return found

    def source(self, instruction: Instruction) -> str:
        """Return where an instruction comes from: "file:line operation"."""
        frame = re.search(r"stack_frame_id=(\d+)", instruction.text)
        name = re.search(r'op_name="([^"]*)"', instruction.text)
        place = self.frames.get(frame[1], "") if frame else ""
        return " ".join(filter(None, (place, name and name[1].rsplit("/", 1)[-1]))) or "no source line"

    def trip_count(self, loop: Instruction, parent: str) -> int:
        """Return the trips of a while instruction of the computation `parent`; raises HloError if it cannot be read."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text)
        if known:
            return int(known[1])
        condition = {i.name: i for i in self.computations[loop.called("condition")]}
        body = {i.name: i for i in self.computations[loop.called("body")]}
        outside = {i.name: i for i in self.computations[parent]}
        test = self.computations[loop.called("condition")][-1]
        try:
            counter, bound = (condition[name] for name in test.operands)
            place = re.search(r"index=(\d+)", counter.text) if counter.opcode == "get-tuple-element" else None
            if test.opcode != "compare" or "direction=LT" not in test.text or place is None:
                raise HloError
            index = int(place[1])
            start = constant(outside, outside[loop.operands[0]].operands[index])
            advanced = follow(body, self.computations[loop.called("body")][-1].operands[index])
            if advanced.opcode != "add":
                raise HloError
            (step,) = (constant(body, name) for name in advanced.operands if is_constant(body, name))
            stop = constant(condition, bound.name)
        except (HloError, KeyError, ValueError, IndexError) as error:
            raise HloError(f"the trip count of the loop {loop.name} cannot be read") from error
        return max(0, -((start - stop) // step))


def is_continuation(line: str) -> bool:
    """Return whether a line continues the instruction of the line before."""
    return line.startswith(('"', "}}", "},"))


def parse_instruction(line: str) -> Instruction | None:
    """Parse a line of a computation; return None if it has no instruction."""
    match = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if not match:
        return None
    rest = line[match.end() :]
    end = matching(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    close = matching("(" + rest, 0) - 1
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[:close])) if opcode != "constant" else (rest[:close],)
    return Instruction(match[1], shape, opcode, operands, rest[close:])


def matching(text: str, start: int) -> int:
    """Return the index of the parenthesis that closes the one at `start`; raises HloError if none does."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise HloError(f"unbalanced parentheses in {text[:80]}")


def parse_frames(text: str) -> dict[str, str]:
    """Map each stack frame's id to "file:line", from the tables at the head of the module."""
    tables = {}
    for title in ("FileNames", "FileLocations", "StackFrames"):
        section = re.search(rf"^{title}\n((?:\d+ .*\n)+)", text, re.MULTILINE)
        tables[title] = dict(line.split(" ", 1) for line in section[1].splitlines()) if section else {}
    frames = {}
    for frame, content in tables["StackFrames"].items():
        number = re.search(r"file_location_id=(\d+)", content)
        location = tables["FileLocations"].get(number[1], "") if number else ""
        file = re.search(r"file_name_id=(\d+)", location)
        line = re.search(r"\bline=(\d+)", location)
        if file and line:
            path = tables["FileNames"][file[1]].strip('"')
            frames[frame] = f"{path.rsplit('/', 1)[-1]}:{line[1]}"
    return frames


def follow(computation: Mapping[str, Instruction], name: str) -> Instruction:
    """Return the instruction that a name stands for; for a copy or a conversion, that of its operand."""
    instruction = computation[name]
    while instruction.opcode in ("copy", "bitcast", "convert"):
        instruction = computation[instruction.operands[0]]
    return instruction


def is_constant(computation: Mapping[str, Instruction], name: str) -> bool:
    """Return whether a name stands for a constant."""
    return follow(computation, name).opcode == "constant"


def constant(computation: Mapping[str, Instruction], name: str) -> int:
    """Return the integer constant that a name stands for; raise ValueError if it is not an integer."""
    return int(follow(computation, name).operands[0])


def shape_bytes(shape: str) -> int:
    """Return the bytes of an array's or a tuple's shape, without the padding of its layout."""
    return sum(
        DTYPE_BYTES.get(dtype, 0) * math.prod(int(size) for size in sizes.split(",") if size)
        for dtype, sizes in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape)
    )


def device_list(text: str) -> "np.ndarray":
    """Return the device ids in the order of "[4,2]T(1,0)" (counted up in that shape, then transposed) or "0,4,1,5"."""
    import numpy as np

    match = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not match:
        return np.array([int(i) for i in text.split(",")])
    shape = [int(i) for i in match[1].split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return (ids.transpose([int(i) for i in match[2].split(",")]) if match[2] else ids).ravel()


def replica_groups(text: str) -> list[list[int]]:
    """Return the groups of a collective.

    They are written as {{0,1},{2,3}}, as [2,4]<=[8], as [4,2]<=[2,4]T(1,0), or as mesh['a'=2,...] {'a'}; another form
    raises HloError.
    """
    import numpy as np

    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", text):
        return [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", match[1])]
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return device_list(match[2]).reshape([int(i) for i in match[1].split(",")]).tolist()
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", text):
        axes = [(name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])]
        names, sizes = [name for name, _ in axes], [size for _, size in axes]
        inside = [names.index(name) for name in re.findall(r"'([^']+)'", match[3])]
        ids = device_list(match[2]) if match[2] else np.arange(math.prod(sizes))
        outside = [axis for axis in range(len(axes)) if axis not in inside]
        ids = ids.reshape(sizes).transpose(outside + inside)
        return ids.reshape(-1, math.prod(sizes[i] for i in inside)).tolist()
    raise HloError(f"the groups of a collective cannot be read: {text[:200]}")


def costs(
    program: Program,
    clock: float,
    seconds_of_kernel: Callable[[str, int], float],
    seconds_of_collective: Callable[[str, int, Sequence[int]], float],
    rare_kernels: Sequence[str] = (),
    kernels_run_once: Sequence[str] = (),
) -> list[Cost]:
    """Predict the seconds of every instruction that takes time, in schedule order.

    Args:
        program: the scheduled program.
        clock: cycles a second.
        seconds_of_kernel: (name of a Pallas kernel's instruction, bytes of its operands and results) -> seconds.
        seconds_of_collective: (opcode, operand bytes, group of device ids) -> seconds.
        rare_kernels: beginnings of the names of kernels that run only for unusual data. A loop around one of them
            counts as not run.
        kernels_run_once: the same for kernels in loops that run once or not at all: such a loop counts as run.

    Raises:
        HloError: a trip count or the groups of a collective cannot be read, or a fusion has no estimate.
    """
    walk = _Walk(program, clock, seconds_of_kernel, seconds_of_collective, tuple(rare_kernels), tuple(kernels_run_once))
    return walk.computation(program.entry, 1)


@dataclasses.dataclass(frozen=True)
class _Walk:
    """The walk through a program that finds its costs; for the fields, see `costs`."""

    program: Program
    clock: float
    seconds_of_kernel: Callable[[str, int], float]
    seconds_of_collective: Callable[[str, int, Sequence[int]], float]
    rare_kernels: tuple[str, ...]
    kernels_run_once: tuple[str, ...]

    def computation(self, name: str, times: int) -> list[Cost]:
        """Return the costs of a computation that runs `times` times, in schedule order."""
        shapes = {instruction.name: instruction.shape for instruction in self.program.computations[name]}
        busy = 0.0  # seconds of the core so far, in one run of this computation
        started: dict[
            str, tuple[float, float]
        ] = {}  # name of a collective's start -> (core seconds then, seconds that it takes)
        found = []
        for instruction in self.program.computations[name]:
            inside = self.inside(instruction, name, times)
            if inside is not None:
                found += inside
                busy += sum(cost.seconds for cost in inside) / times if inside else 0.0
                continue
            own = self.own(instruction, shapes, busy, started)
            if own:
                category, seconds = own
                busy += seconds
                source = self.program.source(instruction)
                found.append(Cost(instruction.name, category, seconds * times, times, source))
        return found

    def inside(self, instruction: Instruction, parent: str, times: int) -> list[Cost] | None:
        """Return the costs of what an instruction of the computation `parent` calls, or None if it calls nothing."""
        if instruction.opcode == "while":
            body = self.program.computations[instruction.called("body")]
            if any(called.name.startswith(self.rare_kernels) for called in body):
                return []
            if any(called.name.startswith(self.kernels_run_once) for called in body):
                return self.computation(instruction.called("body"), times)
            trips = self.program.trip_count(instruction, parent)
            return self.computation(instruction.called("body"), times * trips) if trips else []
        if instruction.opcode == "call":
            return self.computation(instruction.called("to_apply"), times)
        if instruction.opcode == "conditional":  # the slowest branch
            listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.text)
            branches = re.findall(r"%?([\w.\-]+)", listed[1]) if listed else []
            branches = branches or [instruction.called(f"{value}_computation") for value in ("true", "false")]
            costs_of_branches = [self.computation(branch, times) for branch in branches]
            return max(costs_of_branches, key=lambda found: sum(cost.seconds for cost in found))
        return None

    def own(
        self, instruction: Instruction, shapes: Mapping[str, str], busy: float, started: dict
    ) -> tuple[str, float] | None:
        """Return category and seconds of an instruction that calls nothing, or None if it takes no time.

        The start of a collective that has a separate end is kept in `started`. Such a collective costs its own time
        minus the time of the core's work between start and end.
        """
        opcode, operands = instruction.opcode, instruction.operands
        seconds = self.collective_seconds(instruction, shapes)
        if seconds is not None:
            if not opcode.endswith("-start"):
                return "collectives", seconds
            started[instruction.name] = (busy, seconds)
            return None
        if opcode.endswith("-done") and operands and operands[0] in started:
            then, seconds = started.pop(operands[0])
            return "collectives", max(0.0, seconds - (busy - then))
        return self.work(instruction, shapes)

    def collective_seconds(self, instruction: Instruction, shapes: Mapping[str, str]) -> float | None:
        """Return the seconds of the collective that an instruction is or starts; for other instructions None."""
        kind, text = instruction.opcode.removesuffix("-start"), instruction.text
        if instruction.opcode == "async-start":
            called = self.program.computations[instruction.called("calls")]
            wrapped = next((inner for inner in called if inner.opcode in COLLECTIVES), instruction)
            kind, text = wrapped.opcode, wrapped.text
        if kind not in COLLECTIVES:
            return None
        size = sum(shape_bytes(shapes[operand]) for operand in instruction.operands)
        return max(self.seconds_of_collective(kind, size, group) for group in replica_groups(text))

    def work(self, instruction: Instruction, shapes: Mapping[str, str]) -> tuple[str, float] | None:
        """Return category and seconds of a Pallas kernel or an instruction with an estimate; for others None."""
        opcode = instruction.opcode
        if opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in instruction.text:
            size = shape_bytes(instruction.shape) + sum(shape_bytes(shapes[name]) for name in instruction.operands)
            return "Pallas kernels", self.seconds_of_kernel(instruction.name, size)
        if instruction.cycles is not None:
            calls = instruction.called("calls")
            opcodes = self.program.opcodes(calls) if calls else {opcode}
            category = "elementwise and rest"
            if opcodes & MATRIX:
                category = "matrix products"
            elif opcodes <= MOVEMENT:
                category = "layout copies"
            return category, instruction.cycles / self.clock
        if opcode == "fusion" or opcode in MATRIX:
            raise HloError(f"the compiler gives no estimate for {instruction.name}")
        return None
