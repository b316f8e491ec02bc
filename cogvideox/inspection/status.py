"""Say what the files of a run were made from, which are stale, and what to run next."""

import contextlib
import os
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError

from cogvideox.cli import next_command
from cogvideox.errors import UserError, first_line
from cogvideox.files import schemas, stage_files, state, videos
from cogvideox.files.names import CONFIG, EMBEDDINGS, GIVEN_TENSORS, LATENTS, STATE, VIDEO, VIDEO_SUFFIXES
from cogvideox.files.provenance import WEIGHTS, how, knows_weights, recorded, stale_inputs

STAGE1, STAGE2, STAGE3 = next_command.STAGE1, next_command.STAGE2, next_command.STAGE3["torchax"]
# The files of a run, each made from the one before, and the stages that make them.
CHAIN = ((STAGE1, EMBEDDINGS), (STAGE2, LATENTS), (STAGE3, VIDEO))


def status(folder: Path) -> Iterator[str]:
    """Yield lines on the files of a run: what there is, what it was made from, what is stale, what to run next."""
    todo: dict[str, Path] = {}  # by script, the first prompt that needs it
    for source in videos.prompts(folder):
        for script in (yield from status_of_prompt(source)):
            todo.setdefault(script, source)
    first = next((script for script, _ in CHAIN if script in todo), None)
    yield "All is there and fits together." if first is None else next_line(folder, first, todo[first])


# --- What is there -----------------------------------------------------------------------------------------------


def status_of_prompt(source: Path) -> Generator[str, None, set[str]]:
    """Yield lines on the files of a prompt, whose videos may have folders of their own; return the scripts to run."""
    origin = origin_of(source)
    path = origin / CONFIG
    try:
        config: Mapping = stage_files.read_config(origin, schemas.TextConfig)
        yield f"{path}: prompt {config['prompt']!r}, model {config['model_id']}"
    except UserError as error:
        config = {}
        yield str(error)
    embeddings, *others = CHAIN
    needed = yield from status_of_files(origin, [embeddings], config, None if config else embeddings[0])
    scripts, elsewhere = [needed], encoded_elsewhere(source)
    for video in videos_of(source):
        of_video = read_text(video) or config
        scripts.append((yield from status_of_files(video, others, of_video, needed, elsewhere.get(video))))
    return set(filter(None, scripts))


def encoded_elsewhere(source: Path) -> dict[Path, Path]:
    """Return the encoded videos that the index of a prompt's videos names in other folders than their own."""
    index = videos.index_file(source)
    found = ((entry["folder"], entry["file"]) for entry in videos.read_index(index).values() if entry["file"])
    place = {os.path.abspath(video): video for video in videos.videos(source)}
    paths = {os.path.normpath(index.parent / folder): os.path.normpath(index.parent / file) for folder, file in found}
    return {place[folder]: Path(next_command.here(file)) for folder, file in paths.items() if folder in place}


def origin_of(source: Path) -> Path:
    """Return the folder of the embeddings of a prompt: another one if stage 2 has written into an --output_dir."""
    options = next_command.options_of_run(source)
    if not (source / EMBEDDINGS).exists() and "input_dir" in options and "output_dir" in options:
        inside = os.path.relpath(source.absolute(), str(options["output_dir"]))
        origin = Path(next_command.here(Path(str(options["input_dir"]), inside)))
        if (origin / EMBEDDINGS).exists():
            return origin
    return source


def videos_of(source: Path) -> list[Path]:
    """Return the folders of a prompt's videos, those among them that stage 2 did not come to."""
    there = videos.videos(source)
    if there == [source]:
        return there
    options = next_command.options_of_run(source)
    seed, number = options.get("seed"), options.get("num_videos_per_prompt", 1)
    if not (isinstance(seed, int) and isinstance(number, int) and number > 1):
        return there
    seeds = videos.seeds(read_text(source), seed, number)
    return list(dict.fromkeys([*there, *(videos.of_seed(source, one) for one in seeds)]))


def read_text(folder: Path) -> dict:
    """Return what stage 1 has written into a folder's generation_config.json; nothing if it cannot be read."""
    with contextlib.suppress(UserError):
        return stage_files.read_config(folder, schemas.TextConfig)
    return {}


def status_of_files(
    folder: Path,
    chain: Iterable[tuple[str, str]],
    config: Mapping,
    todo: str | None,
    elsewhere: Path | None = None,
) -> Generator[str, None, str | None]:
    """Yield a line on each file of a part of CHAIN; return the first script to run, `todo` if it is given.

    The encoded video may be `elsewhere`.
    """
    for script, name in chain:
        path = elsewhere if name == VIDEO and elsewhere and not (folder / VIDEO).exists() else folder / name
        fault = fault_of(path, config)
        if fault is None and todo:
            fault = "is to be made again, after what comes before it"
        if fault is None:
            made = recorded(path)
            weights = "" if knows_weights(made) else "; with which weights is not known"
            way = f"; {told}" if (told := how(made)) else ""
            yield f"{path}: made {made.get('time', 'at an unknown time')}{way}{weights}"
        else:
            yield f"{path}: {fault}"
            todo = todo or script
        if name == LATENTS and (folder / STATE).exists():
            yield f"{folder / STATE}: an unfinished run of stage 2; {state.progress(folder / STATE)}"
            todo = todo or script
    return todo


# --- What to run next --------------------------------------------------------------------------------------------


def next_line(folder: Path, script: str, prompt: Path) -> str:
    """Return the line that says how the run of a folder goes on: with a stage, which the folder of a prompt needs."""
    several = videos.prompts(folder) != [folder]
    origin = origin_of(prompt)
    input_dir = origin.parent if several else origin
    if script == STAGE1:
        return next_of_stage1(input_dir, origin)
    of_stage1 = next_command.recorded_options(origin / EMBEDDINGS)
    options = next_command.taken_over(of_stage1) | next_command.options_of_run(folder)
    if script == STAGE2:
        model_id = read_text(origin).get("model_id")
        return f"Next: {next_command.stage2(input_dir, folder, model_id, options)}"
    encoded = (next_command.recorded_options(video / VIDEO) for video in videos.videos(folder))
    return f"Next: {next_command.stage3(folder, next(filter(None, encoded), next_command.taken_over(options)))}"


def next_of_stage1(folder: Path, origin: Path) -> str:
    """Return the line with the command of stage 1, for all prompts of a folder or for that of the folder `origin`."""
    embeddings = origin / EMBEDDINGS
    options = next_command.recorded_options(embeddings)
    text = read_text(origin)
    with contextlib.suppress(UserError, OSError, SafetensorError):
        text = text or stage_files.read_made_from(embeddings, stage_files.metadata(embeddings))
    options |= {name: text[name] for name in ("model_id", "negative_prompt") if name in text}
    prompts = Path(str(options.get("prompt_file", "")))
    if folder != origin and prompts.is_file():
        return f"Next: {next_command.stage1(folder, ['--prompt_file', next_command.here(prompts)], options)}"
    if text.keys() & set(GIVEN_TENSORS):
        given = (*GIVEN_TENSORS, "strength", *next_command.SIZE)
        options |= {name: text[name] for name in given if name in text}
    line = next_command.stage1(origin, [f"--prompt={text['prompt']}"] if text else ["--prompt", "PROMPT"], options)
    return f"Next: {line}" if text else f"Next, with what the video shows for PROMPT: {line}"


def fault_of(path: Path, config: Mapping) -> str | None:
    """Return why a file of a run must be made (again), or None."""
    if not path.exists():
        return "is not there"
    try:
        if path.suffix not in VIDEO_SUFFIXES and (difference := stage_files.difference(path, config)):
            return f"is stale: it {difference}"
        for name in stale_inputs(path):
            if WEIGHTS.fullmatch(name):
                return f"is stale: it was made with other weights than the {name} has now"
            return f"is stale: it was made from another {name}"
    except (UserError, OSError, SafetensorError) as error:
        return f"is damaged: {first_line(error)}"
    return None
