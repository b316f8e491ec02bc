"""Put weights onto the chips: the host copies and sends each byte once.

What several chips hold is not sent to each of them. Each is sent a part of it, and a program on the chips gathers the
parts over the links between them, which are faster than the way from the host.
"""

import math
import mmap
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from cogvideox.models.shared.sharding import mesh_axes

Key = TypeVar("Key")
Index = tuple[slice, ...]
Told = Callable[[str, float], object]  # is called with the name of a part of a load, and its seconds
SMALL = 2**22  # bytes of an array that is sent to every chip, because compiling another gather would take longer


class Scatter(NamedTuple):
    """How to send an array of which several chips hold copies: each byte to one chip.

    Attributes:
        sent: the array with the sharding in which it is sent.
        axis: the axis that this sharding splits further than the wanted one.
        mesh_axes: the mesh axes over which it does.
    """

    sent: jax.ShapeDtypeStruct
    axis: int
    mesh_axes: tuple[str, ...]


def ignore(part: str, seconds: float) -> None:
    """Do nothing with what `load_arrays` tells."""


def load_arrays(
    wanted: Mapping[Key, jax.ShapeDtypeStruct],
    fill: Callable[[Key, Index, np.ndarray], None],
    scatter: bool | None = None,
    told: Told = ignore,
) -> dict[Key, jax.Array]:
    """Load arrays onto the devices of a mesh.

    There is a thread for each device of this host and one more, so that some parts are read while others travel. The
    host holds as many parts at a time.

    Args:
        wanted: shape, dtype and sharding (a `NamedSharding` over the mesh) of each array, by a key.
        fill: `fill(key, index, part)` writes what an array has at `index` into the NumPy array `part`. It is called in
            several threads.
        scatter: whether what several devices hold is sent in parts and gathered there; None for a choice by platform:
            the devices that a CPU counts as share its memory, and need no copies at all.
        told: is called with how many seconds of the load were its parts "reading", which is `fill`, and "placing", the
            way to the devices; where threads did both at a time, the seconds are split as those of the threads.
    """
    start = time.perf_counter()
    mesh = next(iter(wanted.values())).sharding.mesh
    if scatter is None:
        scatter = mesh.devices.flat[0].platform != "cpu"
    scatters = {key: found for key, array in wanted.items() if scatter and (found := scatter_of(array))}
    sent = dict(wanted) | {key: found.sent for key, found in scatters.items()}
    parts = [(key, *part) for key, array in sent.items() for part in distinct_parts(array)]

    def send(key: Key, index: Index, devices: Sequence[jax.Device]) -> tuple[list[jax.Array], float, float]:
        begin = time.perf_counter()
        part = _zeros(sent[key].sharding.shard_shape(sent[key].shape), sent[key].dtype)
        fill(key, index, part)
        filled = time.perf_counter()
        arrays = jax.block_until_ready([jax.device_put(part, device) for device in devices])
        return arrays, filled - begin, time.perf_counter() - filled

    arrived: dict[Key, list[jax.Array]] = {key: [] for key in sent}
    with ThreadPoolExecutor(len(mesh.local_devices) + 1) as pool:
        gather = pool.submit(compile_gather, wanted, scatters) if scatters else None
        reading = placing = 0.0  # of all threads
        for (key, *_), (arrays, *seconds) in zip(parts, pool.map(send, *zip(*parts, strict=True)), strict=True):
            arrived[key] += arrays
            reading, placing = reading + seconds[0], placing + seconds[1]
    until_sent = time.perf_counter() - start
    loaded: dict[Key, jax.Array] = {
        key: jax.make_array_from_single_device_arrays(array.shape, array.sharding, arrived[key])
        for key, array in sent.items()
    }
    if gather:
        loaded |= gather.result()({key: loaded[key] for key in scatters})
    read = until_sent * reading / (reading + placing)
    told("reading", read)
    told("placing", time.perf_counter() - start - read)
    return loaded


def distinct_parts(array: jax.ShapeDtypeStruct) -> list[tuple[Index, list[jax.Device]]]:
    """Return the index of each part that some device of this host holds, and the devices that hold it."""
    found: dict[str, tuple[Index, list[jax.Device]]] = {}
    for device, index in array.sharding.addressable_devices_indices_map(array.shape).items():
        found.setdefault(str(index), (index, []))[1].append(device)
    return list(found.values())


def scatter_of(array: jax.ShapeDtypeStruct) -> Scatter | None:
    """Return how to send `array`, split further along the first axis that divides; None for all that each chip holds.

    That is so if no two chips hold the same part, if the array is small, or if no axis divides.
    """
    mesh = array.sharding.mesh
    spec = mesh_axes(array.sharding.spec)
    spec += [()] * (len(array.shape) - len(spec))
    copies = tuple(name for name, size in mesh.shape.items() if size > 1 and not any(name in axes for axes in spec))
    if not copies or math.prod(array.shape) * array.dtype.itemsize < SMALL:
        return None
    for axis, size in enumerate(array.shape):
        if size % math.prod(mesh.shape[name] for name in spec[axis] + copies) == 0:
            spec[axis] += copies
            return Scatter(array.update(sharding=NamedSharding(mesh, PartitionSpec(*spec))), axis, copies)
    return None


def compile_gather(wanted: Mapping[Key, jax.ShapeDtypeStruct], scatters: Mapping[Key, Scatter]) -> Callable:
    """Compile the function that takes a dict of arrays as `scatters` sends them, and returns them as they are wanted.

    Parts that are gathered along the first axis come to lie one after the other. Along another axis they would first be
    gathered like that, and then be copied. So it is done for one index of the first axis at a time, and the program
    needs little memory beyond its arguments and results.
    """

    def gather_array(part: jax.Array, axis: int, mesh_axes: tuple[str, ...]) -> jax.Array:
        if axis == 0:
            return jax.lax.all_gather(part, mesh_axes, tiled=True)
        return jax.lax.map(lambda row: jax.lax.all_gather(row, mesh_axes, axis=axis - 1, tiled=True), part)

    def gather(parts: dict[Key, jax.Array]) -> dict[Key, jax.Array]:
        return {key: gather_array(part, scatters[key].axis, scatters[key].mesh_axes) for key, part in parts.items()}

    sent = {key: scatter.sent for key, scatter in scatters.items()}
    in_specs = {key: array.sharding.spec for key, array in sent.items()}
    shardings = {key: wanted[key].sharding for key in scatters}
    out_specs = {key: sharding.spec for key, sharding in shardings.items()}
    mesh = next(iter(shardings.values())).mesh
    mapped = jax.shard_map(gather, mesh=mesh, in_specs=(in_specs,), out_specs=out_specs, check_vma=False)
    return jax.jit(mapped, out_shardings=shardings).lower(sent).compile()


def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an array in pages of its own; jax on a CPU takes memory that begins at a page as it is, without a copy."""
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, access=mmap.ACCESS_COPY)
    return np.frombuffer(memory, dtype).reshape(shape)
