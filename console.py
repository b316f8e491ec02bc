"""Show a stage to its user: options and their help, lines, a closing table, a log of events, errors of one line."""

import argparse
import contextlib
import dataclasses
import datetime
import errno
import gc
import glob
import importlib.metadata
import json
import math
import os
import platform
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

from tqdm import tqdm

if TYPE_CHECKING:
    import jax

# What --verbose, the log and the timings tell the versions of.
LIBRARIES = ("jax", "jaxlib", "libtpu", "torch", "torchax", "diffusers", "transformers", "flax", "safetensors")


# What the system says where permission, space or another thing that is the user's to give is missing.
REFUSALS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE, errno.ENFILE),
}
LONGEST_LINE = 1200  # characters of an error
LOG_BEGINS = b'{"time": "'  # as each line of a log of events
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # that end a stage in good order
BACKGROUND = "background"  # the name of threads whose work is given up when the process ends


at_end = contextlib.ExitStack()  # what a program must undo at its end, in whatever way it ends


class UserError(Exception):
    """An error that the user can correct; `run` shows it as one line and ends with exit status 2."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Add the default to the help of an option that has one, unless the help says it itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or "(default: " in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """Parse arguments like argparse, with defaults in the help, no abbreviated options, and errors of one line."""

    def __init__(self, description: str | None = None, **options: Any):
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=HelpFormatter,
            **options,
        )

    def error(self, message: str) -> NoReturn:
        """Print the error as one line on stderr, and end the process with exit status 2."""
        self.exit(2, one_line(f"{self.prog}: error: {message} (see --help)") + "\n")


def run(main: Callable[[], None]) -> None:
    """Run `main`; turn UserError into one line and exit status 2, and one of SIGNALS into one line and status 128 + n.

    So it is with what the system refuses. Any other exception is a bug, and keeps its traceback, as all do with
    --debug. The log of the stage's `Report` gets all of them. Threads named BACKGROUND do not delay the end.
    """
    import hosts  # it imports this module

    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # what the terminal cannot show
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):  # nohup and shells ignore some
            signal.signal(number, Interruption.hear)
    try:
        with _failures_logged(), _refusals(), at_end:
            main()
            sys.stdout.flush()
    except UserError as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        _exit(f"error: {error}", 2)
    except BrokenPipeError:  # whoever reads what is printed, such as `head`, has enough
        _stop_printing()
        _leave(128 + signal.SIGPIPE)
    except KeyboardInterrupt as interrupt:
        message = str(interrupt) or "interrupted; existing files are unchanged"
        _exit(message, 128 + (Interruption.number or signal.SIGINT))
    except Exception as error:
        hosts.outlive(error)
        traceback.print_exc()
        _leave(1)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Turn what the system refuses, wherever it comes up, into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        if error.filename is None:  # a file of ours has its name: see writing.write_errors
            _stop_printing()
        raise UserError(
            f"{error.filename or 'stdout'}: {error.strerror}; allow it or make room, or choose another path"
        ) from error
    except MemoryError as error:
        raise UserError(f"this machine's memory is too small ({first_line(error)}); make a smaller video") from error


def _stop_printing() -> None:
    """Send what stdout still holds, and Python flushes at its end, nowhere: who reads it has enough, or no space."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _failures_logged() -> Iterator[None]:
    """Tell the current report, if there is one, what the body of a `with` statement raises."""
    try:
        yield
    except BaseException as error:
        if Report.current:
            Report.current.failed(error)
        raise


class Interruption:
    """The signal that is to end this process; KeyboardInterrupt is raised for it, as Python does for Ctrl-C."""

    number: int | None = None  # of the signal that came
    _held_back = False

    @classmethod
    def hear(cls, number: int, frame: FrameType | None) -> None:
        """Raise KeyboardInterrupt, unless it is held back; a signal handler.

        It is raised a little later while a callback of the garbage collector runs: Python prints and forgets what such
        a callback raises, and jax has one.
        """
        again, cls.number = cls.number is not None and number != signal.SIGALRM, cls.number or number
        if cls._held_back and not again:
            return
        callbacks = {getattr(callback, "__code__", None) for callback in gc.callbacks}
        while frame:
            if frame.f_code in callbacks:
                signal.signal(signal.SIGALRM, cls.hear)
                signal.setitimer(signal.ITIMER_REAL, 0.01)
                return
            frame = frame.f_back
        raise KeyboardInterrupt

    @classmethod
    def check(cls) -> None:
        """Raise KeyboardInterrupt if one was raised before, where it was lost."""
        if cls.number is not None and not cls._held_back:
            raise KeyboardInterrupt

    @classmethod
    @contextlib.contextmanager
    def held_back(cls) -> Iterator[None]:
        """Let a signal change nothing but `number` in the body of a `with` statement; a second one interrupts."""
        cls._held_back = True
        try:
            yield
        finally:
            cls._held_back = False


def _exit(message: str, status: int) -> NoReturn:
    """Print one line on stderr that begins with the program's name, and end the process."""
    program = Path(sys.argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name  # `python -m` runs a package
    print(one_line(f"{name}: {message}"), file=sys.stderr)
    _leave(status)


def _leave(status: int) -> NoReturn:
    """End the process; at once where an orderly end would crash, or wait.

    A thread in the background, which may be compiling, would crash. Other processes of the run would be waited for.
    """
    import hosts  # it imports this module

    if hosts.are_many() or any(thread.name == BACKGROUND for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def one_line(text: str) -> str:
    """Return `text` as one line, with escapes for what cannot be printed, and without the middle of a long one."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown if len(shown) <= LONGEST_LINE else f"{shown[: LONGEST_LINE // 2]} ... {shown[-LONGEST_LINE // 2 :]}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's kind if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def error_message(stderr: str) -> str:
    """Return the message of the one-line error that a program of ours printed last, for who shows it as its own."""
    return stderr.strip().splitlines()[-1].split("error: ", 1)[-1]


def number(kind: type, least: float, most: float = math.inf) -> Callable[[str], float]:
    """Return an argparse type for a finite `kind` (int or float) from `least` to `most`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not (least <= value <= most and math.isfinite(value)):
            bound = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text} is not allowed: it must be {bound}")
        return value

    parse.__name__ = kind.__name__
    return parse


def prepare_libraries() -> None:
    """Set environment variables and warning filters before jax, torch and the Hugging Face libraries are imported.

    Without a TPU, jax would still try libtpu and print many errors before it falls back to another platform; with one
    that another process holds, it would fall back to the CPU. This function therefore sets `JAX_PLATFORMS`, unless the
    user has set it.
    """
    has_cuda = os.path.exists("/dev/nvidia0") and importlib.metadata.entry_points(group="jax_plugins")
    os.environ.setdefault("JAX_PLATFORMS", "tpu,cpu" if has_tpu() else "cuda,cpu" if has_cuda else "cpu")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", message="Explicitly requested dtype int64")  # torchax, while tracing
    warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called")  # jax, when ffmpeg starts; that is safe


def devices() -> "list[jax.Device]":
    """Return jax's devices.

    Raises:
        UserError: the platform that JAX_PLATFORMS names is not there, or another process holds it. What the libraries
            print of that, dozens of lines, only --debug shows.
    """
    import jax

    with tempfile.TemporaryFile() as printed:
        stderr = os.dup(2)
        os.dup2(printed.fileno(), 2)
        try:
            return jax.devices()
        except RuntimeError as error:
            platforms = os.environ.get("JAX_PLATFORMS")
            raise UserError(
                f"jax cannot use the platform {platforms}: {first_line(error)}; is there one, and does no other "
                "process hold it (a process on a TPU VM holds all chips)? JAX_PLATFORMS=cpu does without"
            ) from error
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            if "--debug" in sys.argv:
                printed.seek(0)
                sys.stderr.write(printed.read().decode(errors="replace"))


def has_tpu() -> bool:
    """Return whether this machine has a TPU on its PCI bus."""
    vendors = glob.glob("/sys/bus/pci/devices/*/vendor")
    return any(Path(vendor).read_text().strip() == "0x1ae0" for vendor in vendors)  # Google's PCI vendor number


class EventLog:
    """A file of events, one JSON object a line, each written as it happens: a killed run leaves what it did before.

    Args:
        path: the file, to which events are appended, so that the stages of a run can share it; None keeps none.

    Raises:
        UserError: the file cannot be opened, or it is there and is no such log.
    """

    def __init__(self, path: Path | None):
        self._path, self._file = path, None
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_fifo() or (path.is_file() and _begins(path) not in (b"", LOG_BEGINS)):
                raise OSError(errno.EEXIST, "it is there and is no log")
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115  it stays open until the process ends
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
            self._file = None
            print(f"  WARNING: cannot write {self._path}: {error.strerror}; the log ends here", file=sys.stderr)


def _begins(path: Path) -> bytes:
    """Return the first bytes of a file, as many as LOG_BEGINS has."""
    with open(path, "rb") as file:
        return file.read(len(LOG_BEGINS))


def add_log_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `Report`, which are the same for all stages: how much is printed, and the log."""
    from utils import path  # utils imports this module

    amount = parser.add_mutually_exclusive_group()
    amount.add_argument(
        "--verbose", action="store_true", help="also print versions, devices, plan, memory, and seconds of each step"
    )
    amount.add_argument("--quiet", action="store_true", help="print nothing but warnings and errors, on stderr")
    parser.add_argument("--debug", action="store_true", help="print the traceback of an error before its one line")
    parser.add_argument(
        "--log_json", type=path, help="append what happens to this file while it happens, one JSON object a line"
    )


class Report:
    """What a stage says: lines and a closing table for people, events for --log_json, timings beside its outputs.

    Args:
        stage: its key in timings.json, such as "stage2".
        arguments: the parsed options, those of `add_log_options` among them.

    Attributes:
        counts: of what happens often; the log has for each phase what it added.

    Raises:
        UserError: the file of --log_json cannot be opened.
    """

    current: "Report | None" = None  # the one of this process, which `run` tells how the process ends

    def __init__(self, stage: str, arguments: argparse.Namespace):
        self._stage, self._quiet, self._verbose = stage, arguments.quiet, arguments.verbose
        self._rows: list[tuple[str, object]] = []
        self._started, self._paused = time.perf_counter(), 0.0
        self._asides: dict[str, float] = {}
        self._devices: Sequence[Any] = ()
        self.counts: Counter[str] = Counter()
        self._timings: dict[str, Any] = {
            "program": Path(sys.argv[0]).name,
            "options": vars(arguments),
            "versions": {"python": platform.python_version()} | versions(*LIBRARIES),
            "devices": None,
            "seconds": {},
            "steps": [],
            "profiled": [],
        }
        self._log = EventLog(arguments.log_json)
        self.event("start", stage=stage, **{name: self._timings[name] for name in ("program", "options", "versions")})
        if self._quiet:
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        Report.current = self

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
            print(f"WARNING: {line}", file=sys.stderr)
        else:
            self._print(f"  WARNING: {line}")

    def _print(self, text: str) -> None:
        """Print on stdout, unless --quiet is given; above the progress bar, if there is one."""
        if not self._quiet:
            with tqdm.external_write_mode():
                print(text, flush=True)

    def plan(self, plan: Any) -> None:
        """Tell the plan of the run, a dataclass, and its devices, whose memory is told from now on."""
        import hosts  # it imports this module

        self._devices = hosts.own(plan.devices)
        self._timings["devices"] = f"{len(plan.devices)} x {plan.devices[0].device_kind}"
        places = [(device.id, device.device_kind, getattr(device, "coords", None)) for device in plan.devices]
        self.event("devices", devices=[dict(zip(("id", "kind", "coords"), place, strict=True)) for place in places])
        for number, kind, coords in places:
            self.detail(f"device {number}: {kind}" + (f" at {list(coords)}" if coords else ""))
        fields = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
        self.event("plan", **fields)
        for name, value in fields.items():
            self.detail(f"plan: {name} = {value}")

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
        """Time the body of a `with` statement and add a row, unless it is not to be `in_table`.

        The yielded object has `note`, text for the row that the body may set, and at the end `seconds`.
        """
        Interruption.check()
        self.event("phase_start", phase=name)
        phase, start, counts = SimpleNamespace(note=""), self._now(), self.counts.copy()
        yield phase
        phase.seconds = self._now() - start
        self._timings["seconds"][name] = round(phase.seconds, 6)
        memory = memory_of(self._devices)
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        added = {"counts": self.counts - counts}
        self.event("phase_end", phase=name, seconds=round(phase.seconds, 6), memory=memory, host_peak=host, **added)
        self.detail(f"memory after {name}, host: peak {host / 2**30:.2f} GiB")
        for one in memory:
            sizes = ", ".join(f"{what} {size / 2**30:.2f} GiB" for what, size in one.items() if what != "device")
            self.detail(f"memory after {name}, device {one['device']}: {sizes}")
        if in_table:
            self.add(name, f"{phase.seconds:.2f} s{phase.note}")

    @contextlib.contextmanager
    def progress(self, description: str, unit: str, total: int, done: int = 0) -> Iterator["Progress"]:
        """Show a progress bar, on which `done` units are done; see `Progress`."""
        with tqdm(total=total, initial=done, desc=f"  {description}", unit=unit, disable=self._quiet) as bar:
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

    def add_array(self, name: str, array: Any) -> None:
        """Add a row with the shape and the dtype of an array or a torch tensor."""
        self.add(name, f"{list(array.shape)} {str(array.dtype).removeprefix('torch.')}")

    def close(self, folder: Path, next_command: str | None = None) -> None:
        """Write the timings to `folder`, print the table, and the command to run next if there is one."""
        import timings  # it imports utils, which imports this module

        if warning := timings.write(folder, self._stage, self._timings):
            self.warn(warning)
        for name, seconds in self._asides.items():
            self.add(name, f"{seconds:.2f} s, not part of the seconds above")
        width = max(len(name) for name, _ in self._rows)
        self._print("\n".join(["", *(f"  {name:<{width}}  {value}" for name, value in self._rows)]))
        if next_command:
            self._print(f"\nNext: {next_command}")
        self.event("end", seconds=round(time.perf_counter() - self._started, 6), results=dict(self._rows))

    def failed(self, error: BaseException) -> None:
        """Write to the log what ended the stage before its end."""
        bug = not isinstance(error, (UserError, KeyboardInterrupt))
        trace = "".join(traceback.format_exception(error)) if bug else None
        self.event("error", kind=type(error).__name__, message=str(error), traceback=trace)


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
        Interruption.check()
        self.n += units
        self._bar.update(units)
        now = self._report._now()
        self._report.step(self._unit, self.n, self._total, now - self._last)
        self._last = now


def memory_of(devices: Sequence[Any]) -> list[dict[str, int]]:
    """Return the bytes "in use", at their "peak" and "of" all, of each jax device whose backend tells them."""
    found = []
    for device in devices:
        told = device.memory_stats() or {}
        names = {"in use": "bytes_in_use", "peak": "peak_bytes_in_use", "of": "bytes_limit"}
        sizes = {what: told[name] for what, name in names.items() if told.get(name, -1) >= 0}
        found += [{"device": device.id} | sizes] if sizes else []
    return found


def versions(*names: str) -> dict[str, str]:
    """Return the version of each library by name, or "not installed"; libtpu exists on few platforms."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
