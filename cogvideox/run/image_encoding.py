"""Encode pictures with the VAE's encoder, in torch on the host: what stage 1 does for an image-to-video model."""

import argparse
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cogvideox.cli.report import Report
from cogvideox.errors import PlanError, UserError
from cogvideox.features import features_of
from cogvideox.files import checkpoint, generation_defaults, provenance
from cogvideox.files.images import read_image
from cogvideox.files.prompts import Prompt
from cogvideox.files.tensors import compute_dtype
from cogvideox.models.shared.sizes import check_frames, check_sides, spatial_compression_ratio

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKLCogVideoX

EXAMPLE = "zai-org/CogVideoX1.5-5B-I2V"


def images_of(
    prompts: Sequence[Prompt], model_id: str, transformer: Mapping, arguments: argparse.Namespace
) -> tuple[list[Path], list[str]]:
    """Check the images of the prompts before anything is loaded.

    Args:
        prompts: the prompts.
        model_id: the model.
        transformer: its config.
        arguments: the parsed options; where there are images, `height` and `width` are set to the model's if nobody
            gives them.

    Returns:
        The images, each once, and lines on what the model has decided.

    Raises:
        UserError: a prompt has an image and the model is one for text alone, or the other way round; an image cannot be
            read; or the model does not take images of this size.
    """
    wanted, users = features_of(transformer).image, {prompt.image: prompt for prompt in prompts}
    images = {image: f"{user.source if user.is_line else '--image'} {image}" for image, user in users.items() if image}
    if images and not wanted:
        raise UserError(
            f"{next(iter(images.values()))}: {model_id} makes videos of text alone; drop the image, or choose a "
            f"model for image to video, such as --model_id {EXAMPLE}"
        )
    if wanted and None in users:
        line, in_it = (
            (f"{users[None].source} ", ', or with "image" in a line of JSON') if users[None].is_line else ("", "")
        )
        raise UserError(f"{line}{model_id} makes videos of an image and a text; name one with --image{in_it}")
    taken = complete_size(images, model_id, transformer, arguments)
    for image, where in images.items():
        try:
            read_image(image)
        except UserError as error:
            raise UserError(f"{where.removesuffix(str(image))}{error}") from error
    return [*images], taken


def complete_size(
    images: Collection[Path], model_id: str, transformer: Mapping, arguments: argparse.Namespace
) -> list[str]:
    """Set --height and --width of the images, or of --video, where nobody gives them; see `images_of`.

    For --video --frames is set, too.
    """
    of_video, taken_size = arguments.video is not None, ("height", "width")
    if not of_video:
        _refuse(arguments, ("frames", "strength"), "--video")
    if not images and not of_video:
        _refuse(arguments, taken_size, "--image or --video")
        return []
    names = (*taken_size, "frames") if of_video else taken_size
    taken = generation_defaults.complete(arguments, generation_defaults.of_model(model_id), names)
    vae = checkpoint.read_config(model_id, "vae")
    try:
        check_sides(vae, transformer, arguments.height, arguments.width)
        if of_video:
            check_frames(vae, arguments.frames)
    except PlanError as error:
        raise UserError(f"--{error}") from error
    return taken


def _refuse(arguments: argparse.Namespace, names: Iterable[str], of: str) -> None:
    """Raise UserError if one of the options `names` is given, which are those `of` another option."""
    for name in names:
        if getattr(arguments, name):
            own = "" if name == "strength" else f"; a video made of text has its --{name} from stage 2"
            raise UserError(f"--{name} of stage 1 belongs to {of}, which is missing{own}")


class Encoded(NamedTuple):
    """An image that is encoded.

    Attributes:
        tensors: `image_mean` and `image_logvar` of the posterior of its latents, each [1, C, 1, H, W].
        digest: of its file; see `provenance.file_digest`.
    """

    tensors: "dict[str, torch.Tensor]"
    digest: str


def encode_images(
    images: Iterable[Path], model_id: str, arguments: argparse.Namespace, report: Report
) -> dict[Path, Encoded]:
    """Encode images of any size for a video of --height and --width, in the dtype in which the VAE computes.

    Sources: `CogVideoXImageToVideoPipeline.__call__`, which resizes, and `prepare_latents`.

    Raises:
        UserError: the VAE's files are missing or damaged, or its latents are not finite.
    """
    with report.part("imports"):
        import torch
        from diffusers.video_processor import VideoProcessor

    vae = load_encoder(model_id, arguments, report)
    processor = VideoProcessor(vae_scale_factor=spatial_compression_ratio(vae.config))
    encoded = {}
    for image in images:
        picture, digest = read_image(image), provenance.file_digest(image)
        pixels = processor.preprocess(picture, arguments.height, arguments.width).to(vae.dtype)
        with torch.no_grad():
            posterior = vae.encode(pixels[:, :, None]).latent_dist
        if not posterior.parameters.isfinite().all():
            raise UserError(f"the VAE of {model_id} gives NaN or infinite latents of {image}; {checkpoint.REMEDY}")
        tensors = {"image_mean": posterior.mean, "image_logvar": posterior.logvar}
        encoded[image] = Encoded({name: tensor.contiguous() for name, tensor in tensors.items()}, digest)
        sizes = f"{picture.height} x {picture.width} pixels, resized to {arguments.height} x {arguments.width}"
        report.say(f"encoded {image}: {sizes}")
    return encoded


def load_encoder(model_id: str, arguments: argparse.Namespace, report: Report) -> "AutoencoderKLCogVideoX":
    """Load a model's VAE with the weights of its encoder alone, in the dtype of most of them or of --dtype.

    Raises:
        UserError: a file is missing or damaged, or does not have the encoder's weights.
    """
    with report.part("imports"):
        import torch
        from diffusers import AutoencoderKLCogVideoX

    with torch.device("meta"):
        vae = AutoencoderKLCogVideoX.from_config(checkpoint.read_config(model_id, "vae")).eval()
    shapes = {f"encoder.{name}": tuple(weight.shape) for name, weight in vae.encoder.state_dict().items()}
    with report.part("reading"):
        read = checkpoint.tensor_reader(model_id, "vae", shapes, variant=arguments.variant, say=report.say)
        dtype, line = compute_dtype(read.values, arguments.dtype, platform=None)
        if line:
            report.say(f"VAE's encoder: {line}")
        weights = {name: torch.from_numpy(read(name).astype(np.float32)).to(getattr(torch, dtype)) for name in shapes}
        vae.load_state_dict(weights, strict=False, assign=True)  # the decoder stays without values
    report.say(f"loaded the VAE's encoder: {sum(w.numel() for w in weights.values()):,} parameters, {vae.dtype}")
    return vae
