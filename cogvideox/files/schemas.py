"""Read JSON files as the entries that a class names.

Whatever a file holds, the result is valid or a `UserError` says in one line what is wrong.
"""

import codecs
import re
import reprlib
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cogvideox.defaults import MOST_FPS, MOST_FRAMES, MOST_GUIDANCE, MOST_PIXELS, MOST_SEED
from cogvideox.errors import UserError
from cogvideox.features import features_of

Count = Annotated[int, Field(ge=1, le=2**20)]
Positive = Annotated[float, Field(gt=0, le=1e6)]  # bounds leave NaN and infinity out
Share = Annotated[float, Field(gt=0, lt=1)]


def plain_number(value: float) -> float:
    """Return a whole number as an int, which is written without a point."""
    return int(value) if value.is_integer() else value


# Of a video.
Pixels = Annotated[int, Field(ge=1, le=MOST_PIXELS)]
Frames = Annotated[int, Field(ge=1, le=MOST_FRAMES)]
FrameRate = Annotated[float, Field(ge=1, le=MOST_FPS), AfterValidator(plain_number)]
Guidance = Annotated[float, Field(ge=0, le=MOST_GUIDANCE)]
Seed = Annotated[int, Field(ge=0, le=MOST_SEED)]
FileName = Annotated[str, Field(pattern=r"^[^\x00]+$")]


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
    image: FileName | None = None  # the file of the picture that the video begins with
    video: FileName | None = None  # the file of the video that is changed, and what share of the steps changes it
    strength: Annotated[float, Field(gt=0, le=1)] | None = None
    prompt_seed: Seed | None = None  # the seed that the prompt's line of --prompt_file says; stage 2 takes it


class VideoConfig(TextConfig):
    """What generation_config.json has after stage 2."""

    remedy = "run stage 2 again"
    height: Pixels
    width: Pixels
    frames: Frames
    fps: FrameRate
    num_inference_steps: Count
    guidance_scale: Guidance
    seed: Seed
    scheduler: str
    # Files of earlier versions and of the original project lack these. Stage 2 writes each from its option of the same
    # name, or from its plan; see cogvideox/run/jobs.py.
    timestep_spacing: Literal["linspace", "leading", "trailing"] | None = None
    use_dynamic_cfg: bool = False
    skipped_steps: str = ""
    guidance_interval: Annotated[list[int], Field(min_length=2, max_length=2)] | None = None
    lora: list[str] = []
    sparse_attention: FileName | None = None  # the file of the map
    dense_steps: Annotated[float, Field(ge=0, le=1)] | None = None  # with it, what share of the steps is dense


class PromptLine(Entries):
    """A line of a --prompt_file of JSON lines."""

    model_config = ConfigDict(extra="forbid")  # a misspelt key would change nothing, and nobody would see it
    remedy = 'each line must be an object such as {"prompt": "a fox", "image": "fox.png", "seed": 1}, on one line'
    prompt: str
    image: FileName | None = None  # a file, by its path relative to the folder of --prompt_file
    seed: Seed | None = None


class IndexEntry(Entries):
    """A line of videos.jsonl; its paths are relative to the folder of the file."""

    remedy = "the next stage writes it again"
    folder: str
    prompt: str
    seed: int | None  # None before stage 2
    file: str | None  # of the encoded video; None before stage 3
    state: Literal["encoded", "denoised", "decoded"]  # by stage 1, 2 or 3


class Settings(Entries):
    """What --preset sets; see `generation_defaults.by_default`."""

    model_config = ConfigDict(extra="forbid")
    num_inference_steps: Count
    guidance_scale: Guidance
    scheduler: Literal["ddim", "dpm"]
    use_dynamic_cfg: bool
    fps: FrameRate


Side = Pixels | Annotated[list[Pixels], Field(min_length=2, max_length=2)]  # or the least and the most of a range


class GenerationDefaults(Entries):
    """generation_defaults.json of a model: what it is made for, as options of stage 2, and what it was trained on."""

    model_config = ConfigDict(extra="forbid")  # a misspelt entry would change nothing, and nobody would see it
    remedy = "correct the file, or remove it"
    height: Pixels | None = None
    width: Pixels | None = None
    frames: Frames | None = None
    num_inference_steps: Count | None = None
    guidance_scale: Guidance | None = None
    use_dynamic_cfg: bool | None = None
    fps: FrameRate | None = None
    trained_sizes: list[Annotated[list[Side], Field(min_length=2, max_length=2)]] = []  # height and width
    trained_frames: list[Frames] = []
    authors: Settings | None = None  # with which its authors run it, for --preset authors


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
    modules_to_save: Annotated[list[str], Field(max_length=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_prefix(cls, entries: object) -> object:
        if not isinstance(entries, dict):
            return entries
        plain = {name.removeprefix("transformer."): value for name, value in entries.items()}
        return {name: value for name, value in plain.items() if value is not None or not name.endswith("_pattern")}

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

    remedy = "this is not a CogVideoX, or the file is damaged: correct --model_id"


class WeightIndex(ModelConfig):
    """The index of weights in several files: the name of each tensor's file, which is beside it."""

    remedy = "get the model again or correct --model_id"
    weight_map: Annotated[dict[str, Annotated[str, Field(pattern=r"^[^/\\]+\.safetensors$")]], Field(min_length=1)]


class Transformer(ModelConfig):
    """transformer/config.json, with the defaults of diffusers; what its features may be says `features_of`."""

    num_layers: Count = 30
    num_attention_heads: Count = 30
    # The rotary embedding splits it.
    attention_head_dim: Annotated[int, Field(ge=16, le=1024, multiple_of=16)] = 64
    in_channels: Count = 16
    out_channels: Count = 16
    text_embed_dim: Count = 4096
    time_embed_dim: Count = 512
    max_text_seq_length: Count = 226
    patch_size: Annotated[int, Field(ge=1, le=64)] = 2
    patch_size_t: Annotated[int, Field(ge=1, le=64)] | None = None
    patch_bias: bool = True
    sample_height: Count = 60
    sample_width: Count = 90
    sample_frames: Count = 49
    temporal_compression_ratio: Annotated[int, Field(ge=1, le=64)] = 4
    spatial_interpolation_scale: Positive = 1.875
    temporal_interpolation_scale: Positive = 1.0
    norm_eps: Positive = 1e-5
    norm_elementwise_affine: bool = True
    attention_bias: bool = True
    flip_sin_to_cos: bool = True
    freq_shift: Annotated[float, Field(ge=0, le=1)] = 0
    activation_fn: Literal["gelu-approximate"] = "gelu-approximate"
    use_rotary_positional_embeddings: bool = False
    use_learned_positional_embeddings: bool | None = False
    ofs_embed_dim: Count | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        features_of(dict(self))
        return self


class Vae(ModelConfig):
    """vae/config.json, as far as our stages depend on it, with the defaults of diffusers."""

    block_out_channels: Annotated[list[Count], Field(min_length=1, max_length=8)] = [128, 256, 256, 512]
    latent_channels: Count = 16
    layers_per_block: Count = 3
    norm_num_groups: Count = 32
    norm_eps: Positive = 1e-6
    out_channels: Literal[3] = 3
    scaling_factor: Positive = 1.15258426
    temporal_compression_ratio: Literal[1, 2, 4, 8] = 4
    act_fn: str = "silu"
    down_block_types: list[Literal["CogVideoXDownBlock3D"]] = ["CogVideoXDownBlock3D"] * 4
    up_block_types: list[Literal["CogVideoXUpBlock3D"]] = ["CogVideoXUpBlock3D"] * 4
    sample_height: Count = 480
    sample_width: Count = 720
    use_post_quant_conv: Literal[False] | None = False
    invert_scale_latents: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        levels = len(self.block_out_channels)
        if any(len(types) != levels for types in (self.down_block_types, self.up_block_types)):
            raise ValueError(f"there are {levels} block_out_channels, and another number of block types")
        if any(channels % self.norm_num_groups for channels in self.block_out_channels):
            raise ValueError(f"norm_num_groups {self.norm_num_groups} does not divide block_out_channels")
        return self


class Scheduler(ModelConfig):
    """scheduler/scheduler_config.json; diffusers has defaults for all entries but the class."""

    class_name: Annotated[str, Field(alias="_class_name")]
    num_train_timesteps: Annotated[int, Field(ge=1, le=100_000)] = 1000
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
    return parse_json(path.read_bytes().removeprefix(codecs.BOM_UTF8), path, kind, defaults)


def parse_json(text: str | bytes, path: Path | str, kind: type[Entries], defaults: bool = False) -> dict:
    """Return the entries of a JSON text that the file `path`, or a line of it in words, holds; see `read_json`."""
    try:
        return kind.model_validate_json(text).model_dump(by_alias=True, exclude_unset=not defaults)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        entry = ".".join(map(str, first["loc"]))
        of_stage_1 = issubclass(kind, TextConfig) and (entry in TextConfig.model_fields or not entry)
        remedy = TextConfig.remedy if of_stage_1 else kind.remedy
        found = "" if first["type"] == "json_invalid" else f", not {reprlib.repr(first['input'])}"
        fault = f"{entry}: {first['msg']}{found}" if entry else f"{first['msg']}{found}"
        if first["type"] == "missing":
            fault = f"{entry} is missing"
        raise UserError(f"{path}: {fault}; {remedy}") from error


TEXT_ENTRIES = tuple(TextConfig.model_fields)
VIDEO_ENTRIES = tuple(VideoConfig.model_fields)[len(TEXT_ENTRIES) :]
# What stage 1's tensors are made from; only with an image or a video has its config a size.
EMBEDDING_ENTRIES = [name for name in TEXT_ENTRIES if name not in ("prompt_seed", "strength")]
EMBEDDING_ENTRIES += ["height", "width", "frames"]
# What latents are made from; no tensor depends on fps, and `seed` is the one that was taken.
LATENT_ENTRIES = [name for name in (*TEXT_ENTRIES, *VIDEO_ENTRIES) if name not in ("fps", "prompt_seed")]
