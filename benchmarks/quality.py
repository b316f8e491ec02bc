"""Generate videos for captions of moving shapes, and measure whether they show what the captions say.

    python -m benchmarks.quality
    python -m benchmarks.quality --dtype bfloat16 --output splash.json -- --attention splash_exp2
    python -m benchmarks.quality --variant "--cache_threshold 0.1" --variant "--guidance_interval 0,24"

For each caption, diffusers' CogVideoXPipeline in float32 and our three stages make a video from the same noise. The
videos are scored by image processing (tools/moving_shapes.py). Options after `--` go to our stage 2 alone, so that the
quality of a speed option can be measured. So do those of each --variant, whose videos are made beside the others and
compared with ours. Scored beside them are true clips, the same clips encoded and decoded by the VAE, videos by
untrained weights (a control that must fail), and chance.

An image-to-video model (`--model_id tiny_model_i2v`) gets the first frame of a clip as its picture, and as its prompt
in turn the direction alone and the whole caption. Scored besides is whether the shape of the first frame is in its
place, and how near that frame is to the picture. What is held out are whole pictures.

The results are a report (JSON) and a contact sheet, in
reports/, with --publish in benchmarks/results/.
"""

import argparse
import collections
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cogvideox.cli.options import (
    add_denoising_options,
    add_lora_option,
    add_preset_option,
    add_weight_options,
)
from cogvideox.cli.parser import ArgumentParser
from cogvideox.cli.program import run
from cogvideox.cli.terminal import bar_options
from cogvideox.cli.types import file_path, number
from cogvideox.defaults import FPS, NUM_STEPS, SEED
from cogvideox.files import checkpoint, generation_defaults, lora, stage_files, videos, writing
from cogvideox.files.names import EMBEDDINGS, GIVEN_TENSORS, ROOT
from cogvideox.run import accelerator, decoding, denoising, plans, sparse_maps
from cogvideox.run.accelerator import prepare_libraries
from cogvideox.signals import Interruption
from compile_for_tpu import report
from tools.moving_shapes import (
    CHANCE,
    FRAMES,
    GUIDANCE_SCALE,
    SIZE,
    Caption,
    agreement,
    held_out,
    held_out_pictures,
    measure,
    prompts_of,
    render,
    same_place,
    trained_on,
)

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKLCogVideoX, DiffusionPipeline
    from PIL import Image


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(__doc__.splitlines()[0], prog="python -m benchmarks.quality")
    parser.add_argument("--model_id", default=str(ROOT / "tiny_model"), help="a model that train_tiny_model.py trained")
    parser.add_argument(
        "--captions", type=number(int, 1), default=26, help="captions of each kind, held out and trained on, at most"
    )
    parser.add_argument(
        "--videos", type=number(int, 1), default=4, help="videos of each caption, each with another seed"
    )
    parser.add_argument("--seed", type=number(int, 0), default=SEED, help="seed of the first video's noise")
    parser.add_argument(
        "--num_inference_steps", type=number(int, 1), default=NUM_STEPS, help="denoising steps, of all videos"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of our stages")
    parser.add_argument(
        "--output", type=file_path, help=f"file for the report, JSON (default: {report.REPORTS}/quality[-MODEL].json)"
    )
    parser.add_argument(
        "--sheet",
        type=file_path,
        help=f"file for a contact sheet of the held-out captions, PNG (default: {report.REPORTS}/quality[-MODEL].png)",
    )
    report.add_publish_option(parser)
    parser.add_argument(
        "--animation", type=file_path, help="also write an animation of eight of our videos, .gif or .webp"
    )
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="OPTIONS",
        help="options of stage 2 beside those after --, in one string, for one more video of each case; repeatable",
    )
    parser.add_argument("stage2_options", nargs="*", help="options of our stage 2, after --")
    arguments = parser.parse_args(argv)
    name = Path(arguments.model_id).name
    stem = report.folder(arguments.publish) / ("quality" if name == "tiny_model" else f"quality-{name}")
    arguments.output = arguments.output or stem.with_suffix(".json")
    arguments.sheet = arguments.sheet or stem.with_suffix(".png")
    return arguments


def parse_stage2_options(arguments: argparse.Namespace, variant: str = "") -> argparse.Namespace:
    """Parse the options of stage 2 for our videos, or for those of a variant; only what decides latents is known."""
    parser = ArgumentParser(prog="stage2_transformer.py")
    add_denoising_options(parser)
    add_preset_option(parser)
    add_lora_option(parser)
    add_weight_options(parser)
    of_all = {"guidance_scale": GUIDANCE_SCALE, "num_inference_steps": arguments.num_inference_steps}
    of_all |= {"height": SIZE, "width": SIZE, "frames": FRAMES}
    words = [f"--{name}={value}" for name, value in of_all.items()]
    words += [*arguments.stage2_options, *shlex.split(variant)]
    options = parser.parse_args(words)
    generation_defaults.complete(options, generation_defaults.of_model(arguments.model_id))
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Make the videos, score them, and write report and contact sheet."""
    arguments = parse_arguments(argv)
    options = {"ours": parse_stage2_options(arguments)}
    options |= {variant: parse_stage2_options(arguments, variant) for variant in arguments.variant}
    for path in filter(None, (arguments.output, arguments.sheet, arguments.animation)):
        writing.check_writable(path)
    prepare_libraries()
    from diffusers import CogVideoXImageToVideoPipeline

    pipeline = load(arguments.model_id)
    cases = choose_cases(arguments, isinstance(pipeline, CogVideoXImageToVideoPipeline))
    with Interruption.raised(), tempfile.TemporaryDirectory() as folder:
        made = make_videos(arguments, options, pipeline, cases, Path(folder))
    first_of_held_out = [i for i, case in enumerate(cases) if case.held_out][:: arguments.videos]

    def shown(*sources: str) -> list[tuple]:
        return [(cases[i], *(made[source][i] for source in sources)) for i in first_of_held_out]

    found = judge(arguments, cases, made)
    with writing.replacing(arguments.output) as temporary:
        Path(temporary).write_text(json.dumps(found, indent=2) + "\n")
    print(as_text(found))
    print(f"wrote {os.path.relpath(arguments.output)}")
    sources = (*(["true clips"] if cases[0].with_picture else []), "ours", "diffusers", *arguments.variant)
    with writing.replacing(arguments.sheet) as temporary:
        write_sheet(temporary, shown(*sources), sources)
    print(f"wrote {os.path.relpath(arguments.sheet)}")
    if arguments.animation:
        with writing.replacing(arguments.animation) as temporary:
            write_animation(temporary, shown("ours"))
        print(f"wrote {os.path.relpath(arguments.animation)}")


class Case(NamedTuple):
    """A video to make: with a picture, the first frame of `clip`, for an image model."""

    caption: Caption
    held_out: bool
    seed: int
    prompt: str
    with_picture: bool

    @property
    def clip(self) -> np.ndarray:
        """A true clip, uint8 [frames, height, width, 3]."""
        return render(self.caption, np.random.default_rng(self.seed), steady=self.with_picture)


def choose_cases(arguments: argparse.Namespace, with_picture: bool) -> list[Case]:
    """Choose --captions of each kind, evenly spread, and make --videos cases of each."""
    seeds = itertools.count(arguments.seed)
    never_seen = held_out_pictures() if with_picture else held_out()
    cases = []
    for captions in (never_seen, [caption for caption in trained_on() if caption not in never_seen]):
        number = min(arguments.captions, len(captions))
        for i in np.linspace(0, len(captions) - 1, number).round().astype(int):
            prompts = prompts_of(captions[i]) if with_picture else (str(captions[i]),)
            for video in range(arguments.videos):
                prompt = prompts[(i + video) % len(prompts)]
                cases.append(Case(captions[i], captions is never_seen, next(seeds), prompt, with_picture))
    return cases


def load(model_id: str) -> "DiffusionPipeline":
    """Return diffusers' pipeline of a model, in float32."""
    import torch
    from diffusers import DiffusionPipeline

    model = checkpoint.model_folder(checkpoint.resolve_model_id(model_id), ["*"])
    with checkpoint.load_errors(model):
        return DiffusionPipeline.from_pretrained(model, dtype=torch.float32)


def make_videos(
    arguments: argparse.Namespace,
    options: Mapping[str, argparse.Namespace],
    pipeline: "DiffusionPipeline",
    cases: Sequence[Case],
    folder: Path,
) -> dict[str, list[np.ndarray]]:
    """Return the videos of the cases by source, uint8 [frames, height, width, 3]; `folder` is for scratch files.

    `options` are those of stage 2 for each source that is ours, `pipeline` is diffusers'.
    """
    import torch

    control = untrained(pipeline)
    ours = str(in_dtype(Path(pipeline.name_or_path), pipeline, getattr(torch, arguments.dtype), folder / "model"))

    # That options do not fit the model or the devices is said before hours go into the others.
    denoisers = {name: denoiser(ours, chosen) for name, chosen in options.items()}
    decode = decoder(ours, arguments.dtype)
    prompts = dict(zip(cases, embeddings(ours, cases, folder), strict=True))
    clips = [case.clip for case in cases]
    steps = arguments.num_inference_steps
    return {
        "true clips": clips,
        "through VAE": in_batches("VAE", lambda batch: reconstruct(pipeline.vae, batch), clips),
        "diffusers": in_batches("diffusers", lambda batch: generate(pipeline, batch, steps), cases),
        **{
            name: one_by_one(name, lambda case, denoise=denoise: decode(denoise(prompts[case], case.seed)), cases)
            for name, denoise in denoisers.items()
        },
        "untrained": in_batches("untrained", lambda batch: generate(control, batch, steps), cases),
    }


def one_by_one(name: str, function: Callable, items: Sequence) -> list[np.ndarray]:
    """Return the video that `function` makes of each item; show the progress."""
    from tqdm import tqdm

    return [function(item) for item in tqdm(items, desc=name, unit="video", **bar_options())]


def in_batches(name: str, function: Callable, items: Sequence, size: int = 13) -> list[np.ndarray]:
    """Return the videos that `function` makes of the items, `size` items at a time; show the progress."""
    batches = [items[i : i + size] for i in range(0, len(items), size)]
    return [video for videos in one_by_one(f"{name}, by {size}", function, batches) for video in videos]


def untrained(pipeline: "DiffusionPipeline") -> "DiffusionPipeline":
    """Return a copy of the pipeline whose transformer and text encoder have random weights."""
    import torch

    torch.manual_seed(0)
    drawn = {
        "text_encoder": type(pipeline.text_encoder)(pipeline.text_encoder.config),
        "transformer": type(pipeline.transformer).from_config(pipeline.transformer.config),
    }
    return type(pipeline)(**pipeline.components | drawn)


def in_dtype(model: Path, pipeline: "DiffusionPipeline", dtype: "torch.dtype", folder: Path) -> Path:
    """Copy a model folder to `folder` with its weights in another dtype; return `folder`."""
    shutil.copytree(model, folder)
    for name in ("text_encoder", "transformer", "vae"):
        kind = type(getattr(pipeline, name))
        kind.from_pretrained(model / name, dtype=dtype).save_pretrained(folder / name)  # other files there stay
    return folder


def reconstruct(vae: "AutoencoderKLCogVideoX", clips: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Encode and decode clips, uint8 [frames, height, width, 3], by diffusers' VAE."""
    import torch
    from diffusers.video_processor import VideoProcessor

    from tools.train_tiny_model import to_tensor

    with torch.no_grad():
        decoded = vae.decode(vae.encode(to_tensor(clips, "cpu")).latent_dist.mode()).sample
    pixels = VideoProcessor().postprocess_video(decoded, output_type="np")
    return list(np.round(pixels * 255).astype(np.uint8))


def generate(pipeline: "DiffusionPipeline", cases: Sequence[Case], steps: int) -> list[np.ndarray]:
    """Generate videos by diffusers' pipeline."""
    import torch
    from PIL import Image

    pipeline.set_progress_bar_config(disable=True)
    pictures = [Image.fromarray(case.clip[0]) for case in cases if case.with_picture]
    frames = pipeline(
        prompt=[case.prompt for case in cases],
        **({"image": pictures} if pictures else {}),
        height=SIZE,
        width=SIZE,
        num_frames=FRAMES,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE_SCALE,
        generator=[torch.Generator().manual_seed(case.seed) for case in cases],
        output_type="np",
    ).frames
    return list(np.round(frames * 255).astype(np.uint8))


def embeddings(model: str, cases: Sequence[Case], folder: Path) -> list[Path]:
    """Run stage 1, once for all prompts and pictures, and return its file for each case."""
    from PIL import Image

    lines = []
    for case in cases:
        line = {"prompt": case.prompt}
        if case.with_picture:
            line["image"] = f"{case.seed}.png"
            Image.fromarray(case.clip[0]).save(folder / line["image"])
        lines.append(json.dumps(line))
    different = list(dict.fromkeys(lines))
    (folder / "prompts.txt").write_text("\n".join(different))
    options = ("--prompt_file", folder / "prompts.txt", "--model_id", model, "--output_dir", folder)
    command = [sys.executable, "stage1_text_encoder.py", *map(str, options)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return [videos.of_prompt(folder, 1 + different.index(line)) / EMBEDDINGS for line in lines]


def denoiser(model: str, options: argparse.Namespace) -> Callable[[Path, int], np.ndarray]:
    """Return a function that makes latents as stage 2 does, [1, C, T, H, W], of a file of embeddings and a seed.

    Raises:
        UserError: the options do not fit the model or the devices.
    """
    from safetensors.torch import load_file

    from cogvideox.models.transformer.denoising import Denoising, Posterior
    from cogvideox.models.transformer.parameters import load_parameters
    from cogvideox.models.transformer.step import abstract_arguments, make_step

    devices = accelerator.devices()
    plan = plans.denoising_plan(options, model, devices, devices[0].platform, videos=1)
    loras = [lora.read_lora(option) for option in options.lora]
    read = denoising.weight_reader(model, plan, loras, options.variant, stage_files.ignore)
    sparse_maps.check_weights(sparse_maps.file_of(options, model), model, loras, options.variant, print)
    plan = plans.with_compute_dtype(plan, read.values, options, stage_files.ignore)
    with plans.plan_errors():
        skipped = plans.skipped_steps(options, plan, model, read)
        steps = {kind: make_step(plan, kind=kind) for kind in plan.kinds(skipped)}
        programs = {kind: step.lower(*abstract_arguments(plan)).compile() for kind, step in steps.items()}
    parameters = load_parameters(read, plan.transformer, plan.parallelism, plan.dtype, [one.add for one in loras])

    def denoise(file: Path, seed: int) -> np.ndarray:
        prompts = load_file(file)
        embeds = prompts["prompt_embeds"], prompts["negative_prompt_embeds"]
        image = None
        if plan.features.image:
            mean, logvar = (prompts[name] for name in GIVEN_TENSORS["image"])
            image = Posterior(mean, logvar)
        run = Denoising(plan, parameters, *embeds, [seed], skipped, image).run(programs)
        (state,) = collections.deque(run, maxlen=1)
        return np.asarray(state.latents[:, plan.surplus_frames :]).swapaxes(1, 2)

    return denoise


def decoder(model: str, dtype: str) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that decodes latents [1, C, T, H, W] as stage 3 does, to uint8 [frames, height, width, 3]."""
    from cogvideox.models.vae.decoder import decode
    from cogvideox.models.vae.plan import make_decoding_plan

    plan = make_decoding_plan(
        vae=checkpoint.read_config(model, "vae"),
        decoder="torchax",
        devices=accelerator.devices(),
        dtype=dtype,
        height=SIZE,
        width=SIZE,
        frames=FRAMES,
    )
    vae = plan.make_decoder()
    files = decoding.weight_files(vae, model)
    abstract = plan.on_devices(files)
    programs = [program.lower().compile() for program in plan.programs(vae, abstract)]
    weights = decoding.load_weights(files, abstract)

    def frames(latents: np.ndarray) -> np.ndarray:
        return np.concatenate([*decode(programs, weights, decoding.scaled(latents, plan), plan.split)])

    return frames


def judge(arguments: argparse.Namespace, cases: Sequence[Case], made: dict[str, list[np.ndarray]]) -> dict:
    """Return the report: adherence, the share of the videos that show what the caption says, and PSNR in dB.

    That of the picture is of the first frame against the picture, as each source has it.
    """

    def adherence(source: str, of_held_out: bool) -> dict[str, float]:
        pairs = zip(cases, made[source], strict=True)
        scores = [scored(case, video) for case, video in pairs if case.held_out == of_held_out]
        return {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}

    def psnr(source: str, reference: str, frames: slice = slice(None)) -> dict[str, float]:
        pairs = zip(made[source], made[reference], strict=True)
        error = np.array([np.square(video[frames].astype(float) - truth[frames]).mean() for video, truth in pairs])
        decibels = 10 * np.log10(255**2 / np.maximum(error, 1e-3))
        return {"least": decibels.min(), "median": float(np.median(decibels))}

    psnrs = {
        "ours against diffusers": psnr("ours", "diffusers"),
        **{f"{variant} against ours": psnr(variant, "ours") for variant in arguments.variant},
        "clips through the VAE": psnr("through VAE", "true clips"),
    }
    if cases[0].with_picture:
        sources = [source for source in made if source != "true clips"]
        psnrs |= {f"the picture, {source}": psnr(source, "true clips", slice(1)) for source in sources}
    settings = ("captions", "videos", "seed", "num_inference_steps", "dtype", "variant", "stage2_options")
    return {
        "settings": {name: getattr(arguments, name) for name in settings},
        "adherence": {
            group: {source: adherence(source, group == "held out") for source in made} | {"chance": CHANCE}
            for group in ("held out", "trained on")
        },
        "psnr": psnrs,
    }


def scored(case: Case, video: np.ndarray) -> dict[str, bool]:
    """Return whether a video shows what it should, by attribute."""
    scores = dict(zip(Caption._fields, agreement(case.caption, measure(video)), strict=True))
    return scores | ({"place": same_place(video[0], case.clip[0])} if case.with_picture else {})


def as_text(found: dict) -> str:
    """Return the report as text to print."""
    lines = ["share of the videos that show what the caption says"]
    for group, rows in found["adherence"].items():
        width = max(18, *map(len, rows))
        lines.append(
            f"{f'captions {group}':<{width + 2}}" + "".join(f"{attribute:>12}" for attribute in rows["true clips"])
        )
        for source, shares in rows.items():
            lines.append(f"  {source:<{width}}" + "".join(f"{share:>12.1%}" for share in shares.values()))
    for name, psnr in found["psnr"].items():
        lines.append(f"PSNR of {name}: median {psnr['median']:.1f} dB, least {psnr['least']:.1f} dB")
    return "\n".join(lines)


def write_sheet(path: str, shown: Sequence[tuple], sources: Sequence[str], columns: int = 4) -> None:
    """Write a contact sheet: of each case first, middle and last frame, in a row for each source, named at the left.

    `shown` has for each case the case and a video of each source.
    """
    frames = (0, FRAMES // 2, FRAMES - 1)

    def cell(videos: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.concatenate([video[frame] for frame in frames], axis=1) for video in videos])

    labelled([(case, cell(videos)) for case, *videos in shown], columns, sources).save(path, "PNG")


def write_animation(path: str, shown: Sequence[tuple]) -> None:
    """Write an animation of eight of the videos, evenly spread, in three times their size.

    `shown` has for each case the case and its video.
    """
    chosen = [shown[i * len(shown) // 8] for i in range(8)]
    pictures = [
        labelled([(case, video[frame].repeat(3, axis=0).repeat(3, axis=1)) for case, video in chosen], columns=4)
        for frame in range(FRAMES)
    ]
    pictures[0].save(path, quality=95, save_all=True, append_images=pictures[1:], duration=1000 // FPS, loop=0)


def labelled(pictures: Sequence[tuple[Case, np.ndarray]], columns: int, rows: Sequence[str] = ()) -> "Image.Image":
    """Return one picture that holds pictures of the same size, each above its caption.

    Each consists of `rows` of the same height, whose names stand at the left of each line of pictures.
    """
    from PIL import Image, ImageDraw

    gap, text_height = 4, 30
    names = [textwrap.fill(name, 24, break_long_words=False) for name in rows]
    left = max((6 * len(line) + 12 for name in names for line in name.splitlines()), default=0)  # 6 pixels a letter
    height, width, _ = pictures[0][1].shape
    lines = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (left + columns * (width + gap), lines * (height + text_height)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (case, picture) in enumerate(pictures):
        x, y = left + i % columns * (width + gap), i // columns * (height + text_height)
        sheet.paste(Image.fromarray(picture), (x, y))
        draw.text((x + 2, y + height + 1), case.prompt.replace(" on ", "\non "), fill="black")
    for line in range(lines):
        for i, name in enumerate(names):
            middle = line * (height + text_height) + (i + 0.5) * height / len(names)
            draw.text((left - 6, middle), name, fill="black", anchor="rm", align="right")
    return sheet


if __name__ == "__main__":
    run(main)
