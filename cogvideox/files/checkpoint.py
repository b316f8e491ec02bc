"""Read the configs and weights of a CogVideoX model in diffusers' folder layout, local or from the Hugging Face Hub."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from cogvideox.errors import UserError, first_line
from cogvideox.files.schemas import COMPONENTS, read_json
from cogvideox.files.tensors import check_finite, read_tensors

REMEDY = "get the model again or correct --model_id"


def resolve_model_id(model_id: str) -> str:
    """Return a folder's absolute path, so that later stages find it from any directory; return a hub id unchanged."""
    return str(Path(model_id).resolve()) if os.path.isdir(model_id) else model_id


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
    if os.path.isdir(model_id):  # False for a name that no file can have
        return Path(model_id)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model_id, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise UserError(
            f"model '{model_id}' is neither a local folder nor available from the Hugging Face Hub "
            f"({first_line(error)}); correct --model_id or check the network"
        ) from error


def read_config(model_id: str, component: str, name: str = "config.json") -> dict:
    """Read the config of one component ("transformer", "vae", "scheduler", ...), without loading any weights.

    Raises:
        UserError: the component has no config, or the config is not one of a CogVideoX 1.5 for text to video.
    """
    path = model_folder(model_id, [f"{component}/{name}"]) / component / name
    missing = f"model '{model_id}' has no {component}/{name}; --model_id must name a CogVideoX model"
    return read_json(path, COMPONENTS[component], missing)


def tensor_reader(
    model_id: str, component: str, shapes: Mapping[str, tuple[int, ...]], all_of_them: bool = True
) -> Callable[[str], np.ndarray]:
    """Return a function that returns a tensor by its stored name, as a read-only array in its stored dtype.

    The arrays are the files themselves, mapped into memory: nothing is read before a value is used, and the pages that
    hold them are the system's cache. Several threads may read at a time. When a tensor is first returned it is checked
    for NaN and infinity (UserError).

    Args:
        model_id: a folder, or a model of the Hugging Face Hub.
        component: "transformer" or "vae".
        shapes: shape of each tensor that will be read, by its name.
        all_of_them: whether the component (of the VAE: its decoder) has no other tensors.

    Raises:
        UserError: a file cannot be read, no file has one of the tensors with that shape, or there are other tensors.
    """
    folder = model_folder(model_id, [f"{component}/*.json", f"{component}/*.safetensors"]) / component
    only = ("decoder." if component == "vae" else "") if all_of_them else None
    tensors = read_tensors(folder, shapes, REMEDY, only)

    @functools.cache
    def read(name: str) -> np.ndarray:
        check_finite({name: tensors[name]}, folder, REMEDY)
        return tensors[name]

    return read


@contextlib.contextmanager
def load_errors(folder: Path) -> Iterator[None]:
    """Turn what a library raises while it reads a missing or broken file in `folder` into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a library raises whatever its code meets in a broken file
        raise UserError(f"cannot load {folder}: {first_line(error)}; {REMEDY}") from error


def scheduler_config(model_id: str, changes: Mapping) -> dict:
    """Return a model's scheduler_config.json with other values of some entries."""
    return read_config(model_id, "scheduler", "scheduler_config.json") | dict(changes)
