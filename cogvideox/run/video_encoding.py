"""Encode a video with the VAE's encoder, in JAX on all chips: what stage 1 does for video to video."""

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from cogvideox.cli.report import Report
from cogvideox.defaults import STRENGTH
from cogvideox.errors import UserError
from cogvideox.features import features_of
from cogvideox.files import checkpoint
from cogvideox.files.names import VIDEO_TENSORS
from cogvideox.files.tensors import compute_dtype
from cogvideox.files.video_file import first_frames
from cogvideox.models.shared.sizes import latent_size
from cogvideox.run import accelerator, decoding
from cogvideox.run.compilation import Cache
from cogvideox.run.plans import plan_errors

if TYPE_CHECKING:
    import torch


def check_model(model_id: str, transformer: Mapping, arguments: argparse.Namespace) -> None:
    """Raise UserError if there is a video to change, and the model makes videos of an image."""
    if arguments.video and features_of(transformer).image:
        raise UserError(
            f"--video {arguments.video}: {model_id} makes videos of an image; to change a video choose a model for "
            "text to video"
        )


def frames_of(model_id: str, arguments: argparse.Namespace) -> "np.ndarray | None":
    """Read the frames of --video, in the size of the options, uint8 [frames, height, width, 3]; None without a video.

    The strength is set to its default if nobody gives it.

    Raises:
        UserError: the video cannot be read, or has too few frames.
    """
    if not arguments.video:
        return None
    arguments.strength = arguments.strength or STRENGTH
    wanted = arguments.frames
    try:
        frames = first_frames(arguments.video, wanted, arguments.height, arguments.width)
    except UserError as error:
        raise UserError(f"--video {error}") from error
    if len(frames) < wanted:
        ratio = checkpoint.read_config(model_id, "vae")["temporal_compression_ratio"]
        most = len(frames) - (len(frames) - 1) % ratio
        remedy = f"add --frames {most}, or name a longer one" if frames.size else "name another one"
        raise UserError(f"--video {arguments.video} has {len(frames)} frames, and {wanted} are wanted; {remedy}")
    return frames


def encode_video(
    frames: np.ndarray, model_id: str, arguments: argparse.Namespace, report: Report
) -> "dict[str, torch.Tensor]":
    """Encode the frames of a video in the dtype in which the VAE computes.

    Returns:
        `video_mean` and `video_logvar` of the posterior of its latents, each [1, channels, latent frames, latent
        height, latent width].

    Raises:
        UserError: the VAE's files are missing or damaged, or its latents are not finite.
    """
    with report.part("imports"):
        import torch

        from cogvideox.models.vae import chunks
        from cogvideox.models.vae.encoder import chunk_programs, encode
        from cogvideox.models.vae.plan import check_activation
        from cogvideox.models.vae.spatial_split import choose_split
        from cogvideox.models.vae.vae_torchax import make_encoder

    vae = checkpoint.read_config(model_id, "vae")
    with plan_errors():
        check_activation(vae)
    devices = accelerator.devices(arguments.debug)
    split = choose_split(devices, *latent_size(vae, *frames.shape[:3])[1:])
    report.say(f"encoding {arguments.video} on {len(devices)} x {devices[0].device_kind}: {split}")
    encoder = make_encoder(vae)
    files = decoding.weight_files(encoder, model_id, arguments.variant, report.say, "encoder")
    dtype, line = compute_dtype(decoding.values_of(files), arguments.dtype, devices[0].platform)
    if line:
        report.say(f"VAE's encoder: {line}")
    abstract = chunks.on_devices(files, dtype, split)
    weights = decoding.load_weights(files, abstract, report, "encoder")
    with Cache(None, report):
        programs = [program.lower().compile() for program in chunk_programs(encoder, abstract, frames.shape, split)]
    with report.progress("encoding", "frame", len(frames)) as bar:
        encoded = encode(programs, weights, frames, split, bar.update)
    if not all(np.isfinite(array.astype(np.float32)).all() for array in encoded):
        raise UserError(
            f"the VAE of {model_id} gives NaN or infinite latents of {arguments.video}; {checkpoint.REMEDY}"
        )
    tensors = [torch.from_numpy(array.astype(np.float32)).to(getattr(torch, dtype)) for array in encoded]
    return dict(zip(VIDEO_TENSORS, tensors, strict=True))
