"""Share names, sizes, the stages as processes, and faulty files among the tests.

This module imports neither jax nor torch, because conftest.py must set the environment for both first.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
TINY_MODEL = ROOT / "tiny_model"  # trained; the models that the fixtures make are not

STAGE1, STAGE2, STAGE3 = "stage1_text_encoder.py", "stage2_transformer.py", "stage3_vae_decoder.py"
STAGE3_FLAX = "stage3_vae_decoder_flax.py"
EMBEDDINGS, LATENTS, CONFIG = "stage1_embeddings.safetensors", "stage2_latents.safetensors", "generation_config.json"

# Options of stage 2 for a small video.
SIZE = ("--height", 32, "--width", 48, "--frames", 9, "--num_inference_steps", 2)

# Settings of tools.make_tiny_model for a second model, which shares no size with the first.
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

DEVICES = 8  # of the tests' process, virtual ones
# Most of the tests' time goes to compile programs that run once. XLA's passes are those of users; LLVM's are left out,
# except in test_fleet.py.
QUICK_COMPILATION = "--xla_backend_optimization_level=0"
VIRTUAL_DEVICES = f"--xla_force_host_platform_device_count={DEVICES} {QUICK_COMPILATION}"

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
# For tests that call the TPU compiler.
needs_libtpu = pytest.mark.skipif(
    not HAS_LIBTPU,
    reason="libtpu, which holds the TPU compiler, is not installed; it exists for Linux on x86-64 only",
)


def stage_environment() -> dict[str, str]:
    """Return the environment without the devices that conftest.py gives the tests' process, as a user starts a stage.

    Its programs are compiled as in the tests' process, so that they are the same ones to the last bit.
    """
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    return environment | {"XLA_FLAGS": QUICK_COMPILATION}


def stage_command(script: str | Path, *arguments: object) -> list[str]:
    """Return the command line that runs a script of the project (a path) or a module of it ("benchmarks.quality")."""
    program = [str(ROOT / script)] if str(script).endswith(".py") else ["-m", str(script)]
    return [sys.executable, *program, *map(str, arguments)]


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below `folder`, by relative path."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def values(path: Path) -> dict[str, bytes]:
    """Return the tensors of a file, without the metadata, which has the time when the file was made."""
    return {name: array.tobytes() for name, array in load_file(path).items()}


def edit_config(outputs: Path, **entries: object) -> None:
    """Change entries of generation_config.json in `outputs`; None removes one."""
    path = outputs / CONFIG
    config = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def edit_latents(outputs: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Replace the latents in `outputs` by change(latents), and keep the file's metadata."""
    with safe_open(outputs / LATENTS, "np") as file:
        latents, metadata = file.get_tensor("latents"), file.metadata()
    save_file({"latents": change(latents.copy())}, outputs / LATENTS, metadata)


def poison(latents: np.ndarray) -> np.ndarray:
    """Put two NaN and one infinity into latents, in frames 0 and 2, and return the latents."""
    latents[0, 1, 2, 3, :2] = np.nan
    latents[0, 0, 0, 0, 0] = -np.inf
    return latents


def run_command(
    command: list[str], env: Mapping[str, str] | None = None, check: bool = False, **options: Any
) -> subprocess.CompletedProcess:
    """Run what `stage_command` returned, and return the finished process with its output as text.

    The project's modules are found in every working directory.
    """
    environment = stage_environment() | ({"PYTHONPATH": str(ROOT)} if "-m" in command[:2] else {}) | dict(env or {})
    return subprocess.run(command, check=check, env=environment, capture_output=True, text=True, timeout=900, **options)


def check(process: subprocess.CompletedProcess, status: int = 0) -> subprocess.CompletedProcess:
    """Return a finished process; if its exit status is another one, the assertion shows what it printed."""
    assert process.returncode == status, f"exit {process.returncode}\n{process.stdout}\n{process.stderr}"
    return process
