"""Make a small CogVideoX pipeline with random weights, in diffusers' folder layout.

It has every part of a published model (tokenizer, text encoder, transformer, VAE, scheduler), by default of
zai-org/CogVideoX1.5-5B, at a size that a laptop runs in seconds. The weights are untrained and drawn from a seed. Most
tests run such a model, and the training of the tiny model starts from one (train_tiny_model.py).

    python -m tools.make_tiny_model --output_dir random_model
    python -m tools.make_tiny_model --output_dir random_image_model --kind CogVideoX-5B-I2V
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import sentencepiece
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    SchedulerMixin,
)
from transformers import T5Config, T5EncoderModel, T5Tokenizer
from transformers.utils.logging import disable_progress_bar

from cogvideox.cli.parser import ArgumentParser
from cogvideox.cli.program import run
from cogvideox.cli.types import folder_path

TOKENIZER_TEXT = (
    "a panda playing guitar in a bamboo forest",
    "a red circle moving left on a white background",
    "a blue square moving right over a green field",
    "a yellow triangle going up and down at night",
    "the quick brown fox jumps over the lazy dog",
    "slow camera, cinematic light, high quality, blurry, low quality",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789 .,;:!?'\"()-",
)


class Kind(NamedTuple):
    """What a published model has that others have not, as entries of its configs."""

    transformer: Mapping[str, Any]
    vae: Mapping[str, Any] = MappingProxyType({})
    scheduler: Mapping[str, Any] = MappingProxyType({})
    takes_image: bool = False
    has_ofs: bool = False


TEMPORAL = dict(patch_size_t=2, patch_bias=False, use_rotary_positional_embeddings=True, sample_frames=81)
FLAT = dict(patch_size_t=None, sample_frames=49)
KINDS = {
    "CogVideoX1.5-5B": Kind(TEMPORAL),
    "CogVideoX1.5-5B-I2V": Kind(TEMPORAL, {"invert_scale_latents": True}, takes_image=True, has_ofs=True),
    "CogVideoX-5B": Kind({**FLAT, "use_rotary_positional_embeddings": True}),
    "CogVideoX-2B": Kind(FLAT, {"scaling_factor": 1.15258426}, {"snr_shift_scale": 3.0}),
    "CogVideoX-5B-I2V": Kind(
        {**FLAT, "use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True}, takes_image=True
    ),
}
SCHEDULER = dict(
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    clip_sample=False,
    prediction_type="v_prediction",
    rescale_betas_zero_snr=True,
    set_alpha_to_one=True,
    snr_shift_scale=1.0,
    timestep_spacing="trailing",
)


def make_tokenizer(folder: Path, max_length: int, words: Sequence[str] = ()) -> T5Tokenizer:
    """Train a T5 sentencepiece vocabulary on TOKENIZER_TEXT; write it to `folder` as `spiece.model`, as CogVideoX does.

    Each of `words` becomes one token. Training on so few lines would split it into letters.
    """
    vocabulary = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TOKENIZER_TEXT * 10),
        model_writer=vocabulary,
        vocab_size=192,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        user_defined_symbols=[f"\N{LOWER ONE EIGHTH BLOCK}{word}" for word in words],  # the sign for a space
        num_threads=1,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(vocabulary.getvalue())
    config = dict(tokenizer_class="T5Tokenizer", model_max_length=max_length, extra_ids=100)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return T5Tokenizer.from_pretrained(folder)


def make_text_encoder(vocabulary_size: int, width: int, layers: int) -> T5EncoderModel:
    """Return a T5 encoder with random weights, drawn from torch's global generator."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary_size,
            d_model=width,
            d_kv=width // 4,
            d_ff=2 * width,
            num_heads=4,
            num_layers=layers,
            feed_forward_proj="gated-gelu",
        )
    )


def make_vae(
    channels: Sequence[int], latent_channels: int, layers: int, groups: int, **options: Any
) -> AutoencoderKLCogVideoX:
    """Return a VAE with random weights, drawn from torch's global generator."""
    return AutoencoderKLCogVideoX(
        block_out_channels=channels,
        down_block_types=("CogVideoXDownBlock3D",) * len(channels),
        up_block_types=("CogVideoXUpBlock3D",) * len(channels),
        latent_channels=latent_channels,
        layers_per_block=layers,
        norm_num_groups=groups,
        **{"scaling_factor": 0.7} | options,
    )


def make_pipeline(
    folder: Path,
    *,
    kind: str = "CogVideoX1.5-5B",
    num_attention_heads: int = 4,
    attention_head_dim: int = 32,
    num_layers: int = 2,
    time_embed_dim: int = 64,
    text_width: int = 64,
    text_layers: int = 2,
    max_text_seq_length: int = 226,
    latent_channels: int = 16,
    vae_channels: tuple[int, ...] = (16, 16, 32, 32),
    vae_layers: int = 1,
    vae_groups: int = 8,
    sample_size: int | tuple[int, int] = 60,
    sample_frames: int | None = None,
    words: Sequence[str] = (),
    scheduler_class: type[SchedulerMixin] = CogVideoXDDIMScheduler,
    seed: int = 0,
) -> None:
    """Write a pipeline with random float32 weights to `folder`.

    The other arguments have the names that they have in the configs of diffusers and transformers.

    Args:
        folder: where the pipeline is written; it is made if it is missing.
        kind: of which published model it has the features, a key of KINDS.
        words: words of which each is one token.
        sample_size: height and width, in latent pixels, for which its positions are: of temporal patches the largest.
        sample_frames: of the video for which learned positions are; None for those of the published model.
        scheduler_class: class of the scheduler.
        seed: of the random weights.
    """
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(folder / "tokenizer", max_text_seq_length, words)
    text_encoder = make_text_encoder(len(tokenizer), text_width, text_layers)
    features = KINDS[kind]
    vae = make_vae(vae_channels, latent_channels, vae_layers, vae_groups, **features.vae)
    sample_height, sample_width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=num_attention_heads,
        attention_head_dim=attention_head_dim,
        in_channels=latent_channels * (2 if features.takes_image else 1),
        out_channels=latent_channels,
        num_layers=num_layers,
        time_embed_dim=time_embed_dim,
        ofs_embed_dim=time_embed_dim if features.has_ofs else None,
        text_embed_dim=text_width,
        max_text_seq_length=max_text_seq_length,
        patch_size=2,
        sample_width=sample_width,
        sample_height=sample_height,
        **{**features.transformer, **({"sample_frames": sample_frames} if sample_frames else {})},
    )
    if features.transformer.get("use_learned_positional_embeddings"):
        torch.nn.init.normal_(transformer.patch_embed.pos_embedding)
    scheduler = scheduler_class(**{**SCHEDULER, **features.scheduler})
    pipeline = CogVideoXImageToVideoPipeline if features.takes_image else CogVideoXPipeline
    pipeline(tokenizer, text_encoder, vae, transformer, scheduler).save_pretrained(folder)
    # The published model has only the sentencepiece file; transformers would read tokenizer.json instead of it.
    (folder / "tokenizer" / "tokenizer.json").unlink()


def main(argv: Sequence[str] | None = None) -> None:
    """Write a model to --output_dir, and print its size in MB."""
    parser = ArgumentParser(__doc__.splitlines()[0], prog="python -m tools.make_tiny_model")
    parser.add_argument("--output_dir", type=folder_path, default=Path("random_model"), help="where the model goes")
    parser.add_argument(
        "--kind", choices=KINDS, default=next(iter(KINDS)), help="the published model whose features it has"
    )
    arguments = parser.parse_args(argv)
    disable_progress_bar()
    make_pipeline(arguments.output_dir, kind=arguments.kind)
    size = sum(file.stat().st_size for file in arguments.output_dir.rglob("*") if file.is_file())
    print(f"model: {arguments.output_dir} ({size / 1e6:.1f} MB)")


if __name__ == "__main__":
    run(main)
