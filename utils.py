"""Define what the stages share: default options, and the files that pass between them; `utils.py status` lists them.

What stands here is defined in the package cogvideox. Importing this module loads neither jax nor torch, so that a stage
reports wrong arguments at once.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cogvideox.cli.parser import ArgumentParser
from cogvideox.cli.program import run
from cogvideox.cli.terminal import fitted
from cogvideox.cli.types import folder_path
from cogvideox.defaults import (
    FPS,
    FRAMES,
    GUIDANCE_SCALE,
    HEIGHT,
    MODEL_NAME,
    NUM_STEPS,
    SEED,
    WARMUP_STEPS,
    WIDTH,
)
from cogvideox.errors import UserError
from cogvideox.files.names import CONFIG, EMBEDDINGS, LATENTS, PREVIEW, STAGE_OUTPUTS, VIDEO, VIDEO_SUFFIXES
from cogvideox.files.schemas import TextConfig, VideoConfig
from cogvideox.files.stage_files import made_from, metadata, read_config, write_config
from cogvideox.inspection.status import status

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = [
    "CONFIG",
    "EMBEDDINGS",
    "FPS",
    "FRAMES",
    "GUIDANCE_SCALE",
    "HEIGHT",
    "LATENTS",
    "MODEL_NAME",
    "NUM_STEPS",
    "PREVIEW",
    "SEED",
    "STAGE_OUTPUTS",
    "VIDEO",
    "VIDEO_SUFFIXES",
    "WARMUP_STEPS",
    "WIDTH",
    "TextConfig",
    "VideoConfig",
    "made_from",
    "metadata",
    "prepare_video_for_export",
    "read_config",
    "status",
    "write_config",
]


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


def main(argv: Sequence[str] | None = None) -> None:
    """Print what a folder of outputs holds: `python utils.py status stage_outputs`."""
    parser = ArgumentParser(
        "Say what the files of a run were made from, which are stale, and what to run next.",
        prog="utils.py",
        usage="%(prog)s status [DIR]",
    )
    parser.add_argument("command", choices=["status"], metavar="status", help="the only command")
    parser.add_argument(
        "folder", type=folder_path, nargs="?", metavar="DIR", default=STAGE_OUTPUTS, help="the stages' output folder"
    )
    folder = parser.parse_args(argv).folder
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give that of the stages' outputs")
    for line in status(folder):
        print(fitted(line))


if __name__ == "__main__":
    run(main)
