"""Draw clips of one coloured shape that moves over a plain background, with captions, and measure what a clip shows.

The tiny model is trained on these clips (tools/train_tiny_model.py). `measure` finds out by image processing, without
any model, what a generated clip shows (benchmarks/quality.py).
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

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


def render(
    caption: Caption,
    generator: np.random.Generator,
    frames: int = FRAMES,
    size: int = SIZE,
    variety: float = 1.0,
) -> np.ndarray:
    """Draw a clip that shows `caption`, uint8 [frames, size, size, 3].

    Position, path length and radius of the shape are random. With a variety of 1 they can have every value that keeps
    the shape in the frame; with 0 they have the middle value.
    """

    def drawn(least: float, most: float) -> float:
        return (least + most) / 2 + variety * (most - least) * (generator.random() - 0.5)

    colour, shape, direction, background = map(str, caption)
    radius = size * drawn(0.18, 0.24)
    margin = radius + 1
    travel = drawn(0.5, 0.8) * (size - 2 * margin)
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
    clip = clip.astype(float)
    border = np.concatenate([clip[:, 0], clip[:, -1], clip[:, :, 0], clip[:, :, -1]], axis=1)
    plain = np.median(border, axis=(0, 1))
    background = _nearest(plain, BACKGROUNDS)
    distance = np.linalg.norm(clip - plain, axis=-1)
    foreground = distance > FOREGROUND
    seen = np.flatnonzero(foreground.mean(axis=(1, 2)) > LEAST_PIXELS)
    if len(seen) == 0:
        return Caption(None, None, None, background)
    middle = seen[len(seen) // 2]
    strongest = distance[middle] > distance[middle].max() / 2  # leaves out faint pixels around the shape
    plain_colour = np.median(clip[middle][strongest], axis=0)
    foreground = distance > max(FOREGROUND, np.linalg.norm(plain_colour - plain) / 2)
    return Caption(_nearest(plain_colour, COLOURS), _shape(foreground[seen]), _direction(foreground, seen), background)


def agreement(expected: Caption, measured: Caption) -> list[bool]:
    """Return whether two captions agree, for each attribute."""
    return [a == b for a, b in zip(expected, measured, strict=True)]


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


def _direction(foreground: np.ndarray, seen: np.ndarray) -> str | None:
    """Return the direction in which the centre of bool masks [frames, height, width] moves, or None if it is still."""
    centres = [np.argwhere(foreground[frame]).mean(axis=0) for frame in (seen[0], seen[-1]) if foreground[frame].any()]
    dy, dx = (centres[1] - centres[0]) / foreground.shape[2]
    if max(abs(dx), abs(dy)) < LEAST_MOTION:
        return None
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"
