"""Read from the compiler how much memory a program takes, and predict how long it runs.

The memory is what the program takes on a TPU. The seconds are predicted from the compiler's schedules and its cost
model, not measured.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogvideox import hlo_schedule
from cogvideox.errors import UserError
from compile_for_tpu import kernel_schedule, topologies

if TYPE_CHECKING:
    from jax.extend import core

# Kernels that run only for queries with unusual scores; see custom_splash_attention.py. The prediction
# assumes that a loop around one of them does not run.
RARE_KERNELS = ("exp2_splash_online", *(f"exp2_splash_{kind}_online" for kind in ("dense", "frames", "positions")))
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Programs:
    """Programs that are ready to be compiled, and what the report needs beside them.

    Attributes:
        traced: the programs, `jax.stages.Traced`.
        times: number of runs of each program.
        devices: the devices that the programs run on, in the order of their mesh.
        scores_per_kernel: useful attention scores that a call of the attention kernel computes on one chip, or of each
            kernel by its name.
        trips: of kernels with loops whose length depends on data, by their names: the mean length.
        lengths: of kernels with a length of their grid that depends on data, by their names: its mean. A loop around
            one of them, which runs it only where that is not 0, counts as run once.
        attention_flops: FLOP of one chip inside the attention kernels, which `matrix_flops` leaves out.
        options: the options that the report shows, by name.
        model: the name of the model, or None if the programs belong to no model.
        name: the programs' name in `executable.description`.
        executable_options: the options in `executable.description`.
        advice: what helps if the programs do not fit the memory.
    """

    traced: Sequence
    times: Sequence[int]
    devices: Sequence
    scores_per_kernel: float | Mapping[str, float] = 0
    trips: Mapping[str, float] = dataclasses.field(default_factory=dict)
    lengths: Mapping[str, float] = dataclasses.field(default_factory=dict)
    attention_flops: float = 0
    options: Mapping = dataclasses.field(default_factory=dict)
    model: str | None = None
    name: str = ""
    executable_options: Mapping = dataclasses.field(default_factory=dict)
    advice: str = "a slice of more chips"

    def useful_scores(self, kernel: str) -> float:
        """Return the useful scores of one call of a kernel."""
        found = self.scores_per_kernel
        return found[kernel_schedule.base_name(kernel)] if isinstance(found, Mapping) else found

    def flops(self) -> float:
        """Return the FLOP of one chip for the matrix products, convolutions and attention of all runs."""
        runs = zip(self.times, self.traced, strict=True)
        return sum(n * matrix_flops(p.jaxpr, len(self.devices)) for n, p in runs) + self.attention_flops


def predict(topology: str, dump: Path, programs: Programs, compiled: Sequence) -> dict:
    """Predict the seconds of all runs of the programs: total, by category, of the slowest operations; and the kernels.

    Args:
        dump: the folder that the compiler was told to write its schedules to.
        compiled: the programs, compiled for the slice `topology`.

    Raises:
        hlo_schedule.HloError, kernel_schedule.ScheduleError: a text of the compiler cannot be read.
    """
    kernels = _kernels(dump, programs)
    # A kernel that states its own cost is no attention; if it takes long, it is among the slowest operations.
    stated = {name: size for p in programs.traced for name, size in kernel_schedule.stated_bytes(p.jaxpr).items()}
    split = dict.fromkeys(hlo_schedule.CATEGORIES, 0.0)
    operations: dict[str, float] = defaultdict(float)
    for cost in _costs(topology, programs, compiled, kernels, stated):
        split[cost.category] += cost.seconds
        operations[f"{cost.category}: {cost.source} ({cost.name})"] += cost.seconds
    return {
        "predicted_seconds": sum(split.values()),
        "split": split,
        "slowest": dict(sorted(operations.items(), key=lambda item: -item[1])[:10]),
        "kernels": {
            name: {
                "cycles": kernel.cycles,
                "useful_scores_per_cycle": programs.useful_scores(name) / kernel.cycles,
                "units": {unit: kernel.utilization(unit) for unit in kernel.capacity},
            }
            for name, kernel in kernels.items()
            if kernel_schedule.base_name(name) not in stated
        },
    }


def _kernels(dump: Path, programs: Programs) -> dict[str, kernel_schedule.KernelSchedule]:
    """Read the schedules of the programs' Pallas kernels, except RARE_KERNELS."""
    found = (kernel_schedule.grids(program.jaxpr).items() for program in programs.traced)
    grids = {
        name: tuple(length if isinstance(length, int) else float(programs.lengths[name]) for length in grid)
        for of_program in found
        for name, grid in of_program
        if name not in RARE_KERNELS
    }
    return kernel_schedule.read_schedules(dump, grids, trips=programs.trips) if grids else {}


def _costs(
    topology: str, programs: Programs, compiled: Sequence, kernels: Mapping, stated: Mapping[str, int]
) -> list[hlo_schedule.Cost]:
    """Return the predicted costs of all runs of the programs, in the order of their schedules."""
    chip = topologies.chip(topology)
    devices = programs.devices
    coordinates = {device.id: tuple(device.coords) for device in devices}

    def collective_seconds(opcode, size, group):
        group = [devices[i].id for i in group]  # a program numbers its devices by their place in the mesh
        return topologies.collective_seconds(opcode, size, group, coordinates, chip.link_bandwidth)

    def kernel_seconds(name, size):  # by its schedule, or by its bytes between HBM and VMEM if they take longer
        schedule = kernels.get(name) or next(
            k for other, k in kernels.items() if kernel_schedule.base_name(other) == kernel_schedule.base_name(name)
        )
        return max(schedule.cycles / chip.clock, stated.get(kernel_schedule.base_name(name), size) / chip.hbm_bandwidth)

    costs = []
    for n, program in zip(programs.times, compiled, strict=True):
        parsed = hlo_schedule.Program.parse(program.as_text())
        found = hlo_schedule.costs(
            parsed, chip.clock, kernel_seconds, collective_seconds, RARE_KERNELS, tuple(programs.lengths)
        )
        costs += [cost for cost in found for _ in range(n)]
    return costs


def floor(topology: str, report: Mapping) -> dict:
    """Return the least seconds that peak FLOP/s and memory bandwidth allow, and how many times as long is predicted.

    Args:
        topology: the slice.
        report: has the entries "flops", "memory" and "predicted_seconds".
    """
    chip = topologies.chip(topology)
    moved = sum(report["memory"][kind] for kind in ("arguments", "output")) * GIB
    least = {"compute": report["flops"] / chip.flops, "bytes": moved / chip.hbm_bandwidth}
    return least | {"ratio": report["predicted_seconds"] / max(least.values())}


def memory(compiled: Sequence, topology: str) -> dict:
    """Return the GiB of HBM on one chip, by purpose, of the program that needs the most."""
    analyses = [program.memory_analysis() for program in compiled]
    one = max(analyses, key=lambda a: a.argument_size_in_bytes + a.temp_size_in_bytes)
    sizes = {
        "arguments": one.argument_size_in_bytes,
        "temporaries": one.temp_size_in_bytes,
        "output": one.output_size_in_bytes - one.alias_size_in_bytes,
        "program": one.generated_code_size_in_bytes,
    }
    sizes = {name: size / GIB for name, size in sizes.items()}
    peak, limit = sum(sizes.values()), None if topology == "cpu" else topologies.chip(topology).hbm_gib
    return sizes | {"peak": peak, "limit": limit, "fits": limit is None or peak <= limit}


def out_of_memory(message: str, advice: str) -> dict:
    """Return the GiB in the compiler's out-of-memory error and a line about them.

    Raises:
        UserError: a kernel needs more VMEM than there is.
        RuntimeError: the message is about something else.
    """
    from cogvideox.run.compilation import kernel_shortage, memory_shortage

    if kernel := kernel_shortage(message):
        raise UserError(kernel)
    shortage = memory_shortage(message)
    if not shortage:
        raise RuntimeError(message)
    peak, limit = shortage
    line = f"does not fit: {peak:.1f} GiB a chip of {limit:.2f}, {peak - limit:.1f} too much; what helps: {advice}"
    return {"peak": peak, "limit": limit, "fits": False, "line": line}


def matrix_flops(jaxpr: "core.Jaxpr | core.ClosedJaxpr", devices: int) -> float:
    """Return the FLOP of one device for the matrix products and convolutions of a jaxpr.

    Of its Pallas kernels, those count that state their own cost.

    Shapes outside of shard_map are global; their work is assumed to be split evenly over the devices.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = _shape(equation.invars[0])
            total += 2 * math.prod(_shape(equation.outvars[0])) * math.prod(left[i] for i in contracted) / devices
        elif name == "conv_general_dilated":
            weight = _shape(equation.invars[1])
            features = params["dimension_numbers"].rhs_spec[0]
            total += 2 * math.prod(_shape(equation.outvars[0])) * math.prod(weight) / weight[features] / devices
        elif name == "pallas_call":
            total += params["cost_estimate"].flops if params["cost_estimate"] else 0
        else:
            inside = 1 if name == "shard_map" else devices
            trips = params["length"] if name == "scan" else 1
            for value in params.values():
                for item in value if isinstance(value, (tuple, list)) else [value]:
                    if hasattr(item, "eqns"):
                        total += trips * matrix_flops(item, inside)
    return total


def _shape(variable: Any) -> tuple[int, ...]:
    """Return the shape of a variable of a jaxpr."""
    return variable.aval.shape
