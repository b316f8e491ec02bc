"""Run diffusers' transformer and decoder in torch, for `python -m benchmarks.on_device --beside diffusers`.

    python -m benchmarks.beside_diffusers --device cuda --output stage_outputs/on_device

It measures the steps and decodes that on_device measures, on one device, in bfloat16 and with torch's attention as
diffusers calls it; and it writes what diffusers computes with few blocks and small videos, with weights and inputs, for
on_device to compare with. Weights are drawn on the device. It is a process of its own, because jax and torch each keep
the memory of a GPU for themselves.
"""

import argparse
import functools
import hashlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import torch
from diffusers import AutoencoderKLCogVideoX
from diffusers.utils import logging
from safetensors.torch import save_file

from benchmarks.diffusers_comparison import FILES, FRAMES, LATENTS, RESULTS, WRITTEN, compared_plan
from benchmarks.entries import Entry, Results, durations, measured, run_entries
from benchmarks.machine import (
    LATENT_SEED,
    SCALES,
    WEIGHT_SEED,
    Machine,
    decode_name,
    draw_prompts,
    step_name,
)
from benchmarks.page import DIFFUSERS
from cogvideox.cli.options import add_log_options
from cogvideox.cli.parser import ArgumentParser
from cogvideox.cli.program import run
from cogvideox.cli.report import Report
from cogvideox.cli.types import folder_path, number
from cogvideox.files import writing
from cogvideox.models.transformer.plan import DenoisingPlan
from cogvideox.models.transformer.scheduler import make_scheduler
from cogvideox.run.accelerator import prepare_libraries
from cogvideox.versions import versions
from compile_for_tpu.prediction import GIB
from compile_for_tpu.programs import add_model_option, model_name
from tools import dump_reference

COMPUTED = torch.bfloat16  # the dtype of what is measured


class Torch:
    """diffusers' modules on one device of torch, for the videos of a scale.

    Args:
        device: "cuda" or "cpu".
        sizes: gives the plans and configs; its own device, a CPU of jax, computes nothing.

    Attributes:
        compared: the dtypes of what this project is compared with, the one of the drawn weights first.
    """

    def __init__(self, device: str, sizes: Machine):
        self.device, self.sizes = device, sizes
        self.compared = (COMPUTED, torch.float32) if device == "cuda" else (torch.float32,)

    @property
    def name(self) -> str:
        """Name of the device."""
        return torch.cuda.get_device_name() if self.device == "cuda" else "cpu"

    def pipeline(self, plan: DenoisingPlan) -> dump_reference.Pipeline:
        """Make the pipeline of a plan, with a transformer whose weights are drawn, and without a VAE's."""
        scheduler = make_scheduler(plan.scheduler)
        pipeline = dump_reference.make_pipeline(self.device, COMPUTED, plan.vae, plan.transformer, scheduler)
        self.draw(pipeline.transformer)
        return pipeline

    def vae(self) -> AutoencoderKLCogVideoX:
        """Make the VAE, with weights that are drawn."""
        vae = dump_reference.make_pipeline(self.device, COMPUTED, self.sizes.vae).vae
        self.draw(vae)
        return vae

    def draw(self, module: torch.nn.Module) -> None:
        """Draw the weights of a module that has none; with them a layer's output is about as large as its input."""
        module.to_empty(device=self.device)
        generator = torch.Generator(self.device).manual_seed(WEIGHT_SEED)
        for name, weight in module.named_parameters():
            centre = 1.0 if weight.ndim == 1 and name.endswith("weight") else 0.0  # of a norm
            spread = 3**0.5 * (0.1 if weight.ndim == 1 else weight[0].numel() ** -0.5)
            weight.uniform_(-spread, spread, generator=generator).add_(centre)

    def denoise(self, pipeline: dump_reference.Pipeline, plan: DenoisingPlan, dtype: torch.dtype) -> torch.Tensor:
        """Run all steps of a plan from drawn prompts, and return the latents."""
        prompts = dict(zip(("prompt_embeds", "negative_prompt_embeds"), draw_prompts(plan), strict=True))
        return dump_reference.run_pipeline(pipeline, prompts, plan, LATENT_SEED, dtype, None)

    def draw_latents(self, video: tuple[int, int, int]) -> torch.Tensor:
        """Draw the latents of a decode, bfloat16 [1, channels, frames, height, width]."""
        shape = self.sizes.decoding_plan(video, "torchax", self.sizes.devices).latent_shape
        return torch.randn(shape, generator=torch.Generator().manual_seed(LATENT_SEED)).to(self.device, COMPUTED)

    def now(self) -> float:
        """Return the time when all that was started on the device is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def measured(self, seconds: Sequence[float]) -> dict:
        """Return the result of a measurement, with the peak of memory since `forget_peak` on a GPU."""
        peak = torch.cuda.max_memory_allocated() / GIB if self.device == "cuda" else None
        nothing = dict.fromkeys(("allotted_gib", "in_use_gib", "predicted_seconds", "predicted_gib"))
        return measured(seconds, None, {"peak_gib": peak}, nothing)

    def forget_peak(self) -> None:
        """Let the peak of memory begin at what is allocated now."""
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


# --- Measurements ------------------------------------------------------------------------------------------------


def measure_step(on: Torch, video: tuple[int, int, int], guided: bool) -> dict:
    """Time the steps of diffusers' pipeline: from one call of the transformer to the next."""
    plan = on.sizes.denoising_plan(video, guided)
    pipeline = on.pipeline(plan)
    begun: list[float] = []
    pipeline.transformer.register_forward_pre_hook(lambda *_: begun.append(on.now()))
    on.forget_peak()
    on.denoise(pipeline, plan, COMPUTED)
    begun.append(on.now())
    return on.measured([after - before for before, after in itertools.pairwise(begun)][1:])  # the first one warms up


def measure_decode(on: Torch, video: tuple[int, int, int]) -> dict:
    """Time the decoding of a video, without tiles, until its frames are on the device."""
    vae, latents = on.vae(), on.draw_latents(video)

    def decode_all() -> Iterator[float]:
        for _ in range(1 + on.sizes.scale.repetitions):
            vae.decode(latents)
            yield on.now()

    on.forget_peak()
    return on.measured(durations(decode_all()))


# --- References --------------------------------------------------------------------------------------------------


def write_latents(on: Torch, path: Path) -> dict:
    """Write what diffusers' pipeline makes of drawn prompts in three steps."""
    plan = compared_plan(on.sizes)
    pipeline = on.pipeline(plan)
    positive, negative = draw_prompts(plan)
    inputs = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
    return write_reference(on, path, pipeline.transformer, inputs, functools.partial(on.denoise, pipeline, plan))


def write_frames(on: Torch, path: Path) -> dict:
    """Write the frames that diffusers decodes from drawn latents, pixels in [0, 1], [frames, height, width, 3]."""
    vae, latents = on.vae(), on.draw_latents(on.sizes.scale.chunk_video)

    def decode(dtype: torch.dtype) -> torch.Tensor:
        pixels = vae.to(dtype).decode(latents.to(dtype)).sample[0].float()
        return (pixels * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 3, 0)

    return write_reference(on, path, vae.decoder, {"latents": latents}, decode)


def write_reference(
    on: Torch,
    path: Path,
    module: torch.nn.Module,
    inputs: Mapping[str, torch.Tensor],
    compute: Callable[[torch.dtype], torch.Tensor],
) -> dict:
    """Write a module's weights, its inputs and its results in each dtype that is compared."""
    tensors = {f"weights.{name}": weight.to("cpu", copy=True) for name, weight in module.state_dict().items()}
    tensors |= {f"inputs.{name}": tensor.cpu() for name, tensor in inputs.items()}
    for dtype in on.compared:
        module.to(dtype)
        tensors[f"results.{str(dtype).removeprefix('torch.')}"] = compute(dtype).float().cpu()
    with writing.replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    return {"status": WRITTEN}


# --- The run -----------------------------------------------------------------------------------------------------


def all_entries(on: Torch, folder: Path) -> list[Entry]:
    """Return references and rows in the order of their worth."""
    writers = {LATENTS: write_latents, FRAMES: write_frames}
    references = [
        Entry(name, "check", functools.partial(write, on, folder / FILES[name]), 2.0, quick=True)
        for name, write in writers.items()
    ]
    rows: list[Entry] = []
    for size, guided, minutes in on.sizes.steps:
        video = on.sizes.video(size)
        measure = functools.partial(measure_step, on, video, guided)
        rows.append(Entry(DIFFUSERS + step_name(video, guided), "row", measure, minutes, quick=not rows))
    for size, minutes in {size: minutes for size, _, minutes in on.sizes.decodes}.items():
        video = on.sizes.video(size)
        measure = functools.partial(measure_decode, on, video)
        rows.append(Entry(DIFFUSERS + decode_name(video), "row", measure, minutes))
    return [references[0], *rows[:2], references[1], *rows[2:]]


def made_with(on: Torch) -> dict:
    """Return what decides the results: the device, versions, and the sources."""
    names = "beside_diffusers", "diffusers_comparison", "entries", "machine"
    files = [*(Path(__file__).with_name(f"{name}.py") for name in names), Path(str(dump_reference.__file__))]
    return {
        "devices": f"1 x {on.name}",
        "model": model_name(on.sizes.model),
        "versions": versions("torch", "diffusers") | {"python": sys.version.split()[0]},
        "source files": hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16],
    }


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(__doc__.splitlines()[0], prog="python -m benchmarks.beside_diffusers")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True, help="what torch runs on")
    parser.add_argument("--output", type=folder_path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=number(float, 0), required=True, help="start nothing that takes longer")
    parser.add_argument("--quick", action="store_true", help="only the entries that matter most")
    parser.add_argument("--again", action="store_true", help="run what is done already again too")
    add_model_option(parser)
    add_log_options(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the entries."""
    arguments = parse_arguments(argv)
    with Report("beside_diffusers", "beside_diffusers.py", arguments) as told, torch.no_grad():
        prepare_libraries()
        logging.set_verbosity_error()
        jax.config.update("jax_platforms", "cpu")  # jax computes nothing here, and must not hold the accelerator
        torch.backends.cudnn.allow_tf32 = False  # float32 is to mean float32
        scale = SCALES["gpu" if arguments.device == "cuda" else "cpu"]
        on = Torch(arguments.device, Machine(jax.devices("cpu")[:1], scale, arguments.model_id))
        results = Results(arguments.output, RESULTS, made_with(on), arguments.again)
        writing.check_writable(results.json)
        told.title(f"{model_name(on.sizes.model)} in diffusers on {on.name}")
        todo = all_entries(on, arguments.output)
        run_entries(todo, results, arguments.quick, 60 * arguments.minutes, scale.pace, told)


if __name__ == "__main__":
    run(main)
