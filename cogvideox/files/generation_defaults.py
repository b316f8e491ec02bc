"""Read what a model is made for: the size, the length and the settings that stage 2 takes where no option says them."""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from cogvideox.defaults import FRAMES, HEIGHT, MODEL_NAME, PRESETS, WIDTH
from cogvideox.files import checkpoint
from cogvideox.files.names import CONFIGS
from cogvideox.files.schemas import GenerationDefaults, read_json

FILE = "generation_defaults.json"  # beside model_index.json; that of a published model in configs/, by its name
# What a run has where neither an option nor the model says it, by option.
OURS = {"height": HEIGHT, "width": WIDTH, "frames": FRAMES} | PRESETS["draft"]
SIZE = {"height", "width"}


class ModelDefaults(NamedTuple):
    """What a model is made for.

    Attributes:
        name: of the model that says it.
        entries: those of `GenerationDefaults` that its file has.
    """

    name: str
    entries: Mapping

    def untrained(self, height: int, width: int, frames: int) -> Iterator[str]:
        """Say which of a video's height, width (pixels) and frames the model was not trained on: it may look worse."""
        own_size = [[self.entries[name] for name in ("height", "width")]] if self.entries.keys() >= SIZE else []
        sizes = self.entries.get("trained_sizes", own_size)
        if sizes and [height, width] not in sizes:
            of_training = " and ".join(f"{one} x {other}" for one, other in sizes)
            yield f"{self.name} was trained on {of_training}; {height} x {width} may look worse"
        lengths = self.entries.get("trained_frames", [self.entries[n] for n in ("frames",) if n in self.entries])
        if lengths and frames not in lengths:
            yield f"{self.name} was trained on {' and '.join(map(str, lengths))} frames; {frames} may look worse"


def of_model(model_id: str) -> ModelDefaults:
    """Return what a model is made for: what its folder says, or configs/ for its name, or for the published model.

    Nothing is downloaded: for a model of the hub it is what configs/ says.

    Args:
        model_id: a folder, or a name on the Hugging Face Hub.

    Raises:
        UserError: the file is not of that form.
    """
    name, published = Path(checkpoint.resolve_model_id(model_id)).name, Path(MODEL_NAME).name
    files = {Path(model_id) / FILE: name, CONFIGS / name / FILE: name, CONFIGS / published / FILE: published}
    path = next(path for path in files if path.is_file())
    entries = read_json(path, GenerationDefaults, f"{path} is no file")
    return ModelDefaults(files[path], {entry: value for entry, value in entries.items() if value is not None})


def left_open(arguments: argparse.Namespace, model: ModelDefaults) -> dict[str, object]:
    """Return a value for each option of OURS that is None in the parsed options: the model's, or else ours."""
    given = vars(arguments)
    return {name: model.entries.get(name, ours) for name, ours in OURS.items() if given.get(name, ...) is None}


def complete(arguments: argparse.Namespace, model: ModelDefaults) -> list[str]:
    """Set the options that are left open; return a line that says which of them the model has decided, if any."""
    found = left_open(arguments, model)
    vars(arguments).update(found)
    taken = [f"--{name} {found[name]}" for name in found if name in model.entries]
    return [f"taken from what {model.name} is made for: {' '.join(taken)}"] if taken else []
