"""Write the command of the next stage, which runs as it is printed, in this working directory, and fits this run."""

import ast
import contextlib
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from cogvideox.defaults import IMAGE_LATENT_SCALES, LAYOUT, MODEL_NAME, SEED, STRENGTH, USE_DP
from cogvideox.errors import UserError
from cogvideox.files import generation_defaults, stage_files, videos
from cogvideox.files.names import GIVEN_TENSORS, LATENTS, ROOT, STATE
from cogvideox.files.provenance import recorded, stale_inputs
from cogvideox.files.schemas import TextConfig, VideoConfig

STAGE1, STAGE2 = "stage1_text_encoder.py", "stage2_transformer.py"
STAGE3 = {"torchax": "stage3_vae_decoder.py", "flax": "stage3_vae_decoder_flax.py"}  # by decoder

# The options of each stage that decide its result, with what the stage takes where nobody gives them. Stage 2 has those
# of `generation_defaults.OURS` beside them.
OF_WEIGHTS: dict[str, Any] = {"variant": None, "dtype": None}
OF_STAGE1: dict[str, Any] = {
    **{"model_id": MODEL_NAME, "negative_prompt": "", "image": None, "video": None, "strength": None},
    **{"height": None, "width": None, "frames": None},
    **OF_WEIGHTS,
}
OF_STAGE2: dict[str, Any] = {
    **{"seed": SEED, "num_videos_per_prompt": 1, "videos_at_once": None, "lora": [], "guidance_interval": None},
    **{"cache_threshold": None, "cache_schedule": None, "attention": None, "block_sizes": None, "use_k_smooth": None},
    **{"sparse_attention": None, "dense_steps": None},
    **{"image_latent_scale": IMAGE_LATENT_SCALES[0]},
    **{"use_dp": USE_DP, "sp_num": None, "layout": LAYOUT, "mesh_order": None, "restart": False, "only": None},
    **OF_WEIGHTS,
}
OF_STAGE3: dict[str, Any] = {
    **{"fps": None, "allow_nan": False, "chip_rows": None, "strips": None, "only": None},
    **OF_WEIGHTS,
}
SIZE = ("height", "width", "frames")
LISTS = {"guidance_interval", "lora", "block_sizes"}


def stage1(output_dir: Path, given: Sequence[object], options: Mapping[str, Any]) -> str:
    """Return the command of stage 1.

    Args:
        output_dir: where the files go.
        given: the words that say the prompt or the prompts.
        options: values of OF_STAGE1, by name; others are passed over.
    """
    model_id = options.get("model_id")
    by_default = OF_STAGE1 | {"strength": STRENGTH} | (_size_of(model_id) if isinstance(model_id, str) else {})
    paths = {name: here(path) for name in ("model_id", *GIVEN_TENSORS) if isinstance(path := options.get(name), str)}
    return command(STAGE1, *given, "--output_dir", output_dir, *words({**options, **paths}, by_default))


def stage2(input_dir: Path, output_dir: Path, model_id: str | None, options: Mapping[str, Any]) -> str:
    """Return the command of stage 2; `options` are values of OF_STAGE2 and `generation_defaults.OURS`, by name."""
    made_for = generation_defaults.of_model(model_id or MODEL_NAME, download=False)
    by_default = generation_defaults.by_default(made_for, options.get("preset")) | {"preset": None}
    given = _given_size(input_dir)  # which stage 2 takes
    options = {name: value for name, value in options.items() if name not in given}
    others = [] if output_dir == input_dir else ["--output_dir", output_dir]
    return command(STAGE2, "--input_dir", input_dir, *others, *words(options, by_default | OF_STAGE2))


def stage3(input_dir: Path, options: Mapping[str, Any]) -> str:
    """Return the command of stage 3; `options` are values of OF_STAGE3, by name, and the "decoder"."""
    script = STAGE3.get(str(options.get("decoder")), STAGE3["torchax"])
    return command(script, "--input_dir", input_dir, *words(options, OF_STAGE3))


def _given_size(folder: Path) -> Sequence[str]:
    """Return what of SIZE is that of the image or of the video that stage 1 has encoded for a folder's first prompt."""
    with contextlib.suppress(UserError):
        config = stage_files.read_config(videos.prompts(folder)[0], TextConfig)
        return SIZE if config.get("video") else SIZE[:2] if config.get("image") else ()
    return ()


def _size_of(model_id: str) -> dict[str, Any]:
    """Return the size that stage 1 takes for the images and videos of a model where nobody gives it."""
    entries = generation_defaults.of_model(model_id).entries
    return {name: entries.get(name, generation_defaults.OURS[name]) for name in SIZE}


def taken_over(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a stage's options that the next stage takes over as they are, as far as they are given."""
    return {name: value for name in ("only", *OF_WEIGHTS) if (value := options.get(name))}


# --- What a run was told -----------------------------------------------------------------------------------------


def recorded_options(path: Path) -> dict[str, Any]:
    """Return the options with which a file was made, without those that were None; nothing if it does not say.

    Of --only nothing is said: it is of the other files that were made with this one.
    """
    options: object = None
    with contextlib.suppress(UserError):
        options = recorded(path).get("options") if path.is_file() else None
    if not isinstance(options, dict):
        return {}
    options.pop("only", None)
    for name in LISTS & options.keys():
        with contextlib.suppress(ValueError, SyntaxError):  # earlier versions wrote lists as Python does
            options[name] = ast.literal_eval(str(options[name]))
        options[name] = options[name] if isinstance(options[name], (list, tuple)) else None
    return options


def options_of_run(folder: Path, model_id: str | None = None) -> dict[str, Any]:
    """Return the options with which stage 2 has begun or made the videos of a folder, those of an unfinished run first.

    Args:
        folder: of one video or of several.
        model_id: the model that the videos are of; nothing is returned if they are of another one.

    Where no tensors are left, there is generation_config.json; nothing is returned if that says nothing either. An
    unfinished run from which stage 2 cannot go on adds --restart.
    """
    folders = videos.videos(folder)
    restart = {"restart": any(_is_stale(one / STATE) for one in folders)}
    for path in (one / name for name in (STATE, LATENTS) for one in folders):
        if options := recorded_options(path):
            return (options if model_id in (None, _model_of(path)) else {}) | restart
    for one in folders:
        with contextlib.suppress(UserError):
            config = stage_files.read_config(one, VideoConfig)
            if model_id in (None, config["model_id"]):
                return _as_options(config)
    return {}


def _is_stale(state_file: Path) -> bool:
    """Return whether stage 2 cannot go on from a state, because its inputs are others now or it is damaged."""
    try:
        return state_file.exists() and any(stale_inputs(state_file))
    except UserError:
        return True


def _model_of(path: Path) -> object:
    """Return the model that a file of stage 2 was made with; None if it does not say."""
    with contextlib.suppress(UserError, OSError, SafetensorError):
        return stage_files.read_made_from(path, stage_files.metadata(path)).get("model_id")
    return None


def _as_options(config: Mapping) -> dict[str, Any]:
    """Return the options that lead to these entries of generation_config.json."""
    from cogvideox.models.transformer.scheduler import CHOICES

    chosen = [name for name, changes in CHOICES.items() if changes.items() <= _scheduler_of(config).items()]
    skipped = config.get("skipped_steps") or None
    return {**config, "scheduler": next(iter(chosen), None), "cache_schedule": skipped}


def _scheduler_of(config: Mapping) -> dict[str, Any]:
    """Return the entries of generation_config.json about the scheduler as scheduler_config.json has them."""
    return {"_class_name": config["scheduler"], "timestep_spacing": config.get("timestep_spacing")}


# --- Words of a command line -------------------------------------------------------------------------------------


def command(script: str, *arguments: object) -> str:
    """Return the command line that runs a script of the project with the interpreter that runs now."""
    return shlex.join([interpreter(), here(ROOT / script), *map(str, arguments)])


def interpreter() -> str:
    """Return the interpreter that runs now: its name if a shell finds it by that, else its path."""
    place = Path(sys.executable)
    for name in ("python", "python3"):
        found = shutil.which(name)
        # In a virtual environment it is a link to one that has other packages.
        if found and Path(found).parent.resolve() == place.parent.resolve() and os.path.samefile(found, place):
            return name
    return here(place)


def here(path: str | Path) -> str:
    """Return a path relative to the working directory if it is below it; any other text or path as it is."""
    is_below = Path(path).is_absolute() and Path(path).is_relative_to(Path.cwd())
    return os.path.relpath(path) if is_below else str(path)


def words(options: Mapping[str, Any], by_default: Mapping[str, Any]) -> list[str]:
    """Return the options whose values are not what a stage takes by default, as words of a command line.

    Those that are not in `by_default`, or are None, are left out.
    """
    found: list[str] = []
    for name, default in by_default.items():
        value = options.get(name)
        if value is None or value == default:
            continue
        if isinstance(value, bool):
            found.append(f"--{'' if value else 'no-'}{name}")
        elif name == "lora":
            found += [word for one in list(value) for word in ("--lora", str(one))]
        elif name == "block_sizes":
            found += [f"--{name}", *map(str, value)]
        else:
            text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            found += [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]
    return found
