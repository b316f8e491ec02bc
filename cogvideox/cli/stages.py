"""Define the options of each stage.

Importing this module loads neither jax nor torch. Each stage gives its parser the options of all stages, so that an
error can say to which of them an option belongs.
"""

import argparse
from collections.abc import Callable

from cogvideox.cli.options import (
    add_compilation_options,
    add_decoding_options,
    add_denoising_options,
    add_dump_options,
    add_force_option,
    add_host_options,
    add_log_options,
    add_lora_option,
    add_only_option,
    add_preset_option,
    add_profile_option,
    add_size_options,
    add_weight_options,
    models_or,
)
from cogvideox.cli.parser import ArgumentParser
from cogvideox.cli.types import file_path, folder_path, frame_rate, model_id, number, utf8, video_path
from cogvideox.defaults import FPS, IMAGE_LATENT_SCALES, MODEL_NAME, MOST_SEED, SEED, STRENGTH, WARMUP_STEPS
from cogvideox.files.names import PREVIEW, STAGE_OUTPUTS, VIDEO


def add_stage1_options(parser: ArgumentParser) -> None:
    """Add the options of stage 1."""
    files = parser.group("input and output")
    prompt = files.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", type=utf8, help="what the video shows")
    prompt.add_argument(
        "--prompt_file",
        type=file_path,
        help="a file of many prompts: a text on each line, or JSON lines with prompt, image and seed",
    )
    files.add_argument(
        "--image", type=file_path, help="the picture that the video begins with, for a model for image to video"
    )
    files.add_argument("--video", type=file_path, help="a video to change, for a model for text to video")
    files.add_argument(
        "--negative_prompt", type=utf8, default="", help="what the video must not show; used with guidance"
    )
    files.add_argument("--model_id", type=model_id, default=MODEL_NAME, help="Hugging Face model id, or a folder")
    files.add_argument("--output_dir", type=folder_path, default=STAGE_OUTPUTS, help="where the files go")
    add_only_option(parser, "of --prompt_file")
    add_size_options(parser, "the video that --image or --video is encoded for")
    parser.group("video").add_argument(
        "--strength",
        type=number(float, 0.001, 1),
        help="how much of --video is made anew: the share of stage 2's steps that is run, from the end "
        f"(default: {STRENGTH})",
    )
    add_weight_options(parser)
    add_log_options(parser)


def add_stage2_options(parser: ArgumentParser) -> None:
    """Add the options of stage 2."""
    files = parser.group("input and output")
    files.add_argument("--input_dir", type=folder_path, default=STAGE_OUTPUTS, help="stage 1's output folder")
    files.add_argument("--output_dir", type=folder_path, help="where the files go (default: --input_dir)")
    _add_model_option(files)
    add_only_option(parser, "of --input_dir")
    add_lora_option(parser)
    add_preset_option(parser)
    add_denoising_options(parser)
    _add_video_options(parser)
    _add_run_options(parser)
    add_dump_options(parser, "step")
    add_profile_option(parser, "step")
    add_weight_options(parser)
    add_force_option(parser)
    add_host_options(parser)
    add_log_options(parser)


def add_stage3_options(parser: ArgumentParser) -> None:
    """Add the options of stage 3."""
    files = parser.group("input and output")
    files.add_argument("--input_dir", type=folder_path, default=STAGE_OUTPUTS, help="stage 2's output folder")
    files.add_argument(
        "--output_dir", type=folder_path, help="where the video and timings.json go (default: --input_dir)"
    )
    files.add_argument("--output_video", type=video_path, help=f"the video (default: {VIDEO} in --output_dir)")
    files.add_argument("--output_frames", type=file_path, help="also save the frames, uint8, as safetensors")
    files.add_argument("--allow_nan", action="store_true", help="decode latents that hold NaN or infinity")
    _add_model_option(files)
    add_only_option(parser, "of --input_dir")
    parser.group("video").add_argument(
        "--fps", type=frame_rate, help="frames per second (default: what stage 2 was told)"
    )
    parser.group("speed and memory").add_argument(
        "--warmup",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="first run each program once, untimed",
    )
    add_compilation_options(parser, "the compiled programs")
    add_decoding_options(parser)
    add_dump_options(parser, "chunk")
    add_profile_option(parser, "chunk")
    add_weight_options(parser)
    add_force_option(parser)
    add_host_options(parser)
    add_log_options(parser)


# The stages by their programs. That with the Flax decoder has the options of the other one of stage 3.
STAGES: dict[str, Callable[[ArgumentParser], None]] = {
    "stage1_text_encoder.py": add_stage1_options,
    "stage2_transformer.py": add_stage2_options,
    "stage3_vae_decoder.py": add_stage3_options,
}


def _add_model_option(files: argparse._ArgumentGroup) -> None:
    files.add_argument(
        "--model_id", type=model_id, help="the model; it must be the one that stage 1 used, which is the default"
    )


def _add_video_options(parser: ArgumentParser) -> None:
    """Add what decides the videos beside the options of a denoising step."""
    group = parser.group("video")
    group.add_argument("--fps", type=frame_rate, help=f"frames per second, for stage 3 {models_or(FPS)}")
    group.add_argument(
        "--seed",
        type=number(int, 0, MOST_SEED),
        default=SEED,
        help="seed of the noise, unless the prompt's line in a prompt file says one",
    )
    group.add_argument(
        "--image_latent_scale",
        choices=IMAGE_LATENT_SCALES,
        default=IMAGE_LATENT_SCALES[0],
        help="how the latents of the image are scaled: as diffusers does by the VAE's config, or not at all, as the "
        "authors' own code (sat); for models that take an image",
    )
    group.add_argument(
        "--num_videos_per_prompt",
        type=number(int, 1, 10_000),
        default=1,
        help="videos of each prompt, from the seeds --seed to --seed + N - 1, each in a folder of its own",
    )


def _add_run_options(parser: ArgumentParser) -> None:
    """Add how the steps are run, which changes no video."""
    group = parser.group("speed and memory")
    group.add_argument(
        "--warmup_steps",
        type=number(int, 0, 1000),
        default=WARMUP_STEPS,
        help="steps that run before the first one, untimed",
    )
    add_compilation_options(parser, "the compiled step")
    group.add_argument(
        "--checkpoint_every",
        type=number(int, 0),
        help="keep the state after every N steps, 0 for never (default: as often as 2%% of the time allow)",
    )
    group.add_argument(
        "--restart", action="store_true", help="start over, without the steps that an unfinished run has done"
    )
    parser.group("looking inside").add_argument(
        "--preview_every",
        type=number(int, 1),
        help=f"after every N steps draw the latents that they predict as {PREVIEW} in the output folder",
    )
