"""Find a map of sparse attention on a model's weights, and show what it costs: how far videos are from dense ones.

    python -m tools.fit_sparse_attention --model_id MODEL --prompt_file prompts.txt

It makes a video of each prompt with dense attention, and in some steps measures for every head the relative error that
its attention would have under each pattern. Each head gets the cheapest pattern within --error_budget, so that chips
share the work evenly. The map goes into the folder of the model's transformer, where --sparse_attention auto of stage 2
finds it. Then the videos are made again with the map, and compared. See docs/sparse-attention.md.
"""

import argparse
import dataclasses
import importlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import JsonValue
from safetensors.numpy import load_file

from cogvideox.cli import next_command
from cogvideox.cli.options import (
    add_attention_options,
    add_lora_option,
    add_parallelism_options,
    add_preset_option,
    add_sampling_options,
    add_weight_options,
)
from cogvideox.cli.parser import ArgumentParser
from cogvideox.cli.program import run
from cogvideox.cli.types import file_path, folder_path, model_id, number, utf8
from cogvideox.defaults import DECODERS, DENSE_STEPS, MOST_SEED, SEED
from cogvideox.errors import UserError, shortened
from cogvideox.files import checkpoint, generation_defaults, lora, numbers, sparse_map, stage_files, videos, writing
from cogvideox.files.names import LATENTS
from cogvideox.files.schemas import TextConfig
from cogvideox.files.tensor_dump import row_name
from cogvideox.files.tensors import mapped_tensors
from cogvideox.run import accelerator, denoising, plans, warm
from cogvideox.run.jobs import SIZE
from cogvideox.versions import versions
from compile_for_tpu.topologies import CHIPS
from tools.frame_quality import psnr, ssim

if TYPE_CHECKING:
    from cogvideox.models.transformer.plan import DenoisingPlan
    from cogvideox.models.transformer.sparse.layout import AlignedLayout
    from cogvideox.models.transformer.sparse.search import Choice

DUMP = "stage2_tensors.safetensors"
ERRORS = "attn1.pattern_errors"  # of each block, see models/transformer/sparse/search.py
ERROR_BUDGET = 0.05
OTHER_BUDGETS = (0.5, 2, 4)  # times the one that is asked for, of which the price is told
SOME_STEPS = 3  # that are measured if none are named
CHIP = CHIPS["v6e"]  # of which seconds are predicted
OTHERS = 0.71  # of its peak, what all of a step but attention reaches: of 768 x 1360 x 81 on eight of them


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(__doc__.splitlines()[0], prog="python -m tools.fit_sparse_attention")
    files, looking = parser.group("input and output"), parser.group("looking inside")
    files.add_argument("--model_id", type=model_id, required=True, help="Hugging Face model id, or a folder")
    prompt = files.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", type=utf8, help="what the video shows")
    prompt.add_argument("--prompt_file", type=file_path, help="a file of many prompts, as stage 1 takes it")
    files.add_argument(
        "--output",
        type=file_path,
        help=f"the map (default: {sparse_map.FILE} beside the config of the model's transformer)",
    )
    files.add_argument(
        "--output_dir",
        type=folder_path,
        default=Path("sparse_attention"),
        help="the folder of the videos that are made, with the dumps",
    )
    add_weight_options(parser)
    add_lora_option(parser)
    add_preset_option(parser)
    add_sampling_options(parser)
    parser.group("video").add_argument(
        "--seed", type=number(int, 0, MOST_SEED), default=SEED, help="seed of the noise, as stage 2 takes it"
    )
    add_parallelism_options(parser)
    add_attention_options(parser)
    group = parser.group("speed and memory")
    group.add_argument(
        "--error_budget",
        type=number(float, 0, 1),
        default=ERROR_BUDGET,
        help="the largest relative error of a head's attention",
    )
    group.add_argument(
        "--dense_steps",
        type=number(float, 0, 1),
        metavar="SHARE",
        default=DENSE_STEPS,
        help="share of the steps, from the first on, that will be dense, as stage 2 takes it",
    )
    looking.add_argument(
        "--measured_steps",
        metavar="NUMBERS",
        help=f"steps in which errors are measured, such as 4,9 (default: {SOME_STEPS} of those that will not be dense)",
    )
    looking.add_argument(
        "--compare",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="make the videos with the map, too, and compare them",
    )
    looking.add_argument("--decoder", choices=DECODERS, default=DECODERS[0], help="of the videos that are compared")
    parser.group("printed output").add_argument("--verbose", action="store_true", help="print what the stages print")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Find the map, write it, and say what it costs."""
    arguments = parse_arguments(argv)
    accelerator.prepare_libraries()
    search = prepared(arguments)
    warm.keep()
    prompts = search.encode()
    errors = np.max([search.measure(prompt) for prompt in prompts], axis=0)
    choice = search.choose(errors)
    sparse_map.write(search.output, search.map_of(choice.patterns, search.found(choice, prompts)))
    lines = *search.table(choice), *search.other_budgets(errors)
    print(*lines, f"wrote {search.output}", sep="\n", flush=True)
    if arguments.compare:
        for prompt in prompts:
            print(search.compared(prompt), flush=True)


# --- The search --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Search:
    """A search for a map.

    Attributes:
        arguments: of the tool, with all that the model decides.
        plan: of a run with a map, of one video.
        steps: in which errors are measured.
        output: the file of the map.
        weights, loras: by what the map knows the transformer, see `sparse_map`.
    """

    arguments: argparse.Namespace
    plan: "DenoisingPlan"
    steps: Sequence[int]
    output: Path
    weights: str
    loras: Sequence[str]

    @property
    def layout(self) -> "AlignedLayout":
        """The order of the tokens of a run with a map."""
        return layout_of(self.plan)

    def encode(self) -> list[Path]:
        """Run stage 1; returns the folder of each prompt."""
        folder, given = self.arguments.output_dir / "prompts", self.arguments
        source = (f"--prompt={given.prompt}",) if given.prompt_file is None else ("--prompt_file", given.prompt_file)
        size = SIZE[:2] if self.plan.features.image else ()
        taken = next_command.words(vars(given), dict.fromkeys(("model_id", *size, *next_command.OF_WEIGHTS)))
        self.run_stage(next_command.STAGE1, *source, "--output_dir", folder, *taken)
        return videos.prompts(folder)

    def measure(self, prompt: Path) -> np.ndarray:
        """Make a prompt's video with dense attention; returns the largest errors, float32 [layers, heads, patterns]."""
        config, dense_map = self.plan.transformer, self.arguments.output_dir / f"dense_{sparse_map.FILE}"
        all_dense = (("dense",) * config["num_attention_heads"],) * config["num_layers"]
        sparse_map.write(dense_map, self.map_of(all_dense, {"how": "all heads are dense, to measure errors"}))
        dump = self.folder("dump", prompt)
        chosen = ("--dump_names", f"*.{ERRORS}", "--dump_steps", numbers.as_text(self.steps))
        self.denoise(prompt, "dense", dense_map, 0.0, "--dump", dump, *chosen)
        return errors_in(dump / DUMP, self.steps, config["num_layers"])

    def choose(self, errors: np.ndarray) -> "Choice":
        """Choose a pattern for each head.

        Raises:
            UserError: all would be dense.
        """
        choice, budget = self.within(errors, self.arguments.error_budget), self.arguments.error_budget
        if (choice.cycles >= choice.dense_cycles).all():
            raise UserError(
                f"no pattern within --error_budget {budget:g} would make a layer faster: the least error of a head is "
                f"{np.nanmin(errors):.2g}; nothing is written"
            )
        return choice

    def within(self, errors: np.ndarray, budget: float) -> "Choice":
        """Choose a pattern for each head within a budget of error."""
        from cogvideox.models.transformer.sparse.search import choose

        return choose(errors, self.layout, budget, self.plan.parallelism.tp * self.plan.parallelism.head_parts)

    def compared(self, prompt: Path) -> str:
        """Make a prompt's video with the map, and say how far it is from the dense one."""
        self.denoise(prompt, "sparse", self.output, self.arguments.dense_steps)
        folders = [self.folder(name, prompt) for name in ("sparse", "dense")]
        latents = (stage_files.read_latents(folder / LATENTS, allow_nan=False) for folder in folders)
        ours, theirs = (array.astype(np.float64).ravel() for array in latents)
        difference = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        frames, reference = (self.decode(folder) for folder in folders)
        text = shortened(stage_files.read_config(prompt, TextConfig)["prompt"], 60)
        return (
            f"{text}: latents differ by {difference:.2%} from those of dense attention, frames have a PSNR of "
            f"{psnr(frames, reference):.2f} dB and an SSIM of {ssim(frames, reference):.4f}"
        )

    def denoise(self, prompt: Path, name: str, path: Path, dense_steps: float, *others: object) -> None:
        """Run stage 2 for a prompt, with a map; `name` is of the folder that the files go to."""
        options = vars(self.arguments) | {"sparse_attention": path, "dense_steps": dense_steps, "restart": True}
        by_default = dict.fromkeys((*generation_defaults.OURS, "preset")) | next_command.OF_STAGE2
        words = next_command.words(options, by_default)
        folders = ("--input_dir", prompt, "--output_dir", self.folder(name, prompt))
        self.run_stage(next_command.STAGE2, *folders, *words, "--warmup_steps", 0, *others)

    def decode(self, folder: Path) -> np.ndarray:
        """Run stage 3; returns the frames, uint8 [frames, height, width, 3]."""
        file = folder / "frames.safetensors"
        words = next_command.words(vars(self.arguments), next_command.OF_WEIGHTS)
        script = next_command.STAGE3[self.arguments.decoder]
        self.run_stage(script, "--input_dir", folder, "--output_frames", file, "--no-warmup", *words)
        return load_file(file)["frames"]

    def run_stage(self, script: str, *words: object) -> None:
        """Run a stage in this process, which keeps weights and programs for the next one."""
        quiet = () if self.arguments.verbose else ("--quiet",)
        if not self.arguments.verbose:
            folder = words[words.index("--output_dir" if "--output_dir" in words else "--input_dir") + 1]
            print(f"{script}: {folder}", flush=True)
        importlib.import_module(script.removesuffix(".py")).main([*map(str, words), *quiet])

    def folder(self, name: str, prompt: Path) -> Path:
        """Return the folder of a prompt's files of a kind."""
        outputs = self.arguments.output_dir
        return outputs / name / prompt.relative_to(outputs / "prompts")

    def map_of(self, patterns: "Sequence[Sequence[object]]", found: Mapping[str, JsonValue]) -> sparse_map.SparseMap:
        """Return the map of these patterns, with how it was found."""
        return sparse_map.SparseMap(
            **{name: getattr(self.plan, name) for name in SIZE},
            weights=self.weights,
            loras=tuple(self.loras),
            error_budget=self.arguments.error_budget,
            found=dict(found),
            patterns=tuple(tuple(map(str, of_layer)) for of_layer in patterns),
        )

    def found(self, choice: "Choice", prompts: Sequence[Path]) -> dict[str, JsonValue]:
        """Return how the map was found, for people."""
        names = ("num_inference_steps", "guidance_scale", "seed", "dense_steps")
        texts: list[JsonValue] = [stage_files.read_config(prompt, TextConfig)["prompt"] for prompt in prompts]
        return {
            "prompts": texts,
            "measured_steps": numbers.as_text(self.steps),
            **{name: getattr(self.arguments, name) for name in names},
            "density": round(float(choice.density.mean()), 4),
            "largest_error": round(float(choice.errors.max()), 5),
            "devices": f"{len(self.plan.devices)} x {self.plan.devices[0].device_kind}",
            "versions": dict(versions("jax", "libtpu")),
        }

    # --- What is printed -------------------------------------------------------------------------------------

    def table(self, choice: "Choice") -> Iterator[str]:
        """Yield a line for each layer, and what is predicted of a step."""
        yield "layer  dense  frames  positions  density  largest error  cycles"
        for layer, patterns in enumerate(choice.patterns):
            counts = Counter(pattern.kind for pattern in patterns)
            yield (
                f"{layer:>5}  {counts['dense']:>5}  {counts['frames']:>6}  {counts['positions']:>9}  "
                f"{choice.density[layer]:>7.1%}  {choice.errors[layer].max():>13.4f}  "
                f"{choice.cycles[layer] / choice.dense_cycles:>6.1%}"
            )
        dense, sparse = self.seconds(choice.dense_cycles), self.seconds(float(choice.cycles.mean()))
        others = self.other_seconds()
        yield (
            f"a step with the map: {choice.density.mean():.1%} of the scores. Predicted for as many v6e chips, from "
            f"counted cycles: attention {sparse:.3g} s instead of {dense:.3g} s, all of it {sparse + others:.3g} s "
            f"instead of {dense + others:.3g} s"
        )

    def other_budgets(self, errors: np.ndarray) -> Iterator[str]:
        """Yield a line for each of some other budgets, with what is predicted of a step within it."""
        for factor in OTHER_BUDGETS:
            budget = factor * self.arguments.error_budget
            choice = self.within(errors, budget)
            seconds = self.seconds(float(choice.cycles.mean())) + self.other_seconds()
            yield f"with --error_budget {budget:.3g}: {choice.density.mean():.1%} of the scores, {seconds:.3g} s"

    def seconds(self, cycles: float) -> float:
        """Return the seconds of a step's attention, of so many cycles for each layer and sample."""
        samples = self.plan.prompts / self.plan.mesh.shape["dp"] / self.plan.parallelism.query_parts
        return cycles * samples * self.plan.transformer["num_layers"] / CHIP.clock

    def other_seconds(self) -> float:
        """Return about the seconds of all else in a step, for its products."""
        width = self.plan.transformer["num_attention_heads"] * self.plan.transformer["attention_head_dim"]
        # Of the weights of a layer four are in attention, and the MLP has four times the width.
        weights = 12 * width**2 * self.plan.transformer["num_layers"]
        products = 2 * weights * self.layout.tokens * self.plan.prompts / self.plan.mesh.size
        return products / CHIP.flops / OTHERS


def prepared(arguments: argparse.Namespace) -> Search:
    """Check all that can be checked before anything runs, complete the arguments, and return the search.

    Raises:
        UserError: the options do not fit the model, the devices, or each other.
    """
    from cogvideox.models.transformer.sparse.search import candidates

    model = arguments.model_id = checkpoint.resolve_model_id(arguments.model_id)
    generation_defaults.complete(arguments, generation_defaults.of_model(model))
    devices, loras = accelerator.devices(debug=False), [lora.read_lora(option) for option in arguments.lora]
    of_plan = dict.fromkeys(("cache_threshold", "cache_schedule")) | {"sparse_attention": "0*frames:0"}  # all dense
    options = argparse.Namespace(**vars(arguments) | of_plan)
    plan = plans.denoising_plan(options, model, devices, devices[0].platform, videos=1)
    steps = measured_steps(arguments, plan.steps)
    if not candidates(layout_of(plan)):
        raise UserError(
            f"at {plan.height} x {plan.width} x {plan.frames} no pattern is predicted to be faster than dense "
            "attention; for larger or longer videos there are some"
        )
    default = checkpoint.model_folder(model, []) / "transformer" / sparse_map.FILE
    output = (arguments.output or default).absolute()
    writing.check_writable(output)
    denoising.weight_reader(model, plan, loras, arguments.variant, stage_files.ignore)  # downloads, and checks
    weights = sparse_map.weights_of(model, arguments.variant)
    assert weights
    return Search(arguments, plan, steps, output, weights, sparse_map.known_loras(loras))


def layout_of(plan: "DenoisingPlan") -> "AlignedLayout":
    """Return the order of the tokens of a run with a map."""
    from cogvideox.models.transformer.sparse.layout import AlignedLayout

    assert isinstance(plan.order, AlignedLayout)
    return plan.order


def measured_steps(arguments: argparse.Namespace, steps: int) -> list[int]:
    """Return the steps in which errors are measured, by default some of those in which the map will be used.

    Raises:
        UserError: they are not there.
    """
    if arguments.measured_steps is not None:
        return numbers.named(arguments.measured_steps, steps, "--measured_steps")
    first = math.ceil(arguments.dense_steps * steps)
    if first >= steps:
        raise UserError(f"--dense_steps {arguments.dense_steps:g} leaves no step for the map; make it less than 1")
    count = min(SOME_STEPS, steps - first)
    return [first + (2 * number + 1) * (steps - first) // (2 * count) for number in range(count)]


def errors_in(path: Path, steps: Sequence[int], layers: int) -> np.ndarray:
    """Return the largest errors in a dump, over steps and samples, float32 [layers, heads, patterns]."""
    tensors = mapped_tensors(path)

    def of_layer(layer: int) -> np.ndarray:
        names = [f"{row_name('step', step)}/transformer_blocks.{layer}.{ERRORS}" for step in steps]
        return np.concatenate([np.asarray(tensors[name]) for name in names]).max(axis=0)

    return np.stack([of_layer(layer) for layer in range(layers)])


if __name__ == "__main__":
    run(main)
