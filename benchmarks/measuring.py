"""Compile what is measured, look at its memory, and find what was predicted for it."""

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.machine import Machine, Size
from cogvideox.cli.report import memory_of
from compile_for_tpu import prediction, programs, report

if TYPE_CHECKING:
    import jax


def compiled(traced: "Sequence[jax.stages.Traced]") -> "tuple[list[jax.stages.Compiled], float]":
    """Compile programs at the same time; return them and the seconds."""
    from concurrent.futures import ThreadPoolExecutor

    start = time.perf_counter()
    with ThreadPoolExecutor() as pool:
        programs = list(pool.map(lambda program: program.lower().compile(), traced))
    return programs, time.perf_counter() - start


class MemoryUse:
    """The memory of the devices during a measurement, in GiB of the chip that uses the most."""

    def __init__(self, devices: "Sequence[jax.Device]"):
        self._devices = devices
        self._before = self._most("peak")

    def _most(self, what: str) -> float | None:
        sizes = [told[what] / prediction.GIB for told in memory_of(self._devices) if what in told]
        return max(sizes) if sizes else None

    def so_far(self, programs: "Sequence[jax.stages.Compiled]") -> dict:
        """Return what the compiler allots, what is in use now, and the peak if it is this measurement's own."""
        peak = self._most("peak")
        own = peak is not None and peak > (self._before or 0.0)
        return {
            "allotted_gib": prediction.memory(programs, "cpu")["peak"],
            "in_use_gib": self._most("in use"),
            "peak_gib": peak if own else None,  # otherwise it is that of something before
        }


def predicted(what: str, machine: Machine, size: Size, labels: Sequence[str], options: Sequence[str] = ()) -> dict:
    """Return seconds and GiB of a saved prediction for a size; None where there is none.

    The labels of the report come before that of the model, and those of other options after it.
    """
    of_model = [] if machine.is_of_the_tables else [f"model={programs.model_name(machine.model)}"]
    return of_report(what, machine.topology, ["x".join(map(str, size)), *labels, *of_model, *options])


def of_report(what: str, topology: str | None, labels: Sequence[str]) -> dict:
    """Return seconds and GiB of a saved report; None where there is none."""
    path = report.RESULTS / report.file_name(what, str(topology), labels)
    saved = json.loads(path.read_text()) if path.exists() else {"memory": {}}
    return {"predicted_seconds": saved.get("predicted_seconds"), "predicted_gib": saved["memory"].get("peak")}
