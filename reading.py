"""Read files that others wrote: JSON as the entries that a class names, safetensors as the tensors that are expected.

Whatever a file holds, the result is valid or a `UserError` says in one line what is wrong. Importing this module loads
neither jax nor torch.
"""

import json
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import ml_dtypes
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from safetensors import SafetensorError, safe_open

from console import UserError, first_line

# Beyond these, options and configs are mistakes; they are refused before memory is taken for them.
MOST_PIXELS = 16_384  # of a height or a width, the most that H.264 has
MOST_FRAMES = 10_000
MOST_FPS = 1_000
MOST_GUIDANCE = 1_000.0

# The dtypes that tensors may have, by their names in a safetensors file.
DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}

# --- JSON --------------------------------------------------------------------------------------------------------

Count = Annotated[int, Field(ge=1, le=2**20)]
Positive = Annotated[float, Field(gt=0, le=1e6)]  # bounds leave NaN and infinity out
Share = Annotated[float, Field(gt=0, lt=1)]


class Entries(BaseModel):
    """Entries of a JSON object, with types and bounds; other entries are kept as they are."""

    model_config = ConfigDict(strict=True, extra="allow")
    remedy: ClassVar[str]  # what to do about a wrong entry


class TextConfig(Entries):
    """What stage 1 writes into generation_config.json."""

    remedy = "run stage 1 again"
    model_id: Annotated[str, Field(min_length=1)]
    prompt: str
    negative_prompt: str


class VideoConfig(TextConfig):
    """What generation_config.json has after stage 2."""

    remedy = "run stage 2 again"
    height: Annotated[int, Field(ge=1, le=MOST_PIXELS)]
    width: Annotated[int, Field(ge=1, le=MOST_PIXELS)]
    frames: Annotated[int, Field(ge=1, le=MOST_FRAMES)]
    fps: Annotated[int, Field(ge=1, le=MOST_FPS)]
    num_inference_steps: Count
    guidance_scale: Annotated[float, Field(ge=0, le=MOST_GUIDANCE)]
    seed: Annotated[int, Field(ge=0, lt=2**64)]
    scheduler: str
    # Files of version 0.1.0 and of the original project lack these.
    timestep_spacing: Literal["linspace", "leading", "trailing"] | None = None
    use_dynamic_cfg: bool = False
    skipped_steps: str = ""
    guidance_interval: Annotated[list[int], Field(min_length=2, max_length=2)] | None = None
    lora: list[str] = []  # files of earlier versions have no such entry


class LoraConfig(Entries):
    """What PEFT says of a LoRA: adapter_config.json, or an entry in the metadata of a file that diffusers wrote."""

    remedy = "only a plain LoRA can be fused: correct --lora"
    peft_type: Literal["LORA"] = "LORA"
    r: Count
    lora_alpha: Annotated[float, Field(ge=0, le=1e6)]
    rank_pattern: dict[str, Count] = {}
    alpha_pattern: dict[str, Annotated[float, Field(ge=0, le=1e6)]] = {}
    use_rslora: bool = False
    init_lora_weights: bool | Literal["gaussian", "eva", "orthogonal"] | None = None  # others change the weights too
    bias: Literal["none"] = "none"
    fan_in_fan_out: Literal[False] | None = None
    lora_bias: Literal[False] | None = None
    use_dora: Literal[False] | None = None
    modules_to_save: None = None

    @model_validator(mode="before")
    @classmethod
    def _without_prefix(cls, entries: object) -> object:
        if not isinstance(entries, dict):
            return entries
        return {name.removeprefix("transformer."): value for name, value in entries.items()}

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns(cls, pattern: dict[str, float]) -> dict[str, float]:
        for key in pattern:
            try:
                re.compile(rf"(.*\.)?({key})$")  # as PEFT matches it
            except re.error as error:
                raise ValueError(f"{key!r} is no pattern: {error}") from error
        return pattern


class ModelConfig(Entries):
    """The config of a component of a model; a component of another kind of model has other values."""

    remedy = "this is not a CogVideoX 1.5 for text to video, or the file is damaged: correct --model_id"


class Transformer(ModelConfig):
    """transformer/config.json: temporal patches, rotary embedding, no image to begin with."""

    num_layers: Count
    num_attention_heads: Count
    attention_head_dim: Annotated[int, Field(ge=16, le=1024, multiple_of=16)]  # the rotary embedding splits it
    in_channels: Count
    out_channels: Count
    text_embed_dim: Count
    time_embed_dim: Count
    max_text_seq_length: Count
    patch_size: Annotated[int, Field(ge=1, le=64)]
    patch_size_t: Annotated[int, Field(ge=1, le=64)]
    sample_height: Count
    sample_width: Count
    norm_eps: Positive
    norm_elementwise_affine: bool
    attention_bias: bool
    flip_sin_to_cos: bool
    freq_shift: Annotated[float, Field(ge=0, le=1)]
    activation_fn: Literal["gelu-approximate"]
    use_rotary_positional_embeddings: Literal[True]
    use_learned_positional_embeddings: Literal[False] | None = None
    ofs_embed_dim: None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.in_channels != self.out_channels:
            raise ValueError(f"in_channels is {self.in_channels}, but out_channels is {self.out_channels}")
        return self


class Vae(ModelConfig):
    """vae/config.json, as far as the decoder depends on it."""

    block_out_channels: Annotated[list[Count], Field(min_length=1, max_length=8)]
    latent_channels: Count
    layers_per_block: Count
    norm_num_groups: Count
    norm_eps: Positive
    out_channels: Literal[3]
    scaling_factor: Positive
    temporal_compression_ratio: Literal[1, 2, 4, 8]
    act_fn: str
    down_block_types: list[Literal["CogVideoXDownBlock3D"]] | None = None
    up_block_types: list[Literal["CogVideoXUpBlock3D"]] | None = None
    sample_height: Count = 480
    sample_width: Count = 720
    use_post_quant_conv: Literal[False] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        levels = len(self.block_out_channels)
        if any(types is not None and len(types) != levels for types in (self.down_block_types, self.up_block_types)):
            raise ValueError(f"there are {levels} block_out_channels, and another number of block types")
        if any(channels % self.norm_num_groups for channels in self.block_out_channels):
            raise ValueError(f"norm_num_groups {self.norm_num_groups} does not divide block_out_channels")
        return self


class Scheduler(ModelConfig):
    """scheduler/scheduler_config.json; diffusers has defaults for all entries but the class."""

    class_name: Annotated[str, Field(alias="_class_name")]
    num_train_timesteps: Annotated[int, Field(ge=1, le=100_000)]
    beta_start: Share = 0.00085
    beta_end: Share = 0.012
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "leading"
    rescale_betas_zero_snr: bool = False
    set_alpha_to_one: bool = True
    snr_shift_scale: Positive = 3.0
    steps_offset: Annotated[int, Field(ge=0, le=1000)] = 0
    trained_betas: Annotated[list[Share], Field(min_length=1)] | None = None


class TextEncoder(ModelConfig):
    """text_encoder/config.json, which transformers reads; what would make it take memory without bounds."""

    d_model: Count
    d_ff: Count
    d_kv: Count
    num_heads: Count
    num_layers: Count
    vocab_size: Annotated[int, Field(ge=1, le=2**24)]


COMPONENTS: dict[str, type[Entries]] = {
    "transformer": Transformer,
    "vae": Vae,
    "scheduler": Scheduler,
    "text_encoder": TextEncoder,
}


def read_json(path: Path, kind: type[Entries], missing: str, defaults: bool = False) -> dict:
    """Return the entries of the JSON file `path`, which are those of `kind` and others.

    Args:
        path: the file.
        kind: what it must hold.
        missing: the error if there is no such file.
        defaults: whether entries that are not there have their defaults in the result.

    Raises:
        UserError: there is no such file, it is not JSON, or an entry is missing or wrong.
    """
    if not path.is_file():  # a pipe would be waited for
        raise UserError(missing)
    return parse_json(path.read_bytes(), path, kind, defaults)


def parse_json(text: str | bytes, path: Path, kind: type[Entries], defaults: bool = False) -> dict:
    """Return the entries of a JSON text that the file `path` holds; see `read_json`."""
    try:
        return kind.model_validate_json(text).model_dump(by_alias=True, exclude_unset=not defaults)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        entry = ".".join(map(str, first["loc"]))
        of_stage_1 = issubclass(kind, TextConfig) and (entry in TextConfig.model_fields or not entry)
        remedy = TextConfig.remedy if of_stage_1 else kind.remedy
        found = "" if first["type"] in ("missing", "json_invalid") else f", not {reprlib.repr(first['input'])}"
        raise UserError(f"{path}: {f'{entry}: ' if entry else ''}{first['msg']}{found}; {remedy}") from error


# --- Tensors -----------------------------------------------------------------------------------------------------


def mapped_tensors(path: Path) -> dict[str, np.ndarray | str]:
    """Map a safetensors file into memory, and return its tensors by name.

    In the place of a tensor whose dtype is not in DTYPES there is the dtype's name.

    Raises:
        OSError, SafetensorError: there is no such file, or it is not a complete safetensors file.
    """
    safe_open(path, framework="np")  # checks header and length; its own arrays would be copies
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start, size = file.tell(), path.stat().st_size
        data = np.memmap(file, mode="r", offset=start) if size > start else np.empty(0, np.uint8)
    header.pop("__metadata__", None)
    return {
        name: np.asarray(data[slice(*entry["data_offsets"])].view(DTYPES[entry["dtype"]]).reshape(entry["shape"]))
        if entry["dtype"] in DTYPES
        else entry["dtype"]
        for name, entry in header.items()
    }


def open_tensors(path: Path, remedy: str) -> dict[str, np.ndarray | str]:
    """Return what `mapped_tensors` returns; raise UserError, with the remedy, if the file is missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path} does not exist, or is no file; {remedy}")
    try:
        return mapped_tensors(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path} is not a complete safetensors file ({first_line(error)}); {remedy}") from error


def read_tensors(
    where: Path, expected: Mapping[str, tuple[int, ...] | None], remedy: str, only: str | None = None
) -> dict[str, np.ndarray]:
    """Map safetensors files into memory, and return the expected tensors by name, as read-only arrays.

    The arrays are the files themselves: nothing is read before a value is used.

    Args:
        where: a file, or the folder of a model's component.
        expected: the shape of each tensor by name; None for any that has elements.
        remedy: what the user can do, for the errors.
        only: if given, tensors whose name begins with it are there only if they are expected; "" means all tensors.

    Raises:
        UserError: a file is not complete, or tensors are missing, unexpected, of another shape or dtype.
    """
    found: dict[str, np.ndarray | str] = {}
    for path in sorted(where.glob("*model*.safetensors")) if where.is_dir() else [where]:
        found |= open_tensors(path, remedy)
    integers = [name for name, tensor in found.items() if isinstance(tensor, str)]  # libraries would convert them
    wrong = {name: fault for name in (*expected, *integers) if (fault := _fault(found.get(name), expected.get(name)))}
    if only is not None:
        wrong |= {name: "is unexpected" for name in found.keys() - expected.keys() if name.startswith(only)}
    if wrong:
        name = min(wrong)
        raise UserError(f"{where}: {len(wrong)} tensors do not fit, {name} among them, which {wrong[name]}; {remedy}")
    return {name: array for name in expected if isinstance(array := found[name], np.ndarray)}


def _fault(tensor: np.ndarray | str | None, shape: tuple[int, ...] | None) -> str | None:
    """Return what is wrong with a tensor of which `shape` is expected, or None."""
    if tensor is None:
        return "is missing"
    if isinstance(tensor, str):
        return f"has dtype {tensor}, not one of {', '.join(DTYPES)}"
    if tensor.shape == shape or (shape is None and tensor.ndim and tensor.size):
        return None
    return f"has shape {list(tensor.shape)}" + (f", not {list(shape)}" if shape else "")


def is_finite(array: np.ndarray) -> bool:
    """Return whether a floating-point array has neither NaN nor infinity; as fast as memory, in any dtype."""
    infinity = np.array(np.inf, array.dtype).view(f"u{array.dtype.itemsize}")
    bits = array.view(infinity.dtype).ravel()
    # All bits of the exponent are set in both; pieces of the array stay in the cache.
    return all((bits[i : i + 2**17] & infinity).max() < infinity for i in range(0, bits.size, 2**17))


def check_finite(tensors: Mapping[str, np.ndarray], where: Path, remedy: str) -> None:
    """Raise UserError if one of `tensors`, read from `where`, has NaN or infinite values."""
    for name, array in tensors.items():
        if not is_finite(array):
            raise UserError(f"{where}: {name} has NaN or infinite values; {remedy}")
