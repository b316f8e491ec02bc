"""Read the polynomial of a model's step cache."""

import json
from pathlib import Path

from cogvideox.files import published

# The coefficients of a model's polynomial are in this file beside its transformer's config. For models without one,
# configs/ has those of the published models, by the model's name.
FILE = "step_cache.json"


def polynomial_of(model_id: str) -> list[float] | None:
    """Return the coefficients for a model, the highest power first, or None if nobody has fitted any.

    Args:
        model_id: a folder, or a name on the Hugging Face Hub.

    Raises:
        ValueError: the file does not hold them.
    """
    model = Path(model_id)
    for folder in (model, published.by_name(model.name)):
        if folder and (path := folder / "transformer" / FILE).is_file():
            return [float(coefficient) for coefficient in json.loads(path.read_text())["polynomial"]]
    return None
