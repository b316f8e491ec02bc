"""Write files: each whole or not at all, those of a stage together, and one stage at a time in a folder.

Importing this module loads neither jax nor torch.
"""

import contextlib
import datetime
import errno
import fcntl
import glob
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from cogvideox.errors import UserError, first_line

LOCK = ".lock"
CLAIMED: set[Path] = set()  # the folders that this process has


# --- One file ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[str]:
    """Yield a temporary path in the folder of `path`, and rename the file there to `path` on success.

    A reader of `path` finds either the old file or the complete new one. What a killed process left there is removed.

    Raises:
        UserError: the file cannot be written (no permission, no space, or a folder has this name).
    """
    with write_errors(path):
        temporary = _temporary_beside(path)
        try:
            yield temporary
            _let_others_read(temporary)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


def check_writable(path: Path) -> None:
    """Raise UserError if `path` cannot be written; change no existing file."""
    with write_errors(path):
        os.unlink(_temporary_beside(path))


def check_outputs(
    outputs: Iterable[tuple[str, Path | None]], inputs: Iterable[Path | None], model_id: str | None
) -> None:
    """Check the files of a stage before it runs.

    Args:
        outputs: with the option that names each; None is no file.
        inputs: files that the stage reads, and its log.
        model_id: of the model, whose files are inputs too if it is a folder.

    Raises:
        UserError: an output is an input or another output, links resolved, or it cannot be written.
    """
    model = Path(model_id).glob("*/*") if model_id and os.path.isdir(model_id) else ()
    taken = {path.resolve(): path for path in (*filter(None, inputs), *model)}
    for option, path in outputs:
        if path is None:
            continue
        if other := taken.get(path.resolve()):
            raise UserError(f"{option} {path} would replace {other}, which this stage needs; choose another path")
        taken[path.resolve()] = path
        check_writable(path)


def _temporary_beside(path: Path) -> str:
    """Make an empty file in the folder of `path`, and the folder if it is missing; return the file's path."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EEXIST, "it is a directory, a pipe or a device")
    path.parent.mkdir(parents=True, exist_ok=True)
    host = f".{path.stem}.{socket.gethostname()}-"
    for left in path.parent.glob(f"{glob.escape(host)}*{glob.escape(path.suffix)}"):
        process = left.name.removeprefix(host).partition("-")[0]
        if process.isdecimal() and not _is_running(int(process)):
            left.unlink(missing_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{host}{os.getpid()}-", suffix=path.suffix)
    os.close(handle)
    return temporary


def _let_others_read(path: str | Path) -> None:
    """Give a file the permissions that new files have; mkstemp and safetensors make files for their owner alone."""
    os.umask(umask := os.umask(0))
    os.chmod(path, 0o666 & ~umask)


def _is_running(process: int) -> bool:
    """Return whether this host has a process of this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn errors of writing `path` into a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"cannot write {path}: {reason}; choose another path or free some disk space") from error


# --- The files of a stage ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def committing(folder: Path, stage: str) -> Iterator[Path]:
    """Yield an empty folder; on success its files replace those of `folder`: all of them, or none.

    They count from the moment when their folder gets its second name. If the process is killed while they are moved,
    `finish` moves the others.

    Raises:
        UserError: the files cannot be written.
    """
    new = folder / f".{stage}.new"
    with write_errors(folder):
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        try:
            yield new
            for path in new.iterdir():
                _let_others_read(path)
                with open(path, "rb") as file:
                    os.fsync(file)
            new.rename(new.with_suffix(".ready"))
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)  # the reason why it ends is what counts
            raise
        finish(folder)


def finish(folder: Path) -> None:
    """Move the files of a `committing` that has succeeded to `folder`, if its process did not come so far.

    Raises:
        UserError: the files cannot be moved.
    """
    for ready in folder.glob(".*.ready"):
        for file in sorted(ready.iterdir()):
            with write_errors(folder / file.name), contextlib.suppress(FileNotFoundError):  # another process was faster
                file.replace(folder / file.name)
        with contextlib.suppress(OSError):
            ready.rmdir()


@contextlib.contextmanager
def claimed(folder: Path, stage: str) -> Iterator[None]:
    """Keep `folder`, which is made if it is missing, for one process; what a killed one left there is put in order.

    The system releases the lock of a process that ends in whatever way. Nothing is done if this process has the folder.

    Raises:
        UserError: another process has the folder, which the message names, or the folder cannot be written.
    """
    if folder.resolve() in CLAIMED:
        yield
        return
    with write_errors(folder):
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locked_file(folder)
    CLAIMED.add(folder.resolve())
    try:
        owner = {"stage": stage, "host": socket.gethostname(), "process": os.getpid(), "since": now()}
        with write_errors(folder):
            os.ftruncate(lock, 0)
            os.pwrite(lock, json.dumps(owner).encode(), 0)
        finish(folder)
        for left in folder.glob(".*.new"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        CLAIMED.discard(folder.resolve())
        (folder / LOCK).unlink(missing_ok=True)
        os.close(lock)
        if is_new:
            with contextlib.suppress(OSError):  # it is no longer empty
                folder.rmdir()


def _locked_file(folder: Path) -> int:
    """Return the descriptor of the folder's lock file, which is locked for this process."""
    while True:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.stat(folder / LOCK)):
                    return lock
        except BlockingIOError:
            raise UserError(
                f"{folder} is in use by {_owner(lock)}; wait for its end, or choose another folder"
            ) from None
        os.close(lock)  # the owner of this file has just removed it


def _owner(lock: int) -> str:
    """Say which process has the lock file."""
    try:
        owner = json.loads(os.pread(lock, 4096, 0))
        return "{stage}, process {process} on {host}, since {since}".format(**owner)
    except (ValueError, KeyError, TypeError):
        return "another process"  # which has not yet written its name


def now() -> str:
    """Return the time as text, UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
