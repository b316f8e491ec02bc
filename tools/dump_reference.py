"""Dump what diffusers computes in torch, from the same files and under the same names as the stages' --dump.

    python -m tools.dump_reference stage_outputs --dump reference

diffusers' pipeline and its modules run as they are; hooks on them see what they return. Each part of the model has its
weights only while it runs, so that the model need not fit the memory.
"""

import argparse
import fnmatch
import functools
import re
import resource
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.embeddings import CogVideoXPatchEmbed
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.schedulers import scheduling_dpm_cogvideox
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

from cogvideox.cli.parser import ArgumentParser
from cogvideox.cli.program import run
from cogvideox.cli.terminal import bar_options
from cogvideox.cli.types import file_path, number
from cogvideox.defaults import IMAGE_LATENT_SCALES
from cogvideox.errors import UserError
from cogvideox.features import features_of
from cogvideox.files import checkpoint, lora, numbers, provenance, stage_files, tensor_dump
from cogvideox.files.names import EMBEDDINGS, GIVEN_TENSORS, LATENTS
from cogvideox.files.schemas import VideoConfig
from cogvideox.files.tensor_dump import Dump, Planned
from cogvideox.models.shared import tap
from cogvideox.models.shared.sizes import latent_size
from cogvideox.models.transformer.parameters import stored_shapes
from cogvideox.models.transformer.plan import DenoisingPlan, make_denoising_plan
from cogvideox.models.transformer.scheduler import make_scheduler
from cogvideox.models.vae.decoder import chunk_sizes
from cogvideox.run.accelerator import prepare_libraries
from cogvideox.run.jobs import check_embeddings
from cogvideox.run.plans import plan_errors

# The modules, as regular expressions, whose outputs the stages name too.
IN_A_BLOCK = r"norm[12](\.linear)?|attn1\.(to_[qkv]|norm_[qk]|to_out\.0)|ff\.net\.[02]"
TRANSFORMER = (
    r"time_embedding\.linear_2|patch_embed|norm_final|norm_out(\.linear)?|proj_out"
    rf"|transformer_blocks\.\d+(\.({IN_A_BLOCK}))?"
)
DECODER = (
    r"conv_in|mid_block|norm_out|conv_out|(.+\.)?(resnets|up_blocks|upsamplers)\.\d+"
    r"|.+\.(norm[12]|conv[12]|conv_shortcut)"
)
# Entries of generation_config.json that decide what is computed here, or that decide no number.
UNDERSTOOD = {
    *("model_id", "prompt", "negative_prompt", "height", "width", "frames", "fps", "num_inference_steps", "seed"),
    *("guidance_scale", "use_dynamic_cfg", "scheduler", "timestep_spacing", "lora", "image", "prompt_seed"),
}
WAITING_BYTES = 2**26  # of arrays that are written together
VALUES_AT_A_TIME = 2**24  # that statistics are computed of


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(__doc__.splitlines()[0], prog="python -m tools.dump_reference")
    parser.add_argument("input_dir", type=file_path, help="the folder with the files of the stages")
    parser.add_argument("--stage", type=int, choices=(2, 3), default=2, help="2: the transformer; 3: the VAE's decoder")
    parser.add_argument("--dump", type=file_path, metavar="DIR", required=True, help="the folder for the dump")
    parser.add_argument(
        "--dump_names",
        nargs="+",
        metavar="PATTERN",
        help="patterns over the names of what is written, such as 'transformer_blocks.7.attn1.*' (default: all)",
    )
    parser.add_argument(
        "--dump_steps", metavar="NUMBERS", help="steps, or chunks of stage 3, such as 0,3-5,-1 (default: all)"
    )
    parser.add_argument(
        "--dump_stats",
        action="store_true",
        help="write the statistics of every tensor in every step or chunk; whole tensors only with --dump_names",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and latents")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what torch runs on")
    parser.add_argument(
        "--from_step", type=number(int, 0), metavar="STEP", help="begin here, with the latents of --latents"
    )
    parser.add_argument(
        "--latents", type=file_path, metavar="FILE", help="stage2_tensors.safetensors of a dump of stage 2"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Dump the reference of one stage."""
    arguments = parse_arguments(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU; use --device cpu")
    if (arguments.from_step is None) != (arguments.latents is None):
        raise UserError("--from_step and --latents belong together: a step, and the file with its latents")
    if arguments.from_step is not None and arguments.stage == 3:
        raise UserError("--from_step belongs to --stage 2; stage 3 always begins with the first chunk")
    if arguments.latents is not None and arguments.latents.parent.resolve() == arguments.dump.resolve():
        raise UserError(f"--dump {arguments.dump} would overwrite --latents; choose another folder")
    prepare_libraries()
    logging.set_verbosity_error()
    jax.config.update("jax_platforms", "cpu")  # jax computes nothing here, and must not hold the accelerator
    torch.backends.cudnn.allow_tf32 = False  # float32 is to mean float32

    with torch.no_grad():
        dump = (dump_denoising if arguments.stage == 2 else dump_decoding)(arguments)
    print(f"wrote {' and '.join(str(path) for path in dump.paths)}")
    unit = 1 if sys.platform == "darwin" else 1024
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB")
    if arguments.device == "cuda":
        print(f"peak memory of the GPU: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


# --- Stage 2 -----------------------------------------------------------------------------------------------------


class Start(NamedTuple):
    """What a later step starts from: latents [B, T, C, H, W], and the estimate of the clean latents of the step before.

    The estimate is None if the scheduler does not use it.
    """

    latents: torch.Tensor
    estimate: torch.Tensor | None


def dump_denoising(arguments: argparse.Namespace) -> Dump:
    """Run diffusers' pipeline up to the last wanted step, and return the finished dump."""
    config = stage_files.read_config(arguments.input_dir, VideoConfig)
    check_entries(config, arguments.input_dir / LATENTS)
    path = arguments.input_dir / EMBEDDINGS
    shapes = stage_files.tensor_shapes(path, 1, stage_files.embedding_names(path), config)
    plan = denoising_plan(config, batch=shapes["prompt_embeds"][0])
    check_embeddings({path: shapes}, plan)
    first = arguments.from_step or 0
    steps = steps_from(first, arguments.dump_steps, plan.num_inference_steps)
    last = plan.num_inference_steps - 1 if arguments.dump_stats else steps[-1]
    start = None if arguments.latents is None else read_start(arguments.latents, first, plan, config)

    dtype = getattr(torch, arguments.dtype)
    pipeline = make_pipeline(arguments.device, dtype, plan.vae, plan.transformer, make_scheduler(plan.scheduler))
    transformer = pipeline.transformer
    selected = select(arguments, dict.fromkeys(steps, planned_step(transformer, plan, dtype)))
    blocks = {f"transformer_blocks.{i}": block for i, block in enumerate(transformer.transformer_blocks)}
    others = {name: part for name, part in transformer.named_children() if name != "transformer_blocks"}
    loras = [lora.read_lora(option) for option in config.get("lora", [])]
    for one in loras:
        one.check(stored_shapes(plan.transformer))
    stream_weights(blocks | others, config["model_id"], "transformer", dtype, arguments.device, loras)
    recorder = open_recorder(arguments, "step", selected, config)
    attach(transformer, TRANSFORMER, "", of_tokens, recorder)
    follow_steps(pipeline, recorder, plan.batch, first, last, start)
    with tqdm(total=(last + 1 - first) * len(blocks), desc="denoising", unit="block", **bar_options()) as bar:
        advance(bar, blocks.values())
        run_pipeline(pipeline, load_file(path), plan, config["seed"], dtype, start if first == 0 else None)
    return recorder.dump


def check_entries(config: Mapping, latents: Path) -> None:
    """Raise UserError if the latents, whose file may be missing, were made with what diffusers' pipeline cannot do."""
    made = provenance.decided_by(latents) if latents.is_file() else {}
    by_default = {name: field.default for name, field in VideoConfig.model_fields.items() if name not in UNDERSTOOD}
    found = {**made, **config}  # what is no entry of the config, such as the scale of an image's latents, the file says
    for name, default in {**by_default, "image_latent_scale": IMAGE_LATENT_SCALES[0]}.items():
        value = found.get(name, default)
        if value != default:
            raise UserError(
                f"the latents were made with {name} {value}, which the pipeline run here does not have; run stage 2 "
                "without it, and compare that run"
            )


def denoising_plan(config: Mapping, batch: int) -> DenoisingPlan:
    """Return the plan of stage 2, which checks the model and knows the shape of the latents."""
    model_id = config["model_id"]
    names = ("height", "width", "frames", "num_inference_steps", "guidance_scale")
    scheduler = {"_class_name": config["scheduler"]}
    if spacing := config.get("timestep_spacing"):
        scheduler["timestep_spacing"] = spacing
    with plan_errors():
        return make_denoising_plan(
            transformer=checkpoint.read_config(model_id, "transformer"),
            vae=checkpoint.read_config(model_id, "vae"),
            scheduler=checkpoint.scheduler_config(model_id, scheduler),
            use_dynamic_cfg=config.get("use_dynamic_cfg", False),
            devices=jax.devices()[:1],
            platform="cpu",
            batch=batch,
            **{name: config[name] for name in names},
        )


def read_start(path: Path, step: int, plan: DenoisingPlan, config: Mapping) -> Start:
    """Read what `step` starts from, out of the arrays that stage 2 dumped.

    Raises:
        UserError: the file is of another run, or lacks what the step and the scheduler need.
    """
    names = [f"step_{step:03}/latents"]
    if plan.sampler.adds_noise and step:  # that scheduler uses its last estimate too
        names.append(f"step_{step - 1:03}/pred_original_sample")
    stage_files.tensor_shapes(path, 2, (), config)
    with safe_open(path, framework="pt") as file:
        missing = set(names) - set(file.keys())
        if missing:
            raise UserError(
                f"{path} has no {' and no '.join(sorted(missing))}; run stage 2 with --dump and "
                f"--dump_names latents pred_original_sample --dump_steps {max(step - 1, 0)}-{step}"
            )
        tensors = [file.get_tensor(name) for name in names]
    for tensor in tensors:
        stage_files.check_latents_shape(tuple(tensor.shape), plan.latent_shape, path)
    return Start(tensors[0], tensors[1] if len(tensors) > 1 else None)


def planned_step(
    transformer: CogVideoXTransformer3DModel, plan: DenoisingPlan, dtype: torch.dtype
) -> dict[str, Planned]:
    """Return shapes and dtypes of all that a step computes, found by a step without values."""
    planner = Planner()
    latents = torch.empty(plan.latent_shape, dtype=dtype, device="meta")
    planner("latents", latents)
    rows = plan.batch * plan.prompts
    text = latents.new_empty(rows, plan.transformer["max_text_seq_length"], plan.transformer["text_embed_dim"])
    handles = attach(transformer, TRANSFORMER, "", of_tokens, planner)
    timestep = torch.zeros(rows, dtype=torch.int64, device="meta")
    transformer(
        latents.repeat(plan.prompts, 1, 2 if plan.features.image else 1, 1, 1),
        text,
        timestep,
        ofs=latents.new_empty(1) if plan.features.ofs else None,
    )
    for handle in handles:
        handle.remove()
    for name, tensor in (("noise_pred", latents.float()), ("pred_original_sample", latents.float())):
        planner(name, tensor)
    planner("prev_sample", latents)
    return planner.planned[0]


def follow_steps(
    pipeline: "Pipeline", recorder: "Recorder", batch: int, first: int, last: int, start: Start | None
) -> None:
    """Record what the pipeline's loop passes to the transformer and to the scheduler; run no model but first to last.

    The scheduler takes part in the steps before `first`, too, for it draws noise. What it returns there is replaced by
    `start`.
    """
    forward, step = pipeline.transformer.forward, pipeline.scheduler.step

    def transformer_forward(hidden_states: torch.Tensor, **others: object) -> tuple:
        noisy = hidden_states[:, :, : pipeline.transformer.config.out_channels]  # those of an image come after them
        if recorder.number < first:
            return (torch.zeros_like(noisy),)
        recorder("latents", noisy[:batch])
        return forward(hidden_states, **others)

    @functools.wraps(step)  # the pipeline looks at the parameters
    def scheduler_step(noise_pred: torch.Tensor, *others: object, **options: object) -> tuple:
        prev_sample, estimate = step(noise_pred, *others, **options)
        if recorder.number >= first:
            recorder("noise_pred", noise_pred)
            recorder("pred_original_sample", estimate)
            recorder("prev_sample", prev_sample.to(pipeline.transformer.dtype))
        elif recorder.number == first - 1 and start is not None:
            prev_sample = start.latents.to(prev_sample)
            estimate = estimate if start.estimate is None else start.estimate.to(estimate)
        pipeline._interrupt = recorder.number == last
        recorder.next()
        return prev_sample, estimate

    pipeline.transformer.forward, pipeline.scheduler.step = transformer_forward, scheduler_step


def run_pipeline(
    pipeline: "Pipeline",
    embeddings: Mapping[str, torch.Tensor],
    plan: DenoisingPlan,
    seed: int,
    dtype: torch.dtype,
    start: Start | None,
) -> torch.Tensor:
    """Call diffusers' pipeline, in `dtype`, on the noise that stage 2 draws, or from the first step's latents.

    The VAE's encoder does not run: the pipeline gets the latents of an image as stage 1 has encoded it.

    Returns:
        Its latents, [batch, frames, channels, height, width], with the surplus frames of the plan in front.
    """
    drawn = embeddings["prompt_embeds"].dtype  # whatever dtype the computation has
    generator = torch.Generator().manual_seed(seed)
    image = {}
    if plan.features.image:
        posterior = DiagonalGaussianDistribution(
            torch.cat([embeddings[name] for name in GIVEN_TENSORS["image"]], dim=1)
        )
        sample = posterior.sample(generator)  # which the pipeline would draw in its turn, before the noise
        posterior.sample = lambda _: sample.to(pipeline._execution_device)
        pipeline.vae.encode = lambda _: AutoencoderKLOutput(posterior)
        image = {"image": torch.zeros(1, 3, plan.height, plan.width)}
    latents = randn_tensor(plan.latent_shape, generator=generator, dtype=drawn)
    if start is not None:
        latents = start.latents

    def noise(
        shape: Sequence[int], generator: torch.Generator, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor:
        return randn_tensor(shape, generator=generator, device=device, dtype=drawn).to(dtype)

    device = pipeline._execution_device
    with mock.patch.object(scheduling_dpm_cogvideox, "randn_tensor", noise):
        return pipeline(
            height=plan.height,
            width=plan.width,
            num_frames=plan.frames,
            num_inference_steps=plan.num_inference_steps,
            guidance_scale=plan.guidance_scale,
            use_dynamic_cfg=plan.use_dynamic_cfg,
            generator=generator,
            latents=latents.to(dtype),
            **{name: embeddings[name].to(device, dtype) for name in stage_files.TEXT_TENSORS},
            **image,
            output_type="latent",
        ).frames


def of_tokens(name: str, output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return the output of a module of the transformer as the stages name it.

    Text and video are one sequence. What is computed from the time is the same for all prompts, and one row.
    """
    if isinstance(output, tuple):
        return torch.cat([output[1], output[0]], dim=1)
    return output[:1] if name.endswith(("linear", "linear_2")) else output


# --- Stage 3 -----------------------------------------------------------------------------------------------------


def dump_decoding(arguments: argparse.Namespace) -> Dump:
    """Run diffusers' decoder up to the last wanted chunk, and return the finished dump."""
    config = stage_files.read_config(arguments.input_dir, VideoConfig)
    path = arguments.input_dir / LATENTS
    shape = stage_files.tensor_shapes(path, 2, ("latents",), config, finite=False)["latents"]
    vae = checkpoint.read_config(config["model_id"], "vae")
    size = latent_size(vae, config["frames"], config["height"], config["width"])
    stage_files.check_latents_shape(shape, (1, vae["latent_channels"], *size), path)

    dtype = getattr(torch, arguments.dtype)
    pipeline = make_pipeline(arguments.device, dtype, vae)
    planner = Planner()
    decode(pipeline, torch.empty(shape, dtype=dtype, device="meta"), planner)
    chunks = numbers.named(arguments.dump_steps, planner.number)
    selected = select(arguments, {chunk: planner.planned[chunk] for chunk in chunks})
    stream_weights({"decoder": pipeline.vae.decoder}, config["model_id"], "vae", dtype, arguments.device)
    latents = load_file(path)["latents"].to(arguments.device, dtype)
    frames = chunk_sizes(shape[2]) if arguments.dump_stats else chunk_sizes(shape[2])[: chunks[-1] + 1]
    recorder = open_recorder(arguments, "chunk", selected, config)
    with tqdm(total=len(frames), desc="decoding", unit="chunk", **bar_options()) as bar:
        advance(bar, [pipeline.vae.decoder])
        decode(pipeline, latents[:, :, : sum(frames)], recorder)
    return recorder.dump


def decode(pipeline: "Pipeline", latents: torch.Tensor, recorder: "Planner | Recorder") -> None:
    """Decode latents [1, C, T, H, W] as the pipeline does, and record each chunk."""
    decoder = pipeline.vae.decoder
    handles = attach(decoder, DECODER, "decoder.", of_frames, recorder)
    handles.append(decoder.register_forward_hook(lambda *_: recorder.next()))
    pipeline.decode_latents(latents.transpose(1, 2))
    for handle in handles:
        handle.remove()


def of_frames(_: str, output: torch.Tensor | tuple) -> torch.Tensor:
    """Return the (first) output of a module of the decoder as [frames, channels, height, width]."""
    return (output[0] if isinstance(output, tuple) else output)[0].transpose(0, 1)


# --- diffusers' modules ------------------------------------------------------------------------------------------


class OnDevice:
    """A pipeline that runs on `device_of_run` though its modules lie nowhere while they wait."""

    device_of_run = "cpu"

    @property
    def _execution_device(self) -> torch.device:
        return torch.device(self.device_of_run)


class TextPipeline(OnDevice, CogVideoXPipeline):
    """diffusers' pipeline of a model for text to video."""


class ImagePipeline(OnDevice, CogVideoXImageToVideoPipeline):
    """diffusers' pipeline of a model for image to video."""


Pipeline = TextPipeline | ImagePipeline


def make_pipeline(
    device: str, dtype: torch.dtype, vae: Mapping, transformer: Mapping | None = None, scheduler: object = None
) -> Pipeline:
    """Make the pipeline, without weights, from the configs of its components."""
    with torch.device("meta"):
        modules = [
            config and kind.from_config(dict(config)).to(dtype).eval()
            for kind, config in ((AutoencoderKLCogVideoX, vae), (CogVideoXTransformer3DModel, transformer))
        ]
    takes_image = transformer is not None and features_of(transformer).image
    pipeline = (ImagePipeline if takes_image else TextPipeline)(None, None, *modules, scheduler)
    pipeline.device_of_run = device
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stream_weights(
    parts: Mapping[str, nn.Module],
    model_id: str,
    component: str,
    dtype: torch.dtype,
    device: str,
    loras: Sequence[lora.Lora] = (),
) -> None:
    """Let each part read its weights when it begins to run, and drop them when it ends.

    With the `loras` the weights are, to the last bit, those that stage 2 computes with.

    Raises:
        UserError: the model's files lack a weight.
    """
    folder = str(checkpoint.model_folder(model_id, [f"{component}/*.json", f"{component}/*.safetensors"]))
    stored = {
        name: {f"{name}.{weight}": tuple(x.shape) for weight, x in part.state_dict().items()}
        for name, part in parts.items()
    }
    checkpoint.tensor_reader(
        folder, component, {name: shape for part in stored.values() for name, shape in part.items()}
    )

    def load(name: str, part: nn.Module, _: object) -> None:
        read = checkpoint.tensor_reader(
            folder, component, stored[name], all_of_them=False
        )  # open no longer than needed
        weights = {weight: read(weight).copy() for weight in stored[name]}
        for weight, array in weights.items():
            for one in loras:
                one.add(weight, array, (slice(None),) * array.ndim)
        tensors = {weight.removeprefix(f"{name}."): from_numpy(array) for weight, array in weights.items()}
        part.load_state_dict({weight: x.to(device, dtype) for weight, x in tensors.items()}, assign=True)
        if isinstance(part, CogVideoXPatchEmbed) and part.use_positional_embeddings:  # which are in no file
            size = part.sample_height, part.sample_width, part.sample_frames
            part.pos_embedding = part._get_positional_embeddings(*size, device=device)

    def drop(part: nn.Module, *_: object) -> None:
        part.to("meta")

    for name, part in parts.items():
        part.register_forward_pre_hook(functools.partial(load, name))
        part.register_forward_hook(drop)


def attach(
    module: nn.Module, names: str, prefix: str, tensor_of: Callable, record: Callable
) -> list[torch.utils.hooks.RemovableHandle]:
    """Call `record(prefix + name, tensor_of(name, output))` after each module whose name matches; return the hooks."""

    def hook(name: str, _: nn.Module, __: tuple, output: torch.Tensor | tuple) -> None:
        record(prefix + name, tensor_of(name, output))

    return [
        part.register_forward_hook(functools.partial(hook, name))
        for name, part in module.named_modules()
        if re.fullmatch(names, name)
    ]


def advance(bar: tqdm, modules: Iterable[nn.Module]) -> None:
    """Advance the bar whenever one of the modules has run."""

    def hook(*_: object) -> None:  # what a hook returns, other than None, takes the place of the output
        bar.update()

    for module in modules:
        module.register_forward_hook(hook)


# --- The dump ----------------------------------------------------------------------------------------------------


class Planner:
    """Take the place of a Recorder, and keep shapes and dtypes only: `planned`, by number and name."""

    def __init__(self) -> None:
        self.planned: dict[int, dict[str, Planned]] = {}
        self.number = 0

    def __call__(self, name: str, tensor: torch.Tensor) -> None:
        """Plan for a tensor."""
        kept = Planned(tuple(tensor.shape), np.dtype(str(tensor.dtype).removeprefix("torch.")))
        self.planned.setdefault(self.number, {})[name] = kept

    def next(self) -> None:
        """Go on to the next step or chunk."""
        self.number += 1


class Recorder:
    """Write the tensors of one step or chunk after another, as they come; `number` is that of the current one.

    Args:
        dump: where to.
        selected: by number and name, the arrays to write.
        with_statistics: whether to write the statistics of everything, too.
    """

    def __init__(self, dump: Dump, selected: Mapping[int, Mapping[str, Planned]], with_statistics: bool):
        self.dump, self._selected, self._with_statistics = dump, selected, with_statistics
        self._waiting: dict[str, np.ndarray] = {}
        self._statistics: dict[str, np.ndarray] = {}
        self.number = 0

    def __call__(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor and its statistics, if they are wanted."""
        if self._with_statistics:
            self._statistics[name] = statistics_of(tensor)
        if name in self._selected.get(self.number, ()):
            self._waiting[name] = to_numpy(tensor)
            if sum(array.nbytes for array in self._waiting.values()) >= WAITING_BYTES:
                self._write({})

    def next(self) -> None:
        """Go on to the next step or chunk."""
        self._write(self._statistics)
        self._statistics = {}
        self.number += 1

    def _write(self, statistics: Mapping[str, np.ndarray]) -> None:
        self.dump.add(self.number, self._waiting.items(), statistics)
        self._waiting = {}


def steps_from(first: int, text: str | None, count: int) -> list[int]:
    """Return the steps that --dump_steps names, by default all from `first` on.

    Raises:
        UserError: there is no step `first`, or --dump_steps names steps before it, or what is no step.
    """
    if first >= count:
        raise UserError(f"--from_step {first}: the steps are 0 to {count - 1}")
    steps = list(range(first, count)) if text is None else numbers.named(text, count)
    if steps[0] < first:
        raise UserError(f"--dump_steps {text}: step {steps[0]} comes before --from_step {first}")
    return steps


def select(
    arguments: argparse.Namespace, planned: Mapping[int, Mapping[str, Planned]]
) -> dict[int, dict[str, Planned]]:
    """Return the arrays of which --dump_names matches the name.

    Raises:
        UserError: a pattern matches nothing.
    """
    patterns = arguments.dump_names or ([] if arguments.dump_stats else ["*"])
    names = {name for arrays in planned.values() for name in arrays}
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise UserError(f"--dump_names: {tap.no_such_name(pattern, names)}")
    return {
        number: {name: arrays[name] for name in arrays if any(fnmatch.fnmatchcase(name, p) for p in patterns)}
        for number, arrays in planned.items()
    }


def open_recorder(
    arguments: argparse.Namespace, unit: str, selected: Mapping[int, Mapping[str, Planned]], config: Mapping
) -> Recorder:
    """Open the dump of a stage for the selected arrays; see `Dump` for what it raises."""
    arrays = {number: arrays for number, arrays in selected.items() if arrays}
    metadata = stage_files.made_from(config, [name for name in config if name != "fps"])
    dump = Dump(arguments.dump, f"stage{arguments.stage}", unit, arrays, metadata)
    return Recorder(dump, selected, arguments.dump_stats)


def statistics_of(tensor: torch.Tensor) -> np.ndarray:
    """Compute the row of tensor_dump.STATISTICS where the tensor lies, piece by piece, in float64."""
    sums = []
    for piece in tensor.flatten().split(VALUES_AT_A_TIME):
        values = piece.double()
        sums.append([len(values), *map(float, (values.sum(), values.square().sum(), values.min(), values.max()))])
    return tensor_dump.merged(np.array(sums))


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Copy a tensor to an array; bfloat16 stays what it is."""
    tensor = tensor.to("cpu", copy=True)  # diffusers may go on to change it in place
    return tensor.view(torch.uint16).numpy().view(jnp.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def from_numpy(array: np.ndarray) -> torch.Tensor:
    """Return a tensor that shares the array's memory; the reverse of `to_numpy`."""
    is_bfloat16 = array.dtype == jnp.bfloat16
    return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16) if is_bfloat16 else torch.from_numpy(array)


if __name__ == "__main__":
    run(main)
