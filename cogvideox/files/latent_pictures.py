"""Draw latents as pictures, in colours that are linear in them: a map fitted for a model, or principal components."""

import contextlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cogvideox.errors import UserError
from cogvideox.files.contact_sheet import draw_grid, enlarged

# --- Colours of latents ------------------------------------------------------------------------------------------
MAP_FILE = "latent_rgb.json"  # in the folder of a model's VAE; tools/fit_latent_rgb.py writes it
NOT_FINITE = np.array([255, 0, 255], np.uint8)  # the colour of a latent that is NaN or infinite
NOT_FINITE_TEXT = "magenta is NaN or Inf"
# How red, green and blue grow with each principal component: the largest one is brightness, the others are faint
# tints, so that NOT_FINITE stands out.
COMPONENTS = np.array([[1, 1, 1], [0.6, 0, -0.6], [-0.3, 0.6, -0.3]])


class LatentMap(NamedTuple):
    """A linear map from the channels of latents, as stage 2 saves them, to red, green and blue from 0 to 1.

    Attributes:
        weights: float [channels, 3].
        bias: float [3].
        origin: where the map comes from, for titles.
    """

    weights: np.ndarray
    bias: np.ndarray
    origin: str


def fitted_map(model_id: str) -> LatentMap | None:
    """Read the map that was fitted for a model, or return None if there is none on this machine.

    Args:
        model_id: a folder, or a name on the Hugging Face Hub, of which only the local cache is searched.

    Raises:
        UserError: the file is not what tools/fit_latent_rgb.py writes.
    """
    path = Path(model_id) / "vae" / MAP_FILE
    if not Path(model_id).is_dir():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        with contextlib.suppress(HFValidationError):  # the path of a folder that is gone is no name on the Hub
            cached = try_to_load_from_cache(model_id, f"vae/{MAP_FILE}")
            path = Path(cached) if isinstance(cached, str) else path
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        weights, bias = np.array(stored["weights"], float), np.array(stored["bias"], float)
        origin = f"colours fitted on {stored['fitted_on']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {path} ({error!r}); run python -m tools.fit_latent_rgb again") from error
    if weights.ndim != 2 or weights.shape[1] != 3 or bias.shape != (3,):
        raise UserError(f"{path} has weights {list(weights.shape)}; run python -m tools.fit_latent_rgb again")
    return LatentMap(weights, bias, origin)


def principal_components(latents: np.ndarray) -> LatentMap:
    """Return the map that shows the three largest principal components of latents [C, T, H, W]: COMPONENTS says how.

    Each component is scaled so that all but a hundredth of its values at either end fill the range from 0 to 1. Its
    sign makes the largest of its weights positive. What is not finite is left out.
    """
    values = latents.reshape(len(latents), -1).astype(np.float64)
    values = values[:, np.isfinite(values).all(axis=0)]
    scaled, middle = np.zeros((len(latents), 3)), np.zeros(3)
    if values.size:
        _, directions = np.linalg.eigh(np.atleast_2d(np.cov(values, bias=True)))
        directions = directions[:, ::-1][:, :3]
        directions *= np.sign(directions[np.abs(directions).argmax(axis=0), range(directions.shape[1])])
        low, high = np.quantile(directions.T @ values, (0.01, 0.99), axis=1)
        varied = high - low > 1e-6 * np.abs(values).max()
        scales = np.divide(1, high - low, where=varied, out=np.zeros_like(low))
        scaled[:, : len(scales)] = directions * scales
        middle[: len(scales)] = (low + high) / 2 * scales
    return LatentMap(scaled @ COMPONENTS, 0.5 - middle @ COMPONENTS, "no map is fitted: three principal components")


def latents_to_rgb(latents: np.ndarray, mapping: LatentMap | None) -> np.ndarray:
    """Return latents, float32 [C, T, H, W], as pictures, uint8 [T, H, W, 3].

    Args:
        latents: as stage 2 saves them, that is multiplied by the VAE's scaling_factor.
        mapping: with as many channels; None stands for the latents' own `principal_components`.

    What is not finite has the colour NOT_FINITE.
    """
    mapping = mapping or principal_components(latents)
    finite = np.isfinite(latents).all(axis=0)
    colours = np.tensordot(np.where(finite, latents, 0), mapping.weights, axes=(0, 0)) + mapping.bias
    return np.where(finite[..., None], to_bytes(colours), NOT_FINITE)


def to_bytes(values: np.ndarray) -> np.ndarray:
    """Return values from 0 to 1, clipped to that range, as uint8."""
    return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)


# --- A preview ---------------------------------------------------------------------------------------------------


def preview(latents: np.ndarray, path: Path, mapping: LatentMap | None, title: str) -> None:
    """Write a contact sheet of latents, float32 [C, T, H, W], to the PNG file `path`: a picture for each latent frame.

    Small pictures are enlarged by a whole factor. The title stands above them.

    Args:
        mapping: see `latents_to_rgb`.

    Raises:
        UserError: the file cannot be written.
    """
    pictures = latents_to_rgb(latents, mapping)
    if not np.isfinite(latents).all():
        title += f"; {NOT_FINITE_TEXT}"
    pictures = enlarged(pictures, 160)
    names = [f"latent frame {i}" if pictures.shape[2] > 100 else str(i) for i in range(len(pictures))]
    draw_grid(path, title, pictures, names)
