"""A fleet on a Ray cluster of this machine: the videos of the plain commands, whatever is killed in between."""

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
from safetensors.numpy import load_file

from cogvideox.files import videos
from cogvideox.files.names import INDEX, LATENTS, ROOT, STATE, VIDEO
from fleet.__main__ import FAILED
from fleet.report import FILE
from tests.helpers import check

ray = pytest.importorskip("ray")

MODEL = ROOT / "tiny_model"
COLORS, SHAPES = ("red", "green", "blue", "yellow", "purple", "orange"), ("circle", "square")
TEXTS = [f"a {c} {s} moving {d} on a gray background" for c in COLORS for s in SHAPES for d in ("up", "left")]
SIZE = ("--frames", 5, "--num_inference_steps", 6)
DEVICES = 2  # virtual ones, of each node
ENVIRONMENT = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}", "JAX_PLATFORMS": "cpu"}
PATIENCE = 240  # seconds that a busy machine may need
PROCESS = "ray::Worker"  # how Ray calls a process of the fleet; in a stage it is "ray::Worker.run"


def prompt_file(folder: Path, texts: list[str]) -> Path:
    path = folder / "prompts.txt"
    path.write_text("\n".join(texts) + "\n")
    return path


@contextlib.contextmanager
def fleet(file: Path, *options: object, **process: object) -> Iterator[subprocess.Popen]:
    """Start a fleet for a prompt file, with outputs beside it; yield its process, which is killed at the end."""
    words = ["--prompt_file", file, "--model_id", MODEL, "--output_dir", file.parent / "outputs", *SIZE, *options]
    command = [sys.executable, "-m", "fleet", *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | ENVIRONMENT, **pipes, **process) as started:
        try:
            yield started
        finally:
            started.kill()


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """Return the exit status of a process and what it printed."""
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out + err


def wait_for(what: Callable[[], object], process: subprocess.Popen) -> None:
    """Wait until something is true, as long as a process runs."""
    until = time.monotonic() + PATIENCE
    while not what():
        assert process.poll() is None and time.monotonic() < until, ended(process)
        time.sleep(0.02)


def lines(outputs: Path) -> list[dict]:
    """Return the lines of the report in a folder."""
    file = outputs / FILE
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def family(process: int, title: str = "") -> set[int]:
    """Return the numbers of the processes below this one whose titles contain `title`."""
    parents, titles = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(folder.name)] = (folder / "cmdline").read_bytes().decode(errors="replace")
    found, more = set(), {process}
    while more := {child for child, parent in parents.items() if parent in more} - found:
        found |= more
    return {one for one in found if title in titles.get(one, "")}


def assert_gone(processes: set[int]) -> None:
    """See that none of these processes is left over; what has ended, and waits for somebody to look, is gone."""
    until = time.monotonic() + 150
    while left := [one for one in processes if is_alive(one)]:
        assert time.monotonic() < until, [Path(f"/proc/{one}/cmdline").read_text() for one in left]
        time.sleep(0.2)


def is_alive(process: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def contents(outputs: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return latents and frames of each video in a folder, by its name."""
    return {
        folder.name: (load_file(folder / LATENTS)["latents"], imageio.imread(folder / VIDEO))
        for folder in videos.videos(outputs)
    }


def writer(path: Path) -> int | None:
    """Return the number of the process that was writing a temporary file, by the file's name."""
    number = re.search(r"-(\d+)-\w+(\.\w+)?$", path.name)
    return int(number[1]) if number else None


def assert_equal(found: Path, truth: Path, names: set[str], killed: set[int]) -> None:
    """Compare the videos of these names, bit for bit, and see that there are no others and no half ones.

    Processes that were killed may have left what they were writing, under its temporary name.
    """
    ours, theirs = contents(found), contents(truth)
    assert ours.keys() == names <= theirs.keys()
    for i, kind in enumerate(("latents", "frames")):
        apart = {name: np.abs(ours[name][i].astype(float) - theirs[name][i]).max() for name in sorted(names)}
        assert not any(apart.values()), f"{kind} are apart: {apart}"
    half = [path for path in found.rglob("*") if path.name.startswith(".") and writer(path) not in killed]
    half += found.rglob(STATE)
    assert not half, half


@pytest.fixture(scope="module")
def truth(tmp_path_factory) -> Path:
    """Make all videos by the plain commands, in one process to save time; return the folder of the outputs."""
    folder = tmp_path_factory.mktemp("truth")
    outputs = folder / "outputs"
    file = prompt_file(folder, TEXTS)
    stages = {
        "stage1_text_encoder": ("--prompt_file", file, "--model_id", MODEL, "--output_dir", outputs),
        "stage2_transformer": ("--input_dir", outputs, "--warmup_steps", 0, *SIZE),
        "stage3_vae_decoder": ("--input_dir", outputs, "--no-warmup"),
    }
    calls = [f"import {stage}; {stage}.main({[*map(str, words)]})" for stage, words in stages.items()]
    environment = os.environ | ENVIRONMENT  # with other devices XLA's sums are other ones in the last bits
    command = [sys.executable, "-c", "\n".join(calls)]
    check(subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False))
    return outputs


class Hard:
    """A run of 25 prompts on three nodes, one of which dies, as does a process of another; one prompt is too long."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        from ray.cluster_utils import Cluster

        for name, value in ENVIRONMENT.items():  # of which nodes have a copy
            monkeypatch.setenv(name, value)

        self.outputs = folder / "outputs"
        file = prompt_file(folder, [*TEXTS, "red " * 300])
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        try:
            nodes = [cluster.add_node(num_cpus=1, resources={"video_worker": 1}) for _ in range(3)]
            with fleet(file, "--address", cluster.address, "--group", 4) as started:
                wait_for(lambda: len(self.denoising(nodes)) >= 2, started)
                (killed, _), (_, dead) = list(self.denoising(nodes).items())[:2]
                self.killed = {killed} | family(dead.all_processes["raylet"][0].process.pid)
                os.kill(killed, signal.SIGKILL)
                cluster.remove_node(dead, allow_graceful=False)
                self.status, self.printed = ended(started)
        finally:
            cluster.shutdown()
        self.lines = lines(self.outputs)

    def denoising(self, nodes: list) -> dict[int, object]:
        """Return the processes that denoise a group, with their nodes.

        They are those that have jax, which stage 1 does without, and the locks of several prompts' folders.
        """
        found = {}
        for node in nodes:
            for process in family(node.all_processes["raylet"][0].process.pid, PROCESS):
                with contextlib.suppress(OSError):
                    files = {os.readlink(link) for link in Path(f"/proc/{process}/fd").iterdir()}
                    locks = [file for file in files if file.startswith(f"{self.outputs}/prompt_")]
                    if len(locks) > 1 and "jaxlib" in Path(f"/proc/{process}/maps").read_text():
                        found[process] = node
        return found


@pytest.fixture(scope="module")
def hard(tmp_path_factory) -> Hard:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return Hard(tmp_path_factory.mktemp("hard"), monkeypatch)


@pytest.mark.slow
def test_three_nodes_make_the_videos_of_the_plain_commands(hard, truth):
    names = {f"prompt_{n:04}" for n in range(1, len(TEXTS) + 1)}
    assert_equal(hard.outputs, truth, names, hard.killed)
    print(hard.printed)


@pytest.mark.slow
def test_a_node_that_dies_loses_nothing(hard):
    made = Counter(Path(line["folder"]).name for line in hard.lines if not line["error"])
    assert made == {f"prompt_{n:04}": 1 for n in range(1, len(TEXTS) + 1)}, hard.printed
    assert "is gone" in hard.printed, hard.printed


@pytest.mark.slow
def test_a_process_that_is_killed_costs_a_try(hard):
    tries = {Path(line["folder"]).name: (line["tries"], line["together"]) for line in hard.lines if not line["error"]}
    assert (2, 1) in tries.values(), (tries, hard.printed)  # again, alone
    assert max(tries.values())[0] == 2, tries


@pytest.mark.slow
def test_a_prompt_that_cannot_be_encoded_fails_alone(hard):
    (line,) = [line for line in hard.lines if line["error"]]
    assert Path(line["folder"]).name == f"prompt_{len(TEXTS) + 1:04}" and "is longer than" in line["error"], line
    assert hard.status == FAILED + 1 and f"24 of {len(TEXTS) + 1}" in hard.printed, hard.printed
    index = [json.loads(text) for text in (hard.outputs / INDEX).read_text().splitlines()]
    assert [entry["state"] for entry in index] == ["decoded"] * len(TEXTS), index


@pytest.mark.slow
def test_a_full_disk_and_a_killed_driver(tmp_path, truth):
    """The first run finds no space, the second one is killed, the third is interrupted, the last one does the rest."""
    count, outputs = 6, tmp_path / "outputs"
    file = prompt_file(tmp_path, TEXTS[:count])

    def made() -> dict[Path, int]:
        return {video: video.stat().st_mtime_ns for video in outputs.glob(f"*/{VIDEO}")}

    with fleet(file, "--group", 2) as started:
        wait_for(made, started)
        all_of_it = family(started.pid)
        for process in family(started.pid, PROCESS):
            resource.prlimit(process, resource.RLIMIT_FSIZE, (1000, 1000))
        status, printed = ended(started)
    assert status == 2 and "File too large" in printed.splitlines()[-1], printed
    assert "the same command goes on" in printed.splitlines()[-1], printed
    before = made()
    assert 0 < len(before) < count
    assert_gone(all_of_it)

    with fleet(file, "--group", 1) as started:
        wait_for(lambda: len(made()) > len(before), started)
        killed = family(started.pid)
        started.kill()

    with fleet(file, "--group", 1, start_new_session=True) as started:
        wait_for(lambda: len(made()) > len(before) + 1, started)
        all_of_it = family(started.pid)
        os.killpg(started.pid, signal.SIGINT)  # as a terminal does it, to all that belong to the command
        status, printed = ended(started)
    assert status == 128 + signal.SIGINT, printed
    assert "the same command goes on" in printed.splitlines()[-1], printed
    assert_gone(all_of_it)

    between = made()
    with fleet(file) as started:
        status, printed = ended(started)
    assert status == 0, printed
    assert between.items() <= made().items(), "a video was made twice"
    assert_equal(outputs, truth, {f"prompt_{n:04}" for n in range(1, count + 1)}, killed)
    assert Counter(line["folder"] for line in lines(outputs)).total() <= count + 1  # one was killed before its line

    with fleet(file) as started:
        status, printed = ended(started)
    assert status == 0 and f"{count} of {count}" in printed, printed
    assert between.items() <= made().items()
    assert_gone(killed)  # after a minute or so: Ray's agents first try to tell the others that are dead
