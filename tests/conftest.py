"""Define fixtures: small models, and the stages as subprocesses. Set the environment before jax is imported."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cogvideox.run.accelerator import prepare_libraries
from tests.helpers import OTHER_SIZES, ROOT, SIZE, STAGE1, STAGE2, STAGE3, VIRTUAL_DEVICES, run_command, stage_command

prepare_libraries()
os.environ["XLA_FLAGS"] = VIRTUAL_DEVICES
# Many tests compile the same programs; jax's cache keeps them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def _make_model(folder: Path, **sizes) -> Path:
    from tools.make_tiny_model import make_pipeline  # imports torch, which a run of light tests can do without

    make_pipeline(folder, **sizes)
    return folder


@pytest.fixture(scope="session")
def random_model(tmp_path_factory) -> Path:
    """Make a small model of CogVideoX 1.5's structure, untrained."""
    return _make_model(tmp_path_factory.mktemp("random_model"))


@pytest.fixture(scope="session")
def other_model(tmp_path_factory) -> Path:
    """Make a second small model, none of whose sizes is that of the first."""
    return _make_model(tmp_path_factory.mktemp("other_model"), **OTHER_SIZES)


@pytest.fixture
def run_stage(tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """Run a script or module of the project in `tmp_path`, as a person would, and return the finished process.

    `status` is the expected exit status; if it is another one, the assertion shows what the program printed. With
    `virtual_devices` the CPU counts as eight devices, or as so many.
    """

    def run(script: str, *arguments, status: int = 0, virtual_devices=False) -> subprocess.CompletedProcess:
        flag = VIRTUAL_DEVICES if virtual_devices is True else VIRTUAL_DEVICES.replace("8", str(virtual_devices))
        environment = {"XLA_FLAGS": flag} if virtual_devices else {}
        process = run_command(stage_command(script, *arguments), cwd=tmp_path, env=environment)
        assert process.returncode == status, f"exit {process.returncode}\n{process.stdout}\n{process.stderr}"
        return process

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
def finished_run(tmp_path_factory, random_model) -> Path:
    """Run all three stages once, and return the folder of their outputs."""
    outputs = tmp_path_factory.mktemp("finished")
    for script, *arguments in (
        (STAGE1, "--prompt", "a red circle", "--model_id", random_model, "--output_dir", outputs),
        (STAGE2, "--input_dir", outputs, *SIZE),
        (STAGE3, "--input_dir", outputs),
    ):
        run_command(stage_command(script, *arguments), check=True)
    return outputs


@pytest.fixture
def outputs(finished_run, tmp_path) -> Path:
    """Copy the outputs of all three stages, for a test to change."""
    return Path(shutil.copytree(finished_run, tmp_path / "outputs"))
