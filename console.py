"""Show a stage to its user: options and their help, progress lines, a closing table, errors of one line."""

import argparse
import contextlib
import gc
import glob
import importlib.metadata
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, NoReturn

from tqdm import tqdm


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
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def run(main: Callable[[], None]) -> None:
    """Run `main`; turn UserError into one line and exit status 2, and Ctrl-C into one line and exit status 130.

    Any other exception is a bug, and keeps its traceback.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background jobs ignore it
        for interrupting in (signal.SIGINT, signal.SIGALRM):
            signal.signal(interrupting, _interrupt)
    try:
        main()
    except UserError as error:
        _exit(f"error: {error}", 2)
    except BrokenPipeError:  # whoever reads what is printed, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        _exit("interrupted; existing files are unchanged", 130)


def _interrupt(_: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, but a little later while a callback of the garbage collector runs.

    Python prints and forgets what such a callback raises, and jax has one.
    """
    callbacks = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame:
        if frame.f_code in callbacks:
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def _exit(message: str, status: int) -> NoReturn:
    """Print one line on stderr that begins with the program's name, and end the process."""
    program = Path(sys.argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name  # `python -m` runs a package
    print(f"{name}: {message}", file=sys.stderr)
    sys.exit(status)


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

    Without a TPU, jax would still try libtpu and print many errors before it falls back to another platform. This
    function therefore sets `JAX_PLATFORMS`, unless the user has set it.
    """
    if "JAX_PLATFORMS" not in os.environ and not _has_tpu():
        has_cuda = os.path.exists("/dev/nvidia0") and importlib.metadata.entry_points(group="jax_plugins")
        os.environ["JAX_PLATFORMS"] = "cuda,cpu" if has_cuda else "cpu"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", message="Explicitly requested dtype int64")  # torchax, while tracing
    warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called")  # jax, when ffmpeg starts; that is safe


def _has_tpu() -> bool:
    """Return whether this machine has a TPU on its PCI bus."""
    vendors = glob.glob("/sys/bus/pci/devices/*/vendor")
    return any(Path(vendor).read_text().strip() == "0x1ae0" for vendor in vendors)  # Google's PCI vendor number


class Report:
    """Print a line for each thing that happens, time the phases, and print a closing table of results."""

    def __init__(self, title: str):
        self._rows: list[tuple[str, object]] = []
        print(title, flush=True)

    def say(self, line: str) -> None:
        """Print one line below the title."""
        print(f"  {line}", flush=True)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[SimpleNamespace]:
        """Time the body of a `with` statement and add a row; `seconds` of the yielded object is set at the end."""
        phase, start = SimpleNamespace(), time.perf_counter()
        yield phase
        phase.seconds = time.perf_counter() - start
        self.add(name, f"{phase.seconds:.2f} s")

    def progress(self, description: str, unit: str, total: int) -> tqdm:
        """Return a progress bar, a context manager; call its `update()` whenever one of `total` units is done."""
        return tqdm(total=total, desc=f"  {description}", unit=unit)

    def add(self, name: str, value: object) -> None:
        """Add a row to the closing table."""
        self._rows.append((name, value))

    def add_array(self, name: str, array: Any) -> None:
        """Add a row with the shape and the dtype of an array or a torch tensor."""
        self.add(name, f"{list(array.shape)} {str(array.dtype).removeprefix('torch.')}")

    def close(self, next_command: str | None = None) -> None:
        """Print the table, and the command to run next if there is one."""
        width = max(len(name) for name, _ in self._rows)
        print("\n".join(["", *(f"  {name:<{width}}  {value}" for name, value in self._rows)]))
        if next_command:
            print(f"\nNext: {next_command}")
