"""Run stages in a process of Ray, one after the other, and say what became of each."""

import contextlib
import dataclasses
import errno
import importlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Literal, NamedTuple

from cogvideox.errors import UserError, as_user_error, error_message, first_line, one_line, system_error
from cogvideox.files.names import ROOT
from cogvideox.files.writing import InUse
from cogvideox.run import warm
from cogvideox.run.hosts import sources
from cogvideox.signals import SIGNALS, Interruption

WARNING = "WARNING: "  # how a line begins in which a stage warns

# What the system says of a place where no file can be written, whichever it is.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

# How a stage can end. "broken" is an end with which the process may be in disorder, as after a bug or a device without
# memory; another one must go on. "busy" is a folder that another process still has.
End = Literal["made", "failed", "broken", "busy", "full", "interrupted"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a stage.

    Attributes:
        end: how it ended.
        seconds: that it took.
        error: why it is not made, in a line.
        trace: the traceback of a bug.
        warnings: that it gave.
    """

    end: End
    seconds: float
    error: str = ""
    trace: str = ""
    warnings: tuple[str, ...] = ()


class Process(NamedTuple):
    """A process: Ray's id of its machine, the machine's name, its number there, a digest of the project's files."""

    node: str
    name: str
    number: int
    sources: str


def interrupt(number: int) -> None:
    """Send SIGINT to a process of this machine, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(number, signal.SIGINT)


class Worker:
    """A process for the stages of a fleet, which keeps weights and programs from one run to the next.

    Args:
        threads: how many threads the libraries are to use, as OMP_NUM_THREADS says; None for their own choice, in place
            of Ray's, which is 1.
    """

    def __init__(self, threads: str | None):
        os.environ.pop("OMP_NUM_THREADS", None)
        if threads:
            os.environ["OMP_NUM_THREADS"] = threads
        Interruption.program = "fleet"
        for number in SIGNALS:
            signal.signal(number, Interruption.receive)  # instead of Ray's: a stage ends in good order
        warm.keep()

    def process(self) -> Process:
        """Say where this process is, and what it would run."""
        import ray

        return Process(ray.get_runtime_context().get_node_id(), socket.gethostname(), os.getpid(), sources())

    def run(self, module: str, words: Sequence[str]) -> Outcome:
        """Run a stage, by its module, with the words of a command line."""
        Interruption.number = None
        begin, out, err = time.perf_counter(), io.StringIO(), io.StringIO()
        end: End = "made"
        error, trace = "", ""
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                importlib.import_module(module).main(list(words))
        except KeyboardInterrupt as interrupt:
            end, error = "interrupted", str(interrupt)
        except SystemExit:  # argparse
            end, error = "failed", error_message(err.getvalue())
        except Exception as raised:
            end, error, trace = ended_by(raised)
        printed = [*out.getvalue().splitlines(), *err.getvalue().splitlines()]
        warnings = tuple(line.strip().removeprefix(WARNING) for line in printed if line.strip().startswith(WARNING))
        return Outcome(end, time.perf_counter() - begin, error, trace, warnings)

    def run_with_others(self, module: str, words: Sequence[str]) -> Outcome:
        """Run a stage as one of the processes that do it together, such as one on each host of a slice.

        It is a process of its own, below this one: a process can join others once, so nothing stays warm.
        """
        begin, command = time.perf_counter(), [sys.executable, str(ROOT / f"{module}.py"), *words]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:

            def pass_on() -> None:
                process.send_signal(signal.SIGINT)
                process.wait()

            with Interruption.cleaned_up(pass_on):
                _, printed = process.communicate()
        seconds, error = time.perf_counter() - begin, error_message(printed) if printed.strip() else ""
        if process.returncode in (0, 2):
            return Outcome(of_message(error) if process.returncode else "made", seconds, one_line(error))
        interrupted = process.returncode == 128 + signal.SIGINT
        trace = "" if interrupted else printed
        return Outcome("interrupted" if interrupted else "broken", seconds, one_line(error), trace)


def of_message(error: str) -> End:
    """Return how a stage of another process has ended, by its line."""
    if " is in use by " in error:
        return "busy"
    return "full" if any(os.strerror(number) in error for number in FULL) else "failed"


def ended_by(raised: Exception) -> tuple[End, str, str]:
    """Return how an exception ends a stage, the reason in a line, and its traceback if it is a bug."""
    shown = as_user_error(raised)
    if not isinstance(shown, UserError):
        kind = type(raised).__name__
        return "broken", one_line(f"{kind}: {first_line(raised)}"), "".join(traceback.format_exception(raised))
    if isinstance(shown, InUse):
        return "busy", one_line(str(shown)), ""
    cause = raised if isinstance(raised, OSError) else raised.__cause__
    is_full = cause is not None and system_error(cause) in FULL
    return "full" if is_full else "failed", one_line(str(shown)), ""
