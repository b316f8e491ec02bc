"""Read LoRAs, low-rank changes of a transformer's weights, and add them to the weights while those are loaded.

The result is that of diffusers' `load_lora_weights` and `fuse_lora`: W + scale * alpha / rank * B @ A. Importing this
module loads neither jax nor torch.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors import safe_open

from cogvideox.errors import UserError
from cogvideox.files.checkpoint import model_folder
from cogvideox.files.schemas import LoraConfig, parse_json, read_json
from cogvideox.files.tensors import check_finite, open_tensors, read_tensors

DIFFUSERS, PEFT, PEFT_CONFIG = "pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"
METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's config in a safetensors file
MATRIX = re.compile(
    r"(?:base_model\.model\.)?(?:transformer\.|diffusion_model\.)?(?P<module>.+)\.lora_(?P<letter>[AB])(?:\.\w+)?\.weight"
)
MODELS = {(30, 1920): "CogVideoX-2B", (42, 3072): "CogVideoX-5B or 1.5-5B"}  # by blocks and width
PATCHES = "patch_embed.proj.weight"  # whose inputs are twice as many where an image is among them
REMEDY = "get the LoRA again or correct --lora"


@dataclasses.dataclass(frozen=True)
class Lora:
    """A LoRA, with its scale.

    Attributes:
        files: the safetensors file, and PEFT's config if it has one.
        scale: what the user chose.
        matrices: A [rank, in], B [out, rank] and scale * alpha / rank, by the stored name of the weight [out, in].
        summary: what a stage says of it.
    """

    files: tuple[Path, ...]
    scale: float
    matrices: Mapping[str, tuple[np.ndarray, np.ndarray, float]]
    summary: str

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise UserError unless the LoRA fits a transformer whose tensors have these shapes by their stored names."""
        another = f"it is a LoRA of another model{self._fitting(shapes)}; {REMEDY}"
        if missing := sorted(self.matrices.keys() - shapes.keys()):
            raise UserError(
                f"{self.files[0]}: {len(missing)} of {len(self.matrices)} weights that it changes are not in the "
                f"transformer, {missing[0]} among them; {another}"
            )
        for name, (a, b, _) in self.matrices.items():
            if (len(b), a.shape[1]) != matrix_shape(shapes[name]):
                raise UserError(
                    f"{self.files[0]}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit {name}, which is "
                    f"{list(shapes[name])} in the transformer; {another}"
                )

    def _fitting(self, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """Say which model the LoRA fits, by the inputs, the blocks and the width that its matrices tell."""
        if (patches := self.matrices.get(PATCHES)) and patches[0].shape[1] != (
            inputs := matrix_shape(shapes[PATCHES])[1]
        ):
            return ", one that takes an image" if patches[0].shape[1] > inputs else ", one of text alone"
        blocks = [
            int(match[1]) + 1 for name in self.matrices if (match := re.match(r"transformer_blocks\.(\d+)", name))
        ]
        widths = [a.shape[1] for name, (a, _, _) in self.matrices.items() if "attn1.to_" in name]
        if not blocks or not widths:
            return ""
        known = MODELS.get((max(blocks), widths[0]))
        return f", {known or f'of at least {max(blocks)} blocks of width {widths[0]}'} by its shapes"

    @property
    def changes_nothing(self) -> bool:
        """Whether every product is zero, as of a LoRA that was never trained."""
        return all(factor == 0 or not a.any() or not b.any() for a, b, factor in self.matrices.values())

    def add(self, name: str, part: np.ndarray, index: tuple) -> None:
        """Add what the LoRA has for the tensor `name` at `index`, rows and columns, to `part`, the values there.

        It is rounded where PEFT rounds: the matrices, their product and the sum, each to the dtype of `part`.
        """
        if name not in self.matrices:
            return
        a, b, factor = self.matrices[name]
        rows, columns = index
        wide = np.promote_types(part.dtype, np.float32)
        a, b = (matrix.astype(part.dtype).astype(wide) for matrix in (a[:, columns], b[rows]))
        part += (b @ a * wide.type(factor)).astype(part.dtype)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape of a weight as a matrix, which is what a LoRA changes, also of a convolution over patches."""
    return shape[0], math.prod(shape[1:])


def files_of(path: Path) -> tuple[Path, ...]:
    """Return the safetensors file that `path`, a file or a folder, stands for; PEFT's has its config with it.

    Raises:
        UserError: the folder has no such file.
    """
    if path.is_dir():
        found = [path / name for name in (DIFFUSERS, PEFT) if (path / name).is_file()]
        if not found:
            raise UserError(f"{path} has neither {DIFFUSERS} nor {PEFT}; {REMEDY}")
        path = found[0]
    return (path, path.with_name(PEFT_CONFIG)) if path.name == PEFT else (path,)


def read_lora(text: str) -> Lora:
    """Read the LoRA that a text of the form that `lora_option` returns names: an absolute path, or an id of the hub.

    Raises:
        UserError: it is not there, a file is missing or damaged, or it holds anything but pairs of LoRA matrices and
            their alphas.
    """
    path, _, scale = text.rpartition(":")
    where = Path(path)
    if not where.is_absolute():
        where = model_folder(path, [DIFFUSERS, PEFT, PEFT_CONFIG], option="--lora")
    files = files_of(where)
    names = open_tensors(files[0], REMEDY)
    pairs = pairs_of(names, files[0])
    tensors = read_tensors(files[:1], dict.fromkeys(names), REMEDY)
    check_finite(tensors, files[0], REMEDY)
    config = config_of(files)
    matrices, ranks, alphas = {}, set(), set()
    for module, pair in pairs.items():
        a, b = (tensors[pair[letter]] for letter in "AB")
        if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
            raise UserError(
                f"{files[0]}: {pair['A']} has shape {list(a.shape)} and {pair['B']} {list(b.shape)}, which must be "
                f"[rank, in] and [out, rank] with the same rank; {REMEDY}"
            )
        rank = len(a)
        if config and (said := of_module(config["rank_pattern"], module, config["r"])) != rank:
            raise UserError(f"{files[-1]}: the rank of {module} is {said}, but {pair['A']} has {rank} rows; {REMEDY}")
        alpha = of_module(config["alpha_pattern"], module, config["lora_alpha"]) if config else rank
        root = math.sqrt(rank) if config and config["use_rslora"] else rank
        matrices[f"{module}.weight"] = a, b, float(scale) * alpha / root
        ranks.add(rank)
        alphas.add(alpha)
    alpha_text = spread(alphas) if config else "not stated, as the rank"
    summary = f"LoRA {path}: {len(pairs)} weights, rank {spread(ranks)}, alpha {alpha_text}, scale {float(scale):g}"
    return Lora(files, float(scale), matrices, summary)


def pairs_of(stored_names: Iterable[str], path: Path) -> dict[str, dict[str, str]]:
    """Return for each module the stored names of its tensors "A" and "B".

    Raises:
        UserError: a name is not of a LoRA for the transformer, or a module has one of the two alone.
    """
    names = {name: name for name in stored_names}
    if any(name.startswith(("text_encoder", "lora_te")) for name in names):
        raise UserError(f"{path} has a LoRA of the text encoder; only the transformer can have one: {REMEDY}")
    if not any(".lora_A." in name for name in names):  # an older layout of diffusers
        from diffusers.utils import convert_unet_state_dict_to_peft

        names = convert_unet_state_dict_to_peft(names)
    pairs: dict[str, dict[str, str]] = {}
    others = []
    for name, stored in names.items():
        found = MATRIX.fullmatch(name)
        if found and found["letter"] not in pairs.setdefault(found["module"], {}):  # else a second adapter's
            pairs[found["module"]][found["letter"]] = stored
        else:
            others.append(stored)
    if not pairs or others:
        example = f", {min(others)} among them" if others else ""
        raise UserError(
            f"{path}: {len(others)} of {len(names)} tensors are not called X.lora_A.weight or X.lora_B.weight, "
            f"as in a LoRA of diffusers or PEFT{example}; {REMEDY}"
        )
    for module, pair in pairs.items():
        if len(pair) < 2:
            raise UserError(f"{path}: {module} has lora_{min(pair)} alone, of A and B; {REMEDY}")
    return pairs


def config_of(files: tuple[Path, ...]) -> dict | None:
    """Return PEFT's config of a LoRA, with all entries of `LoraConfig`, or None if there is none.

    Raises:
        UserError: it is missing where PEFT writes one, or it does not describe a LoRA that can be fused.
    """
    if len(files) > 1:
        missing = f"{files[1]} does not exist, or is no file, but {files[0].name} needs it; {REMEDY}"
        return read_json(files[1], LoraConfig, missing, defaults=True)
    text = (safe_open(files[0], framework="np").metadata() or {}).get(METADATA)
    return parse_json(text, files[0], LoraConfig, defaults=True) if text else None


def of_module(pattern: Mapping[str, float], module: str, otherwise: float) -> float:
    """Return the value whose key matches the end of a module's name, as PEFT matches it; else `otherwise`."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)


def spread(values: Iterable[float]) -> str:
    """Return a value, or the least and the greatest of several, as text."""
    return " to ".join(f"{value:g}" for value in sorted({min(values), max(values)}))
