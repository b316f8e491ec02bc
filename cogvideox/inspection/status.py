"""Say what the files of a run were made from, which are stale, and what to run next."""

import contextlib
import shlex
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError

from cogvideox.errors import UserError, first_line
from cogvideox.files import schemas, stage_files, videos
from cogvideox.files.names import CONFIG, EMBEDDINGS, LATENTS, STATE, VIDEO, VIDEO_SUFFIXES
from cogvideox.files.provenance import WEIGHTS, knows_weights, recorded, stale_inputs

# The files of a run, each made from the one before, and the stages that make them.
CHAIN = (
    ("stage1_text_encoder.py", EMBEDDINGS),
    ("stage2_transformer.py", LATENTS),
    ("stage3_vae_decoder.py", VIDEO),
)


def status(folder: Path) -> Iterator[str]:
    """Yield lines on the files of a run: what there is, what it was made from, what is stale, what to run next."""
    todo: set[str] = set()
    prompts = videos.prompts(folder)
    for source in prompts:
        todo.update((yield from status_of_prompt(source)))
    script = next((script for script, _ in CHAIN if script in todo), None)
    if script is None:
        yield "All is there and fits together."
        return
    command = ["python", script, "--input_dir", str(folder)]
    if script == CHAIN[0][0]:
        text = read_text(folder).get("prompt", "...")
        prompt = ["--prompt", text] if prompts == [folder] else ["--prompt_file", "..."]
        command = ["python", script, "--output_dir", str(folder), *prompt]
    yield f"Next: {shlex.join(command)}"


def read_text(folder: Path) -> dict:
    """Return what stage 1 has written into a folder's generation_config.json; nothing if it cannot be read."""
    with contextlib.suppress(UserError):
        return stage_files.read_config(folder, schemas.TextConfig)
    return {}


def status_of_prompt(source: Path) -> Generator[str, None, set[str]]:
    """Yield lines on the files of a prompt, whose videos may have folders of their own; return the scripts to run."""
    path = source / CONFIG
    try:
        config: Mapping = stage_files.read_config(source, schemas.TextConfig)
        yield f"{path}: prompt {config['prompt']!r}, model {config['model_id']}"
    except UserError as error:
        config = {}
        yield str(error)
    embeddings, *others = CHAIN
    needed = yield from status_of_files(source, [embeddings], config, None if config else embeddings[0])
    scripts = [needed]
    for video in videos.videos(source):
        of_video = config if video == source else read_text(video)
        scripts.append((yield from status_of_files(video, others, of_video, needed)))
    return set(filter(None, scripts))


def status_of_files(
    folder: Path, chain: Iterable[tuple[str, str]], config: Mapping, todo: str | None
) -> Generator[str, None, str | None]:
    """Yield a line on each file of a part of CHAIN; return the first script to run, `todo` if it is given."""
    for script, name in chain:
        path = folder / name
        fault = fault_of(path, config)
        if fault is None and todo:
            fault = "is to be made again, after what comes before it"
        if fault is None:
            made = recorded(path)
            weights = "" if knows_weights(made) else "; with which weights is not known"
            yield f"{path}: made {made.get('time', 'at an unknown time')}{weights}"
        else:
            yield f"{path}: {fault}"
            todo = todo or script
        if name == LATENTS and (folder / STATE).exists():
            yield f"{folder / STATE}: an unfinished run, from which stage 2 goes on"
    return todo


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
