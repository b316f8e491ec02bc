"""Read the configs and weights of a CogVideoX model in diffusers' folder layout, local or from the Hugging Face Hub."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from cogvideox.errors import UserError, first_line
from cogvideox.files.schemas import COMPONENTS, WeightIndex, read_json
from cogvideox.files.stage_files import ignore
from cogvideox.files.tensors import check_finite, read_tensors, values_by_dtype

REMEDY = "get the model again or correct --model_id"
VOCABULARY = ("spiece.model", "tokenizer.json")  # files, one of which a tokenizer needs
# What decides the result of a component beside its own folder: configs there, and the vocabulary.
BESIDE = {"text_encoder": ("tokenizer",), "transformer": ("scheduler", "vae")}
# Makes a safetensors file of pickles, of which torch takes nothing but tensors.
CONVERT = (
    'python -c "import glob, torch, safetensors.torch as s; s.save_file({{name: tensor.contiguous().clone() '
    "for file in sorted(glob.glob('{0}/*.bin')) for name, tensor in torch.load(file, weights_only=True).items()}}, "
    "'{0}/{1}')\""
)


def resolve_model_id(model_id: str) -> str:
    """Return a folder's absolute path, so that later stages find it from any directory; return a hub id unchanged."""
    return str(Path(model_id).resolve()) if os.path.isdir(model_id) else model_id


def same_model(model_id: str | None, used: str, refuse: Callable[[str], None]) -> str:
    """Return the model that the earlier stages used, or `model_id`, if it is given; call `refuse` if it is another."""
    if model_id is None or resolve_model_id(model_id) == used:
        return used
    refuse(f"the input was made with model '{used}', not '{model_id}'; run stage 1 again or drop --model_id")
    return resolve_model_id(model_id)


def model_folder(model_id: str, patterns: list[str], download: bool = True, option: str = "--model_id") -> Path:
    """Return the folder of a model; if `model_id` is no local folder, download the files that match `patterns`.

    Without `download` it is the folder of what was downloaded last. `option` is the one that names the model.

    Raises:
        UserError: there is no such folder, and neither the Hugging Face Hub nor its cache has such a model.
    """
    if os.path.isdir(model_id):  # False for a name that no file can have
        return Path(model_id)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model_id, allow_patterns=patterns, local_files_only=not download))
    except (OSError, ValueError, RuntimeError) as error:  # the last where there is no home folder
        raise UserError(
            f"model '{model_id}' is neither a local folder nor available from the Hugging Face Hub "
            f"({first_line(error)}); correct {option} or check the network"
        ) from error


def read_config(model_id: str, component: str, name: str = "config.json", download: bool = True) -> dict:
    """Read the config of one component ("transformer", "vae", "scheduler", ...), without loading any weights.

    Without `download` it is the one that was downloaded last.

    Raises:
        UserError: the component has no config, or the config is not one of a CogVideoX.
    """
    path = model_folder(model_id, [f"{component}/{name}"], download) / component / name
    missing = f"model '{model_id}' has no {component}/{name}; --model_id must name a CogVideoX model"
    return read_json(path, COMPONENTS[component], missing, defaults=True)


def weight_files(folder: Path, variant: str | None = None, say: Callable[[str], None] = ignore) -> list[Path]:
    """Return the files of a component's weights, which are those that diffusers and transformers read, and no others.

    The index names them if there is one; else it is the file of the standard name. A model that has neither, but one
    variant (such as fp16 in `diffusion_pytorch_model.fp16.safetensors`), has the files of that one.

    Args:
        folder: of the component, "text_encoder", "transformer" or "vae".
        variant: read its files; None for the rule above.
        say: is told of a variant that nobody has asked for.

    Raises:
        UserError: there are no such files, or there is a choice between several variants.
    """
    stem = "model" if folder.name == "text_encoder" else "diffusion_pytorch_model"
    name = re.compile(rf"{stem}(?:\.(?!.*-of-)([^.]+))?\.safetensors|{stem}\.safetensors\.index(?:\.([^.]+))?\.json")
    # By variant, None for the standard one; an index comes after a file in this order, and takes its place.
    found = {match[1] or match[2]: path for path in sorted(folder.glob("*")) if (match := name.fullmatch(path.name))}
    if variant is None and None not in found and len(found) == 1:
        (variant,) = found
        say(f"{folder} has its weights as the variant {variant} alone")
    if variant not in found:
        raise UserError(f"{folder} {_why_none(folder, stem, [*filter(None, found)], variant)}")
    path = found[variant]
    if path.suffix == ".safetensors":
        return [path]
    shards = read_json(path, WeightIndex, f"{path} is no file; {REMEDY}")["weight_map"].values()
    return [folder / shard for shard in sorted({*shards})]


def files_of(model_id: str, component: str, variant: str | None = None) -> list[Path]:
    """Return the files on this machine that decide what a component computes: weights, configs and vocabulary.

    Raises:
        UserError: the model, or the component's weights, are not on this machine.
    """
    folder = model_folder(model_id, [], download=False)
    others = (
        file for name in (component, *BESIDE.get(component, ())) for file in sorted((folder / name).glob("[!.]*"))
    )
    small = [file for file in others if file.name.endswith("config.json") or file.name in VOCABULARY]
    return [*weight_files(folder / component, variant), *small]


def _why_none(folder: Path, stem: str, variants: list[str], variant: str | None) -> str:
    """Say what a component's folder has in the place of the weights that are wanted, and what the user can do."""
    name = f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"
    if variants:
        return f"has no {name}, nor an index of it, but the variants {', '.join(variants)}: choose one with --variant"
    if any(folder.glob("*.bin")):
        return f"has its weights as a pickle, which could run code; this converts them: {CONVERT.format(folder, name)}"
    return f"has no {name}, nor an index of it; {f'drop --variant {variant}' if variant else REMEDY}"


class Weights:
    """A component's tensors, by stored name, as read-only arrays in their stored dtypes.

    The arrays are the files themselves, mapped into memory: nothing is read before a value is used, and the pages that
    hold them are the system's cache. Several threads may read at a time.

    Attributes:
        values: see `values_by_dtype`.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray], folder: Path):
        self._tensors, self._folder = tensors, folder
        self._checked: set[str] = set()
        self.values = values_by_dtype(tensors.values())

    def __call__(self, name: str) -> np.ndarray:
        """Return a tensor; raise UserError, the first time, if it has NaN or infinite values."""
        if name not in self._checked:
            check_finite({name: self._tensors[name]}, self._folder, REMEDY)
            self._checked.add(name)
        return self._tensors[name]


def tensor_reader(
    model_id: str,
    component: str,
    shapes: Mapping[str, tuple[int, ...]],
    all_of_them: bool = True,
    variant: str | None = None,
    say: Callable[[str], None] = ignore,
) -> Weights:
    """Return a component's tensors.

    Args:
        model_id: a folder, or a model of the Hugging Face Hub.
        component: "transformer" or "vae".
        shapes: shape of each tensor that will be read, by its name.
        all_of_them: whether the component (of the VAE: its encoder or decoder) has no other tensors.
        variant, say: see `weight_files`.

    Raises:
        UserError: a file cannot be read, no file has one of the tensors with that shape, or there are other tensors.
    """
    folder = model_folder(model_id, [f"{component}/*.json", f"{component}/*.safetensors"]) / component
    files = weight_files(folder, variant, say)
    part = f"{min(shapes).partition('.')[0]}." if component == "vae" else ""
    only = part if all_of_them else None
    return Weights(read_tensors(files, shapes, REMEDY, only), folder)


@contextlib.contextmanager
def load_errors(folder: Path) -> Iterator[None]:
    """Turn what a library raises while it reads a missing or broken file in `folder` into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a library raises whatever its code meets in a broken file
        raise UserError(f"cannot load {folder}: {first_line(error)}; {REMEDY}") from error


def scheduler_config(model_id: str, changes: Mapping) -> dict:
    """Return a model's scheduler_config.json with other values of some entries."""
    return read_config(model_id, "scheduler", "scheduler_config.json") | dict(changes)
