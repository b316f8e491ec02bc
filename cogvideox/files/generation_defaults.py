"""Read what a model is made for: the size, the length and the settings that stage 2 takes where no option says them."""

import argparse
import contextlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cogvideox.defaults import DRAFT, FRAMES, HEIGHT, MODEL_NAME, WIDTH
from cogvideox.errors import UserError
from cogvideox.files import checkpoint, published
from cogvideox.files.schemas import GenerationDefaults, read_json

FILE = "generation_defaults.json"  # beside model_index.json; that of a published model in configs/, by its name
# What a run has where neither an option nor the model says it, by option.
OURS = {"height": HEIGHT, "width": WIDTH, "frames": FRAMES} | DRAFT
SIZE = {"height", "width"}


class ModelDefaults(NamedTuple):
    """What a model is made for.

    Attributes:
        name: of the model that says it.
        entries: those of `GenerationDefaults` that it has.
    """

    name: str
    entries: Mapping

    def untrained(self, height: int, width: int, frames: int) -> Iterator[str]:
        """Say which of a video's height, width (pixels) and frames the model was not trained on: it may look worse."""
        entries = self.entries
        sizes = entries.get("trained_sizes", [[entries["height"], entries["width"]]] if entries.keys() >= SIZE else [])
        if sizes and not any(_is_in(height, one) and _is_in(width, other) for one, other in sizes):
            of_training = " and ".join(f"{_text(one)} x {_text(other)}" for one, other in sizes)
            yield f"{self.name} was trained on {of_training}; {height} x {width} may look worse"
        lengths = entries.get("trained_frames", [entries["frames"]] if "frames" in entries else [])
        if lengths and frames not in lengths:
            yield f"{self.name} was trained on {' and '.join(map(str, lengths))} frames; {frames} may look worse"


def of_model(model_id: str, download: bool = True) -> ModelDefaults:
    """Return what a model is made for.

    It is what the model's folder says, and for the rest what configs/ says of the published model: that of its name, or
    else that whose transformer has the same features, which a fine-tune keeps.

    Args:
        model_id: a folder, or a name on the Hugging Face Hub.
        download: whether the transformer's config may be downloaded, if the name is not that of a published model.

    Raises:
        UserError: the file is not of that form.
    """
    name = Path(checkpoint.resolve_model_id(model_id)).name
    kin = published.by_name(name) or _of_same_kind(model_id, download)
    entries, own = _read(kin / FILE), Path(model_id) / FILE
    if not own.is_file():
        return ModelDefaults(kin.name, entries)
    found = _read(own)
    # A model that has a size or a length of its own was trained on that.
    others = {"trained_sizes"} if found.keys() & SIZE else set()
    others |= {"trained_frames"} if "frames" in found else set()
    return ModelDefaults(name, {entry: value for entry, value in entries.items() if entry not in others} | found)


def by_default(model: ModelDefaults, preset: str | None) -> dict[str, Any]:
    """Return the value of each option of OURS that nobody gives: the preset's, else the model's, else ours."""
    chosen = {"draft": DRAFT, "authors": model.entries["authors"]}.get(preset or "", {})
    return {name: chosen.get(name, model.entries.get(name, ours)) for name, ours in OURS.items()}


def complete(arguments: argparse.Namespace, model: ModelDefaults, names: Collection[str] = OURS.keys()) -> list[str]:
    """Set those of the options `names`, all of OURS by default, that are left open.

    Returns a line that says which of them the model decides, if any.
    """
    given = vars(arguments)
    preset = given.get("preset")
    found = {name: by_default(model, preset)[name] for name in names if given.get(name, ...) is None}
    given.update(found)
    taken = [f"--{name} {v}" for name, v in found.items() if name in model.entries and not (preset and name in DRAFT)]
    return [f"taken from what {model.name} is made for: {' '.join(taken)}"] if taken else []


def _of_same_kind(model_id: str, download: bool) -> Path:
    """Return the folder of the published model with a model's features, else that of the default model."""
    found = None
    with contextlib.suppress(UserError):  # what is wrong is said where the config is needed
        found = published.like(checkpoint.read_config(model_id, "transformer", download=download))
    return found or published.folders()[Path(MODEL_NAME).name]


def _read(path: Path) -> dict:
    entries = read_json(path, GenerationDefaults, f"{path} is no file")
    return {entry: value for entry, value in entries.items() if value is not None}


def _is_in(pixels: int, side: int | list[int]) -> bool:
    """Return whether `pixels` are a trained side, or in its range."""
    return side[0] <= pixels <= side[1] if isinstance(side, list) else pixels == side


def _text(side: int | list[int]) -> str:
    return " to ".join(map(str, side)) if isinstance(side, list) else str(side)
