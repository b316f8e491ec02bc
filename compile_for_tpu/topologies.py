"""Define the TPU slices that can be compiled for, with the figures of their chips that predictions need."""

import contextlib
import dataclasses
import importlib.util
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from cogvideox.errors import UserError

if TYPE_CHECKING:
    import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device of a TPU generation: a chip, or a TensorCore where a chip shows two of them (v4, 7x).

    Peak FLOP/s, bandwidths and cores are from docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}. The memory is what
    libtpu 0.0.42.1 reports as available when a program needs too much.

    Attributes:
        clock: cycles a second: peak FLOP/s divided by the FLOP of the matrix units in one cycle.
        flops: peak bfloat16 FLOP/s.
        hbm_gib: GiB of HBM that a program can use.
        hbm_bandwidth: bytes a second.
        link_bandwidth: bytes a second of one link between chips, one way.
    """

    clock: float
    flops: float
    hbm_gib: float
    hbm_bandwidth: float
    link_bandwidth: float


CHIPS = {
    "v4": Chip(1.05e9, 275e12 / 2, 15.25, 1.2e12 / 2, 50e9),
    "v5e": Chip(1.5e9, 197e12, 15.75, 819e9, 50e9),
    "v5p": Chip(1.75e9, 459e12, 95.74, 2765e9, 100e9),
    "v6e": Chip(1.75e9, 918e12, 31.25, 1638e9, 100e9),
    "7x": Chip(2.2e9, 2307e12 / 2, 94.75, 7380e9 / 2, 100e9),
}


# Arguments of `jax.experimental.topologies.get_topology_desc`, by slice.
TOPOLOGIES: dict[str, tuple[str, dict[str, Any]] | None] = {
    "v6e-1": ("v6e:1x1", {"chips_per_host_bounds": [1, 1, 1]}),
    "v6e-4": ("v6e:2x2", {}),
    "v6e-8": ("v6e:2x4", {}),
    "v6e-16": ("v6e:4x4", {}),
    "v6e-32": ("v6e:4x8", {}),
    "v5e-1": ("v5e:1x1", {"chips_per_host_bounds": [1, 1, 1]}),
    "v5e-4": ("v5e:2x2", {}),
    "v5e-8": ("v5e:2x4", {}),
    "v5p-4": ("v5p:2x2x1", {}),
    "v4-4": ("v4:2x2x1", {}),
    "7x-4": ("tpu7x:2x2x1", {}),
    "7x-8": ("tpu7x:2x2x2", {}),
    "cpu": None,  # the CPU of this machine, to try the tool and executables without a TPU
}


def check(topology: str) -> None:
    """Raise UserError if a slice is not in TOPOLOGIES, or if libtpu, which compiles for it, is not installed."""
    if topology not in TOPOLOGIES:
        raise UserError(f"--topology {topology} is unknown; known are {', '.join(TOPOLOGIES)}")
    if topology != "cpu" and importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "libtpu, which holds the TPU compiler, is not installed; on Linux x86-64, "
            "pip install -r requirements.txt brings it"
        )


def chip(topology: str) -> Chip:
    """Return the chip of a slice in TOPOLOGIES."""
    return CHIPS[topology.split("-")[0]]


def compiler_environment(topology: str, dump: str | None = None) -> dict[str, str]:
    """Return the environment variables of a process that compiles for a slice; they must be set before libtpu loads.

    Args:
        topology: the slice.
        dump: folder for the final schedules of all kernels; None writes none.
    """
    # The cache is off: a program from it leaves no schedules, and one for a CPU cannot be serialised again.
    environment = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    if topology == "cpu":
        return environment
    environment |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": topology,
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # no TPU is touched, so several compilers may run at once
        "XLA_FLAGS": "",
    }
    if dump is not None:
        environment["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final.*"
        )
    return environment


def devices(topology: str) -> list:
    """Return JAX devices of a slice that can only be compiled for; this process must have `compiler_environment`."""
    import jax
    from jax.experimental import topologies

    arguments = TOPOLOGIES[topology]
    if arguments is None:
        return jax.devices()
    name, options = arguments
    return topologies.get_topology_desc(name, platform="tpu", **options).devices


@contextlib.contextmanager
def compiling_for(mesh: "jax.sharding.Mesh") -> Iterator[None]:
    """Trace and compile for the devices of a mesh; without this, Pallas compiles for the devices of this machine."""
    import jax

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


def collective_seconds(
    opcode: str, operand_bytes: int, group: Sequence[int], coordinates: dict[int, tuple], link_bandwidth: float
) -> float:
    """Predict the seconds of a collective from the bytes that must cross the links of its group.

    A gather, scatter or reduction is limited by the chip of the group that has the fewest links; each link carries the
    link bandwidth in each direction. An all-to-all is also limited by the links that cross the middle of the group.
    Small slices have no wrap-around links. Latency is not counted.

    Args:
        opcode: the collective's name in HLO, such as "all-gather".
        operand_bytes: bytes of one device's input.
        group: ids of the devices that take part.
        coordinates: device id -> (x, y, z) of its chip.
        link_bandwidth: bytes a second of one link, one way.

    Raises:
        ValueError: there is no model of this collective.

    Source of the model: jax-ml.github.io/scaling-book/sharding, for meshes without wrap-around.
    """
    n = len(group)
    if n == 1:
        return 0.0
    places = [coordinates[device] for device in group]
    links = [sum(sum(abs(i - j) for i, j in zip(a, b, strict=True)) == 1 for b in places) for a in places]
    ports = max(1, min(links))
    if opcode == "all-gather":
        crossing = operand_bytes * (n - 1) / ports
    elif opcode == "reduce-scatter":
        crossing = operand_bytes * (n - 1) / n / ports
    elif opcode == "all-reduce":
        crossing = 2 * operand_bytes * (n - 1) / n / ports
    elif opcode in ("all-to-all", "ragged-all-to-all"):
        extent = [max(axis) - min(axis) for axis in zip(*places, strict=True)]
        longest = extent.index(max(extent))
        across = max(1, len({place[:longest] + place[longest + 1 :] for place in places}))
        crossing = max(operand_bytes * (n - 1) / n / ports, operand_bytes * n / 4 / across)
    elif opcode == "collective-permute":
        crossing = operand_bytes
    else:
        raise ValueError(f"no model for the collective {opcode}")
    return crossing / link_bandwidth
