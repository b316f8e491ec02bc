"""Train the tiny image-to-video model, which goes on from the tiny model, on clips of moving shapes.

    python -m tools.train_tiny_image_model --output_dir training/image_model --work_dir training

The transformer gets channels for the picture, whose weights are zero at first, and an embedding of `ofs` as
CogVideoX1.5-5B-I2V has it. It learns to animate the first frame of a clip: shape, colours and place come from the
picture, the direction comes from the prompt. The other parts of the tiny model stay as they are; the new folder has
relative links to them. That takes about 13 minutes on a CPU core. A checkpoint is saved in --work_dir each minute, and
the script continues from there when it is started again.
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from tqdm import tqdm

from cogvideox.cli.parser import ArgumentParser
from cogvideox.cli.program import run
from cogvideox.cli.terminal import bar_options
from cogvideox.cli.types import folder_path, number
from cogvideox.files.names import ROOT
from cogvideox.run.accelerator import prepare_libraries
from tools import moving_shapes
from tools.moving_shapes import prompts_of
from tools.train_tiny_model import (
    fit,
    posterior,
    random_clips,
    save,
    save_generation_defaults,
    share,
    velocity_loss,
)

CLIPS = 4000  # encoded once, before the training
SHARED = ("scheduler", "text_encoder", "tokenizer", "vae")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(__doc__.splitlines()[0], prog="python -m tools.train_tiny_image_model")
    parser.add_argument(
        "--text_model", type=folder_path, default=ROOT / "tiny_model", help="where it goes on from, and links to"
    )
    parser.add_argument("--output_dir", type=folder_path, default=Path("training/image_model"), help="for the model")
    parser.add_argument("--work_dir", type=folder_path, default=Path("training"), help="where the checkpoints go")
    parser.add_argument(
        "--effort", type=number(float, 0), default=1.0, help="factor on the numbers of batches and clips"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="seed of data and noise")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train the transformer, and write the model in bfloat16 to --output_dir."""
    arguments = parse_arguments(argv)
    prepare_libraries()
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    text_model = CogVideoXPipeline.from_pretrained(arguments.text_model, dtype=torch.float32)
    parts = text_model.components | {"transformer": with_picture(text_model.transformer)}
    pipeline = CogVideoXImageToVideoPipeline(**parts).to(arguments.device)
    pipeline.text_encoder.requires_grad_(False)
    clips = encoded_clips(pipeline, arguments)
    loss = velocity_loss(pipeline, clips.latents, clips.prompts, arguments.device, clips.picture_latents)
    fit("image_to_video", {"transformer": pipeline.transformer}, loss, arguments)
    save_model(pipeline, arguments.text_model, arguments.output_dir)
    print(f"wrote {arguments.output_dir}")


def with_picture(text: CogVideoXTransformer3DModel) -> CogVideoXTransformer3DModel:
    """Return a transformer that also takes the latents of a picture, and `ofs`, and begins as `text` without them."""
    config = dict(text.config) | {
        "in_channels": 2 * text.config.in_channels,
        "ofs_embed_dim": text.config.time_embed_dim,  # the two embeddings are added
    }
    transformer = CogVideoXTransformer3DModel.from_config(config)
    transformer.load_state_dict(text.state_dict() | _new_weights(transformer, text))
    return transformer


def _new_weights(transformer: CogVideoXTransformer3DModel, text: CogVideoXTransformer3DModel) -> dict:
    """Return the weights of the image transformer that the text transformer lacks, or has in another shape."""
    ofs = {f"ofs_embedding.{key}": value for key, value in transformer.ofs_embedding.state_dict().items()}
    ofs |= {key: torch.zeros_like(value) for key, value in ofs.items() if ".linear_2." in key}
    of_noise = text.patch_embed.proj.weight.detach()  # [out, channels x patch]: the picture's channels follow
    return ofs | {"patch_embed.proj.weight": torch.cat([of_noise, torch.zeros_like(of_noise)], dim=1)}


class Clips(NamedTuple):
    """Clips of the training, encoded by the VAE."""

    latents: torch.Tensor  # [clips, T, C, H, W], scaled
    posteriors: torch.Tensor  # of the first frames alone: mean and logarithm of the variance, [clips, 2 C, 1, H, W]
    prompts: list[str]
    scaling_factor: float
    frames: int  # of the transformer: T, and as many as the last temporal patch lacks

    def picture_latents(self, chosen: np.ndarray) -> torch.Tensor:
        """Return what the pipeline sets beside the noise of clips, [len(chosen), frames, C, H, W].

        It is a sample of the picture's posterior in the very first frame, and zeros in the others.
        """
        sample = DiagonalGaussianDistribution(self.posteriors[chosen]).sample().permute(0, 2, 1, 3, 4)
        rest = torch.zeros_like(sample).expand(-1, self.frames - 1, -1, -1, -1)
        return torch.cat([self.scaling_factor * sample, rest], dim=1)


@torch.no_grad()
def encoded_clips(pipeline: CogVideoXImageToVideoPipeline, arguments: argparse.Namespace) -> Clips:
    """Return encoded random clips, whose pictures and captions are not held out; they are kept in the work folder."""
    path = arguments.work_dir / "image_latents.pt"
    if not path.exists():
        start = time.monotonic()
        generator = np.random.default_rng([arguments.seed, 4])
        kept_out = {*moving_shapes.held_out(), *moving_shapes.held_out_pictures()}
        known = tuple(caption for caption in moving_shapes.ALL if caption not in kept_out)
        latents, posteriors, prompts = [], [], []
        for _ in tqdm(range(share(CLIPS, arguments) // 10 + 1), desc="encoding", unit="batch", **bar_options()):
            clips, captions = random_clips(generator, 10, captions=known, steady=True)
            latents.append(posterior(pipeline.vae, clips, arguments.device).mean.float().cpu())
            pictures = [clip[:1] for clip in clips]
            posteriors.append(posterior(pipeline.vae, pictures, arguments.device).parameters.float().cpu())
            prompts += [prompts_of(caption)[generator.integers(2)] for caption in captions]
        torch.save((torch.cat(latents).permute(0, 2, 1, 3, 4), torch.cat(posteriors), prompts), path)
        print(f"encoding: {len(prompts)} clips in {time.monotonic() - start:.0f} s")
    latents, posteriors, prompts = torch.load(path)
    factor = pipeline.vae.config.scaling_factor
    frames = latents.shape[1] + -latents.shape[1] % pipeline.transformer.config.patch_size_t
    return Clips(factor * latents, posteriors, prompts, factor, frames)


def save_model(pipeline: CogVideoXImageToVideoPipeline, text_model: Path, folder: Path) -> None:
    """Write transformer and settings to `folder`, and relative links to what the text model has too."""
    save(pipeline.transformer, folder / "transformer")
    pipeline.save_config(folder)
    for name in SHARED:
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(text_model / name, folder), target_is_directory=True)
    save_generation_defaults(folder)


if __name__ == "__main__":
    run(main)
