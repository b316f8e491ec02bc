"""Train a small CogVideoX 1.5 on made-up clips of moving shapes, and save it in diffusers' folder layout.

    python tools/train_tiny_model.py --output_dir tiny_model --work_dir training

It trains a tokenizer, then the VAE, then text encoder and transformer together (v-prediction, prompts dropped at times
for guidance), on two CPU cores in a few hours or on a GPU in minutes. Each part leaves a checkpoint in --work_dir every
minute and goes on from there when the script is started again.
"""

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from console import ArgumentParser, number, run  # noqa: E402
from tools import moving_shapes  # noqa: E402
from tools.make_tiny_model import make_pipeline  # noqa: E402
from tools.moving_shapes import FRAMES, SIZE  # noqa: E402

MODEL = dict(
    num_attention_heads=6,
    attention_head_dim=32,
    num_layers=4,
    time_embed_dim=128,
    vae_channels=(16, 16, 32, 32),
)
CHECKPOINT_SECONDS = 60
VARIETY = 0.25  # of the clips that the transformer learns; with all of it two cores would take days
PROMPT_DROPOUT = 0.1
FULL_TEXT_LENGTH = 0.12  # share of the transformer's batches whose text is padded as far as the pipelines pad it


def parse_arguments():
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("tiny_model"), help="where the model goes")
    parser.add_argument("--work_dir", type=Path, default=Path("training"), help="checkpoints")
    parser.add_argument("--pieces", type=number(int, 0), default=1400, help="VAE: batches of small pieces of clips")
    parser.add_argument("--half_clips", type=number(int, 0), default=1100, help="VAE: batches of half clips after them")
    parser.add_argument(
        "--whole_clips", type=number(int, 0), default=100, help="VAE: batches of whole clips at the end"
    )
    parser.add_argument("--clips", type=number(int, 1), default=3000, help="encoded once, for the transformer")
    parser.add_argument("--transformer_steps", type=number(int, 0), default=4500, help="batches of latents")
    parser.add_argument("--batch_size", type=number(int, 1), default=32, help="of latents")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of data, weights and noise")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
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
    """Pieces of many clips teach colours and edges at the least cost; after them group norms see the whole frame."""
    phases = {"pieces": (16, 9, 32), "half_clips": (4, 9, SIZE), "whole_clips": (4, FRAMES, SIZE)}
    steps = [phase for name, phase in phases.items() for _ in range(getattr(arguments, name))]

    def loss(generator: np.random.Generator, step: int) -> torch.Tensor:
        number, frames, size = steps[step]
        clips, _ = random_clips(generator, number)
        pixels = to_tensor([piece(clip, frames, size, generator) for clip in clips], arguments.device)
        posterior = vae.encode(pixels).latent_dist
        error = vae.decode(posterior.sample()).sample.float() - pixels
        return error.square().mean() + 1e-7 * posterior.kl().mean()

    fit("vae", {"vae": vae}, loss, len(steps), 2e-3, arguments)


def piece(clip: np.ndarray, frames: int, size: int, generator: np.random.Generator) -> np.ndarray:
    """A random piece of a clip, [frames, size, size, 3]."""
    lengths = frames, size, size
    starts = [generator.integers(0, whole - part + 1) for whole, part in zip(clip.shape, lengths, strict=False)]
    return clip[tuple(slice(start, start + part) for start, part in zip(starts, lengths, strict=True))]


# --- The transformer ---------------------------------------------------------------------------------------------


@torch.no_grad()
def encoded_clips(pipeline: CogVideoXPipeline, arguments) -> tuple[torch.Tensor, list[str]]:
    """Latents [clips, T, C, H, W] of random clips, scaled to unit variance, and their prompts; sets scaling_factor."""
    path = arguments.work_dir / "latents.pt"
    if not path.exists():
        generator = np.random.default_rng(arguments.seed + 1)
        latents, prompts = [], []
        for start in tqdm(range(0, arguments.clips, 20), desc="encoding", unit="batch"):
            clips, captions = random_clips(generator, min(20, arguments.clips - start), VARIETY)
            latents.append(pipeline.vae.encode(to_tensor(clips, arguments.device)).latent_dist.mode().cpu())
            prompts += captions
        torch.save((torch.cat(latents).permute(0, 2, 1, 3, 4), prompts), path)
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

    def loss(generator: np.random.Generator, step: int) -> torch.Tensor:
        chosen = generator.integers(0, len(prompts), arguments.batch_size)
        dropped = generator.random(arguments.batch_size) < PROMPT_DROPOUT
        x = latents[chosen].to(device)
        noise = torch.randn(x.shape).to(device)
        # CogVideoX attends to the padding of the text too; it learns both a short one, which is cheap, and the longest.
        length = most if generator.random() < FULL_TEXT_LENGTH else generator.integers(least, 48)
        text_ids = tokens[np.where(dropped, len(prompts), chosen), :length].to(device)
        steps = torch.from_numpy(generator.integers(0, scheduler.config.num_train_timesteps, len(x))).to(device)
        text = pipeline.text_encoder(text_ids).last_hidden_state
        noisy = scheduler.add_noise(x, noise, steps)
        (v,) = transformer(noisy, text, steps, image_rotary_emb=rotary, return_dict=False)
        return F.mse_loss(v.float(), scheduler.get_velocity(x, noise, steps))

    # Rotary embeddings tell where tokens are to each other. Queries and keys with parts that depend on no content make
    # attention differ near the frame's edge, so that the model finds out early where in the frame a token is.
    for block in transformer.transformer_blocks:
        for norm in (block.attn1.norm_q, block.attn1.norm_k):
            torch.nn.init.normal_(norm.bias, std=1.5)
    modules = {"transformer": transformer, "text_encoder": pipeline.text_encoder}
    fit("transformer", modules, loss, arguments.transformer_steps, 1e-3, arguments)


# --- Shared ------------------------------------------------------------------------------------------------------


def fit(
    name: str,
    modules: dict[str, torch.nn.Module],
    loss: Callable[[np.random.Generator, int], torch.Tensor],
    steps: int,
    learning_rate: float,
    arguments,
) -> None:
    """Minimise `loss(generator, step)` by AdamW in bfloat16 autocast; the weights end as a running mean.

    Goes on from the checkpoint in the work folder if there is one. What step n draws depends on the seed and n alone,
    so a run that was interrupted gives what it would have given without.
    """
    path = arguments.work_dir / f"{name}.pt"
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=1e-4, betas=(0.9, 0.99))
    schedule = get_cosine_schedule_with_warmup(optimizer, 100, steps)
    mean = EMAModel(parameters, decay=0.998)
    state = modules | {"optimizer": optimizer, "schedule": schedule, "mean": mean}
    done = 0
    if path.exists():
        saved = torch.load(path, map_location=arguments.device)
        done = saved.pop("step")
        for part, value in saved.items():
            state[part].load_state_dict(value)

    def save(step: int) -> None:
        values = {part: value.state_dict() for part, value in state.items()}
        torch.save(values | {"step": step}, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    saved_at, shown = time.monotonic(), None
    with tqdm(total=steps, initial=done, desc=name, unit="step") as bar:
        for step in range(done, steps):
            generator = np.random.default_rng([arguments.seed, step])
            torch.manual_seed(generator.integers(2**63))
            with torch.autocast(torch.device(arguments.device).type, torch.bfloat16):
                value = loss(generator, step)
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            mean.step(parameters)
            shown = value.item() if shown is None else 0.98 * shown + 0.02 * value.item()
            bar.set_postfix(loss=f"{shown:.4f}")
            bar.update()
            if step + 1 == steps or time.monotonic() - saved_at > CHECKPOINT_SECONDS:
                save(step + 1)
                saved_at = time.monotonic()
    mean.copy_to(parameters)


def random_clips(
    generator: np.random.Generator, number: int, variety: float = 1.0
) -> tuple[list[np.ndarray], list[str]]:
    """Clips and their captions, none of which is held out."""
    known = moving_shapes.trained_on()
    captions = [known[i] for i in generator.integers(0, len(known), number)]
    clips = [moving_shapes.render(caption, generator, variety=variety) for caption in captions]
    return clips, [str(caption) for caption in captions]


def to_tensor(clips: Sequence[np.ndarray], device: str) -> torch.Tensor:
    """uint8 clips [frames, height, width, 3] to one tensor [clips, 3, frames, height, width] in [-1, 1]."""
    return torch.from_numpy(np.stack(clips)).to(device).permute(0, 4, 1, 2, 3) / 127.5 - 1


if __name__ == "__main__":
    run(main)
