"""Show a stage to its user: lines, progress, a closing table, a log of events."""

import argparse
import contextlib
import dataclasses
import datetime
import errno
import json
import os
import platform
import resource
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from tqdm import tqdm

from cogvideox.cli import terminal
from cogvideox.errors import UserError, as_user_error
from cogvideox.files import timings
from cogvideox.signals import MESSAGE, Interruption
from cogvideox.versions import LIBRARIES, versions

LOG_BEGINS = b'{"time": "'  # as each line of a log of events


class EventLog:
    """A file of events, one JSON object a line, each written as it happens: a killed run leaves what it did before.

    Args:
        path: the file, to which events are appended, so that the stages of a run can share it; None keeps none.

    Raises:
        UserError: the file cannot be opened, or it is there and is no such log.
    """

    def __init__(self, path: Path | None):
        self._path = path
        self._file: IO[bytes] | None = None
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_fifo() or (path.is_file() and _begins(path) not in (b"", LOG_BEGINS)):
                raise OSError(errno.EEXIST, "it is there and is no log")
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115  closed by `close`
        except OSError as error:
            raise UserError(f"cannot write --log_json {path}: {error.strerror}; choose another path") from error

    def write(self, event: str, **fields: Any) -> None:
        """Append an event; if that fails, say so once and keep no more, for a log must not end a run."""
        if self._file is None:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, "event": event} | fields, default=str, ensure_ascii=False)
        try:
            self._file.write(f"{line}\n".encode(errors="backslashreplace"))  # JSON reads the escape
        except OSError as error:
            self.close()
            print(f"  WARNING: cannot write {self._path}: {error.strerror}; the log ends here", file=sys.stderr)

    def close(self) -> None:
        """Keep no more."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _begins(path: Path) -> bytes:
    """Return the first bytes of a file, as many as LOG_BEGINS has."""
    with open(path, "rb") as file:
        return file.read(len(LOG_BEGINS))


class Report:
    """What a stage says: lines and a closing table for people, events for --log_json, timings beside its outputs.

    It is a context manager: the log gets the error that ends the stage before its end.

    Args:
        stage: its key in timings.json, such as "stage2".
        program: the name of the script.
        arguments: the parsed options, those of `add_log_options` among them.

    Attributes:
        counts: of what happens often; the log has for each phase what it added.

    Raises:
        UserError: the file of --log_json cannot be opened.
    """

    def __init__(self, stage: str, program: str, arguments: argparse.Namespace):
        self._stage, self._quiet, self._verbose = stage, arguments.quiet, arguments.verbose
        self._force = getattr(arguments, "force", False)
        self._rows: list[tuple[str, object]] = []
        self._started, self._paused = time.perf_counter(), 0.0
        self._asides: dict[str, float] = {}
        self._parts: dict[str, float] = {}  # of the phase in progress
        self._devices: Sequence[Any] = ()
        self.counts: Counter[str] = Counter()
        self._timings: dict[str, Any] = {
            "program": program,
            "options": vars(arguments),
            "versions": {"python": platform.python_version()} | versions(*LIBRARIES),
            "devices": None,
            "seconds": {},
            "parts": {},
            "steps": [],
            "profiled": [],
        }
        self._log = EventLog(arguments.log_json)
        self.event("start", stage=stage, **{name: self._timings[name] for name in ("program", "options", "versions")})
        if self._quiet:
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    def __enter__(self) -> "Report":
        self._until_end = contextlib.ExitStack()
        self._until_end.enter_context(Interruption.cleaned_up(lambda: self._end_early(KeyboardInterrupt(MESSAGE))))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        """Write to the log what ends the stage before its end, and close it."""
        self._until_end.close()
        if error is not None:
            self._end_early(error)
        self._log.close()

    def _end_early(self, error: BaseException) -> None:
        """Write to the log what ends the stage before its end."""
        shown = as_user_error(error)
        bug = not isinstance(shown, (UserError, KeyboardInterrupt))
        text = "".join(traceback.format_exception(error)) if bug else None
        self.event("error", kind=type(shown).__name__, message=str(shown), traceback=text)

    def event(self, event: str, **fields: Any) -> None:
        """Write an event with these fields to the log."""
        self._log.write(event, **fields)

    def title(self, title: str) -> None:
        """Print the title, which comes before everything else."""
        self.event("title", text=title)
        self._print(title)
        self.detail("versions: " + ", ".join(f"{name} {value}" for name, value in self._timings["versions"].items()))

    def say(self, line: str) -> None:
        """Print one line below the title."""
        self.event("line", text=line)
        self._print(f"  {line}")

    def detail(self, line: str) -> None:
        """Print one line below the title that only --verbose shows; the log has its content in an event."""
        if self._verbose:
            self._print(f"  {line}")

    def warn(self, line: str) -> None:
        """Print a warning; with --quiet on stderr, because stdout stays empty then."""
        self.event("warning", text=line)
        if self._quiet:
            print(terminal.fitted(f"WARNING: {line}", sys.stderr), file=sys.stderr)
        else:
            self._print(f"  WARNING: {line}")

    def refuse(self, fault: str) -> None:
        """Raise UserError because of files that do not belong together; with --force, only warn."""
        if not self._force:
            raise UserError(f"{fault}, or go on with --force")
        self.warn(f"{fault}; --force goes on")

    def _print(self, text: str) -> None:
        """Print on stdout, unless --quiet is given; above the progress bar, if there is one."""
        if not self._quiet:
            with tqdm.external_write_mode():
                print(terminal.fitted(text), flush=True)

    def plan(self, plan: Any, own_devices: Sequence[Any]) -> None:
        """Tell the plan of the run, a dataclass, and its devices; the memory of `own_devices` is told from now on."""
        self._devices = own_devices
        self._timings["devices"] = f"{len(plan.devices)} x {plan.devices[0].device_kind}"
        places = [(device.id, device.device_kind, getattr(device, "coords", None)) for device in plan.devices]
        self.event("devices", devices=[dict(zip(("id", "kind", "coords"), place, strict=True)) for place in places])
        for number, kind, coords in places:
            self.detail(f"device {number}: {kind}" + (f" at {list(coords)}" if coords else ""))
        fields = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
        self.event("plan", **fields)
        self.detail("plan:")
        for line in terminal.table(list(entries_of(fields)), indent=2):
            self.detail(line)

    def _now(self) -> float:
        """Return the seconds on a clock that stands still during `aside`."""
        return time.perf_counter() - self._paused

    @contextlib.contextmanager
    def aside(self, name: str) -> Iterator[None]:
        """Leave the body of a `with` statement out of the seconds of the phase and the step around it."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self._paused += seconds
            self._asides[name] = self._asides.get(name, 0.0) + seconds
            self.event("aside", name=name, seconds=round(seconds, 6))

    @contextlib.contextmanager
    def phase(self, name: str, in_table: bool = True) -> Iterator[SimpleNamespace]:
        """Time the body of a `with` statement and add a row, with its parts, unless it is not to be `in_table`.

        The yielded object has `note`, text for the row that the body may set, and at the end `seconds`.
        """
        self.event("phase_start", phase=name)
        phase, start, counts, self._parts = SimpleNamespace(note=""), self._now(), self.counts.copy(), {}
        yield phase
        phase.seconds = self._now() - start
        self._timings["seconds"][name] = round(phase.seconds, 6)
        parts = {part: round(seconds, 6) for part, seconds in self._parts.items()}
        self._timings["parts"] |= {name: parts} if parts else {}
        memory = memory_of(self._devices)
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        added = {"parts": parts, "counts": self.counts - counts}
        self.event("phase_end", phase=name, seconds=round(phase.seconds, 6), memory=memory, host_peak=host, **added)
        self.detail(f"memory after {name}, host: peak {host / 2**30:.2f} GiB")
        for one in memory:
            sizes = ", ".join(f"{what} {size / 2**30:.2f} GiB" for what, size in one.items() if what != "device")
            self.detail(f"memory after {name}, device {one['device']}: {sizes}")
        if in_table:
            of_parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in parts.items())
            self.add(name, f"{phase.seconds:.2f} s{phase.note}" + (f": {of_parts}" if parts else ""))

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time the body of a `with` statement as a part of the phase around it; parts of one name add up."""
        start = self._now()
        try:
            yield
        finally:
            self.add_part(name, self._now() - start)

    def add_part(self, name: str, seconds: float) -> None:
        """Say that `seconds` of the phase in progress, which no other part has, were its part `name`."""
        self._parts[name] = self._parts.get(name, 0.0) + seconds

    @contextlib.contextmanager
    def progress(self, description: str, unit: str, total: int, done: int = 0) -> Iterator["Progress"]:
        """Show a progress bar, on which `done` units are done, or lines where stderr is no terminal; see `Progress`."""
        options = {"desc": f"  {description}", "unit": unit, "disable": self._quiet} | terminal.bar_options()
        with (
            tqdm(total=total, initial=done, **options) as bar,
            Interruption.cleaned_up(bar.close),  # so that its line ends
        ):
            yield Progress(self, bar, unit, total)

    def step(self, unit: str, done: int, total: int, seconds: float) -> None:
        """Keep the seconds of a step, the one after which `done` units of `total` are done."""
        self._timings["steps"].append(round(seconds, 6))
        self.event("step", unit=unit, done=done, total=total, seconds=round(seconds, 6))
        self.detail(f"{unit} {done} of {total}: {seconds:.3f} s")

    def compiled(self, **fields: Any) -> None:
        """Keep what was compiled, or loaded from the cache, and in which time."""
        self._timings["compiled"] = fields
        self.event("compiled", **fields)

    def profiled(self) -> None:
        """Note that the step in progress, counted from 1, runs under the profiler, which slows it down."""
        self._timings["profiled"].append(len(self._timings["steps"]) + 1)

    def add(self, name: str, value: object) -> None:
        """Add a row to the closing table."""
        self._rows.append((name, value))

    def add_rows(self, rows: Iterable[tuple[str, object]]) -> None:
        """Add rows to the closing table."""
        self._rows += rows

    def add_array(self, name: str, array: Any) -> None:
        """Add a row with the shape and the dtype of an array or a torch tensor."""
        self.add(name, f"{list(array.shape)} {str(array.dtype).removeprefix('torch.')}")

    def next(self, command: str) -> None:
        """Print the command to run next."""
        self._print(f"\nNext: {command}")

    def close(self, folders: Iterable[Path], next_command: str | None = None) -> None:
        """Write the timings to each of `folders`, print the table, and the command to run next if there is one."""
        for folder in folders:
            if warning := timings.write_timings(folder, self._stage, self._timings):
                self.warn(warning)
        for name, seconds in self._asides.items():
            self.add(name, f"{seconds:.2f} s, not part of the seconds above")
        width = max(len(name) for name, _ in self._rows)
        self._print("\n".join(["", *(f"  {name:<{width}}  {value}" for name, value in self._rows)]))
        if next_command:
            self.next(next_command)
        self.event("end", seconds=round(time.perf_counter() - self._started, 6), results=dict(self._rows))


class Progress:
    """A progress bar; what lies between two updates is a step, whose seconds the report keeps.

    Attributes:
        n: how many units are done.
    """

    def __init__(self, report: Report, bar: tqdm, unit: str, total: int):
        self.n = bar.n
        self._report, self._bar, self._unit, self._total = report, bar, unit, total
        self._last = report._now()

    def update(self, units: int = 1) -> None:
        """End a step, in which `units` were done."""
        self.n += units
        self._bar.update(units)
        now = self._report._now()
        self._report.step(self._unit, self.n, self._total, now - self._last)
        self._last = now


def entries_of(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the name and the value of each entry of a plan, those inside configs and other parts by dotted names."""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from entries_of(value, f"{prefix}{name}.")
        elif dataclasses.is_dataclass(value):
            inside = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            yield from entries_of(inside, f"{prefix}{name}.")
        elif isinstance(shape := getattr(value, "shape", None), Mapping):  # a mesh: how many devices along each axis
            yield from entries_of(shape, f"{prefix}{name}.")
        else:
            yield prefix + name, ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def memory_of(devices: Sequence[Any]) -> list[dict[str, int]]:
    """Return the bytes "in use", at their "peak" and "of" all, of each jax device whose backend tells them."""
    found = []
    for device in devices:
        told = device.memory_stats() or {}
        names = {"in use": "bytes_in_use", "peak": "peak_bytes_in_use", "of": "bytes_limit"}
        sizes = {what: told[name] for what, name in names.items() if told.get(name, -1) >= 0}
        found += [{"device": device.id} | sizes] if sizes else []
    return found
