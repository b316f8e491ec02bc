"""Find the devices, and keep the libraries from talking while they are found."""

import glob
import importlib.metadata
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from cogvideox.errors import UserError, first_line, reason
from cogvideox.signals import Interruption

if TYPE_CHECKING:
    import jax


# XLA's graphs of kernels, in which a trace does not tell one operation from another (openxla/xprof, issue 3070).
NO_GRAPHS = "--xla_gpu_enable_command_buffer="


def prepare_libraries(profiled: bool = False, verbose: bool = False) -> None:
    """Set environment variables and warning filters before jax, torch and the Hugging Face libraries are imported.

    Without a TPU, jax would still try libtpu and print many errors before it falls back to another platform; with one
    that another process holds, it would fall back to the CPU. This function therefore sets `JAX_PLATFORMS`, unless the
    user has set it. If the run is to be `profiled`, a GPU runs each operation by itself. XLA's own warnings, such as
    those of a GPU's autotuner, are shown if `verbose`.

    Raises:
        UserError: there is no temporary folder, without which torch does not start.
    """
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise UserError(f"{reason(error)}; name a folder that can be written with TMPDIR") from error
    has_cuda = os.path.exists("/dev/nvidia0") and importlib.metadata.entry_points(group="jax_plugins")
    os.environ.setdefault("JAX_PLATFORMS", "tpu,cpu" if has_tpu() else "cuda,cpu" if has_cuda else "cpu")
    flags = os.environ.get("XLA_FLAGS", "")
    if profiled and "cuda" in os.environ["JAX_PLATFORMS"] and NO_GRAPHS not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {NO_GRAPHS}".strip()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1" if verbose else "2")  # 1 for warnings, 2 for errors
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", message="Explicitly requested dtype int64")  # torchax, while tracing
    warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called")  # jax, when ffmpeg starts; that is safe


def devices(debug: bool = False) -> "list[jax.Device]":
    """Return jax's devices.

    Raises:
        UserError: the platform that JAX_PLATFORMS names is not there, or another process holds it. What the libraries
            print of that, dozens of lines, is shown with `debug`.
    """
    import jax

    with tempfile.TemporaryFile() as printed:
        stderr = os.dup(2)
        os.dup2(printed.fileno(), 2)
        try:
            with Interruption.cleaned_up(lambda: os.dup2(stderr, 2)):
                return jax.devices()
        except (RuntimeError, AssertionError) as error:  # the second from CUDA without a GPU
            platforms = os.environ.get("JAX_PLATFORMS")
            raise UserError(
                f"jax cannot use the platform {platforms}: {first_line(error)}; is there one, and does no other "
                "process hold it (a process on a TPU VM holds all chips)? JAX_PLATFORMS=cpu does without"
            ) from error
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            if debug:
                printed.seek(0)
                sys.stderr.write(printed.read().decode(errors="replace"))


def has_tpu() -> bool:
    """Return whether this machine has a TPU on its PCI bus."""
    vendors = glob.glob("/sys/bus/pci/devices/*/vendor")
    return any(Path(vendor).read_text().strip() == "0x1ae0" for vendor in vendors)  # Google's PCI vendor number
