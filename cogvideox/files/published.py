"""Find the published model, one of those in configs/, that a name or a transformer's config belongs to."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path

from cogvideox.features import features_of
from cogvideox.files.names import CONFIGS


@functools.cache
def folders() -> dict[str, Path]:
    """Return the folders in configs/ by their names, sorted."""
    return {path.name: path for path in sorted(CONFIGS.iterdir()) if path.is_dir()}


def by_name(name: str) -> Path | None:
    """Return the folder of this name, in whatever case, or None; the hub writes CogVideoX-5b and CogVideoX1.5-5B."""
    return next((path for known, path in folders().items() if known.casefold() == name.casefold()), None)


def like(transformer: Mapping) -> Path | None:
    """Return the folder of the published model with the features of a transformer's config, or None.

    Raises:
        ValueError: no CogVideoX has these features.
    """
    wanted = features_of(transformer)
    return next((path for path in folders().values() if features_of(_transformer(path)) == wanted), None)


def _transformer(folder: Path) -> dict:
    return json.loads((folder / "transformer" / "config.json").read_text())
