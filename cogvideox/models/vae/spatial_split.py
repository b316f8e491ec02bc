"""How a frame is split in space: over a mesh of chips with the axes rows and columns, and on each chip into strips.

Inside a chip's part of the program activations are [frames, height, width, strips, channels]. Strips are bands of rows,
one below the other, in the place of a batch: the TPU's convolutions are fastest with an axis of about eight next to the
channels, and one video has no batch of that size. Sizes are counted in latent pixels. Every strip of every chip has the
same size, so if the frame does not divide evenly, the last strips reach over its edge.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cogvideox.models.shared.sizes import MOST_ELEMENTS

MESH_AXES = ("rows", "columns")
STRIPS = {"tpu": 8}  # by platform; elsewhere 1


@dataclasses.dataclass(frozen=True)
class Split:
    """A frame of `height` x `width` latent pixels on the chips of `mesh`, `strips` on each.

    With `for_tpu` the layers use the forms that are fast on a TPU, a Pallas kernel among them. No convolution takes or
    makes more than `most_elements` at a time, where that is not None.

    The methods `image`, `inside`, `sum` and `neighbours` are for use inside `shard_map`.
    """

    mesh: Mesh
    strips: int
    height: int
    width: int
    for_tpu: bool
    most_elements: int | None = None

    @property
    def platform(self) -> str:
        """Platform of the chips: "tpu", "cpu" or "gpu"."""
        return self.mesh.devices.flat[0].platform

    @property
    def strip_height(self) -> int:
        """Height of a strip in latent pixels."""
        return math.ceil(self.height / (self.mesh.shape["rows"] * self.strips))

    @property
    def strip_width(self) -> int:
        """Width of a strip, which is that of a chip's part, in latent pixels."""
        return math.ceil(self.width / self.mesh.shape["columns"])

    @property
    def covered(self) -> tuple[int, int]:
        """Height and width of all strips together, in latent pixels."""
        rows, columns = self.mesh.shape["rows"], self.mesh.shape["columns"]
        return rows * self.strips * self.strip_height, columns * self.strip_width

    @property
    def is_even(self) -> bool:
        """Whether no strip reaches over the frame's edge."""
        return self.covered == (self.height, self.width)

    @property
    def latents(self) -> NamedSharding:
        """Sharding of what `tiles` returns."""
        return NamedSharding(self.mesh, PartitionSpec(None, *MESH_AXES))

    @property
    def pixels(self) -> NamedSharding:
        """Sharding of [frames, channels, height, width], of which `image` returns each chip's part."""
        return NamedSharding(self.mesh, PartitionSpec(None, None, *MESH_AXES))

    @property
    def replicated(self) -> NamedSharding:
        """Sharding of arrays of which each chip has a copy."""
        return NamedSharding(self.mesh, PartitionSpec())

    def __str__(self) -> str:
        rows, columns = self.mesh.shape["rows"], self.mesh.shape["columns"]
        chips = f"{rows} x {columns} chips (rows x columns)" if rows * columns > 1 else "one chip"
        strips = f", on each {self.strips} strips" if self.strips > 1 else ""
        return f"{chips}{strips} of {self.strip_height} x {self.strip_width} latent pixels"

    def tiles_shape(self, frames: int, channels: int, scale: int = 1) -> tuple[int, int, int, int, int]:
        """Return the shape of what `tiles` returns."""
        height, width = (scale * size for size in self.covered)
        return frames, height // self.strips, width, self.strips, channels

    def tiles(self, latents: np.ndarray, scale: int = 1) -> np.ndarray:
        """Lay latents [1, channels, frames, height, width] out as [frames, rows, columns, strips, channels].

        The rows and columns of all chips are in the result, in the order of the mesh, with zeros beyond the edge. For
        pixels `scale` is how many there are to a latent pixel, along the height and along the width.
        """
        height, width = (scale * size for size in self.covered)
        x = np.moveaxis(latents[0], 0, -1)
        x = np.pad(x, ((0, 0), (0, height - x.shape[1]), (0, width - x.shape[2]), (0, 0)))
        frames, channels = len(x), x.shape[-1]
        x = x.reshape(frames, -1, self.strips, scale * self.strip_height, width, channels)
        return np.moveaxis(x, 2, 4).reshape(self.tiles_shape(frames, channels, scale))

    def image(self, x: jax.Array) -> jax.Array:
        """Join a chip's strips: [frames, height, width, strips, channels] to [frames, channels, rows, width]."""
        frames, height, width, strips, channels = x.shape
        return jnp.transpose(x, (0, 4, 3, 1, 2)).reshape(frames, channels, strips * height, width)

    def inside(self, shape: tuple[int, ...]) -> jax.Array:
        """Tell which elements of an array of `shape` [frames, height, width, strips, channels] lie within the frame.

        Returns bool [1, height, width, strips, 1].
        """
        height, width, strips = shape[1:4]
        scale = height // self.strip_height
        row, column, strip = (jax.lax.broadcasted_iota(jnp.int32, (1, height, width, strips, 1), i) for i in (1, 2, 3))
        row += (jax.lax.axis_index("rows") * strips + strip) * height
        column += jax.lax.axis_index("columns") * width
        return (row < self.height * scale) & (column < self.width * scale)

    def sum(self, x: jax.Array) -> jax.Array:
        """Sum an array over all chips."""
        return jax.lax.psum(x, MESH_AXES)

    def neighbours(
        self, first_row: jax.Array, last_row: jax.Array, first_column: jax.Array, last_column: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Fetch what lies around a chip's part of the frame: edges of its neighbours' parts, zeros beyond the frame.

        Args:
            first_row: of the part, which is that of its first strip, [frames, 1, width, 1, channels].
            last_row: of the part, which is that of its last strip, of the same shape.
            first_column, last_column: of the part, [frames, height, 1, strips, channels].

        Returns:
            The rows above and below with their corners, [frames, 2, width + 2, 1, channels], and the columns on the
            left and right, [frames, height, 2, strips, channels].
        """

        def shifted(x: jax.Array, axis: str, by: int) -> jax.Array:
            """Fetch `x` from the chip `by` places before this one; zeros where there is none."""
            n = self.mesh.shape[axis]
            pairs = [(i, i + by) for i in range(n) if 0 <= i + by < n]
            return jax.lax.ppermute(x, axis, pairs) if n > 1 else jnp.zeros_like(x)

        rows = jnp.concatenate([shifted(last_row, "rows", 1), shifted(first_row, "rows", -1)], axis=1)
        corners = shifted(rows[:, :, -1:], "columns", 1), shifted(rows[:, :, :1], "columns", -1)
        rows = jnp.concatenate([corners[0], rows, corners[1]], axis=2)
        columns = shifted(last_column, "columns", 1), shifted(first_column, "columns", -1)
        return rows, jnp.concatenate(columns, axis=2)


def choose_split(
    devices: Sequence[jax.Device],
    height: int,
    width: int,
    rows: int | None = None,
    strips: int | None = None,
    for_tpu: bool | None = None,
) -> Split:
    """Choose the split of a frame of `height` x `width` latent pixels that gives a chip the least work.

    Args:
        devices: the chips, all of which get a part.
        height, width: of the frame, in latent pixels.
        rows: rows of chips; by default the number that makes the strips smallest, with one video pixel around them.
        strips: strips on a chip; by default the number with which the platform's convolutions are fastest.
        for_tpu: see `Split`; by default whether the devices are TPUs.

    Raises:
        ValueError: `rows` does not divide the number of devices.
    """
    platform = devices[0].platform
    strips = strips or STRIPS.get(platform, 1)
    for_tpu = platform == "tpu" if for_tpu is None else for_tpu
    most_elements = MOST_ELEMENTS.get(platform)
    divisors = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
    if rows is not None and rows not in divisors:
        raise ValueError(f"{rows} rows do not divide {len(devices)} chips; {divisors} work")

    def split(n: int) -> Split:
        return Split(Mesh(np.asarray(devices).reshape(n, -1), MESH_AXES), strips, height, width, for_tpu, most_elements)

    return min(
        (split(n) for n in ([rows] if rows else divisors)),
        key=lambda s: (s.strip_height * 8 + 2) * (s.strip_width * 8 + 2),
    )
