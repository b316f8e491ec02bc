"""Read and write the files that pass between the stages, and check that they belong together."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import JsonValue, TypeAdapter, ValidationError
from safetensors import safe_open

from cogvideox.errors import UserError, shortened
from cogvideox.files import writing
from cogvideox.files.names import CONFIG, GIVEN_TENSORS
from cogvideox.files.schemas import TextConfig, read_json
from cogvideox.files.tensors import check_finite, open_tensors, read_tensors

TEXT_TENSORS = ("prompt_embeds", "negative_prompt_embeds")  # of stage 1, beside GIVEN_TENSORS

ARTICLE = {"image": "an", "video": "a"}
NOT_TAKEN = {
    "image": "an image, and the model makes videos of text alone",
    "video": f"a video, and {CONFIG} no strength",
}
MISSING = {
    "image": "has no image, and the model makes videos of one",
    "video": f"has no video, and {CONFIG} has the strength with which one is to be changed",
}


def write_config(directory: Path, entries: Mapping) -> None:
    """Write generation_config.json in `directory`, which is one that `writing.committing` yields."""
    text = json.dumps(entries, indent=2, ensure_ascii=False) + "\n"
    (directory / CONFIG).write_text(text, encoding="utf-8")


def read_config(directory: Path, kind: type[TextConfig]) -> dict:
    """Read generation_config.json, which must have the entries of `kind`: those of stage 1, or of stages 1 and 2.

    Raises:
        UserError: the file is missing or is not JSON, or an entry is missing, of another type or out of bounds.
    """
    writing.finish(directory)
    path = directory / CONFIG
    return read_json(path, kind, f"{path} does not exist, or is no file; run stage 1 first, or correct --input_dir")


def made_from(config: Mapping, entries: Iterable[str]) -> dict[str, str]:
    """Return the metadata of a safetensors file: the config entries that its tensors were made from."""
    return {"made_from": json.dumps({name: config[name] for name in entries if name in config})}


def read_made_from(path: Path, found: Mapping[str, str] | None) -> dict:
    """Return the config entries that the metadata of a safetensors file say it was made from, as `made_from` wrote.

    Raises:
        UserError: what the file `path` says is no JSON object.
    """
    try:
        return TypeAdapter(dict[str, JsonValue]).validate_json((found or {}).get("made_from", "{}"))
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"]
        raise UserError(f"{path}: its metadata made_from is no JSON object ({reason}); make the file again") from error


def metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file.

    Raises:
        OSError, SafetensorError: there is no such file, or it is not a complete safetensors file.
    """
    return safe_open(path, framework="np").metadata() or {}


def difference(path: Path, config: Mapping) -> str | None:
    """Return the first entry of `config` with which a safetensors file was not made, in words; None if it fits."""
    for name, value in read_made_from(path, metadata(path)).items():
        if config.get(name) != value:
            ours, theirs = (shortened(repr(one)) for one in (config.get(name), value))
            return f"was made with {name} = {theirs}, but {CONFIG} says {ours}"
    return None


def refuse(fault: str) -> None:
    """Raise UserError because of files that do not belong together."""
    raise UserError(fault)


def ignore(warning: str) -> None:
    """Do nothing with a warning."""


def tensor_shapes(
    path: Path,
    stage: int,
    names: Iterable[str],
    config: Mapping,
    finite: bool = True,
    refuse: Callable[[str], None] = refuse,
    warn: Callable[[str], None] = ignore,
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors `names` of a stage's file, and check them and what the file was made from.

    Args:
        path: the file.
        stage: which wrote it.
        names: of tensors.
        config: generation_config.json.
        finite: whether the values must be finite.
        refuse: is called with what is wrong if the file was made with other entries than `config`'s.
        warn: is called if the file does not say what it was made from.

    Raises:
        UserError: the file is missing or truncated, lacks a tensor, has one that is empty, not of floating point or
            not finite, or was made with entries other than `config`'s.
    """
    remedy = f"run stage {stage} again"
    tensors = read_tensors([path], dict.fromkeys(names), remedy)
    if other := difference(path, config):
        refuse(f"{path} {other}; {remedy}")
    if finite:
        check_finite(tensors, path, remedy)
    if "made_from" not in metadata(path):
        warn(f"{path} does not say what it was made from: whether it belongs to {CONFIG} is unknown")
    return {name: tensor.shape for name, tensor in tensors.items()}


def check_embeddings(shapes: Mapping[str, tuple[int, ...]], transformer: Mapping, path: Path) -> None:
    """Raise UserError unless the embeddings are of one prompt, with as many tokens and the width of the transformer."""
    expected = (1, transformer["max_text_seq_length"], transformer["text_embed_dim"])
    for name in TEXT_TENSORS:
        if (shape := shapes[name]) != expected:
            raise UserError(
                f"{path}: {name} has shape {list(shape)}, the transformer takes {list(expected)}: the embeddings were "
                "made with another model; run stage 1 again"
            )


def embedding_names(path: Path) -> tuple[str, ...]:
    """Return the names of the tensors that a file of stage 1 should have: of an image or a video all if it has any.

    Raises:
        UserError: the file is missing or truncated.
    """
    found = open_tensors(path, "run stage 1 again")
    given = [name for names in GIVEN_TENSORS.values() if found.keys() & set(names) for name in names]
    return (*TEXT_TENSORS, *given)


def check_given(
    name: Literal["image", "video"],
    shapes: Mapping[str, tuple[int, ...]],
    expected: tuple[int, ...] | None,
    compression: tuple[int, int],
    path: Path,
) -> None:
    """Check whether a file of stage 1 has the latents of an image, or of a video to change, for a video.

    Args:
        name: which of the two.
        shapes: of the file's tensors, by name.
        expected: the shape of the latents' mean and log-variance; None if there should be none.
        compression: frames and, in height and in width, pixels of a video for each of the latents.
        path: the file.

    Raises:
        UserError: the latents are not there, or are there and should not be, or are of another size.
    """
    found = {tensor: shapes[tensor] for tensor in GIVEN_TENSORS[name] if tensor in shapes}
    if expected is None:
        if found:
            raise UserError(f"{path} has {NOT_TAKEN[name]}; run stage 1 without --{name}")
        return
    if not found:
        raise UserError(f"{path} {MISSING[name]}; run stage 1 again with --{name}")
    for tensor, shape in found.items():
        if shape == expected:
            continue
        if len(shape) != len(expected) or shape[:2] != expected[:2]:
            raise UserError(
                f"{path}: {tensor} has shape {list(shape)}, the transformer takes {list(expected)}; run stage 1 again"
            )
        ours, of_video = (_size(one, compression) for one in (shape, expected))
        options = "--height and --width" if name == "image" else "--height, --width and --frames"
        raise UserError(
            f"{path} has {ARTICLE[name]} {name} of {ours}, for a video of {of_video}; drop {options}, or run stage 1 "
            "again with these"
        )


def _size(shape: tuple[int, ...], compression: tuple[int, int]) -> str:
    """Return the size in words of what has latents of a shape; see `check_given`."""
    frames, *sides = shape[2:]
    length = f"{(frames - 1) * compression[0] + 1} frames of " if frames > 1 else ""
    return f"{length}{' x '.join(str(side * compression[1]) for side in sides)} pixels"


def check_latents_shape(shape: tuple[int, ...], expected: tuple[int, ...], path: Path) -> None:
    """Raise UserError unless the latents have the shape that follows from the configs of the video and the VAE."""
    if shape != expected:
        raise UserError(
            f"{path}: latents have shape {list(shape)}, but {CONFIG} and the VAE say {list(expected)}; "
            "run stage 2 again"
        )


def read_latents(path: Path, allow_nan: bool) -> np.ndarray:
    """Read the latents of a video, [1, C, T, H, W].

    Raises:
        UserError: they have NaN or infinite values, and not `allow_nan`; it says how many and in which frames.
    """
    from safetensors.numpy import load_file  # that of safetensors.flax imports flax

    latents = load_file(path)["latents"]
    bad = ~np.isfinite(latents.astype(np.float32))
    if bad.any() and not allow_nan:
        frames = ", ".join(str(frame) for frame in np.flatnonzero(bad.any(axis=(0, 1, 3, 4))))
        raise UserError(
            f"{path}: {bad.sum():,} of {bad.size:,} values are NaN or infinite, in latent frames {frames} of "
            f"0 to {latents.shape[2] - 1}; run stage 2 again, or decode them anyway with --allow_nan"
        )
    return latents
