"""Measure on this machine what the fleet adds to the plain commands, and how much more several nodes make than one.

All in one run, with nodes that have cores of their own: `python -m fleet.benchmark --nodes 3` takes four times
--cores. What processes need to begin is left out: rates are those from the first video that is made to the last.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cogvideox.cli import terminal
from cogvideox.cli.parser import ArgumentParser
from cogvideox.cli.program import run
from cogvideox.cli.types import model_id, number
from cogvideox.errors import UserError
from cogvideox.files import timings, writing
from cogvideox.files.names import ROOT
from cogvideox.versions import versions
from compile_for_tpu import report
from fleet.places import ON_CPU
from fleet.report import FILE

RESULT = "fleet.json"
TEXT = "a {} moving {} on a gray background"
STAGES = ("stage1_text_encoder", "stage2_transformer", "stage3_vae_decoder")
CPU = {"JAX_PLATFORMS": "cpu", "RAY_worker_niceness": "0"}  # Ray would let its processes be nice to others


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser("Measure what the fleet adds to the plain commands.", prog="fleet.benchmark")
    parser.add_argument("--model_id", type=model_id, default="tiny_model", help="Hugging Face model id, or a folder")
    parser.add_argument("--prompts", type=number(int, 4), default=48, help="how many videos are made each time")
    parser.add_argument("--nodes", type=number(int, 1), default=3, help="how many nodes are compared with one")
    parser.add_argument("--cores", type=number(int, 1), default=1, help="CPU cores of each node")
    report.add_publish_option(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Make the same videos three times, and print what was measured."""
    given = parse_arguments(argv)
    os.environ |= CPU  # of all processes that are started
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < (given.nodes + 1) * given.cores:
        raise UserError(f"{len(cores)} cores are too few for {given.nodes} nodes of {given.cores}, and as many for Ray")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "prompts.txt")
        texts = [TEXT.format(color, way) for color in ("red circle", "blue square") for way in ("up", "left")]
        file.write_text("\n".join(texts[i % len(texts)] for i in range(given.prompts)) + "\n")
        plain = plain_seconds(file, given, cores[: given.cores])
        one, several = (fleet_seconds(file, given, nodes, cores) for nodes in (1, given.nodes))
    found = {
        "machine": f"{platform.processor() or platform.machine()}, {len(cores)} cores, {given.cores} a node",
        "model": Path(given.model_id).name,
        "prompts": given.prompts,
        "nodes": given.nodes,
        "plain_seconds": plain,
        "fleet_seconds": one,
        "added_seconds": one - plain,
        "several_seconds": several,
        "times_as_many": one / several,
        "versions": versions("jax", "torch", "ray"),
    }
    print(*terminal.table([[name, str(value)] for name, value in found.items()]), sep="\n")
    if given.publish:
        with writing.replacing(report.RESULTS / RESULT) as temporary:
            Path(temporary).write_text(json.dumps(found, indent=1) + "\n")


def plain_seconds(file: Path, given: argparse.Namespace, cores: Sequence[int]) -> float:
    """Return the seconds that the plain commands take for a video after their start, as their timings say."""
    outputs = file.with_name("plain")
    words = [
        ["--prompt_file", file, "--model_id", given.model_id, "--output_dir", outputs],
        ["--input_dir", outputs, "--warmup_steps", 1],
        ["--input_dir", outputs],
    ]
    for stage, of_stage in zip(STAGES, words, strict=True):
        with on(cores):
            subprocess.run([sys.executable, ROOT / f"{stage}.py", *map(str, of_stage), "--quiet"], check=True)
    phases = [one for entry in timings.read_timings(outputs).values() for one in entry["seconds"].items()]
    return sum(seconds for name, seconds in phases if name.startswith(("run", "save"))) / given.prompts


def fleet_seconds(file: Path, given: argparse.Namespace, nodes: int, cores: Sequence[int]) -> float:
    """Return the seconds from one video to the next of a fleet on so many nodes, while all of them work."""
    from ray.cluster_utils import Cluster

    outputs = file.with_name(f"fleet_{nodes}")
    with on(cores[nodes * given.cores :]):
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        for node in range(nodes):
            with on(cores[node * given.cores : (node + 1) * given.cores]):
                cluster.add_node(num_cpus=0, resources={ON_CPU: 1})
        words = ["--prompt_file", file, "--model_id", given.model_id, "--output_dir", outputs, "--group", 1]
        command = [sys.executable, "-m", "fleet", *map(str, words), "--address", cluster.address, "--quiet"]
        with on(cores[nodes * given.cores :]), subprocess.Popen(command, cwd=ROOT) as process:
            ends: list[float] = []
            while process.poll() is None:
                with contextlib.suppress(FileNotFoundError):
                    lines = (outputs / FILE).read_bytes().count(b"\n")
                    ends += [time.perf_counter()] * (lines - len(ends))
                time.sleep(0.005)
    finally:
        cluster.shutdown()
    if process.returncode or len(ends) != given.prompts:
        raise UserError(f"the fleet on {nodes} nodes ended with status {process.returncode} after {len(ends)} videos")
    # The first videos of all nodes wait for the start of processes, and at the end not all have work.
    first, last = 2 * nodes, len(ends) - nodes
    return float(np.diff(ends[first:last]).mean())


@contextlib.contextmanager
def on(cores: Sequence[int]) -> Iterator[None]:
    """Start processes on these cores in the body of a `with` statement."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


if __name__ == "__main__":
    run(main)
