"""Say where the files of several videos are: each video has a folder of its own, with the files of a single one.

`stage_outputs/prompt_0002/seed_43` is the folder of the second prompt's video from seed 43. Without --prompt_file there
are no folders of prompts, and with one video of each prompt none of seeds. So each of these folders can be the
--input_dir of a later stage, and so can each folder around them.
"""

from collections.abc import Collection
from pathlib import Path

from cogvideox.errors import UserError
from cogvideox.files import writing
from cogvideox.files.names import CONFIG, LATENTS

PROMPT, SEED = "prompt_", "seed_"


def of_prompt(folder: Path, number: int) -> Path:
    """Return the folder of a prompt, whose number is its line in --prompt_file, from 1."""
    return folder / f"{PROMPT}{number:04}"


def of_seed(folder: Path, seed: int) -> Path:
    """Return the folder of a prompt's video from `seed`."""
    return folder / f"{SEED}{seed}"


def prompts(folder: Path) -> list[Path]:
    """Return the folders of the prompts in `folder`, or `folder` itself, which then has one prompt."""
    return _numbered(folder, PROMPT) or [folder]


def videos(folder: Path) -> list[Path]:
    """Return the folders of the videos in `folder`, which may be that of a single one."""
    return [video for prompt in prompts(folder) for video in _numbered(prompt, SEED) or [prompt]]


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
    found = {path.name.removeprefix(prefix): path for path in folder.glob(f"{prefix}*") if path.is_dir()}
    return [found[number] for number in sorted(filter(str.isdecimal, found), key=int)]
