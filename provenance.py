"""Say what each file of a run was made from, and whether the files of a folder belong together.

The metadata of a safetensors file has `made_from`, the entries of generation_config.json that decided its tensors, and
`provenance`: the stage, digests of its inputs, its options, versions and the time. The comment of a video has the
second of them.
"""

import contextlib
import hashlib
import json
import os
import re
import shlex
import subprocess
from argparse import Namespace
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path

from pydantic import JsonValue, TypeAdapter, ValidationError
from safetensors import SafetensorError

import reading
import resume
import utils
import videos
import writing
from console import LIBRARIES, UserError, first_line, versions

# The files of a run, each made from the one before, and the stages that make them.
CHAIN = (
    ("stage1_text_encoder.py", utils.EMBEDDINGS),
    ("stage2_transformer.py", utils.LATENTS),
    ("stage3_vae_decoder.py", utils.VIDEO),
)


def digest(path: Path) -> str:
    """Return a SHA-256 of the tensors of a safetensors file, with names, dtypes and shapes, without metadata."""
    found = hashlib.sha256()
    for name, tensor in sorted(reading.mapped_tensors(path).items()):
        if isinstance(tensor, str):
            raise ValueError(f"{name} has dtype {tensor}")
        found.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        found.update(tensor.reshape(-1).view("uint8").data)
    return found.hexdigest()


def file_digest(path: Path) -> str:
    """Return a SHA-256 of a whole file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(stage: str, inputs: Mapping[str, str], arguments: Namespace) -> dict[str, str]:
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


def read(path: Path) -> dict:
    """Return what `describe` has said of a safetensors file or a video; nothing if it does not say.

    Raises:
        UserError: the file cannot be read.
    """
    if path.suffix in utils.VIDEO_SUFFIXES:
        text = video_comment(path)
    else:
        try:
            text = utils.metadata(path).get("provenance", "{}")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is not a complete safetensors file ({first_line(error)})") from error
    try:
        return TypeAdapter(dict[str, JsonValue]).validate_json(text)
    except ValidationError:  # a comment of somebody else
        return {}


def video_comment(path: Path) -> str:
    """Return the comment in a video's metadata; {} if there is none, or if ffmpeg cannot read the video."""
    from imageio_ffmpeg import get_ffmpeg_exe

    command = [get_ffmpeg_exe(), "-v", "quiet", "-i", path, "-f", "ffmetadata", "-"]
    process = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    lines = re.findall(r"^comment=(.*)$", process.stdout.decode(errors="replace"), re.M)
    # ffmpeg puts a backslash before some characters.
    return re.sub(r"\\(.)", r"\1", lines[0]) if lines else "{}"


def stale_inputs(path: Path) -> Iterator[str]:
    """Yield the names of files beside `path`, and paths of others, that are not those which `path` was made from."""
    inputs = read(path).get("inputs")
    for name, known in (inputs if isinstance(inputs, dict) else {}).items():
        other = path.parent / name
        try:
            now = file_digest if Path(name).is_absolute() else digest
            if other.is_file() and now(other) != known:
                yield name
        except (OSError, SafetensorError, ValueError):
            yield name


def check_inputs(path: Path, force: bool) -> None:
    """Check that an input of a stage was made from the files that there are now; with `force`, only warn."""
    for name in stale_inputs(path):
        which = f"{name} as it is now" if Path(name).is_absolute() else f"the {name} beside it"
        utils.refuse(f"{path} was not made from {which}; run the stage that made it again", force)


# --- python utils.py status --------------------------------------------------------------------------------------


def status(folder: Path) -> Iterator[str]:
    """Yield lines on the files of a run: what there is, what it was made from, what is stale, what to run next."""
    todo: set[str] = set()
    prompts = videos.prompts(folder)
    for source in prompts:
        todo.update((yield from status_of_prompt(source)))
    script = next((script for script, _ in CHAIN if script in todo), None)
    if script is None:
        yield "All is there and fits together."
        return
    command = ["python", script, "--input_dir", str(folder)]
    if script == CHAIN[0][0]:
        text = read_text(folder).get("prompt", "...")
        prompt = ["--prompt", text] if prompts == [folder] else ["--prompt_file", "..."]
        command = ["python", script, "--output_dir", str(folder), *prompt]
    yield f"Next: {shlex.join(command)}"


def read_text(folder: Path) -> dict:
    """Return what stage 1 has written into a folder's generation_config.json; nothing if it cannot be read."""
    with contextlib.suppress(UserError):
        return utils.read_config(folder, reading.TextConfig)
    return {}


def status_of_prompt(source: Path) -> Generator[str, None, set[str]]:
    """Yield lines on the files of a prompt, whose videos may have folders of their own; return the scripts to run."""
    path = source / utils.CONFIG
    try:
        config: Mapping = utils.read_config(source, reading.TextConfig)
        yield f"{path}: prompt {config['prompt']!r}, model {config['model_id']}"
    except UserError as error:
        config = {}
        yield str(error)
    embeddings, *others = CHAIN
    needed = yield from status_of_files(source, [embeddings], config, None if config else embeddings[0])
    scripts = [needed]
    for video in videos.videos(source):
        of_video = config if video == source else read_text(video)
        scripts.append((yield from status_of_files(video, others, of_video, needed)))
    return set(filter(None, scripts))


def status_of_files(
    folder: Path, chain: Iterable[tuple[str, str]], config: Mapping, todo: str | None
) -> Generator[str, None, str | None]:
    """Yield a line on each file of a part of CHAIN; return the first script to run, `todo` if it is given."""
    for script, name in chain:
        path = folder / name
        fault = fault_of(path, config)
        if fault is None and todo:
            fault = "is to be made again, after what comes before it"
        if fault is None:
            yield f"{path}: made {read(path).get('time', 'at an unknown time')}"
        else:
            yield f"{path}: {fault}"
            todo = todo or script
        if name == utils.LATENTS and (folder / resume.FILE).exists():
            yield f"{folder / resume.FILE}: an unfinished run, from which stage 2 goes on"
    return todo


def fault_of(path: Path, config: Mapping) -> str | None:
    """Return why a file of a run must be made (again), or None."""
    if not path.exists():
        return "is not there"
    try:
        if path.suffix not in utils.VIDEO_SUFFIXES and (difference := utils.difference(path, config)):
            return f"is stale: it {difference}"
        for name in stale_inputs(path):
            return f"is stale: it was made from another {name}"
    except (UserError, OSError, SafetensorError) as error:
        return f"is damaged: {first_line(error)}"
    return None
