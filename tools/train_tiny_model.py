"""Train the tiny model, a CogVideoX 1.5, on clips of moving shapes, and save it in diffusers' folder layout.

    python -m tools.train_tiny_model --output_dir training/model --work_dir training

The script makes a tokenizer, trains the VAE, and then trains text encoder and transformer together by v-prediction,
with some prompts dropped for guidance. That takes about 25 minutes on a CPU core or two. The script saves a checkpoint
in --work_dir each minute, and continues from there when it is started again.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX, CogVideoXImageToVideoPipeline, CogVideoXPipeline, ModelMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import PreTrainedModel

from cogvideox.cli.parser import ArgumentParser
from cogvideox.cli.program import run
from cogvideox.cli.terminal import bar_options
from cogvideox.cli.types import folder_path, number
from cogvideox.defaults import FPS, NUM_STEPS
from cogvideox.files import generation_defaults
from cogvideox.models.transformer.embeddings import OFS
from cogvideox.run.accelerator import prepare_libraries
from tools import moving_shapes
from tools.make_tiny_model import make_pipeline
from tools.moving_shapes import FRAMES, GUIDANCE_SCALE, SIZE, Caption

MODEL: dict[str, Any] = dict(
    num_attention_heads=4,  # so that 2 or 4 chips can share them evenly
    attention_head_dim=48,
    num_layers=4,
    time_embed_dim=128,
    vae_channels=(16, 16, 32, 32),
    vae_groups=2,
)
CHECKPOINT_SECONDS = 60

# The VAE
LATENT_NOISE = 0.08  # standard deviation of the posterior, and of the noise with which the decoder is trained
TAUGHT_NOISE = 0.15  # the same while the VAE learns principal components
WHITENING = 0.7  # 0 leaves the standard deviations of the principal components as they are, 1 makes them equal

# The transformer
CLIPS = 1500  # encoded once, before the training
VARIETY = 0.1  # of those clips, see moving_shapes.render; training with 1 would take days on two cores
BATCH_SIZE = 32
PROMPT_DROPOUT = 0.1
FULL_TEXT = 0.04  # share of the batches whose text is padded to the full length, as the pipelines pad it
FULL_TEXT_BATCH_SIZE = 8


class Part(NamedTuple):
    """One part of the training: its number of batches, and the settings of Muon and Adam."""

    steps: int
    learning_rate: float  # of Muon; that of Adam is a tenth of it
    schedule: str  # diffusers' name of the learning rate's schedule after its warm-up
    averaging: float  # decay of the running mean of the weights, which is the result


PARTS = {
    "vae_taught": Part(1000, 0.02, "linear", 0.99),
    "vae_together": Part(550, 0.01, "linear", 0.99),
    "vae_decoder": Part(1300, 0.02, "linear", 0.99),
    "transformer": Part(1800, 0.02, "cosine", 0.995),
    "image_to_video": Part(2200, 0.02, "cosine", 0.995),  # by train_tiny_image_model.py
}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(__doc__.splitlines()[0], prog="python -m tools.train_tiny_model")
    parser.add_argument("--output_dir", type=folder_path, default=Path("training/model"), help="where the model goes")
    parser.add_argument("--work_dir", type=folder_path, default=Path("training"), help="where the checkpoints go")
    parser.add_argument(
        "--effort", type=number(float, 0), default=1.0, help="factor on the numbers of batches and clips"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="seed of data, weights and noise")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train all parts, and write the model in bfloat16 to --output_dir."""
    arguments = parse_arguments(argv)
    prepare_libraries()
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    start = arguments.work_dir / "untrained"
    if not (start / "model_index.json").exists():
        words = sorted({word for caption in moving_shapes.ALL for word in str(caption).split()})
        make_pipeline(start, **MODEL, words=words, seed=arguments.seed)
    pipeline = CogVideoXPipeline.from_pretrained(start)
    pipeline.to(arguments.device)
    train_vae(pipeline.vae, arguments)
    latents, prompts = encoded_clips(pipeline, arguments)
    train_transformer(pipeline, latents, prompts, arguments)
    shutil.copytree(start, arguments.output_dir, dirs_exist_ok=True)
    for name in ("vae", "text_encoder", "transformer"):
        save(getattr(pipeline, name), arguments.output_dir / name)
    save_generation_defaults(arguments.output_dir)
    print(f"wrote {arguments.output_dir}")


def save(module: ModelMixin | PreTrainedModel, folder: Path) -> None:
    """Write a part of a pipeline in bfloat16 to its folder."""
    module.to("cpu", torch.bfloat16).save_pretrained(folder)
    config = folder / "config.json"
    entries = json.loads(config.read_text())
    entries.pop("_name_or_path", None)  # where it lay on this machine
    config.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")


def save_generation_defaults(model: Path) -> None:
    """Write to a model's folder what the model is made for: the clips."""
    made_for: dict[str, float] = {"height": SIZE, "width": SIZE, "frames": FRAMES, "num_inference_steps": NUM_STEPS}
    made_for |= {"guidance_scale": GUIDANCE_SCALE, "fps": FPS}
    (model / generation_defaults.FILE).write_text(json.dumps(made_for, indent=2) + "\n")


# --- The VAE -----------------------------------------------------------------------------------------------------


def train_vae(vae: AutoencoderKLCogVideoX, arguments: argparse.Namespace) -> None:
    """Teach encoder and decoder principal components of the clips, then train both together, then the decoder alone.

    Trained together from the start, they need thousands of batches before a video shows anything. Principal components
    of blocks of pixels are good latents from the first batch on: the decoder learns to decode them while the encoder
    learns to compute them. Later the latents stay near them, which makes the transformer's task easier. At the end the
    decoder is trained alone, because its errors are what people see.
    """
    components = principal_components(vae.config.latent_channels, arguments)
    with torch.no_grad():  # the standard deviation of the posterior becomes constant; training does not change it
        mean_and_log_variance = vae.encoder.conv_out.conv
        mean_and_log_variance.weight[vae.config.latent_channels :] = 0
        mean_and_log_variance.bias[vae.config.latent_channels :] = 2 * np.log(LATENT_NOISE)

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return vae.encode(pixels).latent_dist.mean.float()

    def drawing_error(latents: torch.Tensor, noise: float, pixels: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(vae.decode(latents + noise * torch.randn_like(latents)).sample.float(), pixels)

    def taught(generator: np.random.Generator, progress: float) -> torch.Tensor:
        pixels = random_pixels(generator, arguments.device, 4, 9, SIZE // 2)
        latents = components(pixels)
        return drawing_error(latents, TAUGHT_NOISE, pixels) + F.mse_loss(encode(pixels), latents)

    def together(generator: np.random.Generator, progress: float) -> torch.Tensor:
        pixels = random_pixels(generator, arguments.device, *clip_sizes(progress, 0.55))
        latents = encode(pixels)
        return drawing_error(latents, LATENT_NOISE, pixels) + 0.1 * F.mse_loss(latents, components(pixels))

    def decoder(generator: np.random.Generator, progress: float) -> torch.Tensor:
        pixels = random_pixels(generator, arguments.device, *clip_sizes(progress, 0.77), captions=more_triangles)
        with torch.no_grad():
            latents = encode(pixels)
        return drawing_error(latents, LATENT_NOISE, pixels)

    def clip_sizes(progress: float, share_of_short: float) -> tuple[int, int, int]:
        """Return clips, frames and size of a batch: two short clips at first, then a whole one, as at inference."""
        return (2, 9, SIZE) if progress < share_of_short else (1, FRAMES, SIZE)

    # A decoder blurs the tips of triangles first, and without them a triangle looks like another shape.
    known = moving_shapes.trained_on()
    more_triangles = (*known, *(caption for caption in known if caption.shape == "triangle"))
    fit("vae_taught", {"vae": vae}, taught, arguments)
    fit("vae_together", {"vae": vae}, together, arguments)
    fit("vae_decoder", {"decoder": vae.decoder}, decoder, arguments)


def principal_components(number: int, arguments: argparse.Namespace) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function from pixels [B, 3, F, H, W] to latents of unit variance [B, number, T, H / 8, W / 8].

    The latents are the `number` largest principal components of blocks of pixels. A latent frame stands for four
    frames; the first latent frame stands for the first frame alone, which is therefore repeated four times.
    """

    def blocks(pixels: torch.Tensor) -> torch.Tensor:
        """Return the pixels that each latent stands for, [B, T, H / 8, W / 8, 768]."""
        pixels = torch.cat([pixels[:, :, :1].expand(-1, -1, 3, -1, -1), pixels], dim=2)
        return pixels.unfold(2, 4, 4).unfold(3, 8, 8).unfold(4, 8, 8).permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4)

    generator = np.random.default_rng([arguments.seed, 1])
    samples = blocks(random_pixels(generator, arguments.device, 100, FRAMES, SIZE)).flatten(0, 3).double()
    mean = samples.mean(dim=0)
    variances, directions = torch.linalg.eigh((samples - mean).T @ (samples - mean) / len(samples))
    variances, directions = variances[-number:], directions[:, -number:]
    scales = variances ** (-WHITENING / 2)
    scales /= (variances * scales**2).mean().sqrt()
    mean, matrix = mean.float(), (directions * scales).float()
    return lambda pixels: ((blocks(pixels) - mean) @ matrix).movedim(-1, 1)


# --- The transformer ---------------------------------------------------------------------------------------------


@torch.no_grad()
def encoded_clips(pipeline: CogVideoXPipeline, arguments: argparse.Namespace) -> tuple[torch.Tensor, list[str]]:
    """Return latents [clips, T, C, H, W] of random clips, scaled to unit variance, and their prompts.

    Latents and prompts are kept in the work folder. The VAE's scaling_factor is set to the scale.
    """
    path = arguments.work_dir / "latents.pt"
    if not path.exists():
        start = time.monotonic()
        generator = np.random.default_rng([arguments.seed, 2])
        encoded: list[torch.Tensor] = []
        prompts: list[str] = []
        for _ in tqdm(range(share(CLIPS, arguments) // 10 + 1), desc="encoding", unit="batch", **bar_options()):
            clips, captions = random_clips(generator, 10, VARIETY)
            encoded.append(posterior(pipeline.vae, clips, arguments.device).mean.float().cpu())
            prompts += map(str, captions)
        torch.save((torch.cat(encoded).permute(0, 2, 1, 3, 4), prompts), path)
        print(f"encoding: {len(prompts)} clips in {time.monotonic() - start:.0f} s")
    latents, prompts = torch.load(path)
    factor = float(1 / latents.std())
    pipeline.vae.register_to_config(scaling_factor=factor)
    return latents * factor, prompts


def train_transformer(
    pipeline: CogVideoXPipeline, latents: torch.Tensor, prompts: list[str], arguments: argparse.Namespace
) -> None:
    """Train transformer and text encoder to predict v of noised latents."""
    # Rotary embeddings give the model relative positions only. Random biases of queries and keys make attention depend
    # on position but not on content, and differ near the frame's edge. From that the model learns absolute positions.
    torch.manual_seed(arguments.seed)
    for block in pipeline.transformer.transformer_blocks:
        for norm in (block.attn1.norm_q, block.attn1.norm_k):
            torch.nn.init.normal_(norm.bias, std=1.5)
    loss = velocity_loss(pipeline, latents, prompts, arguments.device)
    fit("transformer", {"transformer": pipeline.transformer, "text_encoder": pipeline.text_encoder}, loss, arguments)


def velocity_loss(
    pipeline: CogVideoXPipeline | CogVideoXImageToVideoPipeline,
    latents: torch.Tensor,
    prompts: list[str],
    device: str,
    beside: Callable[[np.ndarray], torch.Tensor] | None = None,
) -> Callable[[np.random.Generator, float], torch.Tensor]:
    """Return a loss as `fit` takes it: the error of v, which the transformer predicts, of some clips and their prompts.

    Args:
        pipeline: transformer, text encoder, tokenizer and scheduler.
        latents: [clips, T, C, H, W]. Copies of the first latent frame are put in front, as many as the last temporal
            patch lacks.
        prompts: one for each clip.
        device: where the modules are.
        beside: for an image model: from the indices of some clips to what stands beside the noisy latents in channels,
            [clips, T with the copies, C, H, W].
    """
    transformer, scheduler = pipeline.transformer, pipeline.scheduler
    surplus = -latents.shape[1] % transformer.config.patch_size_t
    latents = torch.cat([latents[:, :1].expand(-1, surplus, -1, -1, -1), latents], dim=1)
    rotary = pipeline._prepare_rotary_positional_embeddings(SIZE, SIZE, latents.shape[1], torch.device(device))
    most = transformer.config.max_text_seq_length
    tokens = pipeline.tokenizer([*prompts, ""], padding="max_length", max_length=most, return_tensors="pt").input_ids
    least = int((tokens != pipeline.tokenizer.pad_token_id).sum(dim=1).max())
    options = {"image_rotary_emb": rotary, "return_dict": False}
    if transformer.config.ofs_embed_dim:
        options["ofs"] = torch.full((1,), OFS, device=device)

    def loss(generator: np.random.Generator, progress: float) -> torch.Tensor:
        # CogVideoX attends to the padding of the text too. Most batches have a short padding, which is cheap, but the
        # model must also learn the full one.
        full = generator.random() < FULL_TEXT
        size, length = (FULL_TEXT_BATCH_SIZE, most) if full else (BATCH_SIZE, generator.integers(least, least + 7))
        chosen = generator.integers(0, len(prompts), size)
        dropped = generator.random(size) < PROMPT_DROPOUT
        x = latents[chosen].to(device)
        noise = torch.randn(x.shape).to(device)
        # Each batch has steps from all of the range, and more of them with much noise, where the prompt matters most.
        spread = (generator.permutation(size) + generator.random(size)) / size
        steps = torch.from_numpy((scheduler.config.num_train_timesteps * spread**0.8).astype(int)).to(device)
        text = pipeline.text_encoder(tokens[np.where(dropped, len(prompts), chosen), :length].to(device))
        noisy = scheduler.add_noise(x, noise, steps)
        seen = noisy if beside is None else torch.cat([noisy, beside(chosen).to(device)], dim=2)
        with sdpa_kernel(SDPBackend.MATH):  # faster on a CPU at this size than the backward pass of the fused kernels
            (v,) = transformer(seen, text.last_hidden_state, steps, **options)
        return F.mse_loss(v.float(), scheduler.get_velocity(x, noise, steps))

    return loss


# --- Shared ------------------------------------------------------------------------------------------------------


class Optimization:
    """Optimizers of modules, and the running mean of their weights.

    Muon optimizes the matrices inside the blocks, Adam the other parameters: first and last layers, norms, embeddings
    (https://kellerjordan.github.io/posts/muon).

    Args:
        modules: the modules that are trained, by the names that they have in a checkpoint.
        part: learning rate, its schedule, and decay of the running mean.
        steps: number of steps of the whole part.
    """

    def __init__(self, modules: dict[str, torch.nn.Module], part: Part, steps: int):
        named = [pair for module in modules.values() for pair in module.named_parameters()]
        self._parameters = [parameter for _, parameter in named]
        self._hidden = [p for key, p in named if "block" in key and "norm" not in key and "bias" not in key]
        others = [p for p in self._parameters if not any(p is q for q in self._hidden)]
        # Muon takes only matrices. These share their memory with the convolutions' [out, in, time, height, width].
        self._matrices = [torch.nn.Parameter(weight.detach().flatten(1)) for weight in self._hidden]
        muon = torch.optim.Muon(self._matrices, part.learning_rate, weight_decay=0)
        adam = torch.optim.Adam(others, part.learning_rate / 10, betas=(0.9, 0.99))
        self._mean = EMAModel(self._parameters, decay=part.averaging)
        schedules = [
            get_scheduler(part.schedule, optimizer, num_warmup_steps=30, num_training_steps=steps)
            for optimizer in (muon, adam)
        ]
        self._steppers = [muon, adam, *schedules]
        names = ("muon", "adam", "schedule of Muon", "schedule of Adam")
        self._saved = modules | dict(zip(names, self._steppers, strict=True)) | {"mean": self._mean}

    def step(self) -> None:
        """Clip the gradients, update the weights and their running mean, and remove the gradients."""
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for matrix, weight in zip(self._matrices, self._hidden, strict=True):
            assert weight.grad is not None  # the loss depends on all of them
            matrix.grad = weight.grad.flatten(1)
        for stepper in self._steppers:
            stepper.step()
        for parameter in self._parameters:
            parameter.grad = None
        self._mean.step(self._parameters)

    def finish(self) -> None:
        """Set the weights to their running mean."""
        self._mean.copy_to(self._parameters)

    def save(self, path: Path, step: int, seconds: float) -> None:
        """Write a checkpoint after `step` steps and `seconds`; the old one is replaced when the new one is complete."""
        values = {name: part.state_dict() for name, part in self._saved.items()}
        torch.save(values | {"step": step, "seconds": seconds}, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path, device: str) -> tuple[int, float]:
        """Restore everything from a checkpoint; return its steps and seconds."""
        saved = torch.load(path, map_location=device)
        step, seconds = saved.pop("step"), saved.pop("seconds")
        for name, value in saved.items():
            self._saved[name].load_state_dict(value)
        return step, seconds


def fit(
    name: str,
    modules: dict[str, torch.nn.Module],
    loss: Callable[[np.random.Generator, float], torch.Tensor],
    arguments: argparse.Namespace,
) -> None:
    """Minimise `loss(generator, progress)` in bfloat16 autocast, with the settings of the part `name`.

    Progress goes from 0 to 1. At the end the weights are set to their running mean. The function continues from the
    part's checkpoint in the work folder if there is one. The random numbers of a step depend only on the seed and on
    the number of the step, so that an interrupted run ends with the same weights as one that was not interrupted.
    """
    part = PARTS[name]
    steps = share(part.steps, arguments)
    path = arguments.work_dir / f"{name}.pt"
    optimization = Optimization(modules, part, steps)
    done, seconds = optimization.load(path, arguments.device) if path.exists() else (0, 0.0)
    start = saved_at = time.monotonic()
    shown = None
    with tqdm(total=steps, initial=done, desc=name, unit="step", **bar_options()) as bar:
        for step in range(done, steps):
            generator = np.random.default_rng([arguments.seed, 3, step])
            torch.manual_seed(generator.integers(2**63))
            with torch.autocast(torch.device(arguments.device).type, torch.bfloat16):
                value = loss(generator, step / steps)
            value.backward()
            optimization.step()
            shown = value.item() if shown is None else 0.98 * shown + 0.02 * value.item()
            bar.set_postfix(loss=f"{shown:.4f}")
            bar.update()
            if step + 1 == steps or time.monotonic() - saved_at > CHECKPOINT_SECONDS:
                saved_at = time.monotonic()
                optimization.save(path, step + 1, seconds + saved_at - start)
    optimization.finish()
    print(f"{name}: {steps} batches in {seconds + time.monotonic() - start:.0f} s")


def share(number: int, arguments: argparse.Namespace) -> int:
    """Return `number` times --effort, rounded."""
    return round(number * arguments.effort)


def random_clips(
    generator: np.random.Generator,
    number: int,
    variety: float = 1.0,
    captions: Sequence[Caption] = moving_shapes.trained_on(),
    steady: bool = False,
) -> tuple[list[np.ndarray], list[Caption]]:
    """Return `number` random clips, uint8 [frames, size, size, 3], and their captions, drawn from `captions`."""
    chosen = [captions[i] for i in generator.integers(0, len(captions), number)]
    return [moving_shapes.render(caption, generator, variety=variety, steady=steady) for caption in chosen], chosen


def random_pixels(
    generator: np.random.Generator, device: str, number: int, frames: int, size: int, **options: Any
) -> torch.Tensor:
    """Cut random pieces from random clips, float32 [number, 3, frames, size, size] in [-1, 1]."""
    clips, _ = random_clips(generator, number, **options)
    lengths = frames, size, size
    pieces = []
    for clip in clips:
        starts = [generator.integers(0, whole - part + 1) for whole, part in zip(clip.shape, lengths, strict=False)]
        pieces.append(clip[tuple(slice(start, start + part) for start, part in zip(starts, lengths, strict=True))])
    return to_tensor(pieces, device)


def posterior(vae: AutoencoderKLCogVideoX, clips: Sequence[np.ndarray], device: str) -> DiagonalGaussianDistribution:
    """Encode clips, uint8 [frames, height, width, 3] each, in bfloat16 autocast."""
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        return vae.encode(to_tensor(clips, device)).latent_dist


def to_tensor(clips: Sequence[np.ndarray], device: str) -> torch.Tensor:
    """Turn uint8 clips [frames, height, width, 3] into one tensor [clips, 3, frames, height, width] in [-1, 1]."""
    return torch.from_numpy(np.stack(clips)).to(device).permute(0, 4, 1, 2, 3) / 127.5 - 1


if __name__ == "__main__":
    run(main)
