"""Let the system read a model's weights from the disk while a stage imports what it needs, before it reads them."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from cogvideox.cli.program import in_background
from cogvideox.errors import UserError
from cogvideox.files import checkpoint

PIECE = 2**24  # bytes that are asked for at a time
SHARE = 0.5  # of the free memory that is filled at most: what does not stay until it is used would be read twice


def warm(model_id: str, component: str, variant: str | None = None) -> None:
    """Begin to read the files of a component's weights into the system's page cache, in the background.

    What is missing, damaged or not yet downloaded is left alone: whoever uses the weights says so.
    """
    with contextlib.suppress(UserError, OSError):
        folder = checkpoint.model_folder(model_id, [], download=False) / component
        in_background(read_ahead, checkpoint.weight_files(folder, variant), int(SHARE * available_memory()))


def read_ahead(files: Iterable[Path], most: int) -> None:
    """Read files into the page cache, one after the other, until `most` bytes of them are there."""
    for file in filter(Path.is_file, files):
        with open(file, "rb", buffering=0) as opened:
            size = os.fstat(opened.fileno()).st_size
            for begin in range(0, size, PIECE):
                if begin + PIECE > most:
                    return
                os.posix_fadvise(opened.fileno(), begin, PIECE, os.POSIX_FADV_WILLNEED)
                os.pread(opened.fileno(), 1, min(begin + PIECE, size) - 1)  # wait until the last one is there
            most -= size


def available_memory() -> int:
    """Return the bytes that the system can give without taking them from a process; 0 where it does not say."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    return 0
