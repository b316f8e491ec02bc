"""Read and write the files that pass between the stages, and check that they belong together."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import JsonValue, TypeAdapter, ValidationError
from safetensors import safe_open

from cogvideox.cli.report import Report
from cogvideox.errors import UserError
from cogvideox.files import writing
from cogvideox.files.names import CONFIG
from cogvideox.files.schemas import TextConfig, read_json
from cogvideox.files.tensors import check_finite, read_tensors


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
            return f"was made with {name} = {value!r}, but {CONFIG} says {config.get(name)!r}"
    return None


def refuse(fault: str, force: bool) -> None:
    """Raise UserError because of files that do not belong together; with `force`, which --force asks for, only warn."""
    if not force:
        raise UserError(f"{fault}, or go on with --force")
    if Report.current:
        Report.current.warn(f"{fault}; --force goes on")


def tensor_shapes(
    path: Path, stage: int, names: Iterable[str], config: Mapping, finite: bool = True, force: bool = False
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors `names` of a stage's file, and check them and what the file was made from.

    Args:
        path: the file.
        stage: which wrote it.
        names: of tensors.
        config: generation_config.json.
        finite: whether the values must be finite.
        force: whether a file is taken that was made with other entries than `config`'s.

    Raises:
        UserError: the file is missing or truncated, lacks a tensor, has one that is empty, not of floating point or
            not finite, or was made with entries other than `config`'s.
    """
    remedy = f"run stage {stage} again"
    tensors = read_tensors(path, dict.fromkeys(names), remedy)
    if other := difference(path, config):
        refuse(f"{path} {other}; {remedy}", force)
    if finite:
        check_finite(tensors, path, remedy)
    if Report.current and "made_from" not in metadata(path):
        Report.current.warn(f"{path} does not say what it was made from: whether it belongs to {CONFIG} is unknown")
    return {name: tensor.shape for name, tensor in tensors.items()}


def check_embeddings(shapes: Mapping[str, tuple[int, ...]], transformer: Mapping, path: Path) -> None:
    """Raise UserError unless the embeddings are of one prompt, with as many tokens and the width of the transformer."""
    expected = (1, transformer["max_text_seq_length"], transformer["text_embed_dim"])
    for name, shape in shapes.items():
        if shape != expected:
            raise UserError(
                f"{path}: {name} has shape {list(shape)}, the transformer takes {list(expected)}: the embeddings were "
                "made with another model; run stage 1 again"
            )


def check_latents_shape(shape: tuple[int, ...], expected: tuple[int, ...], path: Path) -> None:
    """Raise UserError unless the latents have the shape that follows from the configs of the video and the VAE."""
    if shape != expected:
        raise UserError(
            f"{path}: latents have shape {list(shape)}, but {CONFIG} and the VAE say {list(expected)}; "
            "run stage 2 again"
        )
