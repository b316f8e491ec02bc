"""End a program in good order when a signal asks for it.

Python raises KeyboardInterrupt wherever a program is; in the middle of an import, of a library that calls back, or of
compiled code that is a traceback or a crash. Here the handler itself ends the process, after the cleanups of the files
that are half written. Where something must become whole first, the signal is only noted, and the program looks at the
note where it is safe to stop.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import ClassVar, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # that end a stage in good order
MESSAGE = "interrupted; the files that are there are whole"


class Interruption:
    """The signal that is to end this process, and what happens when it comes."""

    number: int | None = None  # of the signal that came
    program = ""  # its name before the line that says so
    _cleanups: ClassVar[list[Callable[[], object]]] = []
    _holders = 0  # how many `held_back` there are around what runs now
    _raises = False  # whether KeyboardInterrupt is raised

    @classmethod
    def install(cls, program: str) -> None:
        """Receive SIGNALS, other than those that this process ignores, as nohup and shells make it."""
        cls.number, cls.program = None, program
        for number in SIGNALS:
            if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
                signal.signal(number, cls.receive)

    @classmethod
    def receive(cls, number: int, frame: FrameType | None) -> None:
        """Note a signal; end the process for it, unless it is the first and held back; a signal handler."""
        is_first, cls.number = cls.number is None, cls.number or number
        if cls._holders and is_first:
            return
        if cls._raises and is_first:
            raise KeyboardInterrupt
        cls._end()

    @classmethod
    def _end(cls) -> NoReturn:
        """End the process at once, without what Python does at its end: clean up, and say so in one line."""
        for cleanup in reversed(cls._cleanups):
            with contextlib.suppress(Exception):
                cleanup()
        with contextlib.suppress(OSError, ValueError):  # nobody reads it
            begin = "\n" if sys.stderr.isatty() else ""  # after the ^C that a terminal shows
            # Not by print, which may be what is interrupted.
            os.write(sys.stderr.fileno(), f"{begin}{cls.program}: {MESSAGE}\n".encode())
        os._exit(128 + (cls.number or signal.SIGINT))

    @classmethod
    def check(cls, message: str = MESSAGE) -> None:
        """Raise KeyboardInterrupt, with this message, if a signal has come: here it is safe to stop."""
        if cls.number is not None:
            raise KeyboardInterrupt(message)

    @classmethod
    @contextlib.contextmanager
    def held_back(cls) -> Iterator[None]:
        """Only note a signal that comes in the body of a `with` statement; a second one ends the process.

        After the body of the outermost such statement KeyboardInterrupt is raised for it.
        """
        came_before = cls.number is not None  # then the program is on its way to the end
        cls._holders += 1
        try:
            yield
        finally:
            cls._holders -= 1
        if not cls._holders and not came_before:
            cls.check()

    @classmethod
    @contextlib.contextmanager
    def raised(cls) -> Iterator[None]:
        """Raise KeyboardInterrupt in the body of a `with` statement, as Python does: for who waits for its children."""
        cls._raises = True
        try:
            yield
        finally:
            cls._raises = False

    @classmethod
    @contextlib.contextmanager
    def cleaned_up(cls, cleanup: Callable[[], object]) -> Iterator[None]:
        """Call `cleanup` if a signal ends the process in the body of a `with` statement, and never else."""
        cls._cleanups.append(cleanup)
        try:
            yield
        finally:
            cls._cleanups.remove(cleanup)
