"""Where arrays live on the dp/sp/tp mesh: tables of logical axes, and for each layout a map from those to mesh axes.

dp splits the batch (the two prompts of classifier-free guidance), sp the sequence, tp the attention heads and the MLP.
Between the matrix products the hidden states are split over the sequence by sp and tp together.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cogvideox.errors import PlanError

MESH_AXES = ("dp", "sp", "tp")

# Every transformer parameter matches exactly one pattern. Names are those of the diffusers module, the blocks' stacked
# along a leading axis; weights are [out, in] as in torch.
PARAMETER_AXES = (
    (r"blocks\.attn1\.to_[qkv]\.weight", ("layers", "heads", "embed")),
    (r"blocks\.attn1\.to_[qkv]\.bias", ("layers", "heads")),
    (r"blocks\.attn1\.norm_[qk]\.(weight|bias)", ("layers", "head_dim")),
    (r"blocks\.attn1\.to_out\.0\.weight", ("layers", "embed", "heads")),
    (r"blocks\.attn1\.to_out\.0\.bias", ("layers", "embed")),
    (r"blocks\.ff\.net\.0\.proj\.weight", ("layers", "mlp", "embed")),
    (r"blocks\.ff\.net\.0\.proj\.bias", ("layers", "mlp")),
    (r"blocks\.ff\.net\.2\.weight", ("layers", "embed", "mlp")),
    (r"blocks\.ff\.net\.2\.bias", ("layers", "embed")),
    (r"blocks\.norm[12]\.linear\.weight", ("layers", "modulation", "time")),
    (r"blocks\.norm[12]\.linear\.bias", ("layers", "modulation")),
    (r"blocks\.norm[12]\.norm\.(weight|bias)", ("layers", "embed")),
    (r"patch_embed\.(proj|text_proj)\.weight", ("embed", "input")),
    (r"patch_embed\.(proj|text_proj)\.bias", ("embed",)),
    (r"time_embedding\.linear_[12]\.weight", ("time", "time_input")),
    (r"time_embedding\.linear_[12]\.bias", ("time",)),
    (r"norm_final\.(weight|bias)", ("embed",)),
    (r"norm_out\.linear\.weight", ("modulation", "time")),
    (r"norm_out\.linear\.bias", ("modulation",)),
    (r"norm_out\.norm\.(weight|bias)", ("embed",)),
    (r"proj_out\.weight", ("output", "embed")),
    (r"proj_out\.bias", ("output",)),
)

# Activations inside the blocks. Between the matrix products sp and tp split the "tokens"; for the products the chips
# along tp gather the tokens, and split the heads and the MLP instead.
ACTIVATION_AXES = {
    "hidden states": ("batch", "tokens", "embed"),
    "gathered heads": ("batch", "gathered tokens", "split heads"),
    "projected heads": ("batch", "split heads", "gathered tokens", "head_dim"),
    "attended heads": ("batch", "exchanged heads"),
    "rotary embedding": ("gathered tokens", "rotary"),
    "time embedding": ("time",),
}

# Logical axis -> mesh axes; an axis that is not named is replicated. Every layout splits the activations in the same
# way. In "fsdp" each chip stores an equal share of the weights, and each block gathers its weights over sp and dp when
# it runs.
ACTIVATIONS = {
    "batch": ("dp",),
    "tokens": ("sp", "tp"),
    "gathered tokens": ("sp",),
    "split heads": ("tp",),
    "exchanged heads": ("tp", "sp"),
}
# In every layout tp, named first, splits heads and MLP and nothing else of the weights, because a block computes on
# that share; sp and dp may split one axis of each weight.
LAYOUTS = {
    "tp": ACTIVATIONS | {"heads": ("tp",), "mlp": ("tp",)},
    "fsdp": ACTIVATIONS | {"heads": ("tp", "sp", "dp"), "mlp": ("tp", "sp", "dp")},
}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device], order: Sequence[str] = MESH_AXES) -> Mesh:
    """Make a mesh with the axes dp, sp and tp of the given sizes; devices are neighbours along the last of `order`.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(f"a mesh of {dict(sizes)} does not fill {len(devices)} devices")
    return Mesh(np.asarray(devices).reshape([sizes[axis] for axis in order]), tuple(order))


def parameter_axes(name: str) -> tuple[str, ...]:
    """Return the logical axes of a transformer parameter; raises ValueError unless exactly one pattern matches it."""
    matches = [axes for pattern, axes in PARAMETER_AXES if re.fullmatch(pattern, name)]
    if len(matches) != 1:
        raise ValueError(f"{len(matches)} sharding rules match the parameter {name}")
    return matches[0]


def parameter_spec(name: str, layout: str) -> PartitionSpec:
    """Return the mesh axes of each axis of the parameter `name` in one of LAYOUTS."""
    return PartitionSpec(*(LAYOUTS[layout].get(axis) for axis in parameter_axes(name)))


def parameter_sharding(name: str, layout: str, mesh: Mesh) -> NamedSharding:
    """Return how the parameter `name` is split over `mesh` in one of LAYOUTS."""
    return NamedSharding(mesh, parameter_spec(name, layout))


def activation_spec(name: str) -> PartitionSpec:
    """Return the mesh axes of each axis of an activation in ACTIVATION_AXES."""
    return PartitionSpec(*(ACTIVATIONS.get(axis) for axis in ACTIVATION_AXES[name]))


def mesh_axes(spec: PartitionSpec) -> list[tuple[str, ...]]:
    """Return the mesh axes that split each axis of an array, also where a spec names one or None."""
    return [(axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in spec]


def gather_at_use(name: str, layout: str) -> tuple[int, tuple[str, ...]] | None:
    """Return (axis, mesh axes) over which a block gathers its share of `name` before use; None where it need not.

    The share is that of one block, so the axis of the layers is not counted.
    """
    shares = [
        (axis, tuple(mesh_axis for mesh_axis in LAYOUTS[layout].get(logical, ()) if mesh_axis != "tp"))
        for axis, logical in enumerate(parameter_axes(name)[1:])
    ]
    split = [share for share in shares if share[1]]
    if len(split) > 1:
        raise ValueError(f"layout {layout} lets sp and dp split {len(split)} axes of {name}; a block gathers one")
    return split[0] if split else None


@dataclasses.dataclass(frozen=True)
class Parallelism:
    """How stage 2 uses its chips: the mesh, and the layout of the parameters (a key of LAYOUTS)."""

    mesh: Mesh
    layout: str = "tp"

    @property
    def sp(self) -> int:
        """Chips that split the sequence."""
        return self.mesh.shape["sp"]

    @property
    def tp(self) -> int:
        """Chips that split attention heads and MLP."""
        return self.mesh.shape["tp"]

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


def mesh_sizes(devices: int, heads: int, batch: int, use_dp: bool, sp_num: int | None = None) -> dict[str, int]:
    """Return the sizes of dp, sp and tp for a number of devices: dp splits the batch if it can, tp is what sp leaves.

    Args:
        heads: attention heads, which sp and tp together split.
        batch: samples in every step, with classifier-free guidance two for each video.
        use_dp: whether dp may split the batch.
        sp_num: size of sp; None for all that dp leaves, which moves the fewest bytes where the weights fit on a chip.

    Raises:
        PlanError: the devices or the heads do not divide; the message says which values work.
    """
    dp = math.gcd(devices, batch) if use_dp else 1
    rest = devices // dp
    sp_num = rest if sp_num is None else sp_num
    divisors = [n for n in range(1, rest + 1) if rest % n == 0]
    if heads % rest:
        raise PlanError(
            None, f"{rest} chips cannot share {heads} attention heads; use a number of chips that divides {heads}"
        )
    if sp_num not in divisors:
        raise PlanError("sp_num", f"{sp_num} does not divide the {rest} chips that share the heads; {divisors} work")
    return {"dp": dp, "sp": sp_num, "tp": rest // sp_num}
