"""How the convolution of `conv_kernel.py` is cut up: blocks that fit VMEM, and which of them a step of the grid has.

`fitting` says which shapes the kernel takes, in how many blocks of columns. `packed_weight` lays out weights for its
products, and `Steps` makes the blocks of its operands and results.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from cogvideox.models.vae.conv_input import nearest, vmem

STRIPS = 8  # of the layout, which the kernel takes as it is: the sublanes of a register
LANES = 128
VMEM_USED = 0.7  # the share of VMEM that blocks may take; the compiler needs some
LEAST_COLUMNS = 32  # of a block, unless there are fewer; with so few the kernel is no gain
MOST_COLUMNS = 88  # of a chunk, whose products lie in VMEM together


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of a convolution, and the blocks of its kernel.

    Attributes:
        frames, height, width: of the input, a chip's part.
        channels, out_channels: multiples of LANES.
        history: frames of the window before the last one: 2 of a convolution in time, or 0.
        cached: whether the history comes from a cache, and does not repeat the first frame.
        factor: by how much repetition enlarges height and width, 1 or 2.
        itemsize: bytes of an element.
        each: columns that share a scale; 1 without one.
        shortcut: channels of the shortcut's input, 0 for none.
        blocks: of columns.
    """

    frames: int
    height: int
    width: int
    channels: int
    out_channels: int
    history: int
    cached: bool
    factor: int
    itemsize: int
    each: int
    shortcut: int = 0
    blocks: int = 1

    @property
    def columns(self) -> int:
        """Columns of a block."""
        return self.width // self.blocks

    @property
    def quads(self) -> bool:
        """Whether two rows and two columns are computed together: one pixel has too few channels to fill the MXU."""
        return self.out_channels == LANES and self.factor == 1

    @property
    def side(self) -> int:
        """Rows, and columns, that are computed together."""
        return 2 if self.quads else 1

    @property
    def ring_frames(self) -> int:
        """Frames in the ring."""
        return self.frames + (self.history if self.cached else 0)

    @property
    def ring_rows(self) -> int:
        """Rows in the ring."""
        return self.side + 2

    @property
    def taps(self) -> list[tuple[int, int, int]]:
        """Frame, row and column of each element of a window."""
        size = 2 if self.factor == 2 else 3
        return [(t, y, x) for t in range(self.history + 1) for y in range(size) for x in range(size)]

    @property
    def sublanes(self) -> int:
        """Rows of 32 bits that a column takes in the ring."""
        return STRIPS * self.itemsize // 4

    @property
    def row(self) -> tuple[int, int, int]:
        """The shape of a row of the ring, in elements of 32 bits: for quads, even columns and odd ones apart.

        Of each the parts of LANES channels lie apart.
        """
        return self.side * self.channels // LANES, (self.columns + 2) // self.side * self.sublanes, LANES

    @property
    def ring(self) -> tuple[int, ...]:
        """The shape of the ring."""
        return self.ring_rows, self.ring_frames, *self.row

    @property
    def weight(self) -> tuple[int, int, int]:
        """The shape of the kernel's weights."""
        if self.quads:
            return 7 * (self.history + 1), 2 * self.channels, 2 * LANES
        return self.factor**2 * len(self.taps), self.channels, self.out_channels

    @property
    def chunks(self) -> tuple[int, int]:
        """Number and size of the chunks that cover a block's columns, or pairs of them, with the least overlap."""
        width, most = self.columns // self.side, MOST_COLUMNS // self.side
        sizes = [width] if width <= most else range(most // 2, most + 1)
        size = min(sizes, key=lambda size: (-(-width // size) * size, -size))
        return -(-width // size), size

    def used(self) -> int:
        """Return the bytes of the blocks in VMEM."""
        column = STRIPS * self.itemsize
        moved = self.channels + self.factor**2 * self.out_channels + (self.shortcut or self.out_channels)
        moved += 2 * self.channels * bool(self.history)
        factors = 2 * STRIPS * 4 * self.channels // self.each
        weights = math.prod(self.weight) * self.itemsize
        edges = (self.width + 2) * 2 * self.channels * self.itemsize
        products = 3 * MOST_COLUMNS * STRIPS * 4 * self.out_channels
        blocks = 2 * self.side * self.columns * (moved * column + factors)
        return 4 * (math.prod(self.ring) + self.side * math.prod(self.row)) + blocks + weights + 2 * edges + products


def fitting(shape: Shape) -> Shape | None:
    """Return the shape with the fewest blocks of columns that fit VMEM, or None if the kernel cannot take it."""
    if shape.channels % LANES or shape.out_channels % LANES or shape.shortcut % LANES or shape.frames < 2:
        return None
    if shape.width % shape.each or shape.factor not in (1, 2) or shape.itemsize not in (2, 4):
        return None
    if shape.height % shape.side:
        return None
    for blocks in range(1, shape.width // shape.each + 1):
        found = dataclasses.replace(shape, blocks=blocks)
        if shape.width % (blocks * shape.each) or found.columns % found.side:
            continue
        if found.columns < min(LEAST_COLUMNS, shape.width):
            break
        if found.used() <= VMEM_USED * vmem():
            return found
    return None


def packed_weight(weight: jax.Array, shape: Shape) -> jax.Array:
    """Lay weights [frames, rows, columns, channels, out channels] out as the kernel takes them, `Shape.weight`.

    To enlarge and convolve takes for each of the four new pixels only 2 x 2 old ones, whose weights are sums.

    A quad of 2 x 2 pixels sees 4 x 4. The two rows in the middle serve both of its rows: their pixels have products for
    two pixels, one below the other. The first row serves the upper pixels, and the last row the lower ones: there two
    columns go with two pixels beside each other, with zeros where one of them does not see one of the columns.
    """
    if shape.factor == 2:

        def merged(w: jax.Array, axis: int) -> list[jax.Array]:
            first, second, third = jnp.moveaxis(w, axis, 0)
            return [jnp.stack(two, axis) for two in ((first, second + third), (first + second, third))]

        phases = [two for rows in merged(weight.astype(jnp.float32), 1) for two in merged(rows, 2)]
        weight = jnp.stack(phases).astype(weight.dtype)
    elif shape.quads:

        def block(*rows: tuple[jax.Array, jax.Array]) -> jax.Array:
            return jnp.concatenate([jnp.concatenate(row, -1) for row in rows], -2)

        parts = []
        for frame in weight:
            zero = jnp.zeros_like(frame[0, 0])
            above, middle, below = frame
            parts += [block((middle[x], above[x]), (below[x], middle[x])) for x in range(3)]
            for row in (above, below):
                parts += [block((row[0], zero), (row[1], row[0])), block((row[2], row[1]), (zero, row[2]))]
        weight = jnp.stack(parts)
    return weight.reshape(shape.weight)


class Steps(NamedTuple):
    """Which blocks a step (b, j, t) of the grid has.

    It brings padded rows `side` * j + q of frame t, q below `side`, and makes rows of the frame before that lie one or
    two rows above.
    """

    shape: Shape

    @property
    def before(self) -> int:
        """Frames of the ring that come from the cache."""
        return self.shape.ring_frames - self.shape.frames

    def source(self, j: jax.Array, t: jax.Array, q: int, frames: int, height: int) -> tuple[jax.Array, jax.Array]:
        """Return (frame, row) of an array that is repeated to the input's size.

        The rows above and below a strip are the last row of the strip before it and the first row of the one after it.
        """
        s = self.shape
        frame = nearest(jnp.clip(t - self.before, 0, s.frames - 1), s.frames, frames)
        padded = j * s.side + q
        row = jnp.where(padded == 0, s.height - 1, jnp.where(padded == s.height + 1, 0, padded - 1))
        return frame, row * height // s.height

    def of_input(self, array: jax.Array, q: int, columns: int, fixed: bool = False) -> pl.BlockSpec:
        """Make the blocks of one row of an input; `fixed` if all blocks of columns have the same."""
        return pl.BlockSpec(
            (None, None, columns, *array.shape[3:]),
            lambda b, j, t: (*self.source(j, t, q, *array.shape[:2]), 0 if fixed else b, 0, 0),
        )

    def beside(self, array: jax.Array, q: int, side: str, columns: int) -> pl.BlockSpec:
        """Make the blocks of the one column on the left or on the right of a block of `columns`."""

        def index(b, j, t):
            column = b * columns - 1 if side == "left" else (b + 1) * columns
            return *self.source(j, t, q, *array.shape[:2]), jnp.clip(column, 0, array.shape[2] - 1), 0, 0

        return pl.BlockSpec((None, None, 1, *array.shape[3:]), index)

    def of_edge(self, rows: jax.Array, q: int) -> pl.BlockSpec:
        """Make the blocks of the rows above the first strip and below the last."""
        s = self.shape
        return pl.BlockSpec(
            (None, None, *rows.shape[2:]),
            lambda b, j, t: (self.source(j, t, q, len(rows), 1)[0], jnp.minimum(j * s.side + q, 1), 0, 0, 0),
        )

    def of_cache(self, columns: int, fixed: bool = False) -> pl.BlockSpec:
        """Make the blocks of the cache."""
        s = self.shape
        return pl.BlockSpec(
            (None, s.side, columns, STRIPS, s.channels),
            lambda b, j, t: (jnp.minimum(t, s.history - 1), j, 0 if fixed else b, 0, 0),
        )

    def cache_right(self) -> pl.BlockSpec:
        """Make the blocks of the cache's columns on the right of all blocks but the last."""
        s = self.shape
        return pl.BlockSpec(
            (None, s.side, 1, STRIPS, s.channels),
            lambda b, j, t: (jnp.minimum(t, s.history - 1), j, jnp.minimum(b, s.blocks - 2), 0, 0),
        )

    def of_next(self, columns: int, fixed: bool) -> pl.BlockSpec:
        """Make the blocks of the next cache; the steps before its first frame write that too."""
        s = self.shape
        return pl.BlockSpec(
            (None, s.side, columns, STRIPS, s.channels),
            lambda b, j, t: (
                jnp.clip(t - (s.ring_frames - s.history), 0, s.history - 1),
                j,
                0 if fixed else b,
                0,
                0,
            ),
        )

    def output(self, j: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return frame and row, or pair of rows, of the result; the steps before the first result have its place."""
        delay = 2 // self.shape.side
        frame = jnp.where(j < delay, 0, jnp.clip(t - 1 - self.before, 0, self.shape.frames - 1))
        return frame, jnp.maximum(j - delay, 0)

    def of_output(self, channels: int, frames: int, rows: int = 0, members: int = 0) -> pl.BlockSpec:
        """Make the blocks of an array [frames, row, `rows`, column, `members`, strips, channels].

        If it has fewer `frames` than the result, they are repeated.
        """
        s = self.shape

        def index(b, j, t):
            frame, row = self.output(j, t)
            return nearest(frame, s.frames, frames), row, 0, b, 0, 0, 0

        block = None, None, rows or s.side, s.columns // s.side, members or s.side, STRIPS, channels
        return pl.BlockSpec(block, index)

    def of_sums(self, channels: int) -> pl.BlockSpec:
        """Make the blocks of the sums."""
        return pl.BlockSpec(
            (None, None, None, self.shape.side, 2 * STRIPS, channels),
            lambda b, j, t: (b, *self.output(j, t), 0, 0, 0),
        )
