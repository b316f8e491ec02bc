"""Read safetensors files as the tensors that are expected.

Whatever a file holds, the result is valid or a `UserError` says in one line what is wrong.
"""

import json
import mmap
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from cogvideox.defaults import COMPUTE_DTYPES
from cogvideox.errors import UserError, first_line, reason, system_error

# The dtypes that tensors may have, by their names in a safetensors file.
DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}
WITHOUT_FLOAT16 = {"cpu": "float32", "tpu": "bfloat16"}  # what a platform that cannot multiply float16 computes in
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def mapped_tensors(path: Path) -> dict[str, np.ndarray | str]:
    """Map a safetensors file into memory, and return its tensors by name.

    In the place of a tensor whose dtype is not in DTYPES there is the dtype's name.

    Raises:
        OSError, SafetensorError: there is no such file, or it is not a complete safetensors file.
    """
    safe_open(path, framework="np")  # checks header and length; its own arrays would be copies
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        # Some file systems, CephFS and others in user space, refuse shared maps.
        mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        data = np.frombuffer(mapped, np.uint8)[file.tell() :]
    header.pop("__metadata__", None)
    return {
        name: data[slice(*entry["data_offsets"])].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
        if entry["dtype"] in DTYPES
        else entry["dtype"]
        for name, entry in header.items()
    }


def unreadable(path: Path, error: Exception) -> str:
    """Say why safetensors cannot read a file: because the system refuses it, or because of what the file holds."""
    if system_error(error):
        return f"{path} cannot be read: {reason(error)}"
    return f"{path} is not a complete safetensors file ({first_line(error)})"


def open_tensors(path: Path, remedy: str) -> dict[str, np.ndarray | str]:
    """Return what `mapped_tensors` returns; raise UserError, with the remedy, if the file is missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path} does not exist, or is no file; {remedy}")
    try:
        check_pointer(path)
        return mapped_tensors(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(unreadable(path, error) + ("" if system_error(error) else f"; {remedy}")) from error


def check_pointer(path: Path) -> None:
    """Raise UserError if a file is what Git LFS leaves in the place of a large one that it has not fetched."""
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            fetch = f"git -C {shlex.quote(str(path.parent))} lfs pull"
            raise UserError(f"{path} is a Git LFS pointer, not yet the file itself; this fetches it: {fetch}")


def read_tensors(
    files: Sequence[Path], expected: Mapping[str, tuple[int, ...] | None], remedy: str, only: str | None = None
) -> dict[str, np.ndarray]:
    """Map safetensors files into memory, and return the expected tensors by name, as read-only arrays.

    The arrays are the files themselves: nothing is read before a value is used.

    Args:
        files: one file, or those of a model's component, which are in one folder.
        expected: the shape of each tensor by name; None for any that has elements.
        remedy: what the user can do, for the errors.
        only: if given, tensors whose name begins with it are there only if they are expected; "" means all tensors.

    Raises:
        UserError: a file is not complete, or tensors are missing, unexpected, of another shape or dtype.
    """
    found: dict[str, np.ndarray | str] = {}
    where = files[0] if len(files) == 1 else files[0].parent
    for path in files:
        found |= open_tensors(path, remedy)
    integers = [name for name, tensor in found.items() if isinstance(tensor, str)]  # libraries would convert them
    wrong = {name: fault for name in (*expected, *integers) if (fault := _fault(found.get(name), expected.get(name)))}
    if only is not None:
        wrong |= {name: "is unexpected" for name in found.keys() - expected.keys() if name.startswith(only)}
    if wrong:
        name = min(wrong)
        raise UserError(f"{where}: {len(wrong)} tensors do not fit, {name} among them, which {wrong[name]}; {remedy}")
    return {name: array for name in expected if isinstance(array := found[name], np.ndarray)}


def _fault(tensor: np.ndarray | str | None, shape: tuple[int, ...] | None) -> str | None:
    """Return what is wrong with a tensor of which `shape` is expected, or None."""
    if tensor is None:
        return "is missing"
    if isinstance(tensor, str):
        return f"has dtype {tensor}, not one of {', '.join(DTYPES)}"
    if tensor.shape == shape or (shape is None and tensor.ndim and tensor.size):
        return None
    return f"has shape {list(tensor.shape)}" + (f", not {list(shape)}" if shape else "")


def values_by_dtype(arrays: Iterable[np.ndarray]) -> Counter[str]:
    """Return how many values arrays have in each dtype, by the dtype's name."""
    values: Counter[str] = Counter()
    for array in arrays:
        values[str(array.dtype)] += array.size
    return values


def compute_dtype(values: Mapping[str, int], wanted: str | None, platform: str | None) -> tuple[str, str]:
    """Return the one dtype in which a component computes, and a line on what is converted to it, "" for nothing.

    It is that of most values, one of COMPUTE_DTYPES, unless another one is wanted or the platform cannot have it.

    Args:
        values: how many values its weights have in each dtype; see `values_by_dtype`.
        wanted: the dtype that --dtype names, or None.
        platform: "tpu", "cpu" or "gpu" of jax; None for torch.
    """
    most = max(values, key=lambda dtype: values[dtype])
    chosen, reason = wanted or (most if most in COMPUTE_DTYPES else "float32"), "that of most weights"
    if wanted:
        reason = "as --dtype says"
    if chosen == "float16" and platform in WITHOUT_FLOAT16:
        chosen, reason = WITHOUT_FLOAT16[platform], f"for a {platform} cannot multiply float16"
    others = ", ".join(f"{number:,} of {dtype}" for dtype, number in sorted(values.items()) if dtype != chosen)
    return chosen, f"dtype: {chosen}, {reason}; converted while loading: {others}" if others else ""


def is_finite(array: np.ndarray) -> bool:
    """Return whether a floating-point array has neither NaN nor infinity; as fast as memory, in any dtype."""
    infinity = np.array(np.inf, array.dtype).view(f"u{array.dtype.itemsize}")
    bits = array.view(infinity.dtype).ravel()
    # All bits of the exponent are set in both; pieces of the array stay in the cache.
    return all((bits[i : i + 2**17] & infinity).max() < infinity for i in range(0, bits.size, 2**17))


def check_finite(tensors: Mapping[str, np.ndarray], where: Path, remedy: str) -> None:
    """Raise UserError if one of `tensors`, read from `where`, has NaN or infinite values."""
    for name, array in tensors.items():
        if not is_finite(array):
            raise UserError(f"{where}: {name} has NaN or infinite values; {remedy}")
