"""Define what the stages share: default options, and the files that pass between them.

Importing this module loads neither jax nor torch, so that a stage reports wrong arguments at once.
"""

import argparse
import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from console import UserError

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
USE_DP = True
LAYOUT = "tp"
STAGE_OUTPUTS = Path("stage_outputs")

# The files that pass between the stages, and the entries that each stage adds to the config, with their types.
CONFIG = "generation_config.json"
EMBEDDINGS = "stage1_embeddings.safetensors"
LATENTS = "stage2_latents.safetensors"
PREVIEW = "stage2_preview.png"
VIDEO = "output_video.mp4"
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi")  # containers for H.264
TEXT_ENTRIES = {"model_id": str, "prompt": str, "negative_prompt": str}
VIDEO_ENTRIES = {
    "height": int,
    "width": int,
    "frames": int,
    "fps": int,
    "num_inference_steps": int,
    "guidance_scale": float,
    "seed": int,
    "scheduler": str,
}
# What latents are made from; no tensor depends on fps.
LATENT_ENTRIES = [name for name in (*TEXT_ENTRIES, *VIDEO_ENTRIES) if name != "fps"]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[str]:
    """Yield a temporary path in the folder of `path`, and rename the file there to `path` on success.

    A reader of `path` finds either the old file or the complete new one.

    Raises:
        UserError: the file cannot be written (no permission, no space, or a folder has this name).
    """
    with write_errors(path):
        temporary = _temporary_beside(path)
        try:
            yield temporary
            os.umask(umask := os.umask(0))
            os.chmod(temporary, 0o666 & ~umask)  # only the owner may read a file of mkstemp
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


def check_writable(path: Path) -> None:
    """Raise UserError if `path` cannot be written; change no existing file."""
    with write_errors(path):
        os.unlink(_temporary_beside(path))


def _temporary_beside(path: Path) -> str:
    """Make an empty file in the folder of `path`, and the folder if it is missing; return the file's path."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    return temporary


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn errors of writing `path` into a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[0]
        raise UserError(f"cannot write {path}: {reason}; choose another path or free some disk space") from error


def path(text: str) -> Path:
    """Return `text` as a path with ~ expanded; an argparse type that rejects an empty path."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text).expanduser()


def write_config(directory: Path, entries: Mapping) -> None:
    """Write generation_config.json in `directory`."""
    with replacing(directory / CONFIG) as temporary:
        Path(temporary).write_text(json.dumps(entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_config(directory: Path, stages: Mapping[int, Mapping[str, type]]) -> dict:
    """Read generation_config.json and check that it has the entries of some stages.

    Args:
        directory: the folder of the file.
        stages: for each stage that must have run, by number, the names and types of its entries.

    Raises:
        UserError: the file is missing or is not JSON, or an entry is missing or has another type.
    """
    path = directory / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist; run stage 1 first, or correct --input_dir") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); run stage 1 again") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} does not hold a JSON object; run stage 1 again")
    for stage, entries in stages.items():
        for name, kind in entries.items():
            if name not in config:
                raise UserError(f"{path} has no entry '{name}'; run stage {stage} (again)")
            value = config[name]
            if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
                raise UserError(
                    f"{path}: '{name}' must be of type {kind.__name__}, not {value!r}; run stage {stage} again"
                )
    return config


def made_from(config: Mapping, entries: Iterable[str]) -> dict[str, str]:
    """Return the metadata of a safetensors file: the config entries that its tensors were made from."""
    return {"made_from": json.dumps({name: config[name] for name in entries})}


def read_made_from(metadata: Mapping[str, str] | None) -> dict:
    """Return the config entries that a safetensors file says it was made from; the reverse of `made_from`."""
    return json.loads((metadata or {}).get("made_from", "{}"))


def tensor_shapes(path: Path, stage: int, names: Iterable[str], config: Mapping) -> dict[str, tuple[int, ...]]:
    """Read the shapes of the tensors `names` from the header of a stage's file, and check what the file was made from.

    Raises:
        UserError: the file is missing or truncated, lacks a tensor, or was made with entries other than `config`'s.
    """
    try:
        with safe_open(path, framework="np") as file:
            entries = read_made_from(file.metadata())
            missing = set(names) - set(file.keys())
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in set(names) - missing}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; run stage {stage} first") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a complete safetensors file ({error}); run stage {stage} again") from error
    if missing:
        raise UserError(f"{path} has no tensor '{min(missing)}'; run stage {stage} again")
    for name, value in entries.items():
        if config.get(name) != value:
            raise UserError(
                f"{path} was made with {name} = {value!r}, but {CONFIG} says {config.get(name)!r}; "
                f"run stage {stage} again"
            )
    return shapes


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
