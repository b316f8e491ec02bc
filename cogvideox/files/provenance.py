"""Say what each file of a run was made from, and whether the files of a folder belong together.

The metadata of a safetensors file has `made_from`, the entries of generation_config.json that decided its tensors, and
`provenance`: the stage, digests of its inputs, its options, versions and the time. The comment of a video has the
second of them.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from pydantic import JsonValue, TypeAdapter, ValidationError
from safetensors import SafetensorError

from cogvideox.errors import UserError
from cogvideox.files import checkpoint, stage_files, tensors, writing
from cogvideox.files.names import VIDEO_SUFFIXES
from cogvideox.files.video_file import video_comment
from cogvideox.versions import LIBRARIES, versions

# What the weights of a model's component are called among the inputs of a file.
WEIGHTS = re.compile("(?P<component>text_encoder|transformer|vae) of (?P<model_id>.+)")
SAMPLE = 4096  # bytes


def digest(path: Path, sample: bool = False) -> str:
    """Return a SHA-256 of the tensors of a safetensors file, with names, dtypes and shapes, without metadata.

    Of each tensor only the SAMPLE bytes in its middle are read if `sample` is true.
    """
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.mapped_tensors(path).items()):
        if isinstance(tensor, str):
            raise ValueError(f"{name} has dtype {tensor}")
        found.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        values = tensor.reshape(-1).view("uint8")
        start = max(0, (values.size - SAMPLE) // 2)
        found.update(values[start : start + SAMPLE].data if sample else values.data)
    return found.hexdigest()


def file_digest(path: Path) -> str:
    """Return a SHA-256 of a whole file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights(model_id: str, component: str, variant: str | None) -> dict[str, str]:
    """Return by what a model's component is known among inputs, and a SHA-256 of it; nothing if it is not here.

    It is fast, so that each start sees other weights or another config: of weights it has all names, dtypes and shapes,
    and a sample of each tensor. It cannot see a change of a tensor that leaves the middle as it is.

    Raises:
        OSError, SafetensorError, ValueError: a file of the weights is damaged.
    """
    try:
        files = checkpoint.files_of(model_id, component, variant)
    except UserError:
        return {}
    found = hashlib.sha256()
    for file in files:
        of_file = digest_in_state(file, sample=file.suffix == ".safetensors")
        found.update(f"{file.parent.name}/{file.name} {of_file}".encode())
    return {f"{component} of {model_id}": found.hexdigest()}


def state(model_id: str, component: str, variant: str | None) -> list[tuple[Path, int, int]]:
    """Return the files of a model's component with times and sizes, whole or not; nothing if it is not here."""
    with contextlib.suppress(UserError, OSError):
        files = checkpoint.files_of(model_id, component, variant)
        return [(file, file.stat().st_mtime_ns, file.stat().st_size) for file in files]
    return []


def digest_in_state(file: Path, sample: bool = False) -> str:
    """Return the digest of a file of weights: `digest` with a sample of them, or else `file_digest`.

    It is computed once as long as the file stays as it is, for a run may have a thousand videos.
    """
    about = file.stat()
    return _digest_in_state(file, sample, about.st_ino, about.st_mtime_ns, about.st_size)


@functools.cache
def _digest_in_state(file: Path, sample: bool, *state: int) -> str:
    return digest(file, sample=True) if sample else file_digest(file)


def differences(found: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """Return the names under which two fingerprints differ.

    What the one of an earlier version lacks does not: weights, and options that nobody gives now.
    """
    nothing, names = str(None), sorted(found.keys() | wanted)
    differing = [x for x in names if found.get(x, nothing) != wanted.get(x, nothing)]
    return [x for x in differing if x in found or not WEIGHTS.match(x)]


def as_metadata(
    stage: str, inputs: Mapping[str, str], arguments: Namespace, plan: Mapping[str, object] | None = None
) -> dict[str, str]:
    """Return the metadata that says how an output comes about, now: `provenance`, as JSON.

    Args:
        stage: which makes the output.
        inputs: what it is made from: the `digest` of each safetensors file of the run, by what it is `known_as`, the
            `file_digest` of each other file, by its absolute path, and the `weights` of the model.
        arguments: the parsed options.
        plan: what came of them: everything else that decides the output, by names for people.
    """
    made = {
        "stage": stage,
        "inputs": dict(inputs),
        "plan": {name: _in_words(value) for name, value in (plan or {}).items()},
        "options": {name: plain(value) for name, value in vars(arguments).items() if value is not None},
        "versions": versions(*LIBRARIES),
        "time": writing.now(),
    }
    return {"provenance": json.dumps(made)}


def _in_words(value: object) -> str:
    """Return a part of a plan as text; a mesh is "dp 1 sp 8 tp 1"."""
    return " ".join(f"{axis} {n}" for axis, n in value.items()) if isinstance(value, dict) else str(value)


def known_as(path: Path, folder: Path) -> str:
    """Return the name of the input `path` of an output in `folder`.

    By it `stale_inputs` finds the input again if it is in this folder or in one around it.
    """
    is_around = path.parent.resolve() in (folder.resolve(), *folder.resolve().parents)
    return os.path.relpath(path, folder) if is_around else path.name


def plain(value: object) -> object:
    """Return an option as JSON can hold it; a path is absolute, for whoever reads it may be in another folder."""
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return value if isinstance(value, (int, float)) else str(value.absolute() if isinstance(value, Path) else value)


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


def decided_by(path: Path) -> dict[str, str]:
    """Return what decided the content of a file of a run, by names for people; nothing if it does not say.

    These are the entries of generation_config.json that it was made from, its plan, beginnings of the digests of its
    inputs, and the versions of the libraries.

    Raises:
        UserError: the file cannot be read, or what it says of itself is damaged.
    """
    made = recorded(path)
    plan = _object(made, "plan")
    if path.suffix not in VIDEO_SUFFIXES:
        plan = stage_files.read_made_from(path, stage_files.metadata(path)) | plan
    inputs = {_role(name): digest[:8] for name, digest in _object(made, "inputs").items()}
    return {name: str(value) for name, value in (plan | inputs | _object(made, "versions")).items()}


def how(made: Mapping) -> str:
    """Say how a file was made that says this of itself: what was decided beside its options, and the main versions."""
    versions = {name: version for name, version in _object(made, "versions").items() if name in ("jax", "torch")}
    return ", ".join(f"{name} {value}" for name, value in (_object(made, "plan") | versions).items())


def _role(name: str) -> str:
    """Return what an input is called where two runs are compared, which have it in other places."""
    if match := WEIGHTS.fullmatch(name):
        return f"weights of the {match['component']}"
    return name if Path(name).is_absolute() else Path(name).name


def input_names(path: Path) -> set[str]:
    """Return the names, without folders, of the stages' files that a file was made from."""
    return {Path(name).name for name in _object(recorded(path), "inputs") if not WEIGHTS.fullmatch(name)}


def stale_inputs(path: Path) -> Iterator[str]:
    """Yield the names of files beside `path`, and paths of others, that are not those which `path` was made from."""
    made = recorded(path)
    variant = _object(made, "options").get("variant")
    for name, known in _object(made, "inputs").items():
        try:
            if _digest_now(name, path.parent, variant) not in (None, known):
                yield name
        except (OSError, SafetensorError, ValueError):
            yield name


def knows_weights(made: Mapping) -> bool:
    """Return whether what is `recorded` of a file says which weights it was made with."""
    return any(map(WEIGHTS.fullmatch, _object(made, "inputs")))


def _object(made: Mapping, name: str) -> dict:
    """Return an entry of what is `recorded`; nothing if it is not there, or no object."""
    entry = made.get(name)
    return entry if isinstance(entry, dict) else {}


def _digest_now(name: str, folder: Path, variant: str | None) -> str | None:
    """Return the digest of an input as it is now, by its name for an output in `folder`; None if it is not there."""
    if match := WEIGHTS.fullmatch(name):
        return weights(match["model_id"], match["component"], variant).get(name)
    if not (folder / name).is_file():
        return None
    return file_digest(Path(name)) if Path(name).is_absolute() else digest(folder / name)


def check_inputs(path: Path, refuse: Callable[[str], None]) -> None:
    """Call `refuse` with what is wrong unless an input of a stage was made from the files that there are now."""
    for name in stale_inputs(path):
        if WEIGHTS.fullmatch(name):
            refuse(f"{path} was made with other weights than the {name} has now; run the stage that made it again")
            continue
        where = name if Path(name).is_absolute() else os.path.relpath(path.parent / name)
        which = f"{where} as it is now"
        refuse(f"{path} was not made from {which}; run the stage that made it again")
