"""Run a program's main function: errors of one line, exit statuses, an end that waits for nobody."""

import contextlib
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from cogvideox.cli.report import Report
from cogvideox.cli.signals import SIGNALS, Interruption
from cogvideox.errors import UserError, first_line, one_line

# What the system says where permission, space or another thing that is the user's to give is missing.
REFUSALS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE, errno.ENFILE),
}


BACKGROUND = "background"  # the name of threads whose work is given up when the process ends


at_end = contextlib.ExitStack()  # what a program must undo at its end, in whatever way it ends


def run(main: Callable[[], None]) -> None:
    """Run `main`; turn UserError into one line and exit status 2, and one of SIGNALS into one line and status 128 + n.

    So it is with what the system refuses. Any other exception is a bug, and keeps its traceback, as all do with
    --debug. The log of the stage's `Report` gets all of them. Threads named BACKGROUND do not delay the end.
    """
    from cogvideox.run import hosts

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
    from cogvideox.run import hosts

    if hosts.are_many() or any(thread.name == BACKGROUND for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
