"""Where arrays live on the dp/sp/tp mesh, in one of the layouts of models/shared/layouts.py.

The declarations of the parameters (models/transformer/parameters.py) and ACTIVATION_AXES say what the axes of an array
stand for.

dp splits the batch (the two prompts of classifier-free guidance), sp the sequence, tp the attention heads and the MLP.
Between the matrix products the hidden states are split over the sequence by sp and tp together.

Inside attention the chips along sp exchange shares of the tokens for shares of the heads. Where they do not divide the
heads, groups of neighbours do: each group attends its own part of the queries, and gathers the keys and values of all.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cogvideox.errors import PlanError
from cogvideox.models.shared.layouts import ACTIVATIONS, LAYOUTS

MESH_AXES = ("dp", "sp", "tp")

# Activations inside the blocks. Between the matrix products sp and tp split the "tokens"; for the products the chips
# along tp gather the tokens, and split the heads and the MLP instead.
ACTIVATION_AXES = {
    "hidden states": ("batch", "tokens", "embed"),
    "gathered heads": ("batch", "gathered tokens", "split heads"),
    "projected heads": ("batch", "split heads", "gathered tokens", "head_dim"),
    "attended heads": ("batch", "exchanged heads"),
    "all heads": ("batch", "chosen heads"),
    "pattern errors": ("batch", "chosen heads", "patterns"),
    "attention weights": ("batch", "chosen heads", "queries", "keys"),
    "rotary embedding": ("gathered tokens", "rotary"),
    "time embedding": ("time",),
}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device], order: Sequence[str] = MESH_AXES) -> Mesh:
    """Make a mesh with the axes dp, sp and tp of the given sizes; devices are neighbours along the last of `order`.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(f"a mesh of {dict(sizes)} does not fill {len(devices)} devices")
    return Mesh(np.asarray(devices).reshape([sizes[axis] for axis in order]), tuple(order))


def layout_spec(axes: Sequence[str], layout: str) -> PartitionSpec:
    """Return the mesh axes that split each of a parameter's logical axes in one of LAYOUTS."""
    return PartitionSpec(*(LAYOUTS[layout].get(axis) for axis in axes))


def activation_spec(name: str) -> PartitionSpec:
    """Return the mesh axes of each axis of an activation in ACTIVATION_AXES."""
    return PartitionSpec(*(ACTIVATIONS.get(axis) for axis in ACTIVATION_AXES[name]))


HIDDEN_STATES = activation_spec("hidden states")


def mesh_axes(spec: PartitionSpec) -> list[tuple[str, ...]]:
    """Return the mesh axes that split each axis of an array, also where a spec names one or None."""
    return [(axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in spec]


def gather_at_use(axes: Sequence[str], layout: str) -> tuple[int, tuple[str, ...]] | None:
    """Return (axis, mesh axes) over which a block gathers its share of a weight before use; None where it need not.

    Args:
        axes: the logical axes of one block's weight, so without "layers".
        layout: one of LAYOUTS.
    """
    shares = [
        (axis, tuple(mesh_axis for mesh_axis in LAYOUTS[layout].get(logical, ()) if mesh_axis != "tp"))
        for axis, logical in enumerate(axes)
    ]
    split = [share for share in shares if share[1]]
    if len(split) > 1:
        raise ValueError(f"layout {layout} lets sp and dp split {len(split)} axes of {axes}; a block gathers one")
    return split[0] if split else None


@dataclasses.dataclass(frozen=True)
class Parallelism:
    """How stage 2 uses its chips.

    Attributes:
        mesh: with the axes of MESH_AXES.
        layout: of the parameters, a key of LAYOUTS.
        query_parts: into so many parts sp splits the queries inside attention, one for each group of neighbours that
            exchange tokens for heads; with 1 all chips along sp are one group, and nothing is gathered.
    """

    mesh: Mesh
    layout: str = "tp"
    query_parts: int = 1

    @property
    def sp(self) -> int:
        """Chips that split the sequence."""
        return self.mesh.shape["sp"]

    @property
    def tp(self) -> int:
        """Chips that split attention heads and MLP."""
        return self.mesh.shape["tp"]

    @property
    def head_parts(self) -> int:
        """Chips of a group along sp: each has such a part of the heads inside attention."""
        return self.sp // self.query_parts

    def head_groups(self, heads: int) -> int:
        """Return in how many groups a chip exchanges and attends its part of the model's `heads`.

        One group travels between chips while another is attended. There are two, or three where two would not be alike:
        of more, each attended for a shorter time, fewer travel unseen. Where nothing travels there is one.
        """
        own = heads // (self.tp * self.head_parts)
        return next((n for n in (2, 3) if own % n == 0), 1) if self.head_parts > 1 else 1

    @property
    def exchanging(self) -> list[list[int]] | None:
        """Places along sp of the chips of each group, which exchange tokens for heads; None for all of them."""
        places = np.arange(self.sp).reshape(self.query_parts, -1)
        return places.tolist() if self.query_parts > 1 else None

    @property
    def gathering(self) -> list[list[int]]:
        """Places along sp of the chips with the same heads, one of each group, which gather keys and values."""
        return np.arange(self.sp).reshape(self.query_parts, -1).T.tolist()

    @property
    def platform(self) -> str:
        """Platform of the chips: "tpu", "cpu" or "gpu"."""
        return self.mesh.devices.flat[0].platform

    def sharding(self, *spec: str | tuple[str, ...] | None) -> NamedSharding:
        """Return `NamedSharding(mesh, PartitionSpec(*spec))`; without arguments, that of replicated arrays."""
        return NamedSharding(self.mesh, PartitionSpec(*spec))


def to_devices(arrays: Any, sharding: NamedSharding) -> Any:
    """Copy a tree of arrays from the host to the devices of `sharding`; with several hosts, all must have the same.

    For several hosts `jax.device_put` would compare what they have, which takes a program and an exchange.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(arrays, sharding)

    def parts(array: jax.typing.ArrayLike) -> jax.Array:
        array = np.asarray(array)
        places = sharding.addressable_devices_indices_map(array.shape)
        # Each device gets a copy of its own, because a program that the array is donated to writes to it.
        copies = [jax.device_put(np.array(array[index]), device) for device, index in places.items()]
        return jax.make_array_from_single_device_arrays(array.shape, sharding, copies)

    return jax.tree.map(parts, arrays)


def possible_parallelisms(
    devices: Sequence[jax.Device],
    heads: int,
    batch: int,
    use_dp: bool,
    sp_num: int | None,
    mesh_order: Sequence[str],
    layout: str,
) -> list[Parallelism]:
    """Return the ways to use the chips of which one is the fastest.

    Args:
        devices: the chips.
        heads, batch, use_dp, sp_num: see `possible_mesh_sizes`.
        mesh_order: order of the mesh's axes; along the last one devices are neighbours.
        layout: of the parameters, a key of LAYOUTS.

    Raises:
        PlanError: there is no such order or layout, or the devices or the heads do not divide.
    """
    if sorted(mesh_order) != sorted(MESH_AXES):
        raise PlanError("mesh_order", f"{','.join(mesh_order)} is not an order of {','.join(MESH_AXES)}")
    if layout not in LAYOUTS:
        raise PlanError("layout", f"{layout} is unknown; there are {', '.join(LAYOUTS)}")
    return [
        Parallelism(make_mesh(sizes, devices, mesh_order), layout, query_parts(sizes, heads))
        for sizes in possible_mesh_sizes(len(devices), heads, batch, use_dp, sp_num)
    ]


def possible_mesh_sizes(
    devices: int, heads: int, batch: int, use_dp: bool, sp_num: int | None = None
) -> list[dict[str, int]]:
    """Return the sizes of dp, sp and tp that may be the fastest, those with the most chips along sp first.

    dp splits the batch if it can, and tp is what sp leaves. If the chips that dp leaves divide the heads, sp has them
    all, which moves the fewest bytes where the weights fit on a chip.

    Args:
        devices: how many there are.
        heads: attention heads, which tp must divide.
        batch: samples in every step, with classifier-free guidance two for each video.
        use_dp: whether dp may split the batch.
        sp_num: size of sp, which leaves one choice; None to leave it open.

    Raises:
        PlanError: `sp_num` does not divide the devices, or leaves a tp that does not divide the heads; the message says
            which values work.
    """
    dp = math.gcd(devices, batch) if use_dp else 1
    rest = devices // dp
    fitting = [sp for sp in range(rest, 0, -1) if rest % sp == 0 and heads % (rest // sp) == 0]
    if sp_num is not None:
        if sp_num not in fitting:
            split = f"does not split the {rest} chips that dp leaves so that the others divide {heads} attention heads"
            raise PlanError("sp_num", f"{sp_num} {split}; {sorted(fitting)} work")
        fitting = [sp_num]
    elif heads % rest == 0:
        fitting = [rest]
    return [{"dp": dp, "sp": sp, "tp": rest // sp} for sp in fitting]


def query_parts(sizes: Mapping[str, int], heads: int) -> int:
    """Return `Parallelism.query_parts` for a mesh: the fewest with which sp and tp share the heads evenly."""
    return sizes["sp"] // math.gcd(sizes["sp"], heads // sizes["tp"])
