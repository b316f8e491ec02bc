"""Run a program of the project in this process, as a person's command does; to start a process takes seconds."""

import contextlib
import fcntl
import functools
import importlib
import os
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO
from unittest import mock

from cogvideox.cli import program
from cogvideox.run import accelerator


def run_here(
    script: str, *arguments: object, folder: Path, devices: int = 1, columns: int | None = None
) -> subprocess.CompletedProcess:
    """Run a script or module in the working directory `folder`; return what a process of its own would have returned.

    It finds the first `devices` of this process' jax devices. It prints to files, or, if `columns` are given, to
    terminals of so many columns. What it changes in this process is restored, and the threads that it leaves have
    ended.
    """
    module = importlib.import_module(script.removesuffix(".py"))
    command, status, found = [str(module.__file__), *map(str, arguments)], 0, accelerator.devices
    with contextlib.ExitStack() as until_end:
        for change in (
            contextlib.chdir(folder),
            jax_options_kept(),
            torch_threads_kept(),
            mock.patch.dict(os.environ),
            mock.patch.object(signal, "signal"),  # pytest has handlers of its own
            mock.patch.object(os, "_exit", sys.exit),  # how a stage ends while it compiles
            mock.patch.object(accelerator, "devices", lambda debug: found(debug)[:devices]),
        ):
            until_end.enter_context(change)
        capture = functools.partial(on_a_terminal, columns) if columns else captured
        os.environ.pop("COLUMNS", None)
        out, err = (until_end.enter_context(capture(name)) for name in ("stdout", "stderr"))
        try:
            program.run(module.main, command[1:], Path(command[0]).name)
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            for thread in threading.enumerate():
                if thread.name == program.BACKGROUND:
                    thread.join()
        printed = [read() for read in (out, err)]
    return subprocess.CompletedProcess(command, status, *printed)


@contextlib.contextmanager
def limited_files(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond so many bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def captured(name: str) -> Iterator[Callable[[], str]]:
    """Send what goes to sys.stdout or sys.stderr, and to its descriptor, to a file; yield a function that reads it."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="backslashreplace") as file, sent_to(file, name):

        def read() -> str:  # with carriage returns as ends of lines
            file.seek(0)
            return file.read()

        yield read


@contextlib.contextmanager
def on_a_terminal(columns: int, name: str) -> Iterator[Callable[[], str]]:
    """Do what `captured` does with a pseudo-terminal of so many columns, which is closed when it is read."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    parts: list[bytes] = []

    def receive() -> None:
        with contextlib.suppress(OSError):  # so ends a terminal that nobody has open
            while part := os.read(ours, 4096):
                parts.append(part)

    reader = threading.Thread(target=receive)
    reader.start()
    with contextlib.ExitStack() as until_end:
        terminal = until_end.enter_context(open(theirs, "w", encoding="utf-8"))
        until_end.enter_context(sent_to(terminal, name))

        def read() -> str:
            until_end.close()
            reader.join()
            return b"".join(parts).decode().replace("\r\n", "\n")

        yield read
    os.close(ours)


@contextlib.contextmanager
def sent_to(file: IO[str], name: str) -> Iterator[None]:
    """Send what goes to sys.stdout or sys.stderr, by its name, and to its descriptor, to `file`."""
    descriptor = {"stdout": 1, "stderr": 2}[name]
    before = os.dup(descriptor)
    os.dup2(file.fileno(), descriptor)
    try:
        with mock.patch.object(sys, name, file):
            yield
    finally:
        os.dup2(before, descriptor)
        os.close(before)


@contextlib.contextmanager
def jax_options_kept() -> Iterator[None]:
    """Restore jax's options after the body of a `with` statement, the folder of compiled programs among them."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    before = dict(jax.config.values)
    try:
        yield
    finally:
        for name, value in before.items():
            if jax.config.values[name] != value:
                jax.config.update(name, value)
        compilation_cache.reset_cache()


@contextlib.contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Restore the number of torch's threads after the body of a `with` statement."""
    before = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    try:
        yield
    finally:
        if before:
            sys.modules["torch"].set_num_threads(before)
