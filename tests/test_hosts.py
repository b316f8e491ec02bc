"""Several processes run a stage as one does; they agree before they begin, and none outlives another."""

import argparse
import io
import itertools
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from cogvideox.errors import UserError
from cogvideox.run import accelerator, hosts
from tests.forks import Fork
from tests.helpers import (
    DEVICES,
    LATENTS,
    QUICK_COMPILATION,
    ROOT,
    SIZE,
    STAGE2,
    STAGE3,
    TINY_MODEL,
    check,
    contents,
    stage_command,
    stage_environment,
)
from tests.in_process import run_here

MESH = ("--sp_num", 2)  # dp, sp and tp of two each, on eight chips
STEPS = ("--num_inference_steps", 900)  # more than come before a process is killed


class Processes:
    """Several processes that run a stage, each in a working directory of its own."""

    def __init__(self, folder: Path, count: int, script: str | Path, *arguments: object, own: dict | None = None):
        with socket.create_server(("localhost", 0)) as free:
            address = f"localhost:{free.getsockname()[1]}"
        environment = stage_environment() | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // count} {QUICK_COMPILATION}",
        }
        self.folders = [folder / str(i) for i in range(count)]
        self._started = []
        for i, cwd in enumerate(self.folders):
            cwd.mkdir(parents=True, exist_ok=True)
            place = ("--num_processes", count, "--process_id", i, "--coordinator_address", address)
            command = stage_command(script, *arguments, *place, *(own or {}).get(i, ()))
            self._started.append(Fork(command, cwd, environment, cwd.with_suffix(".out"), cwd.with_suffix(".err")))

    def stdout(self, i: int) -> str:
        return self.folders[i].with_suffix(".out").read_text()

    def stderr(self, i: int) -> str:
        return self.folders[i].with_suffix(".err").read_text()

    def kill(self, i: int) -> None:
        self._started[i].send_signal(signal.SIGKILL)

    def status(self, i: int, seconds: float = 300) -> int:
        """Wait for a process, which is meant to end; return its exit status."""
        try:
            return self._started[i].wait(seconds)
        finally:
            self._started[i].kill()

    def check(self, status: int = 0) -> None:
        found = [self.status(i) for i in range(len(self._started))]
        said = "\n".join(self.stdout(i) + self.stderr(i) for i in range(len(found)))
        assert found == [status] * len(found), f"exit {found}\n{said}"


@pytest.fixture(scope="session")
def one_process(made_once, finished_run) -> Path:
    """Run stages 2 and 3 in one process with eight devices, and return the folder of their outputs."""

    def make(folder: Path) -> None:
        for script, *options in (
            (STAGE2, "--input_dir", finished_run, "--output_dir", folder, *SIZE, *MESH),
            (STAGE3, "--input_dir", folder, "--output_frames", folder / "frames.safetensors"),
        ):
            check(run_here(script, *options, folder=folder, devices=DEVICES))

    return made_once("one_process", make)


@pytest.mark.slow
def test_latents_of_several_processes(finished_run, one_process, tmp_path):
    """Only process 0 has the input files, says anything, and writes; the latents have the bits of one process."""
    inputs = shutil.copytree(finished_run, tmp_path / "0" / "in")
    (inputs / LATENTS).unlink()
    processes = Processes(tmp_path, 4, STAGE2, "--input_dir", "in", *SIZE, *MESH)
    processes.check()
    assert "devices: 8 x" in processes.stdout(0) and "{'dp': 2, 'sp': 2, 'tp': 2}" in processes.stdout(0)
    assert "[Gloo]" not in processes.stdout(0), processes.stdout(0)
    for i in range(1, 4):
        assert (processes.stdout(i), processes.stderr(i), contents(processes.folders[i])) == ("", "", {})
    ours, wanted = (load_file(folder / LATENTS)["latents"] for folder in (inputs, one_process))
    error = np.abs(ours - wanted).max()
    assert np.abs(wanted).max() > 0.1 and error == 0, f"the latents differ by up to {error:.1e}"


@pytest.mark.slow
def test_frames_of_two_processes(one_process, tmp_path):
    """Where sums are taken in another order, a value between two levels may come out as the other one."""
    inputs = shutil.copytree(one_process, tmp_path / "0" / "in")
    (inputs / "frames.safetensors").unlink()
    options = ("--input_dir", "in", "--output_frames", "frames.safetensors")
    processes = Processes(tmp_path, 2, STAGE3, *options)
    processes.check()
    assert (processes.stdout(1), processes.stderr(1), contents(processes.folders[1])) == ("", "", {})
    paths = (tmp_path / "0" / "frames.safetensors", one_process / "frames.safetensors")
    ours, wanted = (load_file(path)["frames"].astype(int) for path in paths)
    error = np.abs(ours - wanted)
    assert wanted.std() > 1 and error.max() <= 1, f"frames differ by up to {error.max()} levels"
    assert (error > 0).mean() < 0.01, f"{(error > 0).mean():.2%} of the values differ"


LOADING = """
import sys
sys.path.insert(0, sys.argv[1])
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from cogvideox.models.shared import loading, sharding
jax.distributed.initialize(sys.argv[7], int(sys.argv[3]), int(sys.argv[5]))
mesh = sharding.make_mesh({"dp": 2, "sp": 2, "tp": 2}, jax.devices())  # dp is one host or the other
values = [np.random.default_rng(i).random((2048, 1024), np.float32) for i in range(3)]
specs = PartitionSpec(), PartitionSpec("tp"), PartitionSpec(None, ("dp", "sp", "tp"))
wanted = {
    i: jax.ShapeDtypeStruct(values[i].shape, np.float32, sharding=NamedSharding(mesh, specs[i])) for i in range(3)
}
read = [0, 0, 0]
def fill(i, index, part):
    part[...] = values[i][index]
    read[i] += part.size
for i, array in loading.load_arrays(wanted, fill, scatter=True).items():
    assert all(np.array_equal(shard.data, values[i][shard.index]) for shard in array.addressable_shards), i
print(sys.argv[5], "read", [part / values[0].size for part in read], file=sys.stderr)
"""


@pytest.mark.slow
def test_each_host_reads_its_share_of_the_weights(tmp_path):
    """Of what all chips hold, of what those of a host share, and of what is split over all: a half of each."""
    (tmp_path / "load.py").write_text(LOADING)
    processes = Processes(tmp_path, 2, tmp_path / "load.py", ROOT)
    processes.check()
    for i in range(2):
        assert f"{i} read [0.5, 0.5, 0.5]" in processes.stderr(i), processes.stderr(i)


IMPATIENT = """
import sys
sys.path.insert(0, {root!r})
from cogvideox.cli import terminal
from cogvideox.cli.program import run
from cogvideox.run import hosts
import stage2_transformer
terminal.LINE_SECONDS = 0
hosts.HEARTBEAT_SECONDS = 5
run(stage2_transformer.main)
"""


def wait_for(condition: Callable[[], object], fault: Callable[[], str], seconds: float = 300) -> None:
    """Wait until something is there; fail with `fault` after a time that is long also on a busy machine."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            pytest.fail(fault())
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_no_process_outlives_another(victim, finished_run, tmp_path):
    """One is killed between steps, or within one; the other says so in one line and ends."""
    script = tmp_path / STAGE2
    script.write_text(IMPATIENT.format(root=str(ROOT)))
    options = ("--input_dir", finished_run, "--output_dir", tmp_path / "out", *SIZE, *STEPS, *MESH)
    processes = Processes(tmp_path, 2, script, *options)
    wait_for(lambda: re.search(r" [1-9]\d*/900 \[", processes.stderr(0)), lambda: f"no step\n{processes.stderr(0)}")
    processes.kill(victim)
    other = 1 - victim
    assert processes.status(other) != 0
    # The line is written when the process is gone.
    wait_for(lambda: "error" in processes.stderr(other), lambda: f"no line\n{processes.stderr(other)}")
    said = processes.stderr(other)
    last = said.replace("\r", "\n").splitlines()[-1]
    assert last.startswith(f"process {other}: {STAGE2}: error: process {victim} has ended or cannot be reached"), said
    assert "Traceback" not in said and "stack trace" not in said, said
    assert not (tmp_path / "out" / LATENTS).exists()


@pytest.mark.slow
def test_a_difference_is_named(finished_run, tmp_path):
    """An option in which one differs, and one that no several processes can take: a line in each, before the work."""
    for own, wanted in (
        ({1: ("--seed", 7)}, "process 1 differs from process 0 in --seed: 7, not 42"),
        ({i: ("--dump", "dump") for i in range(2)}, "--dump works with one process, not with 2"),
    ):
        processes = Processes(tmp_path, 2, STAGE2, "--input_dir", finished_run, *SIZE, own=own)
        processes.check(status=2)
        for i in range(2):
            lines = processes.stderr(i).splitlines()
            assert len(lines) == 1 and f"{STAGE2}: error: {wanted}" in lines[0], lines
        assert processes.stderr(1).startswith("process 1: ")


def options(**given: object) -> argparse.Namespace:
    return argparse.Namespace(**{"coordinator_address": None, "num_processes": None, "process_id": None} | given)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"num_processes": 2}, "give all three"),
        ({"coordinator_address": "localhost:1", "num_processes": 2, "process_id": 2}, "count from 0"),
        ({"coordinator_address": "localhost", "num_processes": 2, "process_id": 0}, "no HOST:PORT"),
        ({"coordinator_address": "no.such.host.:1", "num_processes": 2, "process_id": 0}, "no HOST:PORT"),
    ],
)
def test_places_that_are_none(given, wanted):
    with pytest.raises(UserError, match=wanted):
        hosts.join(options(**given), ())


def test_place_on_a_slice(monkeypatch):
    """A host of four finds its place in what a TPU VM knows; one host, and a machine without a TPU, are alone."""
    known = {
        "worker-network-endpoints": "a:1:10.0.0.1,b:2:10.0.0.2,c:3:10.0.0.3,d:4:10.0.0.4",
        "agent-worker-number": "2",
    }
    for name in ("TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID", "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hosts, "_metadata", lambda name: known[name])
    monkeypatch.setattr(accelerator, "has_tpu", lambda: False)
    assert hosts._place(options()) is None
    monkeypatch.setattr(accelerator, "has_tpu", lambda: True)
    assert hosts._place(options()) == ("10.0.0.1:8482", 4, 2)
    assert hosts._place(options(num_processes=1)) is None
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    assert hosts._place(options()) is None


def test_model_files_that_differ(tiny_copy, monkeypatch):
    """A cut file of weights, a header of other weights, a config: each is named, and equal copies pass."""
    ours, theirs = tiny_copy(), tiny_copy()
    values: list[bytes] = []

    def both(name: str, value: bytes) -> list[bytes]:
        values.append(value)
        return [values[0], value]

    monkeypatch.setattr(hosts.Hosts, "_exchange", lambda self, name, value: both(name, value))

    def compare() -> None:
        values.clear()
        for folder in (ours, theirs):
            hosts.Hosts(processes=2).agree_on_model(str(folder), "transformer", None)

    compare()
    for name, at in (
        ("transformer/diffusion_pytorch_model.safetensors", 100),
        ("transformer/config.json", 100),
        ("scheduler/scheduler_config.json", 100),
    ):
        content = (theirs / name).read_bytes()
        for other in (content[:-1], content[:at] + b"#" + content[at + 1 :]):
            (theirs / name).write_bytes(other)
            with pytest.raises(UserError, match=f"process 1 differs from process 0 in the model's file {name};"):
                compare()
        (theirs / name).write_bytes(content)
    compare()


@pytest.fixture
def tiny_copy(tmp_path) -> Callable[[], Path]:
    """Return a function that copies the tiny model to a new folder."""
    numbers = itertools.count()
    return lambda: Path(shutil.copytree(TINY_MODEL, tmp_path / str(next(numbers))))


def test_relay():
    """Lines get the number; jax's report of a death is one line; what is only like a report is kept.

    What comes while a progress bar is drawn begins on a line of its own.
    """

    def relayed(text: str, within_line: bool = False) -> str:
        hosts.relay(io.StringIO(text), out := io.StringIO(), 3, "stage", bytearray([within_line]))
        return out.getvalue()

    log = "E1124 20:35:05.222276   21085 coordination_service.cc:1549] Use error polling: tasks are "
    dead = log + "unhealthy (stopped sending heartbeats):\n1\n2\nThe tasks have crashed.\n"
    report = dead + f"F1124 20:35:05.224472 21096 client.h:80] {hosts.FATAL}.\n*** Check failure stack trace: ***\n"
    assert relayed("one\nI1124 noise\n" + report).splitlines() == [
        "process 3: one",
        "process 3: stage: error: process 1, 2 has ended or cannot be reached, so this one ends too; see what it says",
    ]
    assert relayed("one\ntwo\n", within_line=True) == "\nprocess 3: one\nprocess 3: two\n"
    assert relayed("", within_line=True) == ""
    assert "the error" in relayed(dead + "the error\n") and os.linesep in relayed(dead)
