"""Say what each file of a run was made from, and whether the files of a folder belong together.

The metadata of a safetensors file has `made_from`, the entries of generation_config.json that decided its tensors, and
`provenance`: the stage, digests of its inputs, its options, versions and the time. The comment of a video has the
second of them.
"""

import hashlib
import json
import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from pydantic import JsonValue, TypeAdapter, ValidationError
from safetensors import SafetensorError

from cogvideox.errors import UserError
from cogvideox.files import stage_files, tensors, writing
from cogvideox.files.names import VIDEO_SUFFIXES
from cogvideox.files.video_file import video_comment
from cogvideox.versions import LIBRARIES, versions


def digest(path: Path) -> str:
    """Return a SHA-256 of the tensors of a safetensors file, with names, dtypes and shapes, without metadata."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.mapped_tensors(path).items()):
        if isinstance(tensor, str):
            raise ValueError(f"{name} has dtype {tensor}")
        found.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        found.update(tensor.reshape(-1).view("uint8").data)
    return found.hexdigest()


def file_digest(path: Path) -> str:
    """Return a SHA-256 of a whole file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_metadata(stage: str, inputs: Mapping[str, str], arguments: Namespace) -> dict[str, str]:
    """Return the metadata that says how an output comes about, now: `provenance`, as JSON.

    Args:
        stage: which makes the output.
        inputs: what it is made from: the `digest` of each safetensors file of the run, by what it is `known_as`, and
            the `file_digest` of each other file, by its absolute path.
        arguments: the parsed options.
    """
    made = {
        "stage": stage,
        "inputs": dict(inputs),
        "options": {name: _plain(value) for name, value in vars(arguments).items() if value is not None},
        "versions": versions(*LIBRARIES),
        "time": writing.now(),
    }
    return {"provenance": json.dumps(made)}


def known_as(path: Path, folder: Path) -> str:
    """Return the name of the input `path` of an output in `folder`.

    By it `stale_inputs` finds the input again if it is in this folder or in one around it.
    """
    is_around = path.parent.resolve() in (folder.resolve(), *folder.resolve().parents)
    return os.path.relpath(path, folder) if is_around else path.name


def _plain(value: object) -> object:
    """Return an option as JSON can hold it."""
    return value if isinstance(value, (int, float)) else str(value)


def recorded(path: Path) -> dict:
    """Return what `as_metadata` has said of a safetensors file or a video; nothing if it does not say.

    Raises:
        UserError: the file cannot be read.
    """
    if path.suffix in VIDEO_SUFFIXES:
        text = video_comment(path)
    else:
        try:
            text = stage_files.metadata(path).get("provenance", "{}")
        except (OSError, SafetensorError) as error:
            raise UserError(tensors.unreadable(path, error)) from error
    try:
        return TypeAdapter(dict[str, JsonValue]).validate_json(text)
    except ValidationError:  # a comment of somebody else
        return {}


def stale_inputs(path: Path) -> Iterator[str]:
    """Yield the names of files beside `path`, and paths of others, that are not those which `path` was made from."""
    inputs = recorded(path).get("inputs")
    for name, known in (inputs if isinstance(inputs, dict) else {}).items():
        other = path.parent / name
        try:
            now = file_digest if Path(name).is_absolute() else digest
            if other.is_file() and now(other) != known:
                yield name
        except (OSError, SafetensorError, ValueError):
            yield name


def check_inputs(path: Path, refuse: Callable[[str], None]) -> None:
    """Call `refuse` with what is wrong unless an input of a stage was made from the files that there are now."""
    for name in stale_inputs(path):
        which = f"{name} as it is now" if Path(name).is_absolute() else f"the {name} beside it"
        refuse(f"{path} was not made from {which}; run the stage that made it again")
