"""Find the published model, one of those in configs/, that a name or a transformer's config belongs to."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path

from cogvideox.files.names import CONFIGS

# Parts of a transformer that its config says it has or has not. No training changes them, and with the number of
# channels they tell the published models apart.
PARTS = (
    *("patch_size_t", "ofs_embed_dim"),
    *("use_rotary_positional_embeddings", "use_learned_positional_embeddings"),
)


@functools.cache
def folders() -> dict[str, Path]:
    """Return the folders in configs/ by their names, sorted."""
    return {path.name: path for path in sorted(CONFIGS.iterdir()) if path.is_dir()}


def by_name(name: str) -> Path | None:
    """Return the folder of this name, in whatever case, or None; the hub writes CogVideoX-5b and CogVideoX1.5-5B."""
    return next((path for known, path in folders().items() if known.casefold() == name.casefold()), None)


def like(transformer: Mapping) -> Path | None:
    """Return the folder of the published model with the features of a transformer's config, or None."""
    return next((path for path in folders().values() if features(_transformer(path)) == features(transformer)), None)


def features(transformer: Mapping) -> list[object]:
    """Return what tells a transformer's config from those of other published models."""
    has = [bool(transformer[name]) for name in PARTS]
    return [*has, transformer["in_channels"] / transformer["out_channels"]]


def _transformer(folder: Path) -> dict:
    return json.loads((folder / "transformer" / "config.json").read_text())
