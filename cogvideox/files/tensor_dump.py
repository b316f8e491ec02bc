"""Write what a stage computes on its way to safetensors files, step by step, for inspect_tensors.py to read.

A dump is a folder. `<stage>_tensors.safetensors` has whole arrays, named "step_003/transformer_blocks.7.attn1.to_q";
`<stage>_statistics.safetensors` has, for every named point, one row of STATISTICS for each step. The tensors of both
lie in the order of execution.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cogvideox.errors import UserError
from cogvideox.files import tensors, writing

STATISTICS = ("min", "max", "mean", "std")  # NaN or infinite where a value is
# safetensors' name of each dtype.
DTYPES = {np.dtype(kind): name for name, kind in tensors.DTYPES.items()}
DTYPES |= {np.dtype(np.int64): "I64", np.dtype(np.int32): "I32", np.dtype(np.uint8): "U8", np.dtype(np.bool_): "BOOL"}


class Planned(NamedTuple):
    """Shape and dtype of an array that will be written."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class GrowingFile:
    """A safetensors file that arrays are appended to; after each `append` it is complete, whatever comes later.

    The place for the header of all planned arrays is kept free at the beginning of the file.

    Args:
        path: what it holds is lost.
        planned: all arrays that may come, in the order in which they come.
        metadata: of the file.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, path: Path, planned: Mapping[str, Planned], metadata: Mapping[str, str]):
        self._path, self._planned, self._metadata = path, planned, metadata
        self._header: dict[str, dict] = {}
        self._size = 0
        whole, end = {}, 0
        for name, array in planned.items():
            whole[name] = self._entry(array, end)
            end += array.nbytes
        self._reserved = len(self._encoded(whole)) + 8
        with writing.write_errors(path):
            self._file = open(path, "w+b")  # noqa: SIM115  closed by `close`
            self._write_header()

    def append(self, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
        """Write the next arrays, pairs of a name and an array, which must be as planned."""
        header, size = dict(self._header), self._size
        with writing.write_errors(self._path), self._cut_off_on_error():
            self._file.seek(8 + self._reserved + self._size)
            for name, array in arrays:
                expected = self._planned[name]
                assert (array.shape, array.dtype) == (expected.shape, expected.dtype), f"{name}: {array.shape}"
                self._file.write(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")
                header[name] = self._entry(expected, size)
                size += expected.nbytes
            self._file.flush()
            self._header, self._size = header, size
            self._write_header()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @contextlib.contextmanager
    def _cut_off_on_error(self) -> Iterator[None]:
        """Leave the file as it was before an `append` that was interrupted."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                self._file.truncate(8 + self._reserved + self._size)
                self._write_header()
            raise

    def _entry(self, array: Planned, start: int) -> dict:
        end = start + array.nbytes
        return {
            "dtype": DTYPES[np.dtype(array.dtype)],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }

    def _encoded(self, header: Mapping[str, dict]) -> bytes:
        encoded = json.dumps({"__metadata__": dict(self._metadata), **header}, separators=(",", ":")).encode()
        return encoded + b" " * (-len(encoded) % 8)

    def _write_header(self) -> None:
        encoded = self._encoded(self._header).ljust(self._reserved)
        self._file.seek(0)
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)
        self._file.flush()


class Dump:
    """The files of one stage in a dump folder, which are complete after each step.

    Args:
        directory: the folder, made if it is missing; files of an earlier dump of the stage are replaced.
        stage: "stage2" or "stage3".
        unit: what the numbers given to `add` count: "step" or "chunk".
        planned: for each number whose arrays are dumped, the arrays by name, in the order of execution.
        metadata: what the tensors were made from, see `stage_files.made_from`.

    Raises:
        UserError: the disk has no room for the planned arrays, or a file cannot be written; an earlier dump is kept.
    """

    def __init__(
        self,
        directory: Path,
        stage: str,
        unit: str,
        planned: Mapping[int, Mapping[str, Planned]],
        metadata: Mapping[str, str],
    ):
        self._unit = unit
        self._metadata = dict(metadata) | {"order": "execution"}
        self._statistics_path = directory / f"{stage}_statistics.safetensors"
        tensors_path = directory / f"{stage}_tensors.safetensors"
        self.paths: list[Path] = []
        flat = {self._name(number, name): array for number in planned for name, array in planned[number].items()}
        writing.check_writable(tensors_path)
        self._check_space(directory, flat.values(), tensors_path.stat().st_size if tensors_path.exists() else 0)
        for path in (self._statistics_path, tensors_path):
            with writing.write_errors(path):
                path.unlink(missing_ok=True)
        self._tensors = None
        if planned:
            self._tensors = GrowingFile(tensors_path, flat, self._metadata)
            self.paths.append(tensors_path)
        self._rows: dict[str, list[np.ndarray]] = {}
        self._numbers: list[int] = []

    def add(self, number: int, arrays: Iterable[tuple[str, np.ndarray]], statistics: Mapping[str, np.ndarray]) -> None:
        """Write the arrays of one step, and its statistics: for each name a row of STATISTICS, or another small array.

        The arrays are pairs of a name and an array, of which one at a time is needed. The names of the statistics are
        the same for all steps.
        """
        if self._tensors is not None:
            self._tensors.append((self._name(number, name), array) for name, array in arrays)
        if not statistics:
            return
        if not self._rows:
            self.paths.append(self._statistics_path)
        self._numbers.append(number)
        for name, row in statistics.items():
            self._rows.setdefault(name, []).append(row)
        stacked = {name: np.stack(rows) for name, rows in self._rows.items()}
        metadata = self._metadata | {"statistics": json.dumps(STATISTICS), self._unit: json.dumps(self._numbers)}
        planned = {name: Planned(array.shape, array.dtype) for name, array in stacked.items()}
        with writing.replacing(self._statistics_path) as temporary:
            file = GrowingFile(Path(temporary), planned, metadata)
            file.append(stacked.items())
            file.close()

    @staticmethod
    def _check_space(directory: Path, planned: Iterable[Planned], replaced: int) -> None:
        """Raise UserError unless the arrays fit the disk, of which `replaced` bytes become free."""
        needed, free = sum(array.nbytes for array in planned), shutil.disk_usage(directory).free + replaced
        if needed > free:
            raise UserError(
                f"the dump needs {needed / 2**30:.1f} GiB, and the disk of {directory} has {free / 2**30:.1f} GiB "
                "free; name fewer tensors with --dump_names, fewer steps with --dump_steps, or use --dump_stats"
            )

    def _name(self, number: int, name: str) -> str:
        return f"{row_name(self._unit, number)}/{name}"


def merged(sums: np.ndarray) -> np.ndarray:
    """Merge the sums of all chips, float32 [chips, 5 or more] as `tap.sums` returns them, into a row of STATISTICS."""
    count, total, squares = sums[:, :3].astype(np.float64).sum(0)
    mean = total / count
    with np.errstate(invalid="ignore"):  # infinite values
        deviation = np.sqrt(np.maximum(squares / count - mean * mean, 0.0))
    return np.array([sums[:, 3].min(), sums[:, 4].max(), mean, deviation], np.float32)


def statistics_of(array: np.ndarray) -> np.ndarray:
    """Compute the row of STATISTICS of an array on the host."""
    values = np.asarray(array, np.float64)
    with np.errstate(invalid="ignore"):
        return np.array([values.min(), values.max(), values.mean(), values.std()], np.float32)


def row_names(metadata: Mapping[str, str]) -> list[str]:
    """Return what the rows of a file of statistics are called: "step_000" and so on; nothing for another file."""
    if "statistics" not in metadata:
        return []
    unit = "step" if "step" in metadata else "chunk"
    return [row_name(unit, number) for number in json.loads(metadata[unit])]


def row_name(unit: str, number: int) -> str:
    """Return what a step or a chunk is called in a dump."""
    return f"{unit}_{number:03}"


def in_order(metadata: Mapping[str, str]) -> bool:
    """Return whether the tensors of a file lie in the order of execution."""
    return metadata.get("order") == "execution"


def shares(metadata: Mapping[str, str], name: str) -> Iterator[tuple[str, tuple[slice, ...]]]:
    """Yield each chip of a dump's mesh, in words, and where its share of the array `name` lies in the whole array.

    Yields nothing for an array that one chip had, or of which all chips had the same.
    """
    mesh = json.loads(metadata.get("mesh", "{}"))
    shape, split = json.loads(metadata.get("shares", "{}")).get(name.partition("/")[2], ([], []))
    if not any(math.prod(mesh[axis] for axis in axes) > 1 for axes in split):
        return
    for place in chip_places(mesh):
        where = []
        for length, axes in zip(shape, split, strict=True):
            index, parts = 0, 1
            for axis in axes:
                index, parts = index * mesh[axis] + place[axis], parts * mesh[axis]
            where.append(slice(length // parts * index, length // parts * (index + 1)))
        yield in_words(place), tuple(where)


def chip_places(mesh: Mapping[str, int]) -> list[dict[str, int]]:
    """Return the place of each chip along the axes of a mesh, in the order of the mesh."""
    return [dict(zip(mesh, place, strict=True)) for place in np.ndindex(*mesh.values())]


def in_words(place: Mapping[str, int]) -> str:
    """Return a chip's place as it is printed: "dp 0, sp 3, tp 0"."""
    return ", ".join(f"{axis} {index}" for axis, index in place.items())
