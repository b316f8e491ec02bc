"""Say what is there of a run: which prompts have embeddings, and which have all their videos, as a command wants them.

Files are whole, so there they count if they fit the command and what they say they were made from.
"""

import argparse
import contextlib
import enum
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError

from cogvideox.cli import next_command
from cogvideox.errors import UserError
from cogvideox.files import checkpoint, generation_defaults, stage_files, videos
from cogvideox.files.names import CONFIG, EMBEDDINGS, LATENTS, VIDEO
from cogvideox.files.prompts import Prompt
from cogvideox.files.provenance import plain
from cogvideox.files.schemas import TextConfig
from cogvideox.inspection.status import fault_of
from fleet.options import Command

T5_BYTES = 19 * 10**9  # of the published models, in float32
READERS = 8  # threads that read files

# The options that decide the files of each stage, beside those of the prompt.
OF_STAGE2 = {*next_command.OF_STAGE2, *generation_defaults.OURS} - {"restart", "only", "videos_at_once"}
OF_STAGE3 = {*next_command.OF_STAGE3, "decoder"} - {"only"}


class State(enum.IntEnum):
    """How far a prompt is."""

    NOTHING = 0
    ENCODED = 1
    MADE = 2


def states(prompts: Sequence[Prompt], command: Command, model_id: str) -> list[State]:
    """Return how far each prompt is, by its files."""
    stages = {stage: argparse.Namespace(**vars(options)) for stage, options in command.stages.items()}
    if any(prompt.folder.exists() for prompt in prompts):
        made_for = generation_defaults.of_model(model_id)
        generation_defaults.complete(stages["stage2"], made_for)
        generation_defaults.complete(stages["stage1"], made_for, ("height", "width"))
    with ThreadPoolExecutor(READERS) as readers:
        return [*readers.map(lambda prompt: state(prompt, stages, model_id, command.options.decoder), prompts)]


def state(prompt: Prompt, stages: Mapping[str, argparse.Namespace], model_id: str, decoder: str) -> State:
    """Return how far a prompt is, by its files; `stages` are the options of all stages, complete."""
    try:
        config = stage_files.read_config(prompt.folder, TextConfig)
    except UserError:
        return State.NOTHING
    first, second = stages["stage1"], stages["stage2"]
    wanted = {"model_id": model_id, "prompt": prompt.text, "negative_prompt": first.negative_prompt}
    wanted |= prompt.entries(first.height, first.width)
    unwanted = {"prompt_seed", "image"} - wanted.keys()
    if any(config.get(name) != value for name, value in wanted.items()) or unwanted & config.keys():
        return State.NOTHING
    given = {name: vars(first)[name] for name in next_command.OF_WEIGHTS}
    if fault_of(prompt.folder / EMBEDDINGS, config) or not _made_with(prompt.folder / EMBEDDINGS, given):
        return State.NOTHING
    seeds = videos.seeds(config, second.seed, second.num_videos_per_prompt)
    of_seeds = [videos.of_seed(prompt.folder, seed) for seed in seeds] if len(seeds) > 1 else [prompt.folder]
    return State.MADE if all(_is_made(folder, stages, decoder) for folder in of_seeds) else State.ENCODED


def _is_made(folder: Path, stages: Mapping[str, argparse.Namespace], decoder: str) -> bool:
    """Return whether the folder of a video has all files, as the options want them."""
    try:
        config = stage_files.read_config(folder, TextConfig)
    except UserError:
        return False
    of_stage2 = {name: vars(stages["stage2"])[name] for name in OF_STAGE2}
    of_stage3 = {name: (vars(stages["stage3"]) | {"decoder": decoder})[name] for name in OF_STAGE3}
    wanted = {folder / LATENTS: of_stage2, folder / VIDEO: of_stage3}
    return all(not fault_of(file, config) and _made_with(file, options) for file, options in wanted.items())


def _made_with(file: Path, options: Mapping[str, object]) -> bool:
    """Return whether a file says that it was made with these options; one that is None was not given then either."""
    found = next_command.recorded_options(file)
    return all(found.get(name) == (None if value is None else plain(value)) for name, value in options.items())


def entries(prompts: Iterable[Prompt]) -> Iterator[videos.Entry]:
    """Yield what the index has to say of each video that is begun, by its files."""
    for prompt in prompts:
        for folder in videos.videos(prompt.folder) if (prompt.folder / CONFIG).exists() else ():
            there = [(folder / name).exists() for name in (LATENTS, VIDEO)]
            file = folder / VIDEO if all(there) else None
            yield videos.Entry(folder, prompt.text, _seed(folder), file, videos.STATES[there[0] + all(there)])


def _seed(folder: Path) -> int | None:
    """Return the seed of the latents in a folder; None if there are none."""
    with contextlib.suppress(UserError, OSError, SafetensorError):
        return stage_files.read_made_from(folder / LATENTS, stage_files.metadata(folder / LATENTS)).get("seed")
    return None


def encoder_bytes(options: argparse.Namespace) -> int:
    """Return the size of the text encoder's weights: of the files, or that of T5-XXL where they are not here yet."""
    try:
        folder = checkpoint.model_folder(options.model_id, [], download=False) / "text_encoder"
        return sum(file.stat().st_size for file in checkpoint.weight_files(folder, options.variant))
    except (UserError, OSError):
        return T5_BYTES
