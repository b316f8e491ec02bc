"""Read the configs and weights of a CogVideoX model in diffusers' folder layout, local or from the Hugging Face Hub."""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from console import UserError


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


def tensor_reader(model_id: str, component: str, names: Iterable[str]) -> Callable[[str], np.ndarray]:
    """Return a function that reads a tensor by its stored name, as an array in its stored dtype.

    Only the files' headers are read before the function is called. bfloat16 arrays have the dtype of `ml_dtypes`.

    Args:
        names: names of the tensors that will be read.

    Raises:
        UserError: a file cannot be read, or no file has one of the tensors.
    """
    folder = model_folder(model_id, [f"{component}/*.json", f"{component}/*.safetensors"]) / component
    files: dict[str, Any] = {}  # safetensors names no type for an open file
    with load_errors(folder):
        for path in sorted(folder.glob("diffusion_pytorch_model*.safetensors")):
            file = safe_open(path, framework="np")
            files |= dict.fromkeys(file.keys(), file)
    missing = set(names) - files.keys()
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} tensors are not in diffusion_pytorch_model*.safetensors, "
            f"{min(missing)} among them; get the model again"
        )
    return lambda name: files[name].get_tensor(name)


@contextlib.contextmanager
def load_errors(folder: Path) -> Iterator[None]:
    """Turn the errors that a library raises for a missing or broken file in `folder` into a UserError."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load {folder}: {reason}; get the model again or correct --model_id") from error
