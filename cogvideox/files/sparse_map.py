"""Read, write and check the map of a model's block-sparse attention: which keys each of its heads attends.

Importing this module loads neither jax nor torch.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, JsonValue

from cogvideox.errors import UserError, shortened
from cogvideox.files import checkpoint, provenance, writing
from cogvideox.files.lora import Lora
from cogvideox.files.schemas import Entries, Frames, Pixels, read_json

FILE = "sparse_attention.json"  # beside the transformer's config
AUTO = "auto"  # what --sparse_attention is for the model's own map
TOOL = "python -m tools.fit_sparse_attention"
PATTERN = r"dense|(frames|positions):\d{1,4}"  # what `Pattern` of the transformer writes
NO_PATTERN = "is no pattern; dense, frames:1 and positions:2 are"

Patterns = tuple[tuple[str, ...], ...]  # of each layer and head


class SparseMap(Entries):
    """The map of a model, and what it was found for.

    Attributes:
        height, width, frames: of the videos, in pixels.
        weights: SHA-256 of the transformer, see `weights_of`.
        loras: those that were added to it, see `known_loras`.
        error_budget: the relative error of attention that the patterns were chosen for; None where nobody chose one.
        found: how it was found, by names for people: prompts, steps, seed, versions and the like.
        patterns: of each layer and head, as text: "dense", "frames:1" or "positions:2".
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    remedy = f"find the map again with {TOOL}"
    height: Pixels
    width: Pixels
    frames: Frames
    weights: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    loras: tuple[str, ...] = ()
    error_budget: Annotated[float, Field(ge=0, le=1)] | None = None
    found: dict[str, JsonValue]
    patterns: Annotated[Patterns, Field(min_length=1)]


# --- The file ----------------------------------------------------------------------------------------------------


def find(where: Path | str, model_id: str) -> Path:
    """Return the absolute path of the map that --sparse_attention names.

    Args:
        where: a file, a folder with FILE, or AUTO for that of the model, beside its transformer's config.
        model_id: a folder, or a model of the Hugging Face Hub.

    Raises:
        UserError: it is not there.
    """
    if where == AUTO:
        name = f"transformer/{FILE}"
        path = checkpoint.model_folder(model_id, [name]) / name
        missing = f"auto: the model '{model_id}' has no {name}; {TOOL} --model_id {model_id} makes it"
    else:
        path = Path(where) / FILE if Path(where).is_dir() else Path(where)
        missing = f"{path} does not exist, or is no file; {TOOL} makes one"
    if not path.is_file():
        raise UserError(f"--sparse_attention {missing}")
    return path.absolute()


def read(path: Path) -> SparseMap:
    """Read a map.

    Raises:
        UserError: the file is missing or damaged, or a pattern is unknown.
    """
    found = SparseMap(**read_json(path, SparseMap, f"{path} does not exist, or is no file", defaults=True))
    for layer, patterns in enumerate(found.patterns):
        for head, pattern in enumerate(patterns):
            if not re.fullmatch(PATTERN, pattern):
                raise UserError(f"{path}: layer {layer}, head {head}: {shortened(repr(pattern))} {NO_PATTERN}")
    return found


def write(path: Path, found: SparseMap) -> None:
    """Write a map, whole or not at all, with a line for each layer.

    Raises:
        UserError: the file cannot be written, which `writing.check_writable` tells beforehand.
    """
    entries = json.dumps(found.model_dump(exclude={"patterns"}), indent=2, ensure_ascii=False).removesuffix("\n}")
    layers = ",\n".join(f"    {json.dumps(patterns)}" for patterns in found.patterns)
    with writing.replacing(path) as temporary:
        Path(temporary).write_text(f'{entries},\n  "patterns": [\n{layers}\n  ]\n}}\n', encoding="utf-8")


# --- What it was found for ---------------------------------------------------------------------------------------


def weights_of(model_id: str, variant: str | None) -> str | None:
    """Return the SHA-256 by which a map knows a transformer, wherever it is; None if its weights are not here.

    Raises:
        OSError, SafetensorError, ValueError: see `provenance.weights`.
    """
    return next(iter(provenance.weights(model_id, "transformer", variant).values()), None)


def known_loras(loras: Sequence[Lora]) -> tuple[str, ...]:
    """Return by what a map knows LoRAs, wherever they are: "SHA-256:scale" of each, in their order."""
    return tuple(f"{provenance.digest_in_state(one.files[0])}:{one.scale:g}" for one in loras)


def check_size(found: SparseMap, path: Path, transformer: Mapping[str, Any], size: Mapping[str, int]) -> None:
    """Raise UserError unless a map has the layers and heads of a transformer, and was found for videos of this size.

    Args:
        found, path: the map and its file.
        transformer: the config.
        size: "height", "width" and "frames" of the videos that are made.
    """
    layers, heads = transformer["num_layers"], transformer["num_attention_heads"]
    if len(found.patterns) != layers:
        raise UserError(
            f"{path} has {len(found.patterns)} layers, and the model {layers}: it is of another model; {TOOL} makes "
            "one of this model"
        )
    for layer, patterns in enumerate(found.patterns):
        if len(patterns) != heads:
            raise UserError(
                f"{path} has {len(patterns)} heads in layer {layer}, and the model {heads}: it is of another model; "
                f"{TOOL} makes one of this model"
            )
    differ = {name: ours for name, ours in size.items() if getattr(found, name) != ours}
    if differ:
        theirs = ", ".join(f"{name} {getattr(found, name)}" for name in differ)
        ours = ", ".join(f"--{name} {value}" for name, value in differ.items())
        raise UserError(f"{path} was found for {theirs}, and this run has {ours}: {TOOL} finds a map for this size")


def check_weights(
    found: SparseMap, path: Path, weights: str | None, loras: Sequence[str], warn: Callable[[str], None]
) -> None:
    """Check that a map was found with these weights.

    Args:
        found, path: the map and its file.
        weights: what `weights_of` returns of the run's model.
        loras: what `known_loras` returns of the run's LoRAs.
        warn: is told of other LoRAs, which may leave the patterns as good as they are.

    Raises:
        UserError: it was found with another transformer.
    """
    if weights not in (None, found.weights):
        raise UserError(
            f"{path} was found with other weights or another config, {found.weights[:8]}, than the transformer of this "
            f"run has, {str(weights)[:8]}: {TOOL} finds a map for these"
        )
    if tuple(loras) != found.loras:
        warn(f"{path} was found with other LoRAs, or other scales, than this run has: its error may be larger")


# --- Maps that nobody has found ----------------------------------------------------------------------------------


def made_up(text: str, layers: int, heads: int) -> Patterns:
    """Return a map that gives shares of every layer's heads a pattern, for predictions; the other heads are dense.

    Args:
        text: SHARE*PATTERN, or several of them joined by "+", such as "0.5*frames:1+0.25*positions:2".
        layers, heads: of the model.

    Raises:
        ValueError: the text is not of that form, or the shares are more than all heads.
    """
    of_layer: list[str] = []
    total = 0.0
    for share, pattern in _shares(text):
        total += share
        of_layer += [pattern] * (round(total * heads) - len(of_layer))
    of_layer += ["dense"] * (heads - len(of_layer))
    return (tuple(of_layer),) * layers


def _shares(text: str) -> list[tuple[float, str]]:
    """Return the shares and patterns that a text of `made_up` has."""
    found = []
    for part in text.split("+"):
        share, _, pattern = part.partition("*")
        if not re.fullmatch(r"\d*\.?\d+", share):
            raise ValueError(f"{part} is not of the form SHARE*PATTERN, such as 0.5*frames:1")
        if not re.fullmatch(PATTERN, pattern):
            raise ValueError(f"{pattern} {NO_PATTERN}")
        found.append((float(share), pattern))
    if (total := sum(share for share, _ in found)) > 1 + 1e-9:
        raise ValueError(f"the shares of {text} are {total:g} of all heads, which is more than 1")
    return found
