"""Define the command-line options that several programs share.

Importing this module loads neither jax nor torch.
"""

import argparse

from cogvideox.cli.parser import ArgumentParser
from cogvideox.cli.types import file_path, folder_path, interval, lora_option, map_or_shares, map_path, number, preset
from cogvideox.defaults import (
    ATTENTIONS,
    COMPUTE_DTYPES,
    DENSE_STEPS,
    FRAMES,
    GUIDANCE_SCALE,
    HEIGHT,
    LAYOUT,
    MOST_FRAMES,
    MOST_GUIDANCE,
    MOST_PIXELS,
    NUM_STEPS,
    PRESETS,
    SOME_QUERIES,
    USE_DP,
    WIDTH,
)
from cogvideox.models.shared.layouts import LAYOUTS
from cogvideox.models.transformer.scheduler import CHOICES


def add_log_options(parser: ArgumentParser) -> None:
    """Add the options of `Report`, which are the same for all stages: how much is printed, and the log."""
    group = parser.group("printed output")
    amount = group.add_mutually_exclusive_group()
    amount.add_argument(
        "--verbose", action="store_true", help="also print versions, devices, plan, memory, and seconds of each step"
    )
    amount.add_argument("--quiet", action="store_true", help="print nothing but warnings and errors, on stderr")
    group.add_argument("--debug", action="store_true", help="print the traceback of an error before its one line")
    group.add_argument(
        "--log_json", type=file_path, help="append what happens to this file while it happens, one JSON object a line"
    )


def add_only_option(parser: ArgumentParser, whose: str) -> None:
    """Add --only; the prompts are `whose`, such as "of the folder"."""
    parser.group("input and output").add_argument(
        "--only",
        metavar="NUMBERS",
        help=f"take only these prompts {whose}, such as 1-8,11; other processes may have the others (default: all)",
    )


def add_force_option(parser: ArgumentParser) -> None:
    """Add --force; see `Report.refuse`."""
    parser.group("input and output").add_argument(
        "--force", action="store_true", help="go on with files that do not belong together"
    )


def add_weight_options(parser: ArgumentParser) -> None:
    """Add which weights of the model are read, and in which dtype it computes."""
    parser.group("input and output").add_argument(
        "--variant",
        metavar="NAME",
        help="read this variant of the weights, such as fp16 (default: the standard one, or the only one)",
    )
    parser.group("speed and memory").add_argument(
        "--dtype", choices=COMPUTE_DTYPES, help="dtype of weights and products (default: that of most of the weights)"
    )


def models_or(default: object) -> str:
    """Return what the help says of an option that `generation_defaults.complete` sets where nobody gives it."""
    return f"(default: the model's, or {default})"


def add_side_options(parser: ArgumentParser, what: str = "the video") -> None:
    """Add height and width; `what` has them."""
    group, pixels = parser.group("video"), number(int, 1, MOST_PIXELS)
    group.add_argument("--height", type=pixels, help=f"height of {what} in pixels {models_or(HEIGHT)}")
    group.add_argument("--width", type=pixels, help=f"width of {what} in pixels {models_or(WIDTH)}")


def add_size_options(parser: ArgumentParser, what: str = "the video") -> None:
    """Add height and width, and frames of the video; `what` has them."""
    add_side_options(parser, what)
    parser.group("video").add_argument(
        "--frames",
        type=number(int, 1, MOST_FRAMES),
        help=f"frames of the video, of the form 4n + 1 {models_or(FRAMES)}",
    )


def add_sampling_options(parser: ArgumentParser) -> None:
    """Add size, steps, guidance and scheduler; what nobody gives is None, see `generation_defaults.complete`."""
    group = parser.group("sampling")
    group.add_argument("--num_inference_steps", type=number(int, 1), help=f"denoising steps {models_or(NUM_STEPS)}")
    add_size_options(parser)
    group.add_argument(
        "--guidance_scale",
        type=number(float, 0, MOST_GUIDANCE),
        help="scale of classifier-free guidance; 1 or less switches it off, and a step costs half "
        f"{models_or(GUIDANCE_SCALE)}",
    )
    group.add_argument(
        "--guidance_interval",
        type=interval,
        metavar="FIRST,LAST",
        help="guide only the steps FIRST to LAST, counted from 0; the others cost half (default: guide all)",
    )
    group.add_argument(
        "--use_dynamic_cfg",
        action=argparse.BooleanOptionalAction,
        help=f"let the guidance scale change from step to step, as in CogVideoXPipeline {models_or('off')}",
    )
    group.add_argument(
        "--scheduler",
        choices=CHOICES,
        help="ddim, or dpm with trailing timesteps (default: the scheduler that the model names)",
    )


def add_denoising_options(parser: ArgumentParser, made_up_maps: bool = False) -> None:
    """Add the options that a denoising step depends on: size, steps, guidance, attention, sharding.

    Size and settings are None where nobody gives them; see `generation_defaults.complete`. With `made_up_maps`
    --sparse_attention takes those of `sparse_map.made_up`, too.
    """
    add_sampling_options(parser)
    add_parallelism_options(parser)
    add_step_cache_options(parser)
    # Last, because the names of reports list the options in this order.
    add_attention_options(parser)
    add_sparse_attention_options(parser, made_up_maps)


def add_preset_option(parser: ArgumentParser) -> None:
    """Add --preset; see `generation_defaults.by_default`."""
    parser.group("sampling").add_argument(
        "--preset",
        type=preset,
        choices=PRESETS,
        help="set steps, guidance, scheduler and fps at once: to a draft's, or to those of the model's authors "
        "(default: those that the model says, and for the others a draft's)",
    )


def add_lora_option(parser: ArgumentParser) -> None:
    """Add --lora."""
    parser.group("input and output").add_argument(
        "--lora",
        type=lora_option,
        action="append",
        default=[],
        metavar="PATH[:SCALE]",
        help="add a LoRA to the weights, a safetensors file, its folder or a Hugging Face id, times a scale; can be "
        "given several times (default: none)",
    )


def add_parallelism_options(parser: ArgumentParser) -> None:
    """Add how the chips share a denoising step."""
    group, positive = parser.group("devices"), number(int, 1)
    group.add_argument(
        "--use_dp",
        action=argparse.BooleanOptionalAction,
        default=USE_DP,
        help="use data parallelism (dp): split videos, and the two prompts of guidance, over the chips",
    )
    group.add_argument(
        "--videos_at_once",
        type=positive,
        help="of several videos, how many are made at a time (default: what makes the most an hour, by prediction)",
    )
    group.add_argument(
        "--sp_num",
        type=positive,
        help="chips that split the sequence (sp); the others split attention heads (default: all that dp leaves)",
    )
    group.add_argument(
        "--layout",
        choices=LAYOUTS,
        default=LAYOUT,
        help="layout of the weights: tp splits them over tp alone, fsdp keeps even shares of them on all chips",
    )
    group.add_argument(
        "--use_fsdp", dest="layout", action="store_const", const="fsdp", help="the same as --layout fsdp"
    )
    for name in ("--use_tp", "--no-use_fsdp"):
        group.add_argument(name, dest="layout", action="store_const", const="tp", help="the same as --layout tp")
    group.add_argument(
        "--mesh_order",
        metavar="AXES",
        help="order of the mesh axes; chips along the last one are neighbours (default: dp,sp,tp)",
    )


def add_step_cache_options(parser: ArgumentParser) -> None:
    """Add which steps skip the blocks."""
    cache = parser.group("speed and memory").add_mutually_exclusive_group()
    cache.add_argument(
        "--cache_threshold",
        type=number(float, 0),
        help="skip the blocks in steps whose time embedding hardly changes, the more the larger X (default: in none)",
    )
    cache.add_argument(
        "--cache_schedule", metavar="NUMBERS", help="skip the blocks in these steps, such as 2,4-6 (default: in none)"
    )


def add_attention_options(parser: ArgumentParser) -> None:
    """Add the choice of the attention implementation and its own options."""
    group = parser.group("speed and memory")
    group.add_argument(
        "--attention",
        choices=ATTENTIONS,
        help="implementation of attention (default: splash_exp2 on a TPU, else xla)",
    )
    group.add_argument(
        "--block_sizes",
        type=int,
        nargs="+",
        help="block sizes of the attention kernel, in the order of its BlockSizes (default: the kernel's choice)",
    )
    group.add_argument(
        "--use_k_smooth",
        action=argparse.BooleanOptionalAction,
        help="subtract the mean of the keys in attention (default: the kernel's choice)",
    )


def add_sparse_attention_options(parser: ArgumentParser, made_up_maps: bool) -> None:
    """Add the map of block-sparse attention, and in which steps it is not used."""
    group = parser.group("speed and memory")
    made_up = ", or shares of every layer's heads, such as 0.5*frames:1" if made_up_maps else ""
    group.add_argument(
        "--sparse_attention",
        type=map_or_shares if made_up_maps else map_path,
        metavar="PATH|auto",
        help="let each head attend only the keys that this map names, a file or its folder, or auto for the model's "
        f"own{made_up}; it changes the video (default: all keys)",
    )
    group.add_argument(
        "--dense_steps",
        type=number(float, 0, 1),
        metavar="SHARE",
        help=f"with --sparse_attention, the share of the steps, from the first on, that are dense "
        f"(default: {DENSE_STEPS})",
    )


def add_decoding_options(parser: ArgumentParser) -> None:
    """Add the options of the split in space, which a decoder's programs depend on beside the size."""
    group = parser.group("devices")
    group.add_argument(
        "--chip_rows",
        type=number(int, 1),
        help="rows of chips that a frame is split over (default: the split with the least work for each chip)",
    )
    group.add_argument(
        "--strips", type=number(int, 1, 1000), help="bands of rows on each chip (default: 8 on a TPU, else 1)"
    )


def add_dump_options(parser: ArgumentParser, unit: str) -> None:
    """Add what a stage writes of the tensors inside it; `unit` is what it does many of, "step" or "chunk"."""
    group = parser.group("looking inside")
    group.add_argument("--dump", type=folder_path, help="write tensors inside the model to this folder")
    group.add_argument(
        "--dump_names",
        nargs="+",
        metavar="PATTERN",
        help="patterns over diffusers' names of modules, such as 'transformer_blocks.7.attn1.*' (default: all)",
    )
    group.add_argument(
        "--dump_steps", metavar="NUMBERS", help=f"{unit}s whose tensors are written, such as 0,3-5,-1 (default: all)"
    )
    if unit == "step":
        group.add_argument(
            "--dump_queries",
            metavar="NUMBERS",
            help="tokens whose attention weights are written if --dump_names has '*.attn1.weights'; those of the text "
            f"are first (default: {SOME_QUERIES}, evenly spread)",
        )
        group.add_argument(
            "--dump_heads", metavar="NUMBERS", help="heads whose attention weights are written (default: all)"
        )
    group.add_argument(
        "--dump_stats",
        action="store_true",
        help=f"write the statistics of every named tensor in every {unit}; whole tensors only with --dump_names",
    )
    group.add_argument(
        "--dump_shards", action="store_true", help="say which chips differ where they should be equal, and --dump_stats"
    )


def add_host_options(parser: ArgumentParser) -> None:
    """Add the options that say which processes make up the run; see `join`."""
    group = parser.group("devices")
    slice_finds = "(default: found on a TPU slice, else a single process)"
    group.add_argument(
        "--num_processes", type=number(int, 1), help=f"processes that run this stage together {slice_finds}"
    )
    group.add_argument(
        "--process_id", type=number(int, 0), help=f"which of them this one is; process 0 writes the files {slice_finds}"
    )
    group.add_argument(
        "--coordinator_address", metavar="HOST:PORT", help=f"where process 0 listens for the others {slice_finds}"
    )


def add_compilation_options(parser: ArgumentParser, what: str) -> None:
    """Add where the compiled programs come from and go to; `what` is their name for the help."""
    group = parser.group("speed and memory")
    group.add_argument(
        "--executable",
        type=file_path,
        help=f"load {what} from this file, if it fits this run; trust the file like a program, for it is code",
    )
    group.add_argument(
        "--compilation_cache",
        type=folder_path,
        help="folder where compiled programs are kept for the next start, or none to keep nothing "
        "(default: JAX_COMPILATION_CACHE_DIR, or cogvideox-tpu in the user's cache folder)",
    )


def add_profile_option(parser: ArgumentParser, what: str) -> None:
    """Add --profile; `what` is traced, such as "step"."""
    parser.group("looking inside").add_argument(
        "--profile",
        type=folder_path,
        help=f"write a trace of two {what}s to this folder, for XProf and TensorBoard, and print what takes the time",
    )
