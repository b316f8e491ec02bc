"""Write files: each whole or not at all, those of a stage together, and one stage at a time in a folder.

Importing this module loads neither jax nor torch.
"""

import contextlib
import datetime
import errno
import fcntl
import functools
import glob
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from cogvideox.errors import UserError, reason, refusal
from cogvideox.signals import Interruption

LOCK = ".lock"
HELD = ".lock.held"  # beside it, where the file system has no locks
READY = ".ready"  # in a folder whose files are complete
CLAIMED: set[Path] = set()  # the folders that this process has

# --- What not all file systems can do ----------------------------------------------------------------------------

LACKING = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.ENOLCK}
LET_GO: dict[str, str] = {}  # the calls that a file system refused and no result needs, and its words


@contextlib.contextmanager
def _let_go(call: str) -> Iterator[None]:
    """Go on where a file system lacks a call that no result needs, and note it in LET_GO."""
    try:
        yield
    except OSError as error:
        if error.errno not in LACKING:
            raise
        LET_GO[call] = reason(error)


def to_disk(path: str | Path) -> None:
    """Return when the disk has what a file holds."""
    with _let_go("fsync"), open(path, "rb") as file:
        os.fsync(file)


def _let_others_read(path: str | Path) -> None:
    """Give a file the permissions that new files have; mkstemp and safetensors make files for their owner alone."""
    os.umask(umask := os.umask(0))
    with _let_go("chmod"):
        os.chmod(path, 0o666 & ~umask)


def _try_commit(folder: Path, warn: Callable[[str], None]) -> None:
    """Do in small what ends a stage, so that nobody learns after hours that the file system of `folder` cannot do it.

    Raises:
        UserError: it cannot; `warn` is called with what it lacks and no result needs.
    """
    LET_GO.clear()
    trial = Path(tempfile.mkdtemp(prefix=".trial-", suffix=".new", dir=folder))
    try:
        with committing(trial, "trial") as new:
            (new / "file").touch()
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    if LET_GO:
        refused = ", ".join(f"{call} ({words})" for call, words in LET_GO.items())
        warn(f"the file system of {folder} refuses {refused}; the run goes on without")


# --- One file ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[str]:
    """Yield a temporary path in the folder of `path`, and rename the file there to `path` on success.

    A reader of `path` finds either the old file or the complete new one. What a killed process left there is removed.
    A signal waits for the end of the body.

    Raises:
        UserError: the file cannot be written (no permission, no space, or a folder has this name).
    """
    with write_errors(path), Interruption.held_back():
        temporary = _temporary_beside(path)
        remove = functools.partial(os.unlink, temporary)
        try:
            with Interruption.cleaned_up(remove):
                yield temporary
                _let_others_read(temporary)
                os.replace(temporary, path)
        except BaseException:
            remove()
            raise


def check_writable(path: Path) -> None:
    """Raise UserError if `path` cannot be written; change no existing file."""
    with write_errors(path), Interruption.held_back():
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
        raise UserError(f"cannot write {path}: {refusal(error)}") from error


# --- The files of a stage ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def committing(folder: Path, stage: str) -> Iterator[Path]:
    """Yield an empty folder; on success its files replace those of `folder`: all of them, or none.

    They count from the moment when READY is among them: some file systems rename no folders. If the process is killed
    while they are moved, `finish` moves the others. A signal waits for the end of the body.

    Raises:
        UserError: the files cannot be written.
    """
    with write_errors(folder), Interruption.held_back():
        new = Path(tempfile.mkdtemp(prefix=f".{stage}-", suffix=".new", dir=folder))
        remove = functools.partial(shutil.rmtree, new, ignore_errors=True)  # the reason why it ends is what counts
        try:
            with Interruption.cleaned_up(remove):
                yield new
                for path in new.iterdir():
                    _let_others_read(path)
                    to_disk(path)
        except BaseException:
            remove()
            raise
        (new / READY).touch()
        finish(folder)


def finish(folder: Path) -> None:
    """Move the files of a `committing` that has succeeded to `folder`, if its process did not come so far.

    Raises:
        UserError: the files cannot be moved.
    """
    for ready in folder.glob(f".*.new/{READY}"):
        # Another process may be faster.
        for file in sorted({*ready.parent.iterdir()} - {ready}):
            with write_errors(folder / file.name), contextlib.suppress(FileNotFoundError):
                file.replace(folder / file.name)
        with contextlib.suppress(OSError):
            ready.unlink()
            ready.parent.rmdir()


class InUse(UserError):
    """Another process has a folder."""


@contextlib.contextmanager
def claimed(
    folder: Path, stage: str, warn: Callable[[str], None] | None = None, asked: Path | None = None
) -> Iterator[None]:
    """Keep `folder`, which is made if it is missing, for one process; what a killed one left there is put in order.

    The system releases the lock of a process that ends in whatever way. Nothing is done if this process has the folder.
    With `warn` it is tried whether a stage can end there; see `_try_commit`. An error names the file `asked`, if any.

    Raises:
        InUse: another process has the folder, which the message names.
        UserError: the folder cannot be written.
    """
    place = Path(os.path.realpath(folder))  # unlike `resolve`, takes links that loop
    if place in CLAIMED:
        yield
        return
    release = contextlib.ExitStack()
    with Interruption.cleaned_up(release.close):
        try:
            with Interruption.held_back():
                _claim(folder, place, stage, asked or folder, release)
                if warn:
                    with write_errors(folder):
                        _try_commit(folder, warn)
            yield
        finally:
            with Interruption.held_back():
                release.close()


def _claim(folder: Path, place: Path, stage: str, asked: Path, release: contextlib.ExitStack) -> None:
    """Do the work of `claimed` at its beginning; `release` gets that of its end."""
    with write_errors(asked):
        is_new = not os.path.lexists(folder)
        if is_new:
            folder.mkdir(parents=True, exist_ok=True)
            release.callback(_remove_if_empty, folder)
        lock = _locked_file(folder)
    release.callback(os.close, lock)
    for name in (LOCK, HELD):
        release.callback((folder / name).unlink, missing_ok=True)
    CLAIMED.add(place)
    release.callback(CLAIMED.discard, place)
    owner = {"stage": stage, "host": socket.gethostname(), "process": os.getpid(), "since": now()}
    with write_errors(folder):
        os.ftruncate(lock, 0)
        os.pwrite(lock, json.dumps(owner).encode(), 0)
    finish(folder)
    for left in folder.glob(".*.new"):
        shutil.rmtree(left, ignore_errors=True)


def _remove_if_empty(folder: Path) -> None:
    """Remove a folder in which nothing was written."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def _locked_file(folder: Path) -> int:
    """Return the descriptor of the folder's lock file, which is locked for this process.

    Where the file system has no locks, HELD stands for one: of the processes that make this file, one succeeds.
    """
    while True:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        in_use = f"{folder} is in use by {_owner(lock)}; wait for its end, or choose another folder"
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.stat(folder / LOCK)):
                    return lock
        except BlockingIOError:
            raise InUse(in_use) from None
        except OSError as error:
            if error.errno not in LACKING:
                raise
            try:
                os.close(os.open(folder / HELD, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                remedy = f"if that process was killed, remove {folder / HELD}"
                raise InUse(f"{in_use}; there are no locks here ({error.strerror}): {remedy}") from None
            return lock
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
