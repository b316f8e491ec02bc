"""Draw clips of one coloured shape that moves over a plain background, with captions, and measure what a clip shows.

    python -m tools.moving_shapes --colour red --shape circle --background white --output picture.png

draws a picture for an image-to-video model.

The tiny model is trained on these clips (tools/train_tiny_model.py). `measure` finds out by image processing, without
any model, what a generated clip shows (benchmarks/quality.py).
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cogvideox.cli.parser import ArgumentParser
from cogvideox.cli.program import run
from cogvideox.cli.types import png_path
from cogvideox.files import writing

FRAMES, SIZE = 17, 64  # number of frames of a clip; its height and width in pixels
GUIDANCE_SCALE = 2.0  # for a model trained on the clips; a larger scale bends the shapes
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 215, 40),
    "purple": (160, 50, 200),
    "orange": (245, 140, 30),
}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
BACKGROUNDS = {"black": (16, 16, 16), "gray": (128, 128, 128), "white": (240, 240, 240)}


class Outline(NamedTuple):
    """A shape that reaches from -1 to 1 in height and width, y pointing down."""

    outside: Callable[[np.ndarray, np.ndarray], np.ndarray]  # signed distance of (x, y) from the edge, negative inside
    area: float
    centroid_y: float


SHAPES = {
    "circle": Outline(lambda x, y: np.hypot(x, y) - 1, np.pi, 0),
    "square": Outline(lambda x, y: np.maximum(abs(x), abs(y)) - 1, 4, 0),
    "triangle": Outline(lambda x, y: np.maximum(abs(y) - 1, (abs(x) - (y + 1) / 2) / np.hypot(1, 0.5)), 2, 1 / 3),
}

# Thresholds of `measure`; tests/test_moving_shapes.py checks them on clips whose caption is known.
FOREGROUND = 60  # least distance in RGB from the background's colour; the largest possible one is 441
LEAST_PIXELS = 0.01  # share of the frame that a shape must fill to count
LEAST_OVERLAP = 0.7  # with the best outline; noisy clips have at least 0.96, a circle and a square have 0.83
LEAST_MOTION = 0.1  # from the first frame to the last, as a share of the frame's width
SAME_PLACE = 1 / 32  # the largest distance of two centres in the same place, as a share of the frame's width


class Caption(NamedTuple):
    """The words that describe a clip, one for each attribute; None stands for what `measure` cannot see."""

    colour: str | None
    shape: str | None
    direction: str | None
    background: str | None

    def __str__(self) -> str:
        article = "an" if self.colour == "orange" else "a"
        return f"{article} {self.colour} {self.shape} moving {self.direction} on a {self.background} background"


WORDS = tuple(tuple(words) for words in (COLOURS, SHAPES, DIRECTIONS, BACKGROUNDS))  # as in a caption
ALL = tuple(itertools.starmap(Caption, itertools.product(*WORDS)))
CHANCE = {field: 1 / len(words) for field, words in zip(Caption._fields, WORDS, strict=True)}


@functools.cache
def held_out() -> tuple[Caption, ...]:
    """Return an eighth of all captions, never trained on; the others have every word and nearly every pair of words."""
    places = itertools.product(*(range(len(words)) for words in WORDS))
    return tuple(caption for caption, place in zip(ALL, places, strict=True) if np.dot(place, (1, 3, 5, 2)) % 8 == 0)


@functools.cache
def trained_on() -> tuple[Caption, ...]:
    """Return all captions that are not held out."""
    return tuple(caption for caption in ALL if caption not in held_out())


@functools.cache
def held_out_pictures() -> tuple[Caption, ...]:
    """Return all captions of an eighth of the pictures: colour, shape and background that image models never see."""
    return tuple(caption for caption in ALL if caption._replace(direction="left") in held_out())


def prompts_of(caption: Caption) -> tuple[str, str]:
    """Return what an image model can be told beside the picture: the direction alone, and the whole caption."""
    return f"moving {caption.direction}", str(caption)


def render(
    caption: Caption,
    generator: np.random.Generator,
    frames: int = FRAMES,
    size: int = SIZE,
    variety: float = 1.0,
    steady: bool = False,
) -> np.ndarray:
    """Draw a clip that shows `caption`, uint8 [frames, size, size, 3].

    Position, path length and radius of the shape are random. With a variety of 1 they can have every value that keeps
    the shape in the frame; with 0 they have the middle value. The path of a steady shape is a fixed share of the way
    that the frame leaves it, so that the first frame and the direction decide the clip; it is so short that a shape in
    the middle can go in every direction.
    """

    def drawn(least: float, most: float) -> float:
        return (least + most) / 2 + variety * (most - least) * (generator.random() - 0.5)

    colour, shape, direction, background = map(str, caption)
    radius = size * drawn(0.18, 0.24)
    margin = radius + 1
    share = drawn(0.5, 0.8)
    travel = (0.4 if steady else share) * (size - 2 * margin)
    along = drawn(margin, size - margin - travel) + travel * np.linspace(0, 1, frames)
    across = drawn(margin, size - margin)
    dx, dy = DIRECTIONS[direction]
    if dx + dy < 0:
        along = along[::-1]
    centre_x, centre_y = (along, np.full(frames, across)) if dx else (np.full(frames, across), along)

    pixel = np.arange(size) + 0.5
    x = pixel[None, None, :] - centre_x[:, None, None]
    y = pixel[None, :, None] - centre_y[:, None, None]
    outside = radius * SHAPES[shape].outside(x / radius, y / radius)
    cover = np.clip(0.5 - outside, 0, 1)[..., None]  # share of each pixel that the shape covers: smooth edges
    clip = cover * COLOURS[colour] + (1 - cover) * BACKGROUNDS[background]
    return np.round(clip).astype(np.uint8)


def measure(clip: np.ndarray) -> Caption:
    """Measure what a clip, uint8 [frames, height, width, 3], shows.

    The background is the colour of the frame's border. All that differs from it is the shape. The colour of the shape
    is taken from the middle frame, its kind is the outline that overlaps best with it, and its direction is that of its
    centre from the first frame to the last. The shape ends where a pixel is half background and half shape, so that
    blur does not move its edge.
    """
    background, found = _found(clip)
    if found is None:
        return Caption(None, None, None, background)
    masks = found.masks[found.seen]
    return Caption(_nearest(found.colour, COLOURS), _shape(masks), _direction(masks), background)


def same_place(frame: np.ndarray, other: np.ndarray) -> bool:
    """Return whether the shapes of two frames, uint8 [height, width, 3], have their centres in the same place."""
    _, found = zip(*(_found(one[None]) for one in (frame, other)), strict=True)
    if not all(found):
        return False
    one, two = (np.argwhere(each.masks[0]).mean(axis=0) for each in found)
    return bool(np.linalg.norm(one - two) <= SAME_PLACE * frame.shape[1])


def agreement(expected: Caption, measured: Caption) -> list[bool]:
    """Return whether two captions agree, for each attribute."""
    return [a == b for a, b in zip(expected, measured, strict=True)]


class _Found(NamedTuple):
    """The shape in a clip: its RGB colour, bool masks [frames, height, width], and the frames in which it is seen."""

    colour: np.ndarray
    masks: np.ndarray
    seen: np.ndarray


def _found(clip: np.ndarray) -> tuple[str, _Found | None]:
    """Return the background of a clip, uint8 [frames, height, width, 3], and the shape before it, if there is one."""
    clip = clip.astype(float)
    border = np.concatenate([clip[:, 0], clip[:, -1], clip[:, :, 0], clip[:, :, -1]], axis=1)
    plain = np.median(border, axis=(0, 1))
    background = _nearest(plain, BACKGROUNDS)
    distance = np.linalg.norm(clip - plain, axis=-1)
    seen = np.flatnonzero((distance > FOREGROUND).mean(axis=(1, 2)) > LEAST_PIXELS)
    if len(seen) == 0:
        return background, None
    middle = seen[len(seen) // 2]
    strongest = distance[middle] > distance[middle].max() / 2  # leaves out faint pixels around the shape
    colour = np.median(clip[middle][strongest], axis=0)
    return background, _Found(colour, distance > max(FOREGROUND, np.linalg.norm(colour - plain) / 2), seen)


def _nearest(colour: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    """Return the name of the colour in `palette` that is nearest to an RGB colour."""
    return min(palette, key=lambda name: np.linalg.norm(np.subtract(colour, palette[name])))


def _shape(masks: np.ndarray) -> str | None:
    """Return the shape whose outline overlaps best with bool masks [frames, height, width], or None if none does."""
    overlaps = dict(zip(SHAPES, np.mean([_overlaps(mask) for mask in masks], axis=0), strict=True))
    best = max(overlaps, key=overlaps.__getitem__)
    return best if overlaps[best] > LEAST_OVERLAP else None


def _overlaps(mask: np.ndarray) -> list[float]:
    """Return for each of SHAPES the intersection over union of a mask [height, width] and its outline.

    The outline has the area and the centroid of the mask.
    """
    if not mask.any():
        return [0.0] * len(SHAPES)
    area = mask.sum()
    y, x = np.ogrid[: mask.shape[0], : mask.shape[1]]
    center_y, center_x = np.argwhere(mask).mean(axis=0)
    overlaps = []
    for outline in SHAPES.values():
        radius = np.sqrt(area / outline.area)
        ideal = outline.outside((x - center_x) / radius, (y - center_y) / radius + outline.centroid_y) < 0
        overlaps.append((mask & ideal).sum() / (mask | ideal).sum())
    return overlaps


def _direction(masks: np.ndarray) -> str | None:
    """Return the direction in which the centre of bool masks [frames, height, width] moves, or None if it is still."""
    centres = [np.argwhere(mask).mean(axis=0) for mask in (masks[0], masks[-1]) if mask.any()]
    if len(centres) < 2:
        return None
    dy, dx = (centres[1] - centres[0]) / masks.shape[2]
    if max(abs(dx), abs(dy)) < LEAST_MOTION:
        return None
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


def main(argv: Sequence[str] | None = None) -> None:
    """Draw a picture of a shape in the middle, as a PNG."""
    parser = ArgumentParser("Draw a picture for the tiny image-to-video model.", prog="python -m tools.moving_shapes")
    parser.add_argument("--colour", choices=COLOURS, default="red", help="of the shape")
    parser.add_argument("--shape", choices=SHAPES, default="circle", help="what is in the middle of the picture")
    parser.add_argument("--background", choices=BACKGROUNDS, default="white", help="colour around the shape")
    parser.add_argument("--output", type=png_path, default=Path("picture.png"), help="file for the picture, PNG")
    arguments = parser.parse_args(argv)
    from PIL import Image

    caption = Caption(arguments.colour, arguments.shape, "left", arguments.background)
    picture = render(caption, np.random.default_rng(0), variety=0)[FRAMES // 2]
    writing.check_writable(arguments.output)
    with writing.replacing(arguments.output) as temporary:
        Image.fromarray(picture).save(temporary, "PNG")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    run(main)
