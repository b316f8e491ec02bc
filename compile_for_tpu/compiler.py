"""Compile in a process of its own for each compilation, because libtpu reads its settings only once."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cogvideox.errors import UserError, error_message
from cogvideox.files import writing
from cogvideox.files.names import ROOT
from cogvideox.signals import Interruption
from cogvideox.versions import versions
from compile_for_tpu import kernel_schedule, prediction, topologies

DUMP = "COMPILE_FOR_TPU_DUMP"  # names the folder of the compiler's dumps, in the process that compiles


def dump_folder() -> Path | None:
    """Return the folder of the compiler's dumps if this is the process that compiles, else None."""
    return Path(os.environ[DUMP]) if DUMP in os.environ else None


def in_a_process(module: str, command: Sequence[str], topology: str, what: str) -> dict:
    """Run `python -m module command` as the process that compiles, and return the JSON object that it prints last.

    `what` names the programs in the message on stderr. On a terminal, show the seconds that have passed, too.

    Raises:
        UserError: the process ended with a UserError.
        RuntimeError: the process failed in another way.
    """
    with Interruption.raised(), tempfile.TemporaryDirectory() as dump:
        search = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = os.environ | topologies.compiler_environment(topology, dump) | {DUMP: dump, "PYTHONPATH": search}
        with open(Path(dump) / "log", "w+") as log:
            print(f"compiling {what} ...", file=sys.stderr, flush=True)
            process = subprocess.Popen(
                [sys.executable, "-m", module, *command],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
            output = _wait(process)
            log.seek(0)
            errors = log.read()
    if process.returncode == 2:
        raise UserError(error_message(errors))
    if process.returncode:
        raise RuntimeError(f"the compiling process ended with {process.returncode}:\n{errors}")
    return json.loads(output.splitlines()[-1])


def _wait(process: subprocess.Popen) -> str:
    """Return the output of the process at its end; show the seconds meanwhile, and kill it if we are interrupted."""
    start = time.monotonic()
    while True:
        try:
            output, _ = process.communicate(timeout=1)
        except subprocess.TimeoutExpired:
            if sys.stderr.isatty():
                print(f"\r  {time.monotonic() - start:.0f} s ", end="", file=sys.stderr, flush=True)
        except BaseException:
            process.kill()
            raise
        else:
            if sys.stderr.isatty():
                print("\r", end="", file=sys.stderr)
            return output


def compile_and_report(
    what: str, topology: str, trace: Callable[[list], prediction.Programs], dump: Path, save: Path | None = None
) -> dict:
    """Compile programs for a slice and return the report; runs in the process that compiles.

    Args:
        what: "stage2", "stage3" or "kernel".
        topology: the slice to compile for, a key of `topologies.TOPOLOGIES`.
        trace: takes the devices of the slice and returns the programs.
        dump: the folder that the compiler was told to write its schedules to.
        save: file for the compiled programs; None does not save them.
    """
    import jax
    import numpy as np

    from cogvideox.run import executable

    programs = trace(topologies.devices(topology))
    report: dict[str, Any] = {"what": what, "topology": topology}
    if programs.model:
        report["model"] = programs.model
    report["options"] = {name: str(value) for name, value in programs.options.items()}
    report["versions"] = versions("jax", "libtpu")
    start = time.perf_counter()
    try:
        with topologies.compiling_for(jax.sharding.Mesh(np.asarray(programs.devices), ("chips",))):
            compiled = [program.lower().compile() for program in programs.traced]
    except jax.errors.JaxRuntimeError as error:
        return report | {"memory": prediction.out_of_memory(str(error), programs.advice)}
    report["compile_seconds"] = time.perf_counter() - start
    report["memory"] = prediction.memory(compiled, topology)
    report["flops"] = programs.flops()
    if topology != "cpu":
        try:
            report |= prediction.predict(topology, dump, programs, compiled)
        except kernel_schedule.ScheduleError as error:  # of a chip whose schedules have another form; memory is known
            report["unpredicted"] = str(error)
        else:
            report["floor"] = prediction.floor(topology, report)
    if save:
        options = dict(programs.executable_options)
        made_for = executable.description(programs.name, programs.devices, programs.traced, options)
        with writing.replacing(save) as temporary:
            executable.save(temporary, compiled, made_for)
        report["saved"] = str(save)
    return report
