"""Sizes of a video and of its latents, computed from the VAE's config, and the most that an operation may have."""

from collections.abc import Mapping

from cogvideox.errors import PlanError
from cogvideox.features import features_of

# What a convolution or an attention may take or make, by platform: cuDNN has nothing fast for what its 32-bit indices
# do not reach. diffusers cuts such inputs of convolutions, too (`CogVideoXSafeConv3d`).
MOST_ELEMENTS = {"gpu": 2**31 - 1}


def spatial_compression_ratio(vae: Mapping) -> int:
    """Return the pixels of the video per pixel of the latents, in height and in width."""
    return 2 ** (len(vae["block_out_channels"]) - 1)


def latent_size(vae: Mapping, frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Return frames, height and width of the latents of a video of 4n + 1 frames."""
    spatial = spatial_compression_ratio(vae)
    return (frames - 1) // vae["temporal_compression_ratio"] + 1, height // spatial, width // spatial


def check_sides(vae: Mapping, transformer: Mapping, height: int, width: int) -> None:
    """Check the size of a video in pixels, which is that of its image, too.

    Raises:
        PlanError: height or width is not a whole number of the transformer's patches, or the model has learned its
            positions for another one. (For another number of frames diffusers, too, takes sines and cosines instead.)
    """
    spatial = spatial_compression_ratio(vae)
    for name, size in (("height", height), ("width", width)):
        check_multiple(name, size, spatial * transformer["patch_size"])
        learned = transformer[f"sample_{name}"] * spatial
        if features_of(transformer).positions == "learned" and size != learned:
            raise PlanError(name, f"{size} does not fit this model: it has learned positions for {learned}")


def check_multiple(field: str, size: int, multiple: int) -> None:
    """Raise PlanError, naming the nearest size that works, unless `size` is a multiple of `multiple`."""
    if size % multiple:
        nearest = max(round(size / multiple), 1) * multiple
        raise PlanError(field, f"{size} does not fit this model: a multiple of {multiple}, for example {nearest}")


def check_frames(vae: Mapping, frames: int) -> None:
    """Raise PlanError, naming the nearest numbers that work, unless `frames` is 4n + 1 (4 is the VAE's compression)."""
    ratio = vae["temporal_compression_ratio"]
    if (frames - 1) % ratio:
        below = frames - (frames - 1) % ratio
        raise PlanError("frames", f"{frames} is not {ratio}n + 1; the nearest are {below} and {below + ratio}")
