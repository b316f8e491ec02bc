"""Draw pictures in a grid, each below its name, to a PNG file: a contact sheet."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cogvideox.files import writing

GAP, LINE = 8, 20  # pixels between pictures, and of a line of text
MOST_WIDTH = 1400  # pixels of a sheet
LETTER = 6.5  # pixels, on average


def draw_grid(path: Path, title: str, pictures: np.ndarray, names: Sequence[str]) -> None:
    """Write a contact sheet of pictures, uint8 [N, H, W, 3], with a title above and a name above each picture.

    Names and title are wrapped.

    Raises:
        UserError: the file cannot be written.
    """
    from PIL import Image, ImageDraw, ImageFont

    count, height, width, _ = pictures.shape
    columns = columns_for(count, most=max(1, MOST_WIDTH // width))
    font = ImageFont.load_default(14)
    lines = textwrap.wrap(title, max(60, columns * width // 8)) or [""]
    wrapped = [textwrap.wrap(name, max(1, int(width / LETTER))) for name in names]
    above = LINE * max((len(name) for name in wrapped), default=1)
    top = GAP + LINE * len(lines)
    sheet_width = max(columns * (width + GAP), *(math.ceil(font.getlength(text)) + GAP for text in lines)) + GAP
    sheet = Image.new("RGB", (sheet_width, top + math.ceil(count / columns) * (above + height + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((GAP, GAP), "\n".join(lines), fill="black", font=font)
    for i, picture in enumerate(pictures):
        x, y = GAP + i % columns * (width + GAP), top + i // columns * (above + height + GAP)
        draw.multiline_text((x, y + 1), "\n".join(wrapped[i]), fill="black", font=font)
        sheet.paste(Image.fromarray(picture), (x, y + above))
    with writing.replacing(path) as temporary:
        sheet.save(temporary, "PNG")


def enlarged(pictures: np.ndarray, width: int) -> np.ndarray:
    """Return small pictures, [N, H, W, 3], about `width` pixels wide, enlarged by a whole factor."""
    factor = max(1, round(width / pictures.shape[2]))
    return pictures.repeat(factor, axis=1).repeat(factor, axis=2)


def columns_for(count: int, most: int) -> int:
    """Return how many columns spread `count` pictures evenly over as few rows as `most` columns allow."""
    return math.ceil(count / math.ceil(count / most)) if count else 1
