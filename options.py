"""The command-line options that decide a compiled program, and the plans that they make.

The stages and the compile tool share them. Importing this module loads neither jax nor torch.
"""

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import checkpoint
import utils
from console import UserError, number

if TYPE_CHECKING:
    from models import decoding, denoising


def add_size_options(parser: argparse.ArgumentParser) -> None:
    """Add the video's height, width and frames."""
    positive = number(int, 1)
    parser.add_argument("--height", type=positive, default=utils.HEIGHT, help="of the video, in pixels")
    parser.add_argument("--width", type=positive, default=utils.WIDTH, help="of the video, in pixels")
    parser.add_argument("--frames", type=positive, default=utils.FRAMES, help="of the video, 4n + 1")


def add_denoising_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that a denoising step depends on: size, steps, guidance, attention, sharding."""
    positive, yes_no = number(int, 1), argparse.BooleanOptionalAction
    parser.add_argument("--num_inference_steps", type=positive, default=utils.NUM_STEPS, help="denoising steps")
    add_size_options(parser)
    parser.add_argument(
        "--guidance_scale",
        type=number(float, 0),
        default=utils.GUIDANCE_SCALE,
        help="classifier-free guidance; up to 1 there is none, and a step costs half",
    )
    add_attention_options(parser)
    parser.add_argument(
        "--use_dp", action=yes_no, default=utils.USE_DP, help="split the two prompts of guidance over the chips"
    )
    parser.add_argument(
        "--sp_num",
        type=positive,
        help="chips that split the sequence; the others split heads (default: all that dp leaves)",
    )
    parser.add_argument(
        "--layout",
        default=utils.LAYOUT,
        help="of the weights: tp splits them by tp alone, fsdp keeps them in even shares on all chips",
    )
    parser.add_argument(
        "--use_fsdp", dest="layout", action="store_const", const="fsdp", help="the same as --layout fsdp"
    )
    for name in ("--use_tp", "--no-use_fsdp"):
        parser.add_argument(name, dest="layout", action="store_const", const="tp", help="the same as --layout tp")
    parser.add_argument("--mesh_order", help="axes of the mesh, neighbouring chips last (default: dp,sp,tp)")


def add_attention_options(parser: argparse.ArgumentParser) -> None:
    """Add the choice of the attention implementation and its own options."""
    parser.add_argument(
        "--attention",
        help="implementation, by its name in models/attention.py (default: splash_exp2 on a TPU, else xla)",
    )
    parser.add_argument(
        "--block_sizes", type=int, nargs="+", help="of the kernel, in the order of its BlockSizes (default: its choice)"
    )
    parser.add_argument(
        "--use_k_smooth",
        action=argparse.BooleanOptionalAction,
        help="take the mean of the keys out in attention (default: the kernel's)",
    )


def add_decoding_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that a decoder's programs depend on beside the size: the split in space."""
    positive = number(int, 1)
    parser.add_argument(
        "--chip_rows",
        type=positive,
        help="rows of chips that split a frame (default: what leaves a chip the least to do)",
    )
    parser.add_argument("--strips", type=positive, help="bands of rows on a chip (default: 8 on a TPU, else 1)")


def denoising_plan(
    arguments: argparse.Namespace, model_id: str, devices: Sequence, platform: str, **details: Any
) -> "denoising.Plan":
    """The plan that the options of `add_denoising_options` ask for, with the configs of a model.

    Args:
        details: what `make_plan` takes beside the options, batch and dtype.

    Raises:
        UserError: the model, the devices and the options do not fit together.
    """
    from models import denoising

    given = {"mesh_order": arguments.mesh_order.split(",")} if arguments.mesh_order else {}
    names = (
        *("height", "width", "frames", "num_inference_steps", "guidance_scale"),
        *("attention", "block_sizes", "use_k_smooth", "use_dp", "sp_num", "layout"),
    )
    with plan_errors():
        return denoising.make_plan(
            transformer=checkpoint.read_config(model_id, "transformer"),
            vae=checkpoint.read_config(model_id, "vae"),
            scheduler=checkpoint.read_config(model_id, "scheduler", "scheduler_config.json"),
            devices=devices,
            platform=platform,
            **details,
            **{name: getattr(arguments, name) for name in names},
            **given,
        )


def decoding_plan(
    arguments: argparse.Namespace, model_id: str, decoder: str, size: dict[str, int], devices: Sequence, dtype: Any
) -> "decoding.Plan":
    """The plan that the options of `add_decoding_options` ask for, for a video of `size`, with the VAE of a model.

    Args:
        size: height, width and frames.

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
    """Turn a plan that cannot be carried out into an error of one line that names the option."""
    from models.plan_error import PlanError

    try:
        yield
    except PlanError as error:
        raise UserError(f"--{error}" if error.option else str(error)) from error
