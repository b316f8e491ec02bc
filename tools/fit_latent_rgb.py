"""Fit the linear map from a model's latents to colours, with which pictures of latents are drawn.

    python -m tools.fit_latent_rgb tiny_model

The map turns each latent into the mean colour of the pixels that it stands for, as well as a linear map can, for clips
of moving shapes. It is written to `vae/latent_rgb.json` in the model's folder, where the pictures of latents find it.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cogvideox.cli.parser import ArgumentParser
from cogvideox.cli.program import run
from cogvideox.cli.terminal import bar_options
from cogvideox.cli.types import number
from cogvideox.files import checkpoint, writing
from cogvideox.files.latent_pictures import MAP_FILE
from cogvideox.run.accelerator import prepare_libraries

DIGITS = 5  # of the map's numbers, after the point


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(__doc__.splitlines()[0], prog="python -m tools.fit_latent_rgb")
    parser.add_argument("model", help="a model's folder, or its name on the Hugging Face Hub")
    parser.add_argument("--clips", type=number(int, 1), default=16, help="clips of moving shapes to fit on")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="seed of the clips")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Fit the map, write it, and print how much of the colours' variance it explains."""
    arguments = parse_arguments(argv)
    checkpoint.read_config(arguments.model, "vae")
    path = checkpoint.model_folder(arguments.model, ["vae/*"]) / "vae" / MAP_FILE
    writing.check_writable(path)
    prepare_libraries()
    from tools.train_tiny_model import random_clips

    generator = np.random.default_rng(arguments.seed)
    clips, _ = random_clips(generator, arguments.clips)
    fresh, _ = random_clips(generator, arguments.clips)
    latents = encode(path.parent, [*clips, *fresh])
    colours = np.stack([mean_colours(clip, latents.shape[2:]) for clip in (*clips, *fresh)])
    (x, x_fresh), (y, y_fresh) = np.split(rows(latents), 2), np.split(rows(colours), 2)
    weights, bias = fit(x, y)
    share, share_fresh = explained(x @ weights + bias, y), explained(x_fresh @ weights + bias, y_fresh)
    entries = {
        "fitted_on": f"{arguments.clips} clips of moving shapes",
        "seed": arguments.seed,
        "variance_explained": round(share, 4),
        "weights": weights.round(DIGITS).tolist(),
        "bias": bias.round(DIGITS).tolist(),
    }
    with writing.replacing(path) as temporary:
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in entries.items()]
        Path(temporary).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"explains {share:.1%} of the variance of the colours, {share_fresh:.1%} on as many other clips")
    print(f"wrote {path}")


def encode(vae_folder: Path, clips: Sequence[np.ndarray]) -> np.ndarray:
    """Encode clips, uint8 [F, H, W, 3], as the model's transformer and stage 2's file have them, [clips, C, T, H, W].

    That is the mean of diffusers' encoder, times the VAE's scaling_factor.
    """
    import torch
    from diffusers import AutoencoderKLCogVideoX
    from tqdm import tqdm

    from tools.train_tiny_model import to_tensor

    with checkpoint.load_errors(vae_folder):
        vae = AutoencoderKLCogVideoX.from_pretrained(vae_folder, torch_dtype=torch.float32)
    with torch.inference_mode():
        encoded = [
            vae.encode(to_tensor([clip], "cpu")).latent_dist.mean
            for clip in tqdm(clips, "encoding", unit="clip", **bar_options())
        ]
    return torch.cat(encoded).numpy() * vae.config.scaling_factor


def mean_colours(clip: np.ndarray, latent_shape: Sequence[int]) -> np.ndarray:
    """Return the mean colour, from 0 to 1, of the pixels that each latent stands for, [3, T, H, W].

    The first latent frame stands for the first frame of the clip, uint8 [F, H, W, 3], and each other one for as many
    of the rest.
    """
    _, height, width, _ = clip.shape
    t, h, w = latent_shape
    first, rest = clip[:1, None].mean(axis=1), clip[1:].reshape(t - 1, -1, *clip.shape[1:]).mean(axis=1)
    frames = np.concatenate([first, rest])
    blocks = frames.reshape(t, h, height // h, w, width // w, 3)
    return blocks.mean(axis=(2, 4)).transpose(3, 0, 1, 2) / 255


def rows(arrays: np.ndarray) -> np.ndarray:
    """Return arrays [clips, C, T, H, W] as float64 [clips x T x H x W, C]."""
    return np.moveaxis(arrays, 1, -1).reshape(-1, arrays.shape[1]).astype(np.float64)


def fit(latents: np.ndarray, colours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return weights [C, 3] and bias [3] of least squares from latents [N, C] to colours [N, 3]."""
    solution, *_ = np.linalg.lstsq(np.column_stack([latents, np.ones(len(latents))]), colours)
    return solution[:-1], solution[-1]


def explained(found: np.ndarray, truth: np.ndarray) -> float:
    """Return the share of the variance of colours [N, 3] that an approximation explains."""
    return float(1 - np.square(found - truth).sum() / np.square(truth - truth.mean(axis=0)).sum())


if __name__ == "__main__":
    run(main)
