"""What a person sees of a stage: options, a line for each thing that happens, a closing table, errors of one line."""

import argparse
import contextlib
import glob
import importlib.metadata
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from tqdm import tqdm


class UserError(Exception):
    """Something the user can mend; shown as one line, exit status 2."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to the help of an option, where there is one and the help does not say it itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or "(default: " in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with defaults in the help, no abbreviated options, and errors of one line."""

    def __init__(self, description: str | None = None, **options: Any):
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=HelpFormatter,
            **options,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def run(main: Callable[[], None]) -> None:
    """Run a stage: `UserError` becomes a line and exit status 2, Ctrl-C a line and 130; bugs keep their traceback."""
    try:
        main()
    except UserError as error:
        sys.exit(_complain(f"error: {error}", 2))
    except KeyboardInterrupt:
        sys.exit(_complain("interrupted; files that were already there are unchanged", 130))


def _complain(message: str, status: int) -> int:
    program = Path(sys.argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name  # a package's, after python -m
    print(f"{name}: {message}", file=sys.stderr)
    return status


def number(kind: type, least: float, most: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a finite `kind` (int or float) between `least` and `most`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not (least <= value <= most and math.isfinite(value)):
            bound = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text} is not allowed: it must be {bound}")
        return value

    parse.__name__ = kind.__name__
    return parse


def prepare_libraries() -> None:
    """Settle the environment before jax, torch and the Hugging Face libraries are imported.

    Without a TPU, libtpu would be tried all the same and fill the screen with errors before jax falls back, so jax is
    told which platforms there are. A `JAX_PLATFORMS` of the user's is left alone.
    """
    if "JAX_PLATFORMS" not in os.environ and not _has_tpu():
        has_cuda = os.path.exists("/dev/nvidia0") and importlib.metadata.entry_points(group="jax_plugins")
        os.environ["JAX_PLATFORMS"] = "cuda,cpu" if has_cuda else "cpu"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", message="Explicitly requested dtype int64")  # torchax, while tracing
    warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called")  # jax, when ffmpeg starts: it execs at once


def _has_tpu() -> bool:
    vendors = glob.glob("/sys/bus/pci/devices/*/vendor")
    return any(Path(vendor).read_text().strip() == "0x1ae0" for vendor in vendors)  # Google's PCI vendor number


class Report:
    """Says what happens, one line each, takes the time of each phase, and prints the table at the end."""

    def __init__(self, title: str):
        self._rows: list[tuple[str, object]] = []
        print(title, flush=True)

    def say(self, line: str) -> None:
        print(f"  {line}", flush=True)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[SimpleNamespace]:
        """Time what runs inside; `seconds` of the yielded object holds the result."""
        phase, start = SimpleNamespace(), time.perf_counter()
        yield phase
        phase.seconds = time.perf_counter() - start
        self.add(name, f"{phase.seconds:.2f} s")

    def progress(self, description: str, unit: str, total: int) -> tqdm:
        """A progress bar with time per unit and time left; use as a context, `update()` as units are done."""
        return tqdm(total=total, desc=f"  {description}", unit=unit)

    def add(self, name: str, value: object) -> None:
        self._rows.append((name, value))

    def add_array(self, name: str, array: Any) -> None:
        self.add(name, f"{list(array.shape)} {str(array.dtype).removeprefix('torch.')}")

    def close(self, next_command: str | None = None) -> None:
        width = max(len(name) for name, _ in self._rows)
        print("\n".join(["", *(f"  {name:<{width}}  {value}" for name, value in self._rows)]))
        if next_command:
            print(f"\nNext: {next_command}")
