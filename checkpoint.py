"""Read the configs and weights of a CogVideoX model in diffusers' folder layout, local or from the Hugging Face Hub."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from console import UserError

# The dtypes that weights may have, by their names in a safetensors file.
DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}


def resolve_model_id(model_id: str) -> str:
    """Return a folder's absolute path, so that later stages find it from any directory; return a hub id unchanged."""
    return str(Path(model_id).resolve()) if Path(model_id).is_dir() else model_id


def same_model(model_id: str | None, used: str) -> str:
    """Return the model that the earlier stages used; raise UserError if `model_id` is given and names another one."""
    if model_id is not None and resolve_model_id(model_id) != used:
        raise UserError(
            f"the input was made with model '{used}', not '{model_id}'; run stage 1 again or drop --model_id"
        )
    return used


def model_folder(model_id: str, patterns: list[str]) -> Path:
    """Return the folder of a model; if `model_id` is no local folder, download the files that match `patterns`.

    Raises:
        UserError: there is no such folder, and neither the Hugging Face Hub nor its cache has such a model.
    """
    if Path(model_id).is_dir():
        return Path(model_id)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model_id, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model '{model_id}' is neither a local folder nor available from the Hugging Face Hub ({reason}); "
            "correct --model_id or check the network"
        ) from error


def read_config(model_id: str, component: str, name: str = "config.json") -> dict:
    """Read the config of one component ("transformer", "vae", "scheduler", ...), without loading any weights.

    Raises:
        UserError: the component has no config, or the config is not JSON.
    """
    path = model_folder(model_id, [f"{component}/{name}"]) / component / name
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            f"model '{model_id}' has no {component}/{name}; --model_id must name a CogVideoX model"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); get the model again") from error


def tensor_reader(model_id: str, component: str, shapes: Mapping[str, tuple[int, ...]]) -> Callable[[str], np.ndarray]:
    """Return a function that returns a tensor by its stored name, as a read-only array in its stored dtype.

    The arrays are the files themselves, mapped into memory: nothing is read before a value is used, and the pages that
    hold them are the system's cache. Several threads may read at a time.

    Args:
        model_id: a folder, or a model of the Hugging Face Hub.
        component: "transformer" or "vae".
        shapes: shape of each tensor that will be read, by its name.

    Raises:
        UserError: a file cannot be read, or no file has one of the tensors with that shape.
    """
    folder = model_folder(model_id, [f"{component}/*.json", f"{component}/*.safetensors"]) / component
    tensors: dict[str, np.ndarray] = {}
    with load_errors(folder):
        for path in sorted(folder.glob("diffusion_pytorch_model*.safetensors")):
            tensors |= mapped_tensors(path)
    wrong = {name for name, shape in shapes.items() if name not in tensors or tensors[name].shape != shape}
    if wrong:
        name = min(wrong)
        found = f"has shape {list(tensors[name].shape)}" if name in tensors else "is missing"
        raise UserError(
            f"{folder}: {len(wrong)} tensors do not fit config.json, {name} among them, which {found}; "
            "get the model again"
        )
    return tensors.__getitem__


def mapped_tensors(path: Path) -> dict[str, np.ndarray]:
    """Map a safetensors file into memory, and return its tensors by name; those of no dtype in DTYPES are left out.

    Raises:
        OSError, SafetensorError: there is no such file, or it is not a complete safetensors file.
    """
    safe_open(path, framework="np")  # checks header and length; its own arrays would be copies
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = np.memmap(file, mode="r", offset=file.tell())
    header.pop("__metadata__", None)
    return {
        name: np.asarray(data[slice(*entry["data_offsets"])].view(DTYPES[entry["dtype"]]).reshape(entry["shape"]))
        for name, entry in header.items()
        if entry["dtype"] in DTYPES
    }


@contextlib.contextmanager
def load_errors(folder: Path) -> Iterator[None]:
    """Turn the errors that a library raises for a missing or broken file in `folder` into a UserError."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load {folder}: {reason}; get the model again or correct --model_id") from error
