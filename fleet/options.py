"""Read the command line: the options of the fleet itself, and those of the stages, each for the stages that have it."""

import argparse
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from cogvideox.cli.parser import ArgumentParser
from cogvideox.cli.stages import STAGES, add_stage1_options, add_stage2_options, add_stage3_options
from cogvideox.cli.types import file_path, folder_path, model_id, number
from cogvideox.defaults import MODEL_NAME
from cogvideox.files.names import STAGE_OUTPUTS
from cogvideox.run.compilation import NO_CACHE, address_of

GROUP = 8  # prompts that a process takes at a time
DECODERS = {"torchax": "stage3_vae_decoder", "flax": "stage3_vae_decoder_flax"}  # by name, the module of stage 3

# The options of a stage that many prompts on many machines cannot have, and what to do instead.
_BY_HAND = "it is for one video: run the stage by hand, with the folder of a prompt as --input_dir"
_BY_FILE = "prompts, and pictures that differ, are lines of --prompt_file"
_BY_RAY = "Ray knows which machines there are"
REFUSED = {
    **dict.fromkeys(("prompt", "video", "strength"), _BY_FILE),
    **dict.fromkeys(("dump", "dump_names", "dump_steps", "dump_queries", "dump_heads", "dump_stats"), _BY_HAND),
    **dict.fromkeys(("dump_shards", "profile", "log_json", "verbose", "output_video"), _BY_HAND),
    **dict.fromkeys(("process_id", "num_processes", "coordinator_address"), _BY_RAY),
    "input_dir": "--output_dir is the folder of all stages",
    "only": "make a file of some of the prompts, and give another --output_dir",
    "executable": "it has the programs of one stage; the compilation cache keeps those of all",
    "restart": "remove the folders of the videos that are to be made again",
}
# What stage 1 takes for images and videos alone, and stage 2 for all.
SIZE_OF_IMAGES = ("height", "width")


@dataclasses.dataclass(frozen=True)
class Command:
    """What is to be made, and how.

    Attributes:
        options: of the fleet itself, parsed.
        stages: the parsed options of each stage, by its key, "stage1" to "stage3".
        words: the same as words of a command line, without --only.
    """

    options: argparse.Namespace
    stages: Mapping[str, argparse.Namespace]
    words: Mapping[str, Sequence[str]]

    @property
    def modules(self) -> dict[str, str]:
        """The modules of the stages by their keys."""
        decoder = DECODERS[self.options.decoder]
        return {"stage1": "stage1_text_encoder", "stage2": "stage2_transformer", "stage3": decoder}


def parse(argv: Sequence[str] | None, has_images: bool = True) -> Command:
    """Read a command line; one that is wrong ends the process with a line, as in the stages.

    Args:
        argv: the words; None for those of the command line.
        has_images: whether a prompt has an image, with which stage 1 needs the size.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    for name, instead in REFUSED.items():
        if getattr(options, name) != parser.get_default(name):
            parser.error(f"--{name} is not for a fleet: {instead}")
    output_dir = str(options.output_dir.absolute())
    of_all = ["--quiet"] + (["--debug"] if options.debug else [])
    own = {
        "stage1": ["--prompt_file", str(options.prompt_file.absolute()), "--output_dir", output_dir, *of_all],
        "stage2": ["--input_dir", output_dir, "--warmup_steps", "0", *of_all],
        "stage3": ["--input_dir", output_dir, "--no-warmup", *of_all],
    }
    stages, words = {}, {}
    for (stage, first), add_options in zip(own.items(), STAGES.values(), strict=True):
        of_stage = ArgumentParser(prog=parser.prog)
        add_options(of_stage)
        left_out = {"frames", *(() if has_images else SIZE_OF_IMAGES)} if stage == "stage1" else set()
        words[stage] = [*first, *_words(of_stage, options, parser, left_out)]
        stages[stage] = of_stage.parse_args(words[stage])
    return Command(options, stages, words)


def _parser() -> ArgumentParser:
    """Return the parser of the fleet, which knows the options of all stages."""
    parser = ArgumentParser(
        "Make the videos of a prompt file on all machines of a Ray cluster, or on this one.",
        prog="fleet",
        usage="python -m fleet --prompt_file FILE [options]",
        conflict_handler="resolve",  # what several stages have is one option here
    )
    for add_options in (add_stage1_options, add_stage3_options, add_stage2_options):
        add_options(parser)
    files, devices = parser.group("input and output"), parser.group("devices")
    files.add_argument(
        "--prompt_file",
        type=file_path,
        required=True,
        help="the prompts: a text on each line, or JSON lines with prompt, image and seed",
    )
    files.add_argument(
        "--output_dir",
        type=folder_path,
        default=STAGE_OUTPUTS,
        help="where the videos go, each into a folder of its own; all machines must see it by this path",
    )
    files.add_argument("--model_id", type=model_id, default=MODEL_NAME, help="Hugging Face model id, or a folder")
    devices.add_argument(
        "--address", help="the Ray cluster to join, such as auto or HOST:6379 (default: a Ray of this machine alone)"
    )
    devices.add_argument(
        "--chips", type=number(int, 1), help="chips that make a video together (default: all of a host, or of a slice)"
    )
    devices.add_argument("--group", type=number(int, 1), default=GROUP, help="prompts that a process takes at a time")
    parser.group("speed and memory").add_argument(
        "--decoder", choices=DECODERS, default="torchax", help="the decoder of stage 3"
    )
    for action in parser._actions:
        if action.dest in REFUSED:
            action.help, action.required = argparse.SUPPRESS, False
    for group in parser._mutually_exclusive_groups:
        group.required = False
    return parser


def _words(
    of_stage: ArgumentParser, given: argparse.Namespace, parser: ArgumentParser, left_out: Collection[str]
) -> list[str]:
    """Return what is given of a stage's options as words, with absolute paths: a process may run anywhere."""
    own = {"prompt_file", "output_dir", "quiet", "debug", *REFUSED, *left_out}
    found: list[str] = []
    for name in dict.fromkeys(action.dest for action in of_stage._actions):
        value = getattr(given, name, None)
        if name in own or value == parser.get_default(name) or value is None:
            continue
        if isinstance(value, bool):
            found.append(f"--{'' if value else 'no-'}{name}")
        elif name == "lora":
            found += [f"--lora={one}" for one in value]
        elif isinstance(value, list):
            found += [f"--{name}", *map(str, value)]
        elif isinstance(value, tuple):
            found.append(f"--{name}={','.join(map(str, value))}")
        else:
            is_path = isinstance(value, Path) or (name == "model_id" and Path(value).is_dir())
            text = address_of(value) if isinstance(value, Path) else str(value)
            is_path &= value != NO_CACHE and "://" not in text  # of --compilation_cache
            found.append(f"--{name}={Path(value).absolute() if is_path else text}")
    return found
