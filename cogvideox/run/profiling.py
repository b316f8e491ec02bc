"""Trace two steps of a run with jax's profiler, and say which modules of the model they spend their time in.

The trace, which XProf and TensorBoard open, names the compiler's operations, such as fusion.123. The text of the
compiled program says what each of them was made from, by the names of `jax.named_scope`, which are those of diffusers'
modules. Importing this module loads no jax.
"""

import collections
import functools
import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cogvideox.cli.report import Report
from cogvideox.errors import shortened
from cogvideox.files import writing
from cogvideox.hlo_schedule import HloError, Instruction, Program

if TYPE_CHECKING:
    from jax.profiler import ProfileData, ProfilePlane

ROWS = 10  # names in the table
OUTSIDE = "outside of the modules"  # such as the guidance and the scheduler, or the loop over the blocks
OTHER = "other programs"  # such as the conversion of a step's scalars

# What jax puts between the names of scopes for its control flow; whatever else is no scope is no identifier.
NOT_SCOPES = {"while", "body", "cond", "scan", "closed_call", "shard_map", "checkpoint", "pjit", "remat", "core_call"}


class Profile:
    """A trace of the second and the third call of a program, as far as there are; of the only one where there is one.

    What it costs to start and to end the trace is left out of the seconds of the steps. Under the trace, steps take
    longer, and the timings say which these are.

    Args:
        folder: where the trace goes; None traces nothing.
        what: a call is called, such as "step".
        report: is told what takes the time.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, folder: Path | None, what: str, report: Report):
        self._folder, self._what, self._report = folder, what, report
        self._number = itertools.count()  # of calls
        self._wanted = range(0)  # the calls to trace
        self._program: Any = None  # the traced one
        if folder is not None:
            writing.check_writable(folder / "trace")

    def traced(self, programs: Sequence[Any], calls: int) -> list[Any]:
        """Return functions that call compiled programs, and trace some of the calls.

        Args:
            programs: compiled programs.
            calls: how often they will be called, all together.
        """
        if self._folder is None:
            return list(programs)
        self._wanted = range(calls)[1:3] or range(calls)
        return [functools.partial(self._call, program) for program in programs]

    def _call(self, program: Any, *arguments: Any) -> Any:
        """Call a program; start the trace before the first call that is wanted, and end it after the last one."""
        import jax

        number = next(self._number)
        if number == self._wanted[0]:
            jax.block_until_ready(arguments)  # the trace must not have the end of the call before
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # it would slow the host down, and shows nothing of the devices
            with self._report.aside("profile"):
                jax.profiler.start_trace(str(self._folder), profiler_options=options)
        result = program(*arguments)
        if number in self._wanted:
            self._program = program
            self._report.profiled()
        if number == self._wanted[-1]:
            jax.block_until_ready(result)
            try:
                with self._report.aside("profile"):
                    jax.profiler.stop_trace()
            except jax.errors.JaxRuntimeError as error:  # such as a full disk, which must not end the run
                self._report.warn(f"the trace of --profile could not be written: {error}")
                self._folder = None
        return result

    def show(self) -> None:
        """Say where the trace is, and which modules take most of its time."""
        if self._folder is None:
            return
        from jax.profiler import ProfileData

        with self._report.aside("profile"):
            traces = self._folder.glob("plugins/profile/*/*.xplane.pb")
            trace = max(traces, key=lambda file: file.stat().st_mtime)
            operations = list(operations_of(ProfileData.from_file(str(trace))))
            rows = table(operations, self._program.as_text())
        if not rows:
            self._report.warn(f"{trace} has no operations of the kinds that are known here; XProf may show more")
            return
        calls, devices = len(self._wanted), {operation.device for operation in operations}
        total = sum(row.nanoseconds for row in rows)
        scale = 1e6 * calls * len(devices)  # from nanoseconds to milliseconds of a call on one device
        place = "the CPU, side by side on its threads" if None in devices else f"each of {len(devices)} devices"
        many = f"{calls} {self._what}s" if calls > 1 else f"one {self._what}"
        self._report.say(f"profile of {many}: {total / scale:.2f} ms of operations in each, on {place}")
        for row in rows[:ROWS]:
            kinds = ", ".join(f"{kind} {part / row.nanoseconds:.0%}" for kind, part in row.kinds.most_common(3))
            self._report.say(f"{row.nanoseconds / total:7.1%} {row.nanoseconds / scale:11.3f} ms  {row.name}: {kinds}")
        if rest := rows[ROWS:]:
            self._report.say(f"{sum(row.nanoseconds for row in rest) / total:7.1%} in {len(rest)} more")
        names = {row.name: {"share": row.nanoseconds / total, "ms": row.nanoseconds / scale} for row in rows}
        self._report.event("profile", trace=trace, calls=calls, place=place, names=names)
        self._report.say(
            f"the trace is in {self._folder}; to open it: pip install xprof; xprof --logdir {self._folder}"
        )


# --- The trace ---------------------------------------------------------------------------------------------------


class Operation(NamedTuple):
    """One run of an operation of a compiled program.

    Attributes:
        name: the instruction's in the program.
        module: the program's name, or None where the trace does not tell.
        device: the name of the device's part of the trace, None for a CPU.
        nanoseconds: that it took, without those of operations inside of it.
        kernel: the name of the kernel that a GPU ran for it, None elsewhere.
    """

    name: str
    module: str | None
    device: str | None
    nanoseconds: int
    kernel: str | None = None


def operations_of(profile: "ProfileData") -> Iterator[Operation]:
    """Yield the operations of compiled programs in a trace.

    A TPU has a line of them, "XLA Ops"; a GPU has lines of kernels which say the operation that they belong to; on a
    CPU the threads of the host say it.
    """
    devices = [plane for plane in profile.planes if re.fullmatch(r"/device:(TPU|GPU):\d+", plane.name)]
    for plane in devices or [plane for plane in profile.planes if plane.name == "/host:CPU"]:
        for events in _lines(plane, has_kernels="GPU" in plane.name):
            yield from _without_inner(events, plane.name if devices else None)


class _Event(NamedTuple):
    start: float
    end: float
    name: str
    module: str | None
    kernel: str | None


def _lines(plane: "ProfilePlane", has_kernels: bool) -> Iterator[list[_Event]]:
    """Yield the operations of each line of a plane, in the order of their starts, outer ones before inner ones."""
    lines = list(plane.lines)
    only = [line for line in lines if line.name == "XLA Ops"]
    for line in only or lines:
        events = []
        for event in line.events:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of the type of these statistics
                stats = dict(event.stats)
            if name := stats.get("hlo_op", event.name if only else None):
                name = re.match(r"%?([\w.\-]*)", str(name))[1]  # type: ignore[index]  # a TPU has the whole instruction
                kernel = event.name if has_kernels else None
                events.append(_Event(event.start_ns, event.end_ns, name, stats.get("hlo_module"), kernel))
        yield sorted(events, key=lambda event: (event.start, -event.end))


def _without_inner(events: Sequence[_Event], device: str | None) -> Iterator[Operation]:
    """Yield the operations of a line with their own time: a loop contains the operations of its body."""
    own = [event.end - event.start for event in events]
    outer: list[int] = []  # the operations that contain this one
    for i, event in enumerate(events):
        while outer and events[outer[-1]].end <= event.start:
            outer.pop()
        if outer:
            own[outer[-1]] -= min(event.end, events[outer[-1]].end) - event.start
        outer.append(i)
    for event, nanoseconds in zip(events, own, strict=True):
        yield Operation(event.name, event.module, device, max(round(nanoseconds), 0), event.kernel)


# --- Names -------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """The operations of one name: their nanoseconds together, and by what kind of operation they are."""

    name: str
    nanoseconds: int
    kinds: collections.Counter[str]


def table(operations: Sequence[Operation], text: str) -> list[Row]:
    """Return the time of a program's operations by the names of modules, the most expensive first.

    A kernel of a GPU that belongs to no module that is known has a row of its own.

    Args:
        operations: of the program and of others.
        text: of the compiled program.
    """
    header = re.match(r"HloModule ([\w.\-]+)", text)
    names = Names(text)
    find = functools.cache(names.find)  # an operation runs many times
    found: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for operation in operations:
        is_ours = operation.module in (None, header and header[1])
        name = names.instruction(operation)
        if is_ours and name:
            module, kind = find(name)
        elif is_ours and operation.kernel:
            module, kind = kernel_name(operation.kernel), re.sub(r"[\d._]+$", "", operation.name)
        else:
            module, kind = OTHER, operation.module or operation.name
        found[folded(module) or OUTSIDE][kind] += operation.nanoseconds
    rows = [Row(name, sum(kinds.values()), kinds) for name, kinds in found.items()]
    return sorted((row for row in rows if row.nanoseconds), key=lambda row: -row.nanoseconds)


def kernel_name(kernel: str) -> str:
    """Return the name of a GPU's kernel without its C++ type and arguments."""
    return "kernel " + shortened(re.split(r"[<(]", kernel.removeprefix("void "))[0], 60)


def folded(module: str) -> str:
    """Return a module's name with a * for the number of a block of the transformer, or of a resnet of the decoder.

    Blocks of the transformer are one program, and the resnets of a decoder's block have one size.
    """
    return re.sub(r"\.\{\d+\}|(?<=\.resnets)\.\d+", ".*", module)


class Names:
    """The modules that the instructions of a compiled program belong to.

    Args:
        text: of the compiled program; without an entry computation it has no instructions.
    """

    def __init__(self, text: str):
        try:
            self._program = Program.parse(text)
        except HloError:
            self._program = Program({}, "", {})
        self._instructions = {i.name: i for body in self._program.computations.values() for i in body}
        self._kernels = {re.sub(r"\W", "_", name): name for name in self._instructions}
        self._scopes = {name: scope(i) for name, i in self._instructions.items()}
        self._modules = {found[0] for found in self._scopes.values() if found}
        self._users: dict[str, list[str]] = collections.defaultdict(list)
        for instruction in self._instructions.values():
            for operand in instruction.operands:
                self._users[operand].append(instruction.name)

    def __contains__(self, name: str) -> bool:
        """Return whether the program has an instruction of this name."""
        return name in self._instructions

    def instruction(self, operation: Operation) -> str | None:
        """Return the instruction that an operation runs; None if the program has none of its name or its kernel's.

        What a GPU runs as one graph has a single name, but XLA names its own kernels after their instructions.
        """
        return operation.name if operation.name in self else self._kernels.get(operation.kernel or "")

    def find(self, name: str) -> tuple[str, str]:
        """Return the module of an instruction, "" for none, and the kind of its operation.

        What the compiler made without a name, such as a copy, belongs to the module of what is inside of it, of the
        weight that it takes, of what uses it next, or of what it uses, whichever is the first that is known.
        """
        if found := self._scopes[name]:
            return found
        module = (
            self._known(name)
            or self._nearest(name, lambda name: self._users[name])
            or self._nearest(name, lambda name: self._instructions[name].operands)
        )
        return module or "", re.sub(r"[\d.]+$", "", name)

    def _known(self, name: str) -> str | None:
        """Return the module that an instruction itself says, "" for none; None if it says nothing."""
        found = self._scopes[name]
        return found[0] if found else self._inside(name) or self._weight(name) or None

    def _inside(self, name: str) -> str:
        """Return the module of the last instruction with a name in the computation that a fusion calls."""
        called = self._program.computations.get(self._instructions[name].called("calls") or "", [])
        return next((found[0] for i in reversed(called) if (found := self._scopes[i.name]) and found[0]), "")

    def _weight(self, name: str) -> str:
        """Return the module of the weight that an instruction takes, be it converted or copied before."""
        for operand in self._instructions[name].operands:
            source = self._instructions.get(operand)
            while source and source.opcode != "parameter" and len(source.operands) == 1:
                source = self._instructions.get(source.operands[0])
            # The name of a parameter is its place in the arguments, such as arguments[0]['conv_out.conv.weight'].
            place = re.search(r'op_name="\w+\[\d+\](\[[^"]*)"', source.text) if source else None
            parts = re.findall(r"\w+", place[1]) if place else []
            paths = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
            if found := next((path for path in paths if path in self._modules), ""):
                return found
        return ""

    def _nearest(self, start: str, neighbours: Callable[[str], Sequence[str]]) -> str | None:
        """Return the module of the nearest instruction, in a direction, that says one."""
        seen: set[str] = set()
        waiting = collections.deque(neighbours(start))
        while waiting:
            name = waiting.popleft()
            if name in self._instructions and name not in seen:
                seen.add(name)
                module = self._known(name)
                if module is not None:
                    return module
                waiting.extend(neighbours(name))
        return None


def scope(instruction: Instruction) -> tuple[str, str] | None:
    """Return the module ("" for none) and the operation in the name that jax gave an instruction, None without a name.

    "jit(step)/while/body/closed_call/transformer_blocks.{4}/attn1/bsi,nhi->bnsh/dot_general" is a dot_general in the
    module transformer_blocks.{4}.attn1. A scope may repeat the name of the one around it, as in
    "jit(run)/up_blocks.1/up_blocks.1.upsamplers.0/add". The operation of a Pallas kernel is its name.
    """
    match = re.search(r'op_name="([^"]*)"', instruction.text)
    if match is None or instruction.opcode == "parameter":
        return None
    *path, operation = match[1].removesuffix("/pallas_call").split("/")
    module = ""
    for part in path:
        if part not in NOT_SCOPES and re.fullmatch(r"[A-Za-z_]\w*(\.(\w+|\{\d+\}))*", part):
            module = part if not module or part.startswith(f"{module}.") else f"{module}.{part}"
    return module, operation
