"""Define the command-line options that decide a compiled program, and make plans from them.

The stages and the compile tool share this module. Importing it loads neither jax nor torch.
"""

import argparse
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import checkpoint
import tensor_dump
import utils
from console import UserError, first_line, number
from models.scheduler import CHOICES
from reading import MOST_FRAMES, MOST_GUIDANCE, MOST_PIXELS

if TYPE_CHECKING:
    import jax
    import numpy as np

    from models import decoding, denoising, recorder, tap


def add_size_options(parser: argparse.ArgumentParser) -> None:
    """Add the video's height, width and frames."""
    pixels = number(int, 1, MOST_PIXELS)
    parser.add_argument("--height", type=pixels, default=utils.HEIGHT, help="height of the video in pixels")
    parser.add_argument("--width", type=pixels, default=utils.WIDTH, help="width of the video in pixels")
    parser.add_argument(
        "--frames",
        type=number(int, 1, MOST_FRAMES),
        default=utils.FRAMES,
        help="frames of the video, of the form 4n + 1",
    )


def add_denoising_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that a denoising step depends on: size, steps, guidance, attention, sharding."""
    positive, yes_no = number(int, 1), argparse.BooleanOptionalAction
    parser.add_argument("--num_inference_steps", type=positive, default=utils.NUM_STEPS, help="denoising steps")
    add_size_options(parser)
    parser.add_argument(
        "--guidance_scale",
        type=number(float, 0, MOST_GUIDANCE),
        default=utils.GUIDANCE_SCALE,
        help="scale of classifier-free guidance; 1 or less switches it off, and a step costs half",
    )
    parser.add_argument(
        "--guidance_interval",
        type=interval,
        metavar="FIRST,LAST",
        help="guide only the steps FIRST to LAST, counted from 0; the others cost half (default: guide all)",
    )
    parser.add_argument(
        "--use_dynamic_cfg",
        action=yes_no,
        default=utils.USE_DYNAMIC_CFG,
        help="let the guidance scale change from step to step, as in CogVideoXPipeline",
    )
    parser.add_argument(
        "--scheduler",
        choices=CHOICES,
        help="ddim, or dpm with trailing timesteps (default: the scheduler that the model names)",
    )
    parser.add_argument(
        "--use_dp",
        action=yes_no,
        default=utils.USE_DP,
        help="use data parallelism (dp): split videos, and the two prompts of guidance, over the chips",
    )
    parser.add_argument(
        "--videos_at_once",
        type=positive,
        metavar="N",
        help="of several videos, how many are made at a time (default: what makes the most an hour, by prediction)",
    )
    parser.add_argument(
        "--sp_num",
        type=positive,
        help="chips that split the sequence (sp); the others split attention heads (default: all that dp leaves)",
    )
    parser.add_argument(
        "--layout",
        default=utils.LAYOUT,
        help="layout of the weights: tp splits them over tp alone, fsdp keeps even shares of them on all chips",
    )
    parser.add_argument(
        "--use_fsdp", dest="layout", action="store_const", const="fsdp", help="the same as --layout fsdp"
    )
    for name in ("--use_tp", "--no-use_fsdp"):
        parser.add_argument(name, dest="layout", action="store_const", const="tp", help="the same as --layout tp")
    parser.add_argument(
        "--mesh_order", help="order of the mesh axes; chips along the last one are neighbours (default: dp,sp,tp)"
    )
    cache = parser.add_mutually_exclusive_group()
    cache.add_argument(
        "--cache_threshold",
        type=number(float, 0),
        metavar="X",
        help="skip the blocks in steps whose time embedding hardly changes, the more the larger X (default: in none)",
    )
    cache.add_argument(
        "--cache_schedule", metavar="NUMBERS", help="skip the blocks in these steps, such as 2,4-6 (default: in none)"
    )
    add_attention_options(parser)  # last, because the names of reports list the options in this order


def interval(text: str) -> tuple[int, int]:
    """Return two numbers "a,b" as a tuple; an argparse type."""
    try:
        first, last = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no interval such as 3,30") from None
    return first, last


def add_attention_options(parser: argparse.ArgumentParser) -> None:
    """Add the choice of the attention implementation and its own options."""
    parser.add_argument(
        "--attention",
        help="implementation of attention, a name in models/attention.py (default: splash_exp2 on a TPU, else xla)",
    )
    parser.add_argument(
        "--block_sizes",
        type=int,
        nargs="+",
        help="block sizes of the attention kernel, in the order of its BlockSizes (default: the kernel's choice)",
    )
    parser.add_argument(
        "--use_k_smooth",
        action=argparse.BooleanOptionalAction,
        help="subtract the mean of the keys in attention (default: the kernel's choice)",
    )


def add_decoding_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the split in space, which a decoder's programs depend on beside the size."""
    positive = number(int, 1)
    parser.add_argument(
        "--chip_rows",
        type=positive,
        help="rows of chips that a frame is split over (default: the split with the least work for each chip)",
    )
    parser.add_argument(
        "--strips", type=number(int, 1, 1000), help="bands of rows on each chip (default: 8 on a TPU, else 1)"
    )


def add_dump_options(parser: argparse.ArgumentParser, unit: str) -> None:
    """Add what a stage writes of the tensors inside it; `unit` is what it does many of, "step" or "chunk"."""
    parser.add_argument("--dump", type=utils.path, metavar="DIR", help="write tensors inside the model to this folder")
    parser.add_argument(
        "--dump_names",
        nargs="+",
        metavar="PATTERN",
        help="patterns over diffusers' names of modules, such as 'transformer_blocks.7.attn1.*' (default: all)",
    )
    parser.add_argument(
        "--dump_steps", metavar="NUMBERS", help=f"{unit}s whose tensors are written, such as 0,3-5,-1 (default: all)"
    )
    parser.add_argument(
        "--dump_stats",
        action="store_true",
        help=f"write the statistics of every named tensor in every {unit}; whole tensors only with --dump_names",
    )
    parser.add_argument(
        "--dump_shards", action="store_true", help="say which chips differ where they should be equal, and --dump_stats"
    )


def dump_wanted(arguments: argparse.Namespace) -> "tap.Wanted | None":
    """Return what the options of `add_dump_options` ask the programs to return, or None without --dump.

    Raises:
        UserError: an option belongs to --dump, which is not there.
    """
    from models import tap

    if arguments.dump is None:
        for name in ("dump_names", "dump_steps", "dump_stats", "dump_shards"):
            if getattr(arguments, name):
                raise UserError(f"--{name} belongs to --dump, which says where the files go")
        return None
    statistics = arguments.dump_stats or arguments.dump_shards
    arrays = arguments.dump_names or ([] if statistics else ["*"])
    return tap.Wanted(tuple(arrays), ("*",) if statistics else (), checksums=arguments.dump_shards)


def dump_recorder(
    arguments: argparse.Namespace,
    stage: str,
    unit: str,
    made_from: Mapping[str, str],
    mesh: "jax.sharding.Mesh",
    programs: "Sequence[jax.stages.Traced]",
) -> "recorder.Recorder | recorder.NoRecorder":
    """Make what writes the files of --dump while programs run, one for each step; see `Recorder`."""
    from models import recorder

    if arguments.dump is None:
        return recorder.NoRecorder()
    chosen = tensor_dump.steps(arguments.dump_steps, len(programs))
    return recorder.Recorder(arguments.dump, stage, unit, made_from, mesh, programs, chosen)


def scheduler_config(model_id: str, changes: Mapping) -> dict:
    """Return a model's scheduler_config.json with other values of some entries."""
    return checkpoint.read_config(model_id, "scheduler", "scheduler_config.json") | dict(changes)


def denoising_plan(
    arguments: argparse.Namespace, model_id: str, devices: Sequence, platform: str, videos: int, **details: Any
) -> "denoising.Plan":
    """Return the plan that the options of `add_denoising_options` ask for, with the configs of a model.

    Args:
        arguments: the parsed options.
        model_id: the model whose configs are read.
        devices: the jax devices to run on.
        platform: "tpu", "cpu" or "gpu".
        videos: how many there are to make; its batch is how many of them are made at a time.
        details: other arguments of `denoising.make_plan`: dtype.

    Raises:
        UserError: the model, the devices and the options do not fit together.
    """
    from models import denoising, throughput

    given = {"mesh_order": arguments.mesh_order.split(",")} if arguments.mesh_order else {}
    names = (
        *("height", "width", "frames", "num_inference_steps", "guidance_scale", "guidance_interval"),
        *("use_dynamic_cfg", "attention", "block_sizes", "use_k_smooth", "use_dp", "sp_num", "layout"),
    )
    with plan_errors():
        make = functools.partial(
            denoising.make_plan,
            transformer=checkpoint.read_config(model_id, "transformer"),
            vae=checkpoint.read_config(model_id, "vae"),
            scheduler=scheduler_config(model_id, CHOICES.get(arguments.scheduler, {})),
            devices=devices,
            platform=platform,
            step_cache=arguments.cache_threshold is not None or arguments.cache_schedule is not None,
            **details,
            **{name: getattr(arguments, name) for name in names},
            **given,
        )
        if arguments.videos_at_once:
            return make(batch=min(arguments.videos_at_once, videos))
        return throughput.fastest(make, videos, len(devices))


def skipped_steps(
    arguments: argparse.Namespace, plan: "denoising.Plan", model_id: str, read: "Callable[[str], np.ndarray]"
) -> list[int]:
    """Return the steps that --cache_schedule or --cache_threshold lets skip the blocks.

    Raises:
        UserError: the schedule names the first step or steps that are not there, or there is no polynomial.
    """
    steps = plan.num_inference_steps
    if arguments.cache_schedule is not None:
        found = tensor_dump.steps(arguments.cache_schedule, steps, "--cache_schedule")
        if full := plan.always_full.intersection(found):
            and_guided = ", and the first one with guidance," if plan.guidance_interval else ""
            raise UserError(
                f"--cache_schedule {arguments.cache_schedule} names step {min(full)}: the first and the last step"
                f"{and_guided} are always full"
            )
        return found
    if arguments.cache_threshold is None:
        return []
    from models import step_cache
    from models.denoising import time_embeddings
    from models.scheduler import AffineScheduler, make_scheduler

    try:
        polynomial = step_cache.polynomial_of(model_id)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{step_cache.FILE} of {model_id} cannot be read: {first_line(error)}; make it again"
        ) from error
    if polynomial is None:
        raise UserError(
            f"--cache_threshold needs a polynomial, and {model_id} has none: fit one with "
            "python -m tools.fit_step_cache, or name the steps with --cache_schedule"
        )
    timesteps = AffineScheduler(make_scheduler(plan.scheduler), steps).timesteps
    embeddings = time_embeddings(plan, timesteps, read)
    skipped = step_cache.skipped_steps(embeddings, polynomial, arguments.cache_threshold)
    return sorted(set(skipped) - plan.always_full)


def decoding_plan(
    arguments: argparse.Namespace, model_id: str, decoder: str, size: dict[str, int], devices: Sequence, dtype: Any
) -> "decoding.Plan":
    """Return the plan that the options of `add_decoding_options` ask for, with the VAE config of a model.

    Args:
        arguments: the parsed options.
        model_id: the model whose config is read.
        decoder: "torchax" or "flax".
        size: "height" and "width" of the video in pixels, and its "frames".
        devices: the jax devices to run on.
        dtype: of weights and latents.

    Raises:
        UserError: the model, the devices and the options do not fit together.
    """
    from models import decoding

    with plan_errors():
        return decoding.make_plan(
            vae=checkpoint.read_config(model_id, "vae"),
            decoder=decoder,
            devices=devices,
            dtype=dtype,
            chip_rows=arguments.chip_rows,
            strips=arguments.strips,
            **size,
        )


@contextlib.contextmanager
def plan_errors() -> Iterator[None]:
    """Turn errors that say why a plan cannot be carried out into a UserError that names the option."""
    from models.plan_error import PlanError
    from models.tap import NoSuchNameError

    try:
        yield
    except PlanError as error:
        raise UserError(f"--{error}" if error.option else str(error)) from error
    except NoSuchNameError as error:
        raise UserError(f"--dump_names: {str(error).splitlines()[0]}") from error
