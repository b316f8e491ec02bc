"""End a program in good order when a signal asks for it."""

import contextlib
import gc
import signal
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # that end a stage in good order


class Interruption:
    """The signal that is to end this process; KeyboardInterrupt is raised for it, as Python does for Ctrl-C."""

    number: int | None = None  # of the signal that came
    _held_back = False

    @classmethod
    def install(cls) -> None:
        """Let SIGNALS that this process does not ignore, as nohup and shells make it, raise KeyboardInterrupt."""
        cls.number = None
        for number in SIGNALS:
            if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
                signal.signal(number, cls.receive)

    @classmethod
    def receive(cls, number: int, frame: FrameType | None) -> None:
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
                signal.signal(signal.SIGALRM, cls.receive)
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
