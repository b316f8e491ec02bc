"""Run a program's main function: errors of one line, exit statuses, an end that waits for nobody."""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NoReturn

from cogvideox import packages
from cogvideox.cli.terminal import fitted
from cogvideox.errors import UserError, as_user_error, one_line
from cogvideox.signals import MESSAGE, Interruption

BACKGROUND = "background"  # the name of threads whose work is given up when the process ends

# Hooks of rooms above this one. If one of the first kind is true, the process ends at once; those of the second kind
# are called with an error that is no UserError, before its traceback is printed.
ENDS_AT_ONCE: list[Callable[[], bool]] = []
BEFORE_FAILURE: list[Callable[[Exception], None]] = []


def run(
    main: Callable[[Sequence[str] | None], object], argv: Sequence[str] | None = None, program: str | None = None
) -> None:
    """Run `main(argv)`; turn UserError into a line and exit status 2, and a signal into a line and status 128 + n.

    So it is with what the system refuses. Any other exception is a bug, and keeps its traceback, as all do with
    --debug. Threads named BACKGROUND do not delay the end.

    Args:
        main: takes the options, None for those of the command line.
        argv: the options.
        program: the name before the line of an error; by default that of the script that runs.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # what the terminal cannot show
    if program is None:
        script = Path(sys.argv[0])
        program = script.parent.name if script.name == "__main__.py" else script.name  # `python -m` runs a package
    Interruption.install(program)
    try:
        main(argv)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads what is printed, such as `head`, has enough
        _stop_printing()
        _leave(128 + signal.SIGPIPE)
    except KeyboardInterrupt as interrupt:
        _exit(str(interrupt) or MESSAGE, 128 + (Interruption.number or signal.SIGINT), program)
    except Exception as error:
        shown = as_user_error(error)
        if isinstance(error, ModuleNotFoundError) and error.name and packages.is_required(error.name):
            shown = UserError(packages.missing(error.name))
        if isinstance(shown, UserError):
            if isinstance(error, OSError) and error.filename is None:  # a file of ours has its name
                _stop_printing()
            if "--debug" in (sys.argv if argv is None else argv):
                traceback.print_exc()
            _exit(f"error: {shown}", 2, program)
        for prepare in BEFORE_FAILURE:
            prepare(error)
        traceback.print_exc()
        _leave(1)


def in_background(function: Callable, *arguments: Any) -> Future:
    """Run a function in a thread that does not keep the process from ending."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name=BACKGROUND).start()
    return future


def _stop_printing() -> None:
    """Send what stdout still holds, and Python flushes at its end, nowhere: who reads it has enough, or no space."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _exit(message: str, status: int, program: str) -> NoReturn:
    """Print one line on stderr that begins with the program's name, and end the process."""
    print(fitted(one_line(f"{program}: {message}"), sys.stderr), file=sys.stderr)
    _leave(status)


def _leave(status: int) -> NoReturn:
    """End the process; at once where an orderly end would crash, as with a thread that compiles, or wait."""
    is_busy = any(thread.name == BACKGROUND for thread in threading.enumerate())
    if is_busy or any(condition() for condition in ENDS_AT_ONCE):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
