"""Define fixtures: small models, and runs of the stages. Set the environment before jax is imported."""

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cogvideox.run.accelerator import prepare_libraries
from tests.helpers import (
    DEVICES,
    OTHER_SIZES,
    ROOT,
    SIZE,
    STAGE1,
    STAGE2,
    STAGE3,
    STAGE3_FLAX,
    VIRTUAL_DEVICES,
    check,
    run_command,
    stage_command,
)
from tests.in_process import run_here

prepare_libraries()
os.environ["XLA_FLAGS"] = VIRTUAL_DEVICES
# Many tests compile the same programs; jax's cache keeps them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


@pytest.hookimpl(trylast=True)  # after those that options leave out are gone
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let each parallel worker begin with its share of the slow tests: at the end many short ones keep all busy.

    A worker gets one of equal parts of the list, and when that is done, the end of what another has left.
    """
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    if workers > 1:
        is_slow = [item.get_closest_marker("slow") is not None for item in items]
        kinds = [[item for item, slow in zip(items, is_slow, strict=True) if slow == kind] for kind in (True, False)]
        items[:] = [
            item
            for i in range(workers)
            for kind in kinds
            for item in kind[len(kind) * i // workers : len(kind) * (i + 1) // workers]
        ]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Return a function that lets one of the parallel workers fill a folder, and returns the folder to all of them."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # which the workers share

    def made(name: str, fill: Callable[[Path], object]) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with open(root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return made


def _make_model(folder: Path, **sizes) -> None:
    from tools.make_tiny_model import make_pipeline  # imports torch, which a run of light tests can do without

    make_pipeline(folder, **sizes)


@pytest.fixture(scope="session")
def random_model(made_once) -> Path:
    """Make a small model of CogVideoX 1.5's structure, untrained."""
    return made_once("random_model", _make_model)


@pytest.fixture(scope="session")
def other_model(made_once) -> Path:
    """Make a second small model, none of whose sizes is that of the first."""
    return made_once("other_model", lambda folder: _make_model(folder, **OTHER_SIZES))


@pytest.fixture(scope="session")
def image_model(made_once) -> Path:
    """Make a small model for image to video, of CogVideoX 1.5's structure, untrained."""
    return made_once("image_model", lambda folder: _make_model(folder, kind="CogVideoX1.5-5B-I2V"))


@pytest.fixture
def run_stage(tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """Run a script or module of the project in `tmp_path`, as a person would, and return the finished process.

    `status` is the expected exit status; if it is another one, the assertion shows what the program printed. A module
    has a process of its own, a script runs in that of the tests, where it finds one device, with
    `virtual_devices` eight, or so many.
    """

    def run(
        script: str, *arguments: object, status: int = 0, virtual_devices: bool | int = False
    ) -> subprocess.CompletedProcess:
        if not script.endswith(".py"):
            assert not virtual_devices, "a process of its own has one device"
            return check(run_command(stage_command(script, *arguments), cwd=tmp_path), status)
        devices = DEVICES if virtual_devices is True else int(virtual_devices) or 1
        return check(run_here(script, *arguments, folder=tmp_path, devices=devices), status)

    return run


@pytest.fixture
def one_device(tmp_path, monkeypatch) -> None:
    """Let programs whose main a test calls find one device, and work in `tmp_path`."""
    import jax

    from cogvideox.run import accelerator

    found = jax.devices()[:1]
    monkeypatch.setattr(accelerator, "devices", lambda debug=False: found)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def finished_run(made_once, random_model) -> Path:
    """Run all three stages once, and return the folder of their outputs."""

    def make(outputs: Path) -> None:
        for script, *arguments in (
            (STAGE1, "--prompt", "a red circle", "--model_id", random_model, "--output_dir", outputs),
            (STAGE2, "--input_dir", outputs, *SIZE),
            (STAGE3, "--input_dir", outputs),
        ):
            check(run_here(script, *arguments, folder=outputs))

    return made_once("finished_run", make)


@pytest.fixture(scope="session")
def processes_folder(made_once, random_model) -> Path:
    """Run each stage once as a process of its own, as a person does, and return the folder of what they leave.

    For each script that is what it printed, with what it imports (.json), its log (.jsonl) and, in "cache", its
    compiled programs.
    """

    def make(folder: Path) -> None:
        for script, *options in (
            (STAGE1, "--prompt", "a red circle", "--model_id", random_model),
            (STAGE2, *SIZE, "--compilation_cache", folder / "cache" / STAGE2),
            (STAGE3, "--compilation_cache", folder / "cache" / STAGE3),
            (STAGE3_FLAX, "--compilation_cache", folder / "cache" / STAGE3_FLAX, "--output_video", "flax.mp4"),
        ):
            command = stage_command(script, *options, "--log_json", folder / f"{script}.jsonl")
            process = check(run_command(command, cwd=folder, env={"PYTHONPROFILEIMPORTTIME": "1"}))
            (folder / f"{script}.json").write_text(json.dumps(vars(process)))

    return made_once("processes", make)


@pytest.fixture(scope="session")
def processes(processes_folder) -> dict[str, subprocess.CompletedProcess]:
    """Return the processes of `processes_folder` by script."""
    return {
        file.stem: subprocess.CompletedProcess(**json.loads(file.read_text()))
        for file in processes_folder.glob("*.py.json")
    }


@pytest.fixture
def outputs(finished_run, tmp_path) -> Path:
    """Copy the outputs of all three stages, for a test to change."""
    return Path(shutil.copytree(finished_run, tmp_path / "outputs"))
