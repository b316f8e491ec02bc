"""Say where the files of several videos are: each video has a folder of its own, with the files of a single one.

An index in the folder around them, videos.jsonl, has a line for each.

`stage_outputs/prompt_0002/seed_43` is the folder of the second prompt's video from seed 43. Without --prompt_file there
are no folders of prompts, and with one video of each prompt none of seeds. So each of these folders can be the
--input_dir of a later stage, and so can each folder around them.
"""

import contextlib
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePath
from typing import NamedTuple

from cogvideox.errors import UserError
from cogvideox.files import numbers, writing
from cogvideox.files.names import CONFIG, INDEX, LATENTS
from cogvideox.files.schemas import IndexEntry, parse_json

PROMPT, SEED = "prompt_", "seed_"


def of_prompt(folder: Path, number: int) -> Path:
    """Return the folder of a prompt, whose number is its place among the prompts of --prompt_file, from 1."""
    return folder / f"{PROMPT}{number:04}"


def of_seed(folder: Path, seed: int) -> Path:
    """Return the folder of a prompt's video from `seed`."""
    return folder / f"{SEED}{seed}"


def seeds(text: Mapping, seed: int, number: int) -> range:
    """Return the seeds of a prompt's videos: so many, from that of its line of --prompt_file on, or else from `seed`.

    `text` has the prompt's entries of generation_config.json.
    """
    first = text.get("prompt_seed")
    first = seed if first is None else first
    return range(first, first + number)


def prompts(folder: Path, only: str | None = None) -> list[Path]:
    """Return the folders of the prompts in `folder`, or `folder` itself, which then has one prompt.

    `only` has the numbers of those that are wanted, as --only says them.

    Raises:
        UserError: a prompt of `only` is not there.
    """
    found = _numbered(folder, PROMPT)
    if only is None:
        return found or [folder]
    if not found:
        raise UserError(f"--only {only} is for the folder of several prompts, and {folder} is none")
    by_number = {int(path.name.removeprefix(PROMPT)): path for path in found}
    wanted = numbers.named(only, max(by_number), "--only", first=1)
    if missing := [number for number in wanted if number not in by_number]:
        raise UserError(f"--only {only}: {of_prompt(folder, missing[0])} is not there; run stage 1 for this prompt")
    return [by_number[number] for number in wanted]


def videos(folder: Path, only: str | None = None) -> list[Path]:
    """Return the folders of the videos in `folder`, which may be that of a single one; `only` as in `prompts`."""
    return [video for prompt in prompts(folder, only) for video in _numbered(prompt, SEED) or [prompt]]


def kept_for(folder: Path, inside: Iterable[Path], only: str | None) -> list[Path]:
    """Return the folders that a stage has for itself: `folder`, or with --only those of the prompts in it.

    `inside` are the folders of the prompts, or of their videos.
    """
    if only is None:
        return [folder]
    return list(dict.fromkeys(folder / one.relative_to(folder).parts[0] for one in inside))


def check_prompts(folder: Path, new: Collection[Path]) -> None:
    """Raise UserError if `folder` has a prompt's files beside those of the folders `new`, which stage 1 is to write."""
    with writing.write_errors(folder):
        others = _numbered(folder, PROMPT)
    for other in others:
        if other not in new:
            raise UserError(
                f"{other} has another prompt, of an earlier run, which stage 2 would take too; remove it, or choose "
                "another --output_dir"
            )
    if folder not in new:
        _check_absent(folder / CONFIG, "the files of a single prompt are in the way")


def check_videos(folder: Path, new: Collection[Path]) -> None:
    """Raise UserError if a prompt's `folder` has videos which stage 3 would confuse with `new`, those of stage 2."""
    if folder in new:
        with writing.write_errors(folder):
            others = _numbered(folder, SEED)
        for other in others:
            _check_absent(other, "the folder of another video of this prompt is in the way")
    else:
        _check_absent(folder / LATENTS, "the latents of a single video are in the way")


def _check_absent(path: Path, fault: str) -> None:
    """Raise UserError if there is a file or a folder `path`."""
    if path.exists():
        raise UserError(f"{path}: {fault}; remove it, or choose another --output_dir")


def _numbered(folder: Path, prefix: str) -> list[Path]:
    """Return the folders inside `folder` whose names are the prefix and a number, in the order of the numbers."""
    found: dict[str, Path] = {}
    if not folder.is_dir():
        return []
    with contextlib.suppress(PermissionError), os.scandir(folder) as entries:
        for entry in entries:  # which knows what it is, without a question for each of thousands
            number = entry.name.removeprefix(prefix)
            is_folder = Path(entry).is_dir if entry.is_symlink() else entry.is_dir  # some links loop
            if entry.name.startswith(prefix) and number.isdecimal() and is_folder():
                found[number] = folder / entry.name
    return [found[number] for number in sorted(found, key=int)]


# --- The index ---------------------------------------------------------------------------------------------------


STATES = ("encoded", "denoised", "decoded")  # what stages 1, 2 and 3 make of a video


class Entry(NamedTuple):
    """A video as the index has it, see `IndexEntry`, with paths as the programs have them."""

    folder: Path
    prompt: str
    seed: int | None = None
    file: Path | None = None
    state: str = "encoded"


def label(folder: Path, around: Path) -> str:
    """Return what a video's folder inside another one is called in the names of files, such as prompt_0002_seed_43."""
    return str(folder.relative_to(around)).replace(os.sep, "_")


def index_file(folder: Path) -> Path:
    """Return the index that has the videos in `folder`: that of a folder around it, if there is one."""
    place = Path(os.path.abspath(folder))
    found = place / INDEX
    while re.fullmatch(rf"({PROMPT}|{SEED})\d+", place.name):
        place = place.parent
        found = place / INDEX if (place / INDEX).is_file() else found
    return found


def read_index(path: Path) -> dict[str, dict]:
    """Return the entries of an index by their folders; nothing where there is none, or where it is damaged."""
    try:
        lines = path.read_bytes().splitlines()
        return {entry["folder"]: entry for line in lines if (entry := parse_json(line, path, IndexEntry))}
    except (OSError, UserError):
        return {}


def record(folder: Path, found: Iterable[Entry], anew: bool = False, only_forward: bool = False) -> None:
    """Put entries of videos in `folder` into the index, each in the place of what that has of the same folder.

    A single video that lies in `folder` itself has no index.

    Args:
        folder: of all the videos.
        found: the entries; their paths are absolute, or relative to the working directory.
        anew: whether the index has these entries alone.
        only_forward: whether what the index has of a folder stays if its state is as far as the new one.

    Raises:
        UserError: the index cannot be written.
    """
    path = index_file(folder)
    entries = {} if anew else read_index(path)
    new = {}
    for entry in found:
        name = os.path.relpath(entry.folder, path.parent)
        file = os.path.relpath(entry.file, path.parent) if entry.file else None
        new[name] = entry._asdict() | {"folder": name, "file": file}
    if only_forward:
        far = {name: STATES.index(entry["state"]) for name, entry in entries.items()}
        new = {name: entry for name, entry in new.items() if far.get(name, -1) < STATES.index(entry["state"])}
    if not new or (not entries and not anew and [*new] == ["."]):
        return
    # A prompt without videos, and a video with a seed of its own in the folder of the prompt, exclude each other.
    around = {str(parent) for name in new for parent in PurePath(name).parents}
    inside = {name for name in entries if not {str(parent) for parent in PurePath(name).parents}.isdisjoint(new)}
    gone = {name for name in entries if not (path.parent / name).is_dir()}
    kept = {name: entry for name, entry in entries.items() if name not in around | inside | gone}
    lines = sorted((kept | new).items(), key=lambda item: [int(number) for number in re.findall(r"\d+", item[0])])
    with writing.replacing(path) as temporary:
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for _, entry in lines)
        Path(temporary).write_text(text, encoding="utf-8")
