"""Read an option's text as its value: functions for argparse's `type`."""

import argparse
import difflib
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

from cogvideox.defaults import MOST_FPS, MOST_LORA_SCALE
from cogvideox.errors import first_line, shortened
from cogvideox.files import published, sparse_map
from cogvideox.files.names import VIDEO_SUFFIXES
from cogvideox.files.schemas import plain_number

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def number(kind: type, least: float, most: float = math.inf) -> Callable[[str], float]:
    """Return an argparse type for a finite `kind` (int or float) from `least` to `most`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not (least <= value <= most and math.isfinite(value)):
            bound = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text} is not allowed: it must be {bound}")
        return value

    parse.__name__ = kind.__name__
    return parse


def frame_rate(text: str) -> float:
    """Return frames per second, whole or not; an argparse type."""
    return plain_number(number(float, 1, MOST_FPS)(text))


def utf8(text: str) -> str:
    """Return `text`; an argparse type that rejects what the shell passed on but is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{shortened(repr(text))} is not UTF-8") from None
    return text


def file_path(text: str) -> Path:
    """Return `text` as a path with ~ expanded; an argparse type that rejects what is no path for safetensors."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    try:
        return Path(utf8(text)).expanduser()
    except RuntimeError as error:  # there is no such home
        raise argparse.ArgumentTypeError(f"{text}: {first_line(error)}") from None


def folder_path(text: str) -> Path:
    """Return `text` as the path of a folder; an argparse type that rejects what is plainly a video's name."""
    path = file_path(text)
    if path.suffix.lower() in VIDEO_SUFFIXES and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is the name of a video, not of a folder")
    return path


def model_id(text: str) -> str:
    """Return a Hugging Face id, or the path of a folder with ~ expanded; an argparse type."""
    return os.path.expanduser(utf8(text))


def model_or_config(text: str) -> str:
    """Return what `model_id` does, or the folder in configs/ of that name, in whatever case; an argparse type."""
    if "/" in text or os.path.isdir(path := model_id(text)):
        return model_id(text)
    if found := published.by_name(text):
        return str(found)
    known = {name.casefold(): name for name in published.folders()}
    close = difflib.get_close_matches(text.casefold(), known, n=1)
    meant = f"did you mean {known[close[0]]}?" if close else f"there are {', '.join(known.values())}"
    raise argparse.ArgumentTypeError(f"{path} is neither a folder nor one of those in configs/; {meant}")


def png_path(text: str) -> Path:
    """Return `text` as the path of a PNG file; an argparse type that accepts no other suffix."""
    path = file_path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{path} is not the name of a picture; it must end in .png")
    return path


def video_path(text: str) -> Path:
    """Return `text` as the path of a video; an argparse type that accepts the suffixes of our containers only."""
    path = file_path(text)
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        raise argparse.ArgumentTypeError(
            f"{path} is not the name of a video; it must end in {', '.join(VIDEO_SUFFIXES)}"
        )
    return path


def interval(text: str) -> tuple[int, int]:
    """Return two numbers "a,b" as a tuple; an argparse type."""
    try:
        first, last = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no interval such as 3,30") from None
    return first, last


def preset(text: str) -> str:
    """Return the name of a preset; an argparse type that takes the former name of the draft, too."""
    return "draft" if text == "seed" else text


def map_path(text: str) -> Path | str:
    """Return the path of a map of sparse attention, or "auto" for that of the model; an argparse type."""
    return text if text == sparse_map.AUTO else file_path(text)


def map_or_shares(text: str) -> Path | str:
    """Return what `map_path` does, or the text of `sparse_map.made_up`, which has a "*"; an argparse type."""
    if "*" not in text:
        return map_path(text)
    try:
        sparse_map.made_up(text, layers=1, heads=1)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def lora_option(text: str) -> str:
    """Return PATH[:scale] with an absolute path and a scale, 1.0 if there is none; an argparse type.

    What exists as it stands is a path without a scale. USER/REPO stays as it is if there is no such path: it is an id
    of the Hugging Face Hub.
    """
    path, colon, scale = text.rpartition(":")
    if not colon or "/" in scale or file_path(text).exists():
        path, scale = text, "1"
    try:
        factor = number(float, -MOST_LORA_SCALE, MOST_LORA_SCALE)(scale)
    except ValueError:
        raise argparse.ArgumentTypeError(f"the scale of {text} is {scale!r}, no number") from None
    is_id = HUB_ID.fullmatch(path) and not path.endswith(".safetensors") and not Path(path).exists()
    return f"{path if is_id else utf8(str(file_path(path).absolute()))}:{factor}"
