"""Start diffusers beside this project, and compare latents and frames with what it wrote."""

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.entries import NOISE_FACTOR, Entry, judged, relative_error
from benchmarks.machine import LATENT_SEED, Machine, decode_frames
from cogvideox.cli.report import Report
from cogvideox.errors import UserError
from cogvideox.files.tensors import mapped_tensors
from cogvideox.signals import Interruption

if TYPE_CHECKING:
    import numpy as np

    from cogvideox.models.transformer.plan import DenoisingPlan

RESULTS = "diffusers"  # name of the files with what diffusers' process knows so far
LATENTS = "latents after three guided steps, one device, beside diffusers"
FRAMES = "decoded frames, one device, beside diffusers"
FILES = {LATENTS: "diffusers_latents.safetensors", FRAMES: "diffusers_frames.safetensors"}  # what diffusers computed
WRITTEN = "written"  # status of such a file's entry
BLOCKS, STEPS = 2, 3  # of the transformer, and of its denoising, for the comparison of latents
FLOAT32_TOLERANCE = 1e-3
SECONDS_TO_END = 10.0  # that diffusers' process has after a signal

# --- diffusers' process ------------------------------------------------------------------------------------------


def torch_device() -> str:
    """Return the device of torch that stands beside those of jax, found without starting jax.

    Raises:
        UserError: there is none.
    """
    import torch

    platform = os.environ.get("JAX_PLATFORMS", "").partition(",")[0]
    if platform == "cpu":
        return "cpu"
    if platform != "tpu" and torch.cuda.is_available():
        return "cuda"
    raise UserError(
        f"--beside diffusers: torch {torch.__version__} has no device to compare the platform {platform} with; install "
        "torch's build for your GPU, or set JAX_PLATFORMS=cpu for small sizes on the CPU"
    )


def run_diffusers(device: str, minutes: float, arguments: argparse.Namespace, told: Report) -> dict[str, dict]:
    """Run `benchmarks.beside_diffusers` to its end, and return its entries by name.

    It must end before jax takes the memory of the device. If it cannot begin, this process ends with its exit status.

    Args:
        device: of torch.
        minutes: that it has.
        arguments: the parsed options of on_device.
        told: gets a warning if it ends early.
    """
    command = [sys.executable, "-m", "benchmarks.beside_diffusers", "--device", device, "--minutes", f"{minutes:g}"]
    command += ["--output", str(arguments.output), "--model_id", arguments.model_id]
    command += [f"--{name}" for name in ("quick", "again", "verbose", "quiet", "debug") if getattr(arguments, name)]
    status = wait_for(command)
    if status == 2:  # it has said why
        sys.exit(status)
    if status != 0:
        told.warn(f"diffusers' process ended with exit status {status}; the same command goes on where it was")
    path = arguments.output / f"{RESULTS}.json"
    return json.loads(path.read_text(encoding="utf-8"))["entries"] if path.exists() else {}


def wait_for(command: list[str]) -> int:
    """Run a command, and return its exit status; a signal to this process ends both."""
    with Interruption.raised():
        process = subprocess.Popen(command)
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            try:
                process.wait(SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()
            raise


# --- Comparisons -------------------------------------------------------------------------------------------------


def comparisons(machine: Machine, folder: Path, theirs: Mapping[str, Mapping]) -> list[Entry]:
    """Return the comparisons with what diffusers has written to a folder; `theirs` are its entries."""
    compare = {LATENTS: latents, FRAMES: frames}
    return [
        Entry(name, "check", functools.partial(compared, machine, compare[name], folder / FILES[name]), 1.0, quick=True)
        for name, found in theirs.items()
        if found["status"] == WRITTEN
    ]


def compared(machine: Machine, compute: Any, path: Path) -> dict:
    """Compare with a file of diffusers, and remove it if nothing is wrong.

    The file has the tensors "weights.*" by their names in the checkpoint, "inputs.*", and "results.*" by dtype. On the
    CPU both compute in float32. Elsewhere bfloat16 may take this project twice as far from diffusers in float32 as it
    takes diffusers.
    """
    tensors = {name: array for name, array in mapped_tensors(path).items() if not isinstance(array, str)}
    parts: dict[str, dict[str, np.ndarray]] = {"weights": {}, "inputs": {}, "results": {}}
    for name, array in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = array
    exact = parts["results"]["float32"]
    if machine.platform == "cpu":
        error = relative_error(compute(machine, "float32", parts["weights"], parts["inputs"]), exact)
        found = judged(error, FLOAT32_TOLERANCE, "relative error beside diffusers, both in float32")
    else:
        error = relative_error(compute(machine, "bfloat16", parts["weights"], parts["inputs"]), exact)
        noise = relative_error(parts["results"]["bfloat16"], exact)
        note = f"relative error beside diffusers in float32; diffusers' own in bfloat16 is {noise:.1e}"
        found = judged(error, NOISE_FACTOR * noise, note)
    if found["status"] == "passed":
        path.unlink()
    return found


def compared_plan(machine: Machine, **options: Any) -> "DenoisingPlan":
    """Return the plan of the steps that are compared; `options` are those of `make_denoising_plan`."""
    config = machine.transformer | {"num_layers": BLOCKS}
    video = machine.scale.checked_video
    return machine.denoising_plan(video, True, transformer=config, num_inference_steps=STEPS, **options)


def latents(
    machine: Machine, dtype: str, weights: "Mapping[str, np.ndarray]", inputs: "Mapping[str, np.ndarray]"
) -> "np.ndarray":
    """Run the steps of `compared_plan` on one device; return the latents, [batch, frames, channels, height, width]."""
    import numpy as np
    import torch

    from cogvideox.models.transformer.denoising import Denoising
    from cogvideox.models.transformer.parameters import load_parameters
    from cogvideox.models.transformer.step import make_step

    plan = compared_plan(machine, dtype=dtype, devices=machine.devices[:1])
    parameters = load_parameters(weights.__getitem__, plan.transformer, plan.parallelism, plan.dtype)
    names = "prompt_embeds", "negative_prompt_embeds"
    positive, negative = (torch.from_numpy(inputs[name].astype(np.float32)).bfloat16() for name in names)
    denoising = Denoising(plan, parameters, positive, negative, [LATENT_SEED] * plan.batch)
    programs = dict.fromkeys(plan.kinds(), make_step(plan))
    for state in denoising.run(programs):
        last = state
    return np.asarray(last.latents, np.float32)


def frames(
    machine: Machine, dtype: str, weights: "Mapping[str, np.ndarray]", inputs: "Mapping[str, np.ndarray]"
) -> "np.ndarray":
    """Decode the latents on one device; return pixels in [0, 1], [frames, height, width, 3]."""
    import jax

    plan = machine.decoding_plan(machine.scale.chunk_video, "torchax", machine.devices[:1], dtype)
    decoder = plan.make_decoder()
    tree = decoder.convert_weights({name: array.astype(plan.dtype) for name, array in weights.items()})
    placed = jax.device_put(tree, plan.split.replicated)
    return decode_frames(plan, decoder, placed, inputs["latents"].astype(plan.dtype))
