"""Define what the stages share: default options, and the files that pass between them.

Importing this module loads neither jax nor torch, so that a stage reports wrong arguments at once.
"""

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue, TypeAdapter, ValidationError
from safetensors import safe_open

import writing
from console import ArgumentParser, Report, UserError, run
from reading import TextConfig, VideoConfig, check_finite, read_json, read_tensors

if TYPE_CHECKING:
    import numpy as np
    import torch

# Defaults of the command-line options.
MODEL_NAME = "zai-org/CogVideoX1.5-5B"
WIDTH = 1360
HEIGHT = 768
FRAMES = 81
FPS = 8
NUM_STEPS = 10
GUIDANCE_SCALE = 6.0
SEED = 42
WARMUP_STEPS = 2
USE_DYNAMIC_CFG = False
USE_DP = True
LAYOUT = "tp"
STAGE_OUTPUTS = Path("stage_outputs")

# What --preset sets, by option; each option wins over it. "seed" has the original project's settings, those of a draft;
# "authors" has those of the model's authors (zai-org/CogVideo, inference/cli_demo.py).
PRESETS: dict[str, dict[str, object]] = {
    "seed": {
        "num_inference_steps": NUM_STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        "scheduler": None,  # the one that the model names
        "use_dynamic_cfg": USE_DYNAMIC_CFG,
        "fps": FPS,
    },
    "authors": {
        "num_inference_steps": 50,
        "guidance_scale": 6.0,
        "scheduler": "dpm",
        "use_dynamic_cfg": True,
        "fps": 16,
    },
}

# The files that pass between the stages, and the entries that each stage adds to the config.
CONFIG = "generation_config.json"
EMBEDDINGS = "stage1_embeddings.safetensors"
LATENTS = "stage2_latents.safetensors"
PREVIEW = "stage2_preview.png"
VIDEO = "output_video.mp4"
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi")  # containers for H.264
TEXT_ENTRIES = tuple(TextConfig.model_fields)
VIDEO_ENTRIES = tuple(VideoConfig.model_fields)[len(TEXT_ENTRIES) :]
# What latents are made from; no tensor depends on fps.
LATENT_ENTRIES = [name for name in (*TEXT_ENTRIES, *VIDEO_ENTRIES) if name != "fps"]


def path(text: str) -> Path:
    """Return `text` as a path with ~ expanded; an argparse type that rejects an empty path."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text).expanduser()


def utf8(text: str) -> str:
    """Return `text`; an argparse type that rejects what the shell passed on but is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8") from None
    return text


def write_config(directory: Path, entries: Mapping) -> None:
    """Write generation_config.json in `directory`, which is one that `writing.committing` yields."""
    text = json.dumps(entries, indent=2, ensure_ascii=False) + "\n"
    (directory / CONFIG).write_text(text, encoding="utf-8")


def read_config(directory: Path, kind: type[TextConfig]) -> dict:
    """Read generation_config.json, which must have the entries of `kind`: those of stage 1, or of stages 1 and 2.

    Raises:
        UserError: the file is missing or is not JSON, or an entry is missing, of another type or out of bounds.
    """
    writing.finish(directory)
    path = directory / CONFIG
    return read_json(path, kind, f"{path} does not exist, or is no file; run stage 1 first, or correct --input_dir")


def made_from(config: Mapping, entries: Iterable[str]) -> dict[str, str]:
    """Return the metadata of a safetensors file: the config entries that its tensors were made from."""
    return {"made_from": json.dumps({name: config[name] for name in entries if name in config})}


def read_made_from(path: Path, found: Mapping[str, str] | None) -> dict:
    """Return the config entries that the metadata of a safetensors file say it was made from, as `made_from` wrote.

    Raises:
        UserError: what the file `path` says is no JSON object.
    """
    try:
        return TypeAdapter(dict[str, JsonValue]).validate_json((found or {}).get("made_from", "{}"))
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"]
        raise UserError(f"{path}: its metadata made_from is no JSON object ({reason}); make the file again") from error


def metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file.

    Raises:
        OSError, SafetensorError: there is no such file, or it is not a complete safetensors file.
    """
    return safe_open(path, framework="np").metadata() or {}


def difference(path: Path, config: Mapping) -> str | None:
    """Return the first entry of `config` with which a safetensors file was not made, in words; None if it fits."""
    for name, value in read_made_from(path, metadata(path)).items():
        if config.get(name) != value:
            return f"was made with {name} = {value!r}, but {CONFIG} says {config.get(name)!r}"
    return None


def add_force_option(parser: argparse.ArgumentParser) -> None:
    """Add --force; see `refuse`."""
    parser.add_argument("--force", action="store_true", help="go on with files that do not belong together")


def refuse(fault: str, force: bool) -> None:
    """Raise UserError because of files that do not belong together; with `force`, which --force asks for, only warn."""
    if not force:
        raise UserError(f"{fault}, or go on with --force")
    if Report.current:
        Report.current.warn(f"{fault}; --force goes on")


def tensor_shapes(
    path: Path, stage: int, names: Iterable[str], config: Mapping, finite: bool = True, force: bool = False
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors `names` of a stage's file, and check them and what the file was made from.

    Args:
        path: the file.
        stage: which wrote it.
        names: of tensors.
        config: generation_config.json.
        finite: whether the values must be finite.
        force: whether a file is taken that was made with other entries than `config`'s.

    Raises:
        UserError: the file is missing or truncated, lacks a tensor, has one that is empty, not of floating point or
            not finite, or was made with entries other than `config`'s.
    """
    remedy = f"run stage {stage} again"
    tensors = read_tensors(path, dict.fromkeys(names), remedy)
    if other := difference(path, config):
        refuse(f"{path} {other}; {remedy}", force)
    if finite:
        check_finite(tensors, path, remedy)
    if Report.current and "made_from" not in metadata(path):
        Report.current.warn(f"{path} does not say what it was made from: whether it belongs to {CONFIG} is unknown")
    return {name: tensor.shape for name, tensor in tensors.items()}


def prepare_video_for_export(video: "np.ndarray | torch.Tensor") -> "list[np.ndarray]":
    """Return a video as the frames that `diffusers.utils.export_to_video` takes, float32 [height, width, 3] in [0, 1].

    Args:
        video: frames as `--output_frames` saves them, uint8 [frames, height, width, 3], or the VAE's output, a torch
            tensor [1, 3, frames, height, width] with values around [-1, 1].

    Raises:
        ValueError: the video has another shape or dtype.
    """
    import numpy as np

    if isinstance(video, np.ndarray) and video.dtype == np.uint8 and video.ndim == 4 and video.shape[3] == 3:
        return list(video.astype(np.float32) / 255)
    if not isinstance(video, np.ndarray) and video.ndim == 5 and video.shape[:2] == (1, 3):
        from diffusers.video_processor import VideoProcessor

        return list(VideoProcessor().postprocess_video(video.float(), output_type="np")[0])
    raise ValueError(f"expected uint8 [F, H, W, 3] or a tensor [1, 3, F, H, W], got {video.dtype} {list(video.shape)}")


def main() -> None:
    """Print what a folder of outputs holds: `python utils.py status stage_outputs`."""
    import provenance

    parser = ArgumentParser("Say what the files of a run were made from, which are stale, and what to run next.")
    parser.add_argument("command", choices=["status"])
    parser.add_argument("folder", type=path, nargs="?", default=STAGE_OUTPUTS, help="the stages' output folder")
    for line in provenance.status(parser.parse_args().folder):
        print(line)


if __name__ == "__main__":
    run(main)
