"""Train a small CogVideoX 1.5 on made-up clips of moving shapes, and save it in diffusers' folder layout.

    python -m tools.train_tiny_model --output_dir tiny_model --work_dir training

It makes a tokenizer, then trains the VAE, then text encoder and transformer together (v-prediction, prompts dropped at
times for guidance). Two free CPU cores take about 20 minutes. Every part leaves a checkpoint in --work_dir each minute
and goes on from there when the script is started again.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from console import ArgumentParser, number, prepare_libraries, run
from tools import moving_shapes
from tools.make_tiny_model import make_pipeline
from tools.moving_shapes import FRAMES, SIZE, Caption

MODEL = dict(
    num_attention_heads=4,  # a number that the chips of a slice can share
    attention_head_dim=48,
    num_layers=4,
    time_embed_dim=128,
    vae_channels=(16, 16, 32, 32),
    vae_groups=2,
)
CHECKPOINT_SECONDS = 60

# The VAE
LATENT_NOISE = 0.08  # deviation of the posterior: the decoder learns to draw from latents that are off by as much
TAUGHT_NOISE = 0.15  # the same while it learns from components
WHITENING = 0.7  # of the components: 0 leaves their deviations as they are, 1 makes them equal

# The transformer
CLIPS = 1500  # encoded once
VARIETY = 0.1  # of those clips; with all of it two cores would take days
BATCH_SIZE = 32
PROMPT_DROPOUT = 0.1
FULL_TEXT, FULL_TEXT_BATCH_SIZE = 0.04, 8  # share of the batches whose text is padded as far as the pipelines pad it


class Part(NamedTuple):
    """One part of the training: its batches, and how Muon and Adam take them."""

    steps: int
    learning_rate: float  # of Muon; Adam's is a tenth of it
    schedule: str  # diffusers' name of what the learning rate does after its warm-up
    averaging: float  # of the running mean that the weights end as


PARTS = {
    "vae_taught": Part(1000, 0.02, "linear", 0.99),
    "vae_together": Part(550, 0.01, "linear", 0.99),
    "vae_decoder": Part(1300, 0.02, "linear", 0.99),
    "transformer": Part(1800, 0.02, "cosine", 0.995),
}


def parse_arguments():
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("tiny_model"), help="where the model goes")
    parser.add_argument("--work_dir", type=Path, default=Path("training"), help="checkpoints")
    parser.add_argument(
        "--effort", type=number(float, 0), default=1.0, help="share of the recipe's batches and clips to train with"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of data, weights and noise")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
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
        getattr(pipeline, name).to("cpu", torch.bfloat16).save_pretrained(arguments.output_dir / name)
    print(f"wrote {arguments.output_dir}")


# --- The VAE -----------------------------------------------------------------------------------------------------


def train_vae(vae: AutoencoderKLCogVideoX, arguments) -> None:
    """Teach both halves the clips' principal components, then train them together, then the decoder alone.

    Left to invent latents together, the halves need thousands of batches before anything can be seen. Components of
    blocks of pixels are latents that are good at once: the decoder learns to draw from them while the encoder learns to
    give them. They stay near them, which the transformer finds easier. The decoder, whose strokes people look at, then
    goes on by itself.
    """
    components = principal_components(vae.config.latent_channels, arguments)
    with torch.no_grad():  # a constant posterior deviation, which no part changes
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

    def clip_sizes(progress: float, halves: float) -> tuple[int, int, int]:
        """Clips, frames and size of a batch: two halves at first, then a whole one, as the norms will see them."""
        return (2, 9, SIZE) if progress < halves else (1, FRAMES, SIZE)

    # The tips of triangles are the first that a decoder blurs, and what a triangle is known by.
    known = moving_shapes.trained_on()
    more_triangles = (*known, *(caption for caption in known if caption.shape == "triangle"))
    fit("vae_taught", {"vae": vae}, taught, arguments)
    fit("vae_together", {"vae": vae}, together, arguments)
    fit("vae_decoder", {"decoder": vae.decoder}, decoder, arguments)


def principal_components(number: int, arguments) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from pixels [B, 3, F, H, W] to latents of unit variance [B, number, T, H / 8, W / 8].

    A latent frame stands for four frames, the first one for the first frame alone, here repeated four times.
    """

    def blocks(pixels: torch.Tensor) -> torch.Tensor:
        """The pixels [B, T, H / 8, W / 8, 768] that each latent stands for."""
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
def encoded_clips(pipeline: CogVideoXPipeline, arguments) -> tuple[torch.Tensor, list[str]]:
    """Latents [clips, T, C, H, W] of random clips, scaled to unit variance, and their prompts; sets scaling_factor."""
    path = arguments.work_dir / "latents.pt"
    if not path.exists():
        start = time.monotonic()
        generator = np.random.default_rng([arguments.seed, 2])
        latents, prompts = [], []
        for _ in tqdm(range(share(CLIPS, arguments) // 10 + 1), desc="encoding", unit="batch"):
            clips, captions = random_clips(generator, 10, VARIETY)
            with torch.autocast(torch.device(arguments.device).type, torch.bfloat16):
                latents.append(pipeline.vae.encode(to_tensor(clips, arguments.device)).latent_dist.mean.float().cpu())
            prompts += map(str, captions)
        torch.save((torch.cat(latents).permute(0, 2, 1, 3, 4), prompts), path)
        print(f"encoding: {len(prompts)} clips in {time.monotonic() - start:.0f} s")
    latents, prompts = torch.load(path)
    factor = float(1 / latents.std())
    pipeline.vae.register_to_config(scaling_factor=factor)
    return latents * factor, prompts


def train_transformer(pipeline: CogVideoXPipeline, latents: torch.Tensor, prompts: list[str], arguments) -> None:
    """v-prediction of noised latents; the frames that fill up the temporal patch are copies of the first one."""
    transformer, scheduler, device = pipeline.transformer, pipeline.scheduler, arguments.device
    surplus = -latents.shape[1] % transformer.config.patch_size_t
    latents = torch.cat([latents[:, :1].expand(-1, surplus, -1, -1, -1), latents], dim=1)
    rotary = pipeline._prepare_rotary_positional_embeddings(SIZE, SIZE, latents.shape[1], torch.device(device))
    most = transformer.config.max_text_seq_length
    tokens = pipeline.tokenizer([*prompts, ""], padding="max_length", max_length=most, return_tensors="pt").input_ids
    least = int((tokens != pipeline.tokenizer.pad_token_id).sum(dim=1).max())

    def loss(generator: np.random.Generator, progress: float) -> torch.Tensor:
        # CogVideoX attends to the padding of the text too; it learns both a short one, which is cheap, and the longest.
        full = generator.random() < FULL_TEXT
        size, length = (FULL_TEXT_BATCH_SIZE, most) if full else (BATCH_SIZE, generator.integers(least, least + 7))
        chosen = generator.integers(0, len(prompts), size)
        dropped = generator.random(size) < PROMPT_DROPOUT
        x = latents[chosen].to(device)
        noise = torch.randn(x.shape).to(device)
        # Spread evenly over each batch, and more where there is much noise: only there the prompt is needed.
        spread = (generator.permutation(size) + generator.random(size)) / size
        steps = torch.from_numpy((scheduler.config.num_train_timesteps * spread**0.8).astype(int)).to(device)
        text = pipeline.text_encoder(tokens[np.where(dropped, len(prompts), chosen), :length].to(device))
        noisy = scheduler.add_noise(x, noise, steps)
        with sdpa_kernel(SDPBackend.MATH):  # at this size the fused kernels' backward pass is slower on a CPU
            (v,) = transformer(noisy, text.last_hidden_state, steps, image_rotary_emb=rotary, return_dict=False)
        return F.mse_loss(v.float(), scheduler.get_velocity(x, noise, steps))

    # Rotary embeddings tell where tokens are to each other. Queries and keys with parts that depend on no content make
    # attention differ near the frame's edge, so that the model finds out early where in the frame a token is.
    torch.manual_seed(arguments.seed)
    for block in transformer.transformer_blocks:
        for norm in (block.attn1.norm_q, block.attn1.norm_k):
            torch.nn.init.normal_(norm.bias, std=1.5)
    fit("transformer", {"transformer": transformer, "text_encoder": pipeline.text_encoder}, loss, arguments)


# --- Shared ------------------------------------------------------------------------------------------------------


def fit(
    name: str,
    modules: dict[str, torch.nn.Module],
    loss: Callable[[np.random.Generator, float], torch.Tensor],
    arguments,
) -> None:
    """Minimise `loss(generator, progress)` by Muon and Adam in bfloat16 autocast; the weights end as a running mean.

    Muon takes the matrices inside the blocks, Adam the rest: first and last layers, norms, embeddings
    (https://kellerjordan.github.io/posts/muon). Progress goes from 0 to 1. Goes on from the checkpoint in the work
    folder if there is one. What a step draws depends on the seed and its number alone, so a run that was interrupted
    gives what it would have given without.
    """
    part = PARTS[name]
    steps = share(part.steps, arguments)
    path = arguments.work_dir / f"{name}.pt"
    named = [pair for module in modules.values() for pair in module.named_parameters()]
    parameters = [parameter for _, parameter in named]
    hidden = [p for key, p in named if "block" in key and "norm" not in key and "bias" not in key]
    others = [p for p in parameters if not any(p is q for q in hidden)]
    # Muon wants matrices; these share their memory with a convolution's weight [out, in, time, height, width].
    matrices = [torch.nn.Parameter(weight.detach().flatten(1)) for weight in hidden]
    muon = torch.optim.Muon(matrices, part.learning_rate, weight_decay=0)
    adam = torch.optim.Adam(others, part.learning_rate / 10, betas=(0.9, 0.99))
    mean = EMAModel(parameters, decay=part.averaging)
    state = modules | {"muon": muon, "adam": adam, "mean": mean}
    for optimizer in (muon, adam):
        schedule = get_scheduler(part.schedule, optimizer, num_warmup_steps=30, num_training_steps=steps)
        state[f"schedule of {type(optimizer).__name__}"] = schedule
    done, seconds = 0, 0.0
    if path.exists():
        saved = torch.load(path, map_location=arguments.device)
        done, seconds = saved.pop("step"), saved.pop("seconds")
        for key, value in saved.items():
            state[key].load_state_dict(value)
    start = saved_at = time.monotonic()
    shown = None
    with tqdm(total=steps, initial=done, desc=name, unit="step") as bar:
        for step in range(done, steps):
            generator = np.random.default_rng([arguments.seed, 3, step])
            torch.manual_seed(generator.integers(2**63))
            with torch.autocast(torch.device(arguments.device).type, torch.bfloat16):
                value = loss(generator, step / steps)
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for matrix, weight in zip(matrices, hidden, strict=True):
                matrix.grad = weight.grad.flatten(1)
            for key in ("muon", "adam", "schedule of Muon", "schedule of Adam"):
                state[key].step()
            for parameter in parameters:
                parameter.grad = None
            mean.step(parameters)
            shown = value.item() if shown is None else 0.98 * shown + 0.02 * value.item()
            bar.set_postfix(loss=f"{shown:.4f}")
            bar.update()
            if step + 1 == steps or time.monotonic() - saved_at > CHECKPOINT_SECONDS:
                saved_at = time.monotonic()
                values = {key: value.state_dict() for key, value in state.items()}
                values |= {"step": step + 1, "seconds": seconds + saved_at - start}
                torch.save(values, path.with_suffix(".new"))
                path.with_suffix(".new").replace(path)
    mean.copy_to(parameters)
    print(f"{name}: {steps} batches in {seconds + time.monotonic() - start:.0f} s")


def share(number: int, arguments) -> int:
    """`number` of the recipe at the effort that was asked for."""
    return round(number * arguments.effort)


def random_clips(
    generator: np.random.Generator,
    number: int,
    variety: float = 1.0,
    captions: Sequence[Caption] = moving_shapes.trained_on(),
) -> tuple[list[np.ndarray], list[Caption]]:
    """Clips and their captions, none of which is held out."""
    chosen = [captions[i] for i in generator.integers(0, len(captions), number)]
    return [moving_shapes.render(caption, generator, variety=variety) for caption in chosen], chosen


def random_pixels(
    generator: np.random.Generator, device: str, number: int, frames: int, size: int, **options
) -> torch.Tensor:
    """Random pieces of random clips, [number, 3, frames, size, size] in [-1, 1]."""
    clips, _ = random_clips(generator, number, **options)
    lengths = frames, size, size
    pieces = []
    for clip in clips:
        starts = [generator.integers(0, whole - part + 1) for whole, part in zip(clip.shape, lengths, strict=False)]
        pieces.append(clip[tuple(slice(start, start + part) for start, part in zip(starts, lengths, strict=True))])
    return to_tensor(pieces, device)


def to_tensor(clips: Sequence[np.ndarray], device: str) -> torch.Tensor:
    """uint8 clips [frames, height, width, 3] to one tensor [clips, 3, frames, height, width] in [-1, 1]."""
    return torch.from_numpy(np.stack(clips)).to(device).permute(0, 4, 1, 2, 3) / 127.5 - 1


if __name__ == "__main__":
    run(main)
