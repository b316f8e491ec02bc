"""Read the polynomial of a model's step cache."""

import json
from pathlib import Path

from cogvideox.files.names import CONFIGS

# The coefficients of a model's polynomial are in this file beside its transformer's config. For models without one,
# configs/ has some, by the model's name.
FILE = "step_cache.json"


def polynomial_of(model_id: str) -> list[float] | None:
    """Return the coefficients for a model, the highest power first, or None if nobody has fitted any.

    Args:
        model_id: a folder, or a name on the Hugging Face Hub.

    Raises:
        ValueError: the file does not hold them.
    """
    model = Path(model_id)
    for path in (model / "transformer" / FILE, CONFIGS / model.name / "transformer" / FILE):
        if path.is_file():
            return [float(coefficient) for coefficient in json.loads(path.read_text())["polynomial"]]
    return None
