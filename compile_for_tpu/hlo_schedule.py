"""Where the time of a compiled TPU program goes, read from its scheduled HLO text.

Each fusion carries the compiler's `estimated_cycles`. Loops are multiplied by their trip counts; Pallas kernels count
what their own schedule says (benchmarks/kernel_schedule.py); collectives what their bytes take on the links
(benchmarks/tpu.py), less the work that the schedule puts between their start and their end. Copies between HBM and VMEM
that the compiler starts ahead of their use count as hidden. Predictions all, no measurement.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

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
    """Something in the program that the prediction needs and that cannot be read."""


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
        match = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        return int(match[1]) if match else None

    def called(self, attribute: str) -> str | None:
        match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.text)
        return match[1] if match else None


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
        computations, entry, current = {}, None, None
        lines = []
        for line in text.splitlines():  # kernels' metadata holds line breaks
            if lines and current_is_continuation(line):
                lines[-1] += " " + line
            else:
                lines.append(line)
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
        """Opcodes in a computation and in the fusions inside it."""
        found = set()
        for instruction in self.computations[computation]:
            found.add(instruction.opcode)
            if instruction.opcode == "fusion":
                found |= self.opcodes(instruction.called("calls"))
        return found

    def source(self, instruction: Instruction) -> str:
        frame = re.search(r"stack_frame_id=(\d+)", instruction.text)
        name = re.search(r'op_name="([^"]*)"', instruction.text)
        place = self.frames.get(frame[1], "") if frame else ""
        return " ".join(filter(None, (place, name and name[1].rsplit("/", 1)[-1]))) or "no source line"

    def trip_count(self, loop: Instruction, parent: str) -> int:
        """Trips of a while instruction of the computation `parent`; raises HloError if the program does not say."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text)
        if known:
            return int(known[1])
        condition = {i.name: i for i in self.computations[loop.called("condition")]}
        body = {i.name: i for i in self.computations[loop.called("body")]}
        outside = {i.name: i for i in self.computations[parent]}
        test = self.computations[loop.called("condition")][-1]
        try:
            counter, bound = (condition[name] for name in test.operands)
            if test.opcode != "compare" or "direction=LT" not in test.text or counter.opcode != "get-tuple-element":
                raise HloError
            index = int(re.search(r"index=(\d+)", counter.text)[1])
            start = constant(outside, outside[loop.operands[0]].operands[index])
            advanced = follow(body, self.computations[loop.called("body")][-1].operands[index])
            if advanced.opcode != "add":
                raise HloError
            (step,) = (constant(body, name) for name in advanced.operands if is_constant(body, name))
            stop = constant(condition, bound.name)
        except (HloError, KeyError, ValueError, IndexError, TypeError) as error:
            raise HloError(f"the trip count of the loop {loop.name} cannot be read") from error
        return max(0, -((start - stop) // step))


def current_is_continuation(line: str) -> bool:
    return line.startswith(('"', "}}", "},"))


def parse_instruction(line: str) -> Instruction | None:
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
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise HloError(f"unbalanced parentheses in {text[:80]}")


def parse_frames(text: str) -> dict[str, str]:
    """Stack frame id -> "file:line", from the tables at the head of the module."""
    tables = {}
    for title in ("FileNames", "FileLocations", "StackFrames"):
        section = re.search(rf"^{title}\n((?:\d+ .*\n)+)", text, re.MULTILINE)
        tables[title] = dict(line.split(" ", 1) for line in section[1].splitlines()) if section else {}
    frames = {}
    for frame, content in tables["StackFrames"].items():
        location = tables["FileLocations"].get(re.search(r"file_location_id=(\d+)", content)[1], "")
        file = re.search(r"file_name_id=(\d+)", location)
        line = re.search(r"\bline=(\d+)", location)
        if file and line:
            path = tables["FileNames"][file[1]].strip('"')
            frames[frame] = f"{path.rsplit('/', 1)[-1]}:{line[1]}"
    return frames


def follow(computation: Mapping[str, Instruction], name: str) -> Instruction:
    instruction = computation[name]
    while instruction.opcode in ("copy", "bitcast", "convert"):
        instruction = computation[instruction.operands[0]]
    return instruction


def is_constant(computation, name) -> bool:
    return follow(computation, name).opcode == "constant"


def constant(computation: Mapping[str, Instruction], name: str) -> int:
    return int(follow(computation, name).operands[0])


def shape_bytes(shape: str) -> int:
    """Bytes of an array or a tuple shape, padding of the layout left out."""
    return sum(
        DTYPE_BYTES.get(dtype, 0) * math.prod(int(size) for size in sizes.split(",") if size)
        for dtype, sizes in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape)
    )


def device_list(text: str):
    """Device ids in the order that "[4,2]T(1,0)" (counted up in this shape, then transposed) or "0,4,1,5" gives."""
    import numpy as np

    match = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not match:
        return np.array([int(i) for i in text.split(",")])
    shape = [int(i) for i in match[1].split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return (ids.transpose([int(i) for i in match[2].split(",")]) if match[2] else ids).ravel()


def replica_groups(text: str) -> list[list[int]]:
    """The groups of a collective: {{0,1},{2,3}}, [2,4]<=[8], [4,2]<=[2,4]T(1,0), or mesh['a'=2,...] {'a'}."""
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
) -> list[Cost]:
    """Predicted seconds of every instruction that takes time, in schedule order.

    Args:
        clock: cycles a second.
        seconds_of_kernel: (name of a Pallas kernel's instruction, bytes of its operands and results) -> seconds.
        seconds_of_collective: (opcode, operand bytes, group of device ids) -> seconds.
        rare_kernels: beginnings of the names of kernels that only unusual data call for, as often as the data say; a
            loop around one of them counts as not run.

    Raises:
        HloError: a trip count or a collective's groups that cannot be read, or an instruction without an estimate.
    """
    arguments = (clock, seconds_of_kernel, seconds_of_collective, tuple(rare_kernels))
    return list(_computation(program, program.entry, 1, *arguments))


def _computation(program, name, times, *arguments) -> Iterator[Cost]:
    clock, seconds_of_kernel, seconds_of_collective, rare_kernels = arguments
    shapes = {instruction.name: instruction.shape for instruction in program.computations[name]}
    busy = 0.0  # seconds of the core so far, in one run of this computation
    started = {}  # name of a collective's start -> (core seconds then, seconds that it takes)

    def cost(instruction, category, seconds):
        nonlocal busy
        busy += seconds
        return Cost(instruction.name, category, seconds * times, times, program.source(instruction))

    for instruction in program.computations[name]:
        opcode, calls = instruction.opcode, instruction.called("calls")
        if opcode == "while":
            body = program.computations[instruction.called("body")]
            if rare_kernels and any(inside.name.startswith(rare_kernels) for inside in body):
                continue
            trips = program.trip_count(instruction, name)
            inside = list(_computation(program, instruction.called("body"), times * trips, *arguments))
        elif opcode == "call":
            inside = list(_computation(program, instruction.called("to_apply"), times, *arguments))
        elif opcode == "conditional":  # the dearest branch
            listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.text)
            branches = re.findall(r"%?([\w.\-]+)", listed[1]) if listed else []
            branches = branches or [instruction.called(f"{value}_computation") for value in ("true", "false")]
            inside = max(
                (list(_computation(program, branch, times, *arguments)) for branch in branches),
                key=lambda found: sum(cost.seconds for cost in found),
            )
        else:
            inside = None
        if inside is not None:
            busy += sum(cost.seconds for cost in inside) / times
            yield from inside
            continue

        kind = opcode.removesuffix("-start").removesuffix("-done")
        if kind == "async" and opcode == "async-start":
            wrapped = [i for i in program.computations[calls] if i.opcode in COLLECTIVES]
            kind = wrapped[0].opcode if wrapped else kind
        if kind in COLLECTIVES and not opcode.endswith("-done"):
            text = instruction.text if kind == opcode.removesuffix("-start") else wrapped[0].text
            size = sum(shape_bytes(shapes[operand]) for operand in instruction.operands)
            groups = replica_groups(text)
            seconds = max(seconds_of_collective(kind, size, group) for group in groups)
            if opcode.endswith("-start"):
                started[instruction.name] = (busy, seconds)
            else:
                yield cost(instruction, "collectives", seconds)
        elif opcode.endswith("-done") and instruction.operands and instruction.operands[0] in started:
            then, seconds = started.pop(instruction.operands[0])
            yield cost(instruction, "collectives", max(0.0, seconds - (busy - then)))
        elif opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in instruction.text:
            size = shape_bytes(instruction.shape) + sum(
                shape_bytes(shapes[operand]) for operand in instruction.operands
            )
            yield cost(instruction, "Pallas kernels", seconds_of_kernel(instruction.name, size))
        elif instruction.cycles is not None:
            opcodes = program.opcodes(calls) if calls else {opcode}
            category = "elementwise and rest"
            if opcodes & MATRIX:
                category = "matrix products"
            elif opcodes <= MOVEMENT:
                category = "layout copies"
            yield cost(instruction, category, instruction.cycles / clock)
        elif opcode == "fusion" or opcode in MATRIX:
            raise HloError(f"the compiler gives no estimate for {instruction.name}")
