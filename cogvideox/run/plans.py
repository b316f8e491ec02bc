"""Make the plans of a denoising run and of a decode from options and a model's configs."""

import argparse
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from cogvideox.errors import PlanError, UserError, first_line
from cogvideox.files import checkpoint, numbers, tensors
from cogvideox.files.step_polynomial import FILE as STEP_CACHE
from cogvideox.files.step_polynomial import polynomial_of
from cogvideox.models.transformer.scheduler import CHOICES
from cogvideox.run import sparse_maps

if TYPE_CHECKING:
    import jax
    import numpy as np

    from cogvideox.models.shared import tap
    from cogvideox.models.shared.plan import Plan
    from cogvideox.models.transformer.plan import DenoisingPlan
    from cogvideox.models.vae.plan import DecodingPlan
    from cogvideox.run import recorder

MOST_QUERIES = 64  # whose attention weights a dump has

# What else the command line can say about a wrong field of a plan.
REMEDIES = {"use_dynamic_cfg": "add --no-use_dynamic_cfg"}


def dump_wanted(arguments: argparse.Namespace, plan: "DenoisingPlan | None" = None) -> "tap.Wanted | None":
    """Return what the options of `add_dump_options` ask the programs to return, or None without --dump.

    Args:
        arguments: the parsed options.
        plan: of stage 2, whose tokens and heads the options name.

    Raises:
        UserError: an option belongs to --dump, which is not there, or names tokens or heads that are not there.
    """
    from cogvideox.models.shared import tap

    if arguments.dump is None:
        for name in ("dump_names", "dump_steps", "dump_queries", "dump_heads", "dump_stats", "dump_shards"):
            if getattr(arguments, name, None):
                raise UserError(f"--{name} belongs to --dump, which says where the files go")
        return None
    statistics = arguments.dump_stats or arguments.dump_shards
    arrays = arguments.dump_names or ([] if statistics else ["*"])
    wanted = tap.Wanted(tuple(arrays), ("*",) if statistics else (), checksums=arguments.dump_shards)
    if plan is None:
        return wanted
    chosen = attention_wanted(arguments, plan)
    return dataclasses.replace(wanted, queries=chosen["queries"], heads=chosen["heads"])


def attention_wanted(arguments: argparse.Namespace, plan: "DenoisingPlan") -> dict[str, list[int]]:
    """Return of which queries and heads --dump writes attention weights, if it does.

    Raises:
        UserError: they are not there, or so many queries that the weights would be a matrix of all.
    """
    from cogvideox.models.transformer.taps import some_queries

    queries = some_queries(plan.tokens)
    if arguments.dump_queries:
        queries = numbers.named(arguments.dump_queries, plan.tokens, "--dump_queries")
        if len(queries) > MOST_QUERIES:
            raise UserError(
                f"--dump_queries names {len(queries)} tokens; each has a weight for all, name {MOST_QUERIES}"
            )
    heads = plan.transformer["num_attention_heads"]
    return {"queries": queries, "heads": numbers.named(arguments.dump_heads, heads, "--dump_heads")}


def check_dump(arguments: argparse.Namespace, steps: int) -> None:
    """Raise UserError, before anything is loaded, if the options of --dump are wrong for a run of so many steps."""
    dump_wanted(arguments)
    numbers.named(arguments.dump_steps, steps)


def dump_recorder(
    arguments: argparse.Namespace,
    stage: str,
    unit: str,
    made: Mapping[str, str],
    mesh: "jax.sharding.Mesh",
    programs: "Sequence[jax.stages.Traced]",
) -> "recorder.Recorder | recorder.NoRecorder":
    """Make what writes the files of --dump, with the metadata `made`, while programs run, one for each step."""
    from cogvideox.run import recorder

    if arguments.dump is None:
        return recorder.NoRecorder()
    chosen = numbers.named(arguments.dump_steps, len(programs))
    return recorder.Recorder(arguments.dump, stage, unit, made, mesh, programs, chosen)


def denoising_plan(
    arguments: argparse.Namespace, model_id: str, devices: Sequence, platform: str, videos: int, **details: Any
) -> "DenoisingPlan":
    """Return the plan that the options of `add_denoising_options` ask for, with the configs of a model.

    Args:
        arguments: the parsed options.
        model_id: the model whose configs are read.
        devices: the jax devices to run on.
        platform: "tpu", "cpu" or "gpu".
        videos: how many there are to make; its batch is how many of them are made at a time.
        details: other arguments of `make_denoising_plan`: dtype, strength.

    Raises:
        UserError: the model, the devices and the options do not fit together.
    """
    from cogvideox.models.transformer import throughput
    from cogvideox.models.transformer.plan import make_denoising_plan

    given = {"mesh_order": arguments.mesh_order.split(",")} if arguments.mesh_order else {}
    names = (
        *("height", "width", "frames", "num_inference_steps", "guidance_scale", "guidance_interval"),
        *("use_dynamic_cfg", "attention", "block_sizes", "use_k_smooth", "use_dp", "sp_num", "layout"),
    )
    transformer = checkpoint.read_config(model_id, "transformer")
    with plan_errors():
        make = functools.partial(
            make_denoising_plan,
            transformer=transformer,
            vae=checkpoint.read_config(model_id, "vae"),
            scheduler=checkpoint.scheduler_config(model_id, CHOICES.get(arguments.scheduler, {})),
            devices=devices,
            platform=platform,
            step_cache=arguments.cache_threshold is not None or arguments.cache_schedule is not None,
            sparse=sparse_maps.sparse_attention(arguments, model_id, transformer),
            **details,
            **{name: getattr(arguments, name) for name in names},
            **given,
        )
        if arguments.videos_at_once:
            return make(batch=min(arguments.videos_at_once, videos))
        return throughput.fastest(make, videos, len(devices))


AnyPlan = TypeVar("AnyPlan", bound="Plan")


def with_compute_dtype(
    plan: AnyPlan, values: Mapping[str, int], arguments: argparse.Namespace, say: Callable[[str], None]
) -> AnyPlan:
    """Return the plan with the dtype that `tensors.compute_dtype` chooses; `say` is told what is converted to it.

    Raises:
        UserError: the dtype does not fit the other options.
    """
    dtype, line = tensors.compute_dtype(values, arguments.dtype, plan.devices[0].platform)
    if line:
        say(line)
    with plan_errors():
        return plan.with_dtype(dtype)


def skipped_steps(
    arguments: argparse.Namespace, plan: "DenoisingPlan", model_id: str, read: "Callable[[str], np.ndarray]"
) -> list[int]:
    """Return the steps that --cache_schedule or --cache_threshold lets skip the blocks.

    Raises:
        UserError: the schedule names the first step or steps that are not there, or there is no polynomial.
    """
    steps = plan.steps
    if arguments.cache_schedule is not None:
        found = numbers.named(arguments.cache_schedule, steps, "--cache_schedule")
        if full := plan.always_full.intersection(found):
            and_guided = ", and the first one with guidance," if plan.guidance_interval else ""
            raise UserError(
                f"--cache_schedule {arguments.cache_schedule} names step {min(full)}: the first and the last step"
                f"{and_guided} are always full"
            )
        return found
    if arguments.cache_threshold is None:
        return []
    from cogvideox.models.transformer import step_cache
    from cogvideox.models.transformer.scheduler import AffineScheduler, make_scheduler
    from cogvideox.models.transformer.step import time_embeddings

    try:
        polynomial = polynomial_of(model_id)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{STEP_CACHE} of {model_id} cannot be read: {first_line(error)}; make it again") from error
    if polynomial is None:
        raise UserError(
            f"--cache_threshold needs a polynomial, and {model_id} has none: fit one with "
            "python -m tools.fit_step_cache, or name the steps with --cache_schedule"
        )
    scheduler = AffineScheduler(make_scheduler(plan.scheduler), plan.num_inference_steps, plan.dropped_steps)
    embeddings = time_embeddings(plan, scheduler.timesteps, read)
    skipped = step_cache.skipped_steps(embeddings, polynomial, arguments.cache_threshold)
    return sorted(set(skipped) - plan.always_full)


def decoding_plan(
    arguments: argparse.Namespace, model_id: str, decoder: str, size: dict[str, int], devices: Sequence, dtype: Any
) -> "DecodingPlan":
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
    from cogvideox.models.vae.plan import make_decoding_plan

    with plan_errors():
        return make_decoding_plan(
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
    """Turn errors that say why a plan cannot be carried out into a UserError that names the options."""
    from cogvideox.models.shared.tap import NoSuchNameError

    try:
        yield
    except PlanError as error:
        message = f"--{error}" if error.field else str(error)
        if error.other:
            message = message.replace(error.other, f"--{error.other}")
        remedy = REMEDIES.get(error.field or "")
        raise UserError(f"{message}; {remedy}" if remedy else message) from error
    except NoSuchNameError as error:
        raise UserError(f"--dump_names: {str(error).splitlines()[0]}") from error
