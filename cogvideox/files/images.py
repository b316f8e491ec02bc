"""Read a picture from a file as diffusers does, whatever kind of picture it is."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from cogvideox.errors import UserError, first_line, reason, system_error
from cogvideox.files.tensors import check_pointer

if TYPE_CHECKING:
    from PIL.Image import Image


def read_image(path: Path) -> "Image":
    """Return a picture in RGB, 8 bits a channel, turned as its EXIF entry says; of an animated file the first frame.

    Source: `diffusers.utils.load_image`, which leaves out what says how transparent a pixel is, too. Only gray pictures
    of 16 bits are others there: diffusers takes all that is brighter than 255 of 65,535 for white.

    Raises:
        UserError: there is no such file, or it is no picture that Pillow reads, damaged or too large.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not path.is_file():  # a pipe would be waited for
        remedy = "download it first" if {"http:", "https:"} & {*path.parts} else "name a picture"
        raise UserError(f"{path} does not exist, or is no file; {remedy}")
    try:
        check_pointer(path)
        with warnings.catch_warnings(action="ignore"), Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened)
            is_of_16_bits = upright.mode.startswith("I;16")
            return (upright.point(lambda value: value * (1 / 256)) if is_of_16_bits else upright).convert("RGB")
    except (UserError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is no picture of a kind that Pillow reads; make a PNG or JPEG file of it") from error
    except Image.DecompressionBombError as error:
        raise UserError(
            f"{path} has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels; make a smaller picture of it"
        ) from error
    except Exception as error:  # Pillow raises whatever its code meets in a broken file
        fault = f"cannot be read: {reason(error)}" if system_error(error) else f"is damaged: {first_line(error)}"
        raise UserError(f"{path} {fault}") from error
