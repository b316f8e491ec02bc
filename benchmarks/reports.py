"""The reports of our own programs that pages take figures from: the command of each, and a run of many at a time."""

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from cogvideox.errors import UserError, error_message
from cogvideox.files.names import ROOT
from cogvideox.signals import Interruption
from compile_for_tpu import report

LARGE, MIDDLE, SMALL = (768, 1360, 81), (720, 1280, 81), (640, 1280, 61)  # height, width, frames
MODEL = "CogVideoX1.5-5B"  # of the figures that name no other
V6E = ("v6e-1", "v6e-4", "v6e-8")
HOSTS = ("v6e-16", "v6e-32")  # of several hosts
OTHER_TPUS = ("7x-4", "7x-8", "v5p-4", "v5e-8", "v4-4")
OTHER_MODELS = ("CogVideoX1.5-5B-I2V", "CogVideoX-5B", "CogVideoX-5B-I2V", "CogVideoX-2B")
OPTIONS = (
    "--dump_stats",
    "--cache_schedule 1",
    "--cache_schedule 1 --skipped_step",
    "--guidance_interval 0,4",  # of 10 steps; the program is that of all intervals
    "--videos_at_once 8",
)
MAPS = ("1*dense", "0.5*frames:1", "0.75*frames:1", "0.5*frames:1+0.25*positions:2")  # of sparse attention, made up
SPARSE_STEPS = {"v6e-8": MAPS, "v6e-1": MAPS[2:3]}
PATTERNS = ("dense", "frames:1", "frames:2", "positions:2")


def commands() -> list[str]:
    """Return what `python -m compile_for_tpu` takes for each report, those that take longest first."""
    one_prompt = "stage2 --guidance_scale 1"
    return [
        *(f"stage3 --topology {slice_}{of(SMALL)}" for slice_ in V6E),
        f"stage3 --topology v6e-8{of(MIDDLE)}",
        *(f"stage3 --topology {slice_}" for slice_ in (*V6E, *HOSTS, "7x-8")),
        "encoder --topology v6e-8",
        *(f"stage2 --topology {slice_}" for slice_ in (*V6E, *HOSTS, *OTHER_TPUS)),
        *(f"stage2 --topology v6e-8 {options}" for options in OPTIONS),
        *(
            f"stage2 --topology {slice_} --sparse_attention {one}"
            for slice_, maps in SPARSE_STEPS.items()
            for one in maps
        ),
        *(f"{one_prompt} --topology {slice_}" for slice_ in (*V6E, "v6e-32", "7x-4", "7x-8")),
        *(f"stage2 --topology {slice_}{of(size)}" for size, slice_ in itertools.product((SMALL, MIDDLE), V6E)),
        *(f"{one_prompt} --topology {slice_}{of(SMALL)}" for slice_ in V6E),
        *(f"stage2 --topology {slice_} --model {name}" for name, slice_ in itertools.product(OTHER_MODELS, V6E)),
        f"{one_prompt} --topology v6e-4 --model CogVideoX-2B",
        "kernel --topology v6e-1",
        "kernel --topology 7x-4 --tokens 45106",
        *(f"kernel --topology v6e-1 --tokens 45106 --pattern {pattern}" for pattern in PATTERNS),
    ]


def of(size: Sequence[int]) -> str:
    """Return the options of a size."""
    return "".join(f" --{name} {n}" for name, n in zip(("height", "width", "frames"), size, strict=True))


def step_file(topology: str, size: Sequence[int], guided: bool, model: str = MODEL) -> str:
    """Return the name of the report of a step."""
    labels = ["x".join(map(str, size)), *["guided"] * guided, *[f"model={model}"] * (model != MODEL)]
    return report.file_name("stage2", topology, labels)


def step(topology: str, size: Sequence[int], guided: bool, model: str = MODEL) -> dict | None:
    """Return the published report of a step, or None."""
    path = report.RESULTS / step_file(topology, size, guided, model)
    return json.loads(path.read_text()) if path.is_file() else None


def run(jobs: Sequence[Sequence[str]], at_a_time: int) -> None:
    """Run commands of `python -m`, so many at a time, with a line for each that ends.

    Raises:
        UserError: some of them failed; the others have run.
    """
    waiting, failed = [*jobs], 0
    running: dict[subprocess.Popen, tuple[str, float]] = {}
    with Interruption.raised(), tqdm(total=len(jobs), unit="report") as bar:
        try:
            while waiting or running:
                while waiting and len(running) < at_a_time:
                    words = waiting.pop(0)
                    process = subprocess.Popen(
                        [sys.executable, "-m", *words],
                        cwd=ROOT,
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.PIPE,
                        text=True,
                    )
                    running[process] = " ".join(words), time.monotonic()
                for process in [process for process in running if process.poll() is not None]:
                    name, begin = running.pop(process)
                    _, errors = process.communicate()
                    failed += process.returncode != 0
                    ending = f": {error_message(errors or 'it was killed')}" if process.returncode else ""
                    bar.write(f"{time.monotonic() - begin:6.0f} s  {name}{ending}")
                    bar.update()
                time.sleep(0.2)
        finally:
            for process in running:
                process.terminate()
    if failed:
        raise UserError(f"{failed} of {len(jobs)} failed; their lines above say why")
