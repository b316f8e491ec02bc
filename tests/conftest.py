"""Models made on the spot, the stages as subprocesses, and the diffusers pipeline in torch as the truth."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from console import prepare_libraries

ROOT = Path(__file__).parent.parent
TINY_MODEL = ROOT / "tiny_model"  # the embedded model, which is trained

VIRTUAL_DEVICES = "--xla_force_host_platform_device_count=8"

prepare_libraries()  # before any test imports jax
os.environ["XLA_FLAGS"] = VIRTUAL_DEVICES
# The same programs are compiled by many of the stages' runs; once is enough.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

from tools.make_tiny_model import make_pipeline  # noqa: E402

STAGE1, STAGE2, STAGE3 = "stage1_text_encoder.py", "stage2_transformer.py", "stage3_vae_decoder.py"
SIZE = ("--height", 32, "--width", 48, "--frames", 9, "--num_inference_steps", 2)

# A second model that shares no size with the first.
OTHER_SIZES = dict(
    num_attention_heads=3,
    attention_head_dim=16,
    num_layers=3,
    time_embed_dim=32,
    text_width=48,
    text_layers=1,
    max_text_seq_length=40,
    latent_channels=8,
    vae_channels=(8, 16, 24),
    vae_layers=2,
    vae_groups=4,
    sample_size=40,
    seed=1,
)


@pytest.fixture(scope="session")
def random_model(tmp_path_factory) -> Path:
    """A small model of CogVideoX 1.5's structure, untrained."""
    folder = tmp_path_factory.mktemp("random_model")
    make_pipeline(folder)
    return folder


@pytest.fixture(scope="session")
def other_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("other_model")
    make_pipeline(folder, **OTHER_SIZES)
    return folder


def stage_environment() -> dict[str, str]:
    """The environment of a person who starts a stage, without what this file sets for the tests' own process."""
    return {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}


@pytest.fixture
def run_stage(tmp_path):
    """Run a stage's script in `tmp_path`, as a person would, and return the finished process.

    `status` is the expected exit status; what the stage printed is in the assertion otherwise. With `virtual_devices`
    the CPU counts as eight devices.
    """

    def run(script: str, *arguments, status: int = 0, virtual_devices=False) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        environment = stage_environment() | ({"XLA_FLAGS": VIRTUAL_DEVICES} if virtual_devices else {})
        process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
        assert process.returncode == status, f"exit {process.returncode}\n{process.stdout}\n{process.stderr}"
        return process

    return run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, random_model) -> Path:
    """The outputs of all three stages."""
    outputs = tmp_path_factory.mktemp("finished")
    for script, *arguments in (
        (STAGE1, "--prompt", "a red circle", "--model_id", random_model, "--output_dir", outputs),
        (STAGE2, "--input_dir", outputs, *SIZE),
        (STAGE3, "--input_dir", outputs),
    ):
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        subprocess.run(command, check=True, capture_output=True, env=stage_environment())
    return outputs


@pytest.fixture
def outputs(finished_run, tmp_path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "outputs"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
