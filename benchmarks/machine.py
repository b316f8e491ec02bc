"""The devices at hand, and the sizes at which checks and measurements run on them."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.reproduce_tables import LARGE, MIDDLE, SMALL, video_tokens
from cogvideox.features import features_of
from cogvideox.files import checkpoint, generation_defaults
from cogvideox.models.shared.sizes import spatial_compression_ratio
from compile_for_tpu.programs import BUILT_IN_MODEL

if TYPE_CHECKING:
    import jax
    import numpy as np
    import torch

    from cogvideox.models.transformer.plan import DenoisingPlan
    from cogvideox.models.transformer.sparse.layout import AlignedLayout
    from cogvideox.models.vae.decoder import Decoder
    from cogvideox.models.vae.plan import DecodingPlan

Size = tuple[int, int, int]  # height, width and frames of a video

PROMPT_SEED, LATENT_SEED, WEIGHT_SEED = 0, 1, 2
GUIDANCE_SCALE = 6.0

# Steps and decodes of CogVideoX1.5-5B in the order of their worth, with their minutes on a TPU, compilation included.
STEPS = (
    (SMALL, False, 2.0),
    (LARGE, True, 3.5),
    (MIDDLE, True, 3.0),  # of the original's figures the one with the least doubt
    (LARGE, False, 2.5),
    (SMALL, True, 2.5),
)
DECODES = ((SMALL, "torchax", 7.0), (LARGE, "torchax", 7.0), (MIDDLE, "torchax", 7.0), (LARGE, "flax", 7.0))


@dataclasses.dataclass(frozen=True)
class Scale:
    """The sizes at which the entries run.

    Attributes:
        transformer, vae: entries that differ from the model's configs.
        videos: height, width and frames that are run in the place of each size of the tables, and that for any other;
            None if each size is run as it is.
        lengths: tokens for the attention kernel, those of the small and of the large video without guidance.
        heads: attention heads for the kernel.
        token_grid: patches along frames, height and width of the video whose heads have patterns; None for those of the
            video's size.
        checked_video, chunk_video: height, width and frames for the checks of a step, and of a chunk of the decoder.
        repetitions: how often something is timed.
        pace: what an entry takes here, as a part of the minutes that it says, which are those of a TPU.
    """

    transformer: Mapping
    vae: Mapping
    videos: Mapping[Size | None, Size] | None
    lengths: tuple[int, int]
    heads: int
    token_grid: tuple[int, int, int] | None
    checked_video: Size
    chunk_video: Size
    repetitions: int
    pace: float


FULL = Scale(
    transformer={},
    vae={},
    videos=None,
    lengths=(226 + video_tokens(SMALL), 226 + video_tokens(LARGE)),
    heads=6,  # what each of eight chips has of 48
    token_grid=None,
    checked_video=(256, 256, 17),
    chunk_video=(96, 128, 9),
    repetitions=5,
    pace=1.0,
)
# XLA compiles faster for a GPU: on an NVIDIA H200 entries took 0.03 to 0.21 of a TPU's minutes, diffusers' steps 0.3.
ON_A_GPU = dataclasses.replace(FULL, pace=0.3)
ON_A_CPU = Scale(
    transformer={
        "num_attention_heads": 8,
        "attention_head_dim": 16,
        "num_layers": 2,
        "time_embed_dim": 32,
        "text_embed_dim": 24,
        "max_text_seq_length": 10,
    },
    vae={
        "block_out_channels": [8, 8, 16],
        "down_block_types": ["CogVideoXDownBlock3D"] * 3,
        "up_block_types": ["CogVideoXUpBlock3D"] * 3,
        "layers_per_block": 1,
        "norm_num_groups": 4,
    },
    videos={LARGE: (32, 40, 9), MIDDLE: (24, 40, 9), SMALL: (16, 24, 9), None: (24, 40, 9)},
    lengths=(270, 530),
    heads=4,
    token_grid=(4, 5, 13),  # so many frames that a pattern does not name all of them
    checked_video=(24, 40, 9),
    chunk_video=(24, 40, 9),
    repetitions=3,
    pace=0.0,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Machine:
    """The devices at hand, the model whose shapes are run on them, and the sizes for them."""

    devices: Sequence["jax.Device"]
    scale: Scale
    model: str = BUILT_IN_MODEL

    @property
    def is_of_the_tables(self) -> bool:
        """Whether the model is that of the tables, in whose sizes it is measured; any other is in its own size."""
        return self.model == BUILT_IN_MODEL

    @functools.cached_property
    def size(self) -> Size:
        """Height, width and frames that the model is made for."""
        made_for = generation_defaults.by_default(generation_defaults.of_model(self.model), None)
        return made_for["height"], made_for["width"], made_for["frames"]

    @property
    def steps(self) -> tuple[tuple[Size, bool, float], ...]:
        """Size, guidance and minutes of the steps, in the order of their worth."""
        return STEPS if self.is_of_the_tables else ((self.size, True, 2.0), (self.size, False, 2.0))

    @property
    def decodes(self) -> tuple[tuple[Size, str, float], ...]:
        """Size, decoder and minutes of the decodes, in the order of their worth."""
        return DECODES if self.is_of_the_tables else ((self.size, "torchax", 7.0), (self.size, "flax", 7.0))

    @functools.cached_property
    def lengths(self) -> tuple[int, int]:
        """Tokens for the attention kernel: those of the scale, the first of them the model's own if it is another."""
        if self.is_of_the_tables or self.scale.videos is not None:
            return self.scale.lengths
        return self.layout(self.size).real_tokens, self.scale.lengths[0]

    def layout(self, size: Size) -> "AlignedLayout":
        """Return where the tokens of a video of a size lie if heads have patterns."""
        import jax

        from cogvideox.models.transformer.sparse.layout import AlignedLayout

        plan = self.denoising_plan(self.video(size), False, devices=jax.devices("cpu")[:1], platform="cpu")
        return AlignedLayout.of(self.scale.token_grid or plan.token_grid, plan.tokens - plan.video_tokens)

    def video(self, size: Size) -> Size:
        """Return height, width and frames that are run in the place of a size."""
        videos = self.scale.videos
        return size if videos is None else videos.get(size, videos[None])

    @property
    def platform(self) -> str:
        """Platform of the devices: "tpu", "cpu" or "gpu"."""
        return self.devices[0].platform

    @property
    def topology(self) -> str | None:
        """Name of the TPU slice, such as "v6e-8", as predictions have it; None for other devices."""
        generation = GENERATIONS.get(self.devices[0].device_kind)
        return generation and f"{generation}-{len(self.devices)}"

    @property
    def attention(self) -> str:
        """The attention that is checked: the default of the platform, but the TPU's kernel on a CPU."""
        return "xla" if self.platform == "gpu" else "splash_exp2"

    @functools.cached_property
    def transformer(self) -> dict:
        """The transformer's config."""
        config = checkpoint.read_config(self.model, "transformer") | dict(self.scale.transformer)
        return config | ({"ofs_embed_dim": config["time_embed_dim"]} if config["ofs_embed_dim"] else {})

    @functools.cached_property
    def vae(self) -> dict:
        """The VAE's config."""
        return checkpoint.read_config(self.model, "vae") | dict(self.scale.vae)

    def denoising_plan(self, video: Size, guided: bool, **options: Any) -> "DenoisingPlan":
        """Make the plan of a denoising; `options` are arguments of `make_denoising_plan` other than the defaults."""
        from cogvideox.models.transformer.plan import make_denoising_plan

        height, width, frames = video
        defaults: dict = {"transformer": self.transformer, "devices": self.devices, "platform": self.platform}
        defaults["num_inference_steps"] = 1 + self.scale.repetitions  # the first one is not timed
        arguments = defaults | options
        # Learned positions are for one size; drawn like the other weights, they are for that of the plan.
        spatial = spatial_compression_ratio(self.vae)
        sample = {"sample_height": height // spatial, "sample_width": width // spatial}
        if features_of(arguments["transformer"]).positions == "learned":
            arguments["transformer"] = arguments["transformer"] | sample
        return make_denoising_plan(
            vae=self.vae,
            scheduler=checkpoint.read_config(self.model, "scheduler", "scheduler_config.json"),
            height=height,
            width=width,
            frames=frames,
            guidance_scale=GUIDANCE_SCALE if guided else 1.0,
            **arguments,
        )

    def decoding_plan(
        self, video: Size, decoder: str, devices: Sequence["jax.Device"], dtype: str = "bfloat16"
    ) -> "DecodingPlan":
        """Make the plan of a decode."""
        from cogvideox.models.vae.plan import make_decoding_plan

        height, width, frames = video
        return make_decoding_plan(
            vae=self.vae, decoder=decoder, devices=devices, dtype=dtype, height=height, width=width, frames=frames
        )


# Generation of a TPU by jax's name for the kind of device.
GENERATIONS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "7x",
}

# Sizes by platform.
SCALES = {"cpu": ON_A_CPU, "gpu": ON_A_GPU, "tpu": FULL}


def step_name(video: Size, guided: bool) -> str:
    """Return the name of the row of a step."""
    return f"step, {' x '.join(map(str, video))}, {'guidance' if guided else 'no guidance'}"


def decode_name(video: Size) -> str:
    """Return the name of the row of a decode, whatever the decoder."""
    return f"decode, {' x '.join(map(str, video))}"


def draw_prompts(plan: "DenoisingPlan") -> "tuple[torch.Tensor, torch.Tensor]":
    """Draw embeddings of a positive and a negative prompt, bfloat16 [batch, text tokens, text width]."""
    import torch

    config = plan.transformer
    shape = plan.batch, config["max_text_seq_length"], config["text_embed_dim"]
    generator = torch.Generator().manual_seed(PROMPT_SEED)
    positive, negative = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))
    return positive, negative


def decode_frames(plan: "DecodingPlan", decoder: "Decoder", weights: Any, latents: "np.ndarray") -> "np.ndarray":
    """Decode latents to float32 pixels in [0, 1], [frames, height, width, 3]."""
    import jax.numpy as jnp
    import numpy as np

    from cogvideox.models.vae.decoder import chunk_programs, decode

    traced = chunk_programs(decoder, weights, plan.latent_shape, plan.split, jnp.float32)
    programs = [program.lower().compile() for program in traced]
    return np.concatenate(list(decode(programs, weights, latents, plan.split)))
