"""Run stage 2: denoise the latents with the CogVideoX 1.5 transformer, in JAX.

Reads stage 1's files from --input_dir; writes stage2_latents.safetensors and the video entries of
generation_config.json to --output_dir. Where there are several videos, each has a folder of its own; see videos.py.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from safetensors import SafetensorError

from cogvideox.cli import program
from cogvideox.cli.options import (
    add_compilation_options,
    add_denoising_options,
    add_dump_options,
    add_force_option,
    add_host_options,
    add_log_options,
    add_profile_option,
)
from cogvideox.cli.parser import ArgumentParser
from cogvideox.cli.program import run
from cogvideox.cli.report import Report
from cogvideox.cli.signals import Interruption
from cogvideox.cli.types import file_path, lora_option, number
from cogvideox.defaults import FPS, MOST_FPS, MOST_SEED, PRESETS, SEED, WARMUP_STEPS
from cogvideox.errors import UserError
from cogvideox.files import checkpoint, lora, provenance, stage_files, tensor_dump, videos, writing
from cogvideox.files.names import CONFIG, EMBEDDINGS, LATENTS, PREVIEW, STAGE_OUTPUTS
from cogvideox.files.schemas import LATENT_ENTRIES, TEXT_ENTRIES, VIDEO_ENTRIES, TextConfig
from cogvideox.files.state import StateFile
from cogvideox.models.shared.sizes import spatial_compression_ratio
from cogvideox.run import accelerator, hosts
from cogvideox.run.accelerator import prepare_libraries
from cogvideox.run.compilation import Cache, Compiling
from cogvideox.run.plans import denoising_plan, dump_recorder, dump_wanted, plan_errors, skipped_steps
from cogvideox.run.profiling import Profile
from cogvideox.versions import versions

if TYPE_CHECKING:
    import jax

    from cogvideox.models.transformer.denoising import Denoising
    from cogvideox.models.transformer.plan import DenoisingPlan, StepKind
    from cogvideox.models.transformer.step import State


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser("Stage 2 of CogVideoX text to video: denoise the latents.")
    parser.add_argument("--input_dir", type=file_path, default=STAGE_OUTPUTS, help="stage 1's output folder")
    parser.add_argument("--output_dir", type=file_path, help="where the files go (default: --input_dir)")
    add_force_option(parser)
    parser.add_argument("--model_id", help="the model; it must be the one that stage 1 used, which is the default")
    add_denoising_options(parser)
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="seed",
        help="set steps, guidance, scheduler and fps at once: to a draft's, or to those of the model's authors",
    )
    parser.add_argument(
        "--lora",
        type=lora_option,
        action="append",
        default=[],
        metavar="PATH[:SCALE]",
        help="add a LoRA to the weights, a safetensors file or its folder, times a scale; can be given several times "
        "(default: none)",
    )
    parser.add_argument("--seed", type=number(int, 0, MOST_SEED), default=SEED, help="seed of the noise")
    parser.add_argument(
        "--num_videos_per_prompt",
        type=number(int, 1, 10_000),
        default=1,
        metavar="N",
        help="videos of each prompt, from the seeds --seed to --seed + N - 1, each in a folder of its own",
    )
    parser.add_argument("--fps", type=number(int, 1, MOST_FPS), default=FPS, help="frames per second, for stage 3")
    parser.add_argument(
        "--warmup_steps",
        type=number(int, 0, 1000),
        default=WARMUP_STEPS,
        help="steps that run before the first one, untimed",
    )
    add_compilation_options(parser, "the compiled step")
    parser.add_argument(
        "--preview_every",
        type=number(int, 1),
        metavar="N",
        help=f"after every N steps draw the latents that they predict as {PREVIEW} in the output folder",
    )
    parser.add_argument(
        "--checkpoint_every",
        type=number(int, 0),
        metavar="N",
        help="keep the state after every N steps, 0 for never (default: as often as 2%% of the time allow)",
    )
    parser.add_argument(
        "--restart", action="store_true", help="start over, without the steps that an unfinished run has done"
    )
    add_dump_options(parser, "step")
    add_profile_option(parser, "step")
    add_host_options(parser)
    add_log_options(parser)
    given, _ = parser.parse_known_args()
    parser.set_defaults(**PRESETS[given.preset])
    return parser.parse_args()


@dataclasses.dataclass(frozen=True)
class Video:
    """A video to make.

    Attributes:
        source: the folder of its prompt, with stage 1's files.
        folder: where its own files go.
        seed: of its noise.
        text: the entries of generation_config.json that stage 1 has written.
    """

    source: Path
    folder: Path
    seed: int
    text: Mapping

    @property
    def embeddings(self) -> Path:
        """The file of its prompt's embeddings."""
        return self.source / EMBEDDINGS


class Task(NamedTuple):
    """What is written with a video's latents.

    Attributes:
        video: which.
        config: the entries that generation_config.json has after this stage.
        inputs: see `provenance.describe`.
        decides: all that the latents depend on, to the last bit, by names for people.
    """

    video: Video
    config: Mapping
    inputs: Mapping[str, str]
    decides: dict[str, str]

    @property
    def is_finished(self) -> bool:
        """Whether the latents that this task would write are there."""
        try:
            found = stage_files.metadata(self.video.folder / LATENTS)
            return found.get("decides") == json.dumps(self.decides)
        except (OSError, SafetensorError):
            return False


class Group(NamedTuple):
    """Tasks that are done at a time, the file that keeps their state, and what that has of an unfinished run."""

    tasks: list[Task]
    state_file: StateFile
    saved: "Mapping[str, np.ndarray] | None"


def main() -> None:
    """Run stage 2."""
    arguments = parse_arguments()
    hosts.join(arguments, inputs=(CONFIG, EMBEDDINGS))
    report = Report("stage2", arguments)
    profile = Profile(arguments.profile, "step", report)
    output_dir = arguments.output_dir or arguments.input_dir
    found = find_videos(arguments, output_dir)
    loras = [lora.read(option) for option in arguments.lora]
    lora_files = [file for one in loras for file in one.files]
    hosts.agree_on_files(lora_files)
    model_id, shapes = check_files(found, arguments, output_dir, lora_files)

    prepare_libraries()
    devices = accelerator.devices()
    plan = denoising_plan(arguments, model_id, devices, devices[0].platform, videos=len(found))
    for path, of_file in shapes.items():
        check_embeddings(of_file, plan.transformer, path)
    wanted = dump_wanted(arguments)
    tensor_dump.steps(arguments.dump_steps, plan.num_inference_steps)  # wrong ones are said before anything is loaded

    report.title(f"Stage 2: transformer of {model_id}")
    cache = Cache(arguments.compilation_cache, report)
    with report.phase("load"):
        from cogvideox.models.transformer.parameters import load_parameters, stored_shapes
        from cogvideox.models.transformer.step import abstract_arguments, make_step

        shapes_of_weights = stored_shapes(plan.transformer)
        for one in loras:
            one.check(shapes_of_weights)
        read = checkpoint.tensor_reader(model_id, "transformer", shapes_of_weights)
        hosts.agree_on_model(model_id, "transformer", "vae", "scheduler")
        with plan_errors():
            plan = plan.with_dtype(read("proj_out.weight").dtype)
            skipped = skipped_steps(arguments, plan, model_id, read)
            kinds = plan.kinds(skipped)  # of the steps, each kind with a program of its own
            traced = {
                kind: make_step(plan, wanted, kind).trace(*abstract_arguments(plan)) for kind in dict.fromkeys(kinds)
            }
        report.plan(plan)
        describe(plan, arguments, report)
        for one in loras:
            report.say(one.summary)
        if plan.step_cache:
            describe_cache(skipped, plan, report)
        digests = {str(path): provenance.file_digest(path) for path in lora_files}  # once for all videos
        digests |= {str(path): provenance.digest(path) for path in shapes}
        tasks = [task_of(video, arguments, plan, skipped, lora_files, digests) for video in found]
        groups = groups_of(tasks, plan, arguments, report)
        if not groups:
            return
        programs_of_run = [traced[kind] for kind in kinds]
        made_from = stage_files.made_from(tasks[0].config, LATENT_ENTRIES)  # only a single video is dumped
        recorder = dump_recorder(arguments, "stage2", "step", made_from, plan.parallelism.mesh, programs_of_run)
        compiling = Compiling(arguments, "denoising step", plan, [*traced.values()], cache, report)
        parameters = load_parameters(read, plan.transformer, plan.parallelism, [one.add for one in loras])
        report.say(f"loaded transformer: {sum(p.size for p in parameters.values()):,} parameters, {plan.dtype}")
        start = functools.partial(start_group, plan=plan, parameters=parameters, skipped=skipped, report=report)
        denoising = start(groups[0])

    with report.phase("compile") as compile_phase:
        compiled, compile_phase.note = compiling.wait()

    if arguments.warmup_steps == 0:
        report.say("no warm-up: the seconds of the first step hold what the first run of a program costs")
    with report.phase(f"warm-up ({arguments.warmup_steps} steps)"):
        ignoring = dict(zip(traced, map(recorder.ignoring, compiled), strict=True))
        denoising.warm_up(arguments.warmup_steps, ignoring)

    profiled = profile.traced(compiled, plan.num_inference_steps - denoising.done)
    programs = dict(zip(traced, map(recorder.recording, profiled), strict=True))
    latents, seconds, steps = make_group(groups[0], denoising, programs, arguments, report)
    for n, group in enumerate(groups[1:], 2):
        label = f", group {n} of {len(groups)}"
        latents, seconds_of_group, steps_of_group = make_group(group, start(group), programs, arguments, report, label)
        seconds, steps = seconds + seconds_of_group, steps + steps_of_group
    report.add("per step", f"{seconds / steps:.3f} s")
    if len(groups) > 1:
        report.add("run of all groups", f"{seconds:.2f} s")
    profile.show()

    report.add_array("latents", latents)
    for name, value in recorder.summary():
        report.add(name, value)
    if hosts.is_first():
        report.close(output_dir, shlex.join(["python", "stage3_vae_decoder.py", "--input_dir", str(output_dir)]))


def find_videos(arguments: argparse.Namespace, output_dir: Path) -> list[Video]:
    """Return the videos to make: of each prompt in --input_dir as many as --num_videos_per_prompt says.

    Raises:
        UserError: stage 1's files are missing or wrong, or other videos are in the way.
    """
    seeds = range(arguments.seed, arguments.seed + arguments.num_videos_per_prompt)
    if seeds[-1] > MOST_SEED:
        raise UserError(f"--seed {arguments.seed} and those after it for --num_videos_per_prompt exceed {MOST_SEED}")
    found = []
    for source in videos.prompts(arguments.input_dir):
        text = stage_files.read_config(source, TextConfig)
        folder = output_dir / source.relative_to(arguments.input_dir)
        folders = [videos.of_seed(folder, seed) for seed in seeds] if len(seeds) > 1 else [folder]
        if hosts.is_first():
            videos.check_videos(folder, folders)
        found += [Video(source, own, seed, text) for own, seed in zip(folders, seeds, strict=True)]
    if arguments.dump and len(found) > 1:
        raise UserError(f"--dump takes one video, and there are {len(found)}; give the --input_dir of one prompt")
    return found


def check_files(
    found: Sequence[Video], arguments: argparse.Namespace, output_dir: Path, lora_files: Sequence[Path]
) -> tuple[str, dict[Path, dict[str, tuple[int, ...]]]]:
    """Claim the output folder, and check the files of the videos.

    Returns:
        The model that stage 1 used, and the shapes of the embeddings, by name, in each of its files.

    Raises:
        UserError: another process writes to the folder, or a file is wrong or would replace another one.
    """
    if hosts.is_first():
        program.at_end.enter_context(writing.claimed(output_dir, "stage2"))
    names = ("prompt_embeds", "negative_prompt_embeds")
    texts = {video.embeddings: video.text for video in found}
    shapes = {
        path: stage_files.tensor_shapes(path, 1, names, text, force=arguments.force) for path, text in texts.items()
    }
    model_id = checkpoint.same_model(arguments.model_id, found[0].text["model_id"])
    for video in found:
        if video.text["model_id"] != model_id:
            raise UserError(f"{video.source} was made with model '{video.text['model_id']}', not '{model_id}'")
    outputs = [video.folder / name for video in found for name in (LATENTS, CONFIG)]
    inputs = [*shapes, *lora_files, arguments.executable, arguments.log_json]
    there = [("--output_dir", path) for path in outputs if hosts.is_first() and path.parent.is_dir()]
    writing.check_outputs(there, inputs, model_id)
    return model_id, shapes


def groups_of(tasks: list[Task], plan: "DenoisingPlan", arguments: argparse.Namespace, report: Report) -> list[Group]:
    """Divide the tasks into groups that are done at a time, without those of several that are finished already."""
    keeps_state = not arguments.dump and not hosts.are_many()
    todo = tasks
    if len(tasks) > 1:
        report.say(f"{len(tasks)} videos, {plan.batch} at a time: {reason_for_batch(plan, arguments)}")
        if keeps_state and not arguments.restart:
            todo = [task for task in tasks if not task.is_finished]
    if len(todo) < len(tasks):
        report.say(f"already finished: {len(tasks) - len(todo)} of {len(tasks)} videos; --restart makes them again")
    groups = []
    for i in range(0, len(todo), plan.batch):
        group = todo[i : i + plan.batch]
        decides = group[0].decides.copy()
        for task in group[1:]:
            decides |= {f"{name} of {task.video.folder}": value for name, value in task.decides.items()}
        every = arguments.checkpoint_every if keeps_state else 0
        state_file = StateFile(group[0].video.folder, decides, every, report)
        groups.append(Group(group, state_file, state_file.load(arguments.restart) if keeps_state else None))
    return groups


def reason_for_batch(plan: "DenoisingPlan", arguments: argparse.Namespace) -> str:
    """Say why a group has as many videos as it has."""
    if arguments.videos_at_once:
        return "as --videos_at_once says"
    if plan.batch == 1:
        return "more would not make more of them an hour"
    return f"dp {plan.parallelism.mesh.shape['dp']} makes the most of them an hour, by prediction"


def start_group(
    group: Group, *, plan: "DenoisingPlan", parameters: "Mapping[str, jax.Array]", skipped: list[int], report: Report
) -> "Denoising":
    """Return the run of a group before its first step, or before the one after those that are done."""
    import torch
    from safetensors.torch import load_file

    from cogvideox.models.transformer.denoising import Denoising

    # The last group may have fewer videos; then its last one is made several times, and written once.
    filled = [task.video for task in group.tasks + group.tasks[-1:] * (plan.batch - len(group.tasks))]
    embeddings = [load_file(video.embeddings) for video in filled]
    positive, negative = (
        torch.cat([of_prompt[name] for of_prompt in embeddings]) for name in ("prompt_embeds", "negative_prompt_embeds")
    )
    denoising = Denoising(plan, parameters, positive, negative, [video.seed for video in filled], skipped)
    if group.saved:
        denoising.resume(group.saved)
        report.say(f"going on after step {denoising.done} of {plan.num_inference_steps}, from {group.state_file.path}")
    return denoising


def make_group(
    group: Group,
    denoising: "Denoising",
    programs: "Mapping[StepKind, Callable]",
    arguments: argparse.Namespace,
    report: Report,
    label: str = "",
) -> tuple[np.ndarray, float, int]:
    """Run the steps of a group and write its latents.

    Returns:
        The latents, [B, C, T, H, W], and the seconds and the number of the steps.
    """
    import jax

    plan, done, state_file = denoising.plan, denoising.done, group.state_file
    steps = plan.num_inference_steps
    with Interruption.held_back(), contextlib.ExitStack() as claims:
        for task in group.tasks if hosts.is_first() else ():
            claims.enter_context(writing.claimed(task.video.folder, "stage2"))
        with (
            report.phase(f"run{label}", in_table=not label) as run_phase,
            report.progress("denoising", "step", steps, done) as bar,
        ):
            for state in denoising.run(programs):
                bar.update()
                if arguments.preview_every and bar.n % arguments.preview_every == 0:
                    with report.aside("previews"):
                        draw_previews(state, bar.n, group.tasks, plan)
                if bar.n < steps:
                    state_file.keep(denoising, state, now=Interruption.number is not None)
                if Interruption.number and bar.n < steps:
                    raise KeyboardInterrupt(state_file.farewell(bar.n, steps))
        warn_if_not_finite(int(state.finite_steps), steps, report)

        with report.phase(f"save{label}", in_table=not label):
            latents = np.asarray(jax.numpy.swapaxes(state.latents[:, plan.surplus_frames :], 1, 2))
            if hosts.is_first():
                for i, task in enumerate(group.tasks):
                    save(latents[i : i + 1], task, arguments)
                state_file.remove()
    for task in group.tasks:
        report.say(f"wrote {task.video.folder / LATENTS} and {CONFIG}")
    return latents[: len(group.tasks)], run_phase.seconds, steps - done


def warn_if_not_finite(finite_steps: int, steps: int, report: Report) -> None:
    """Warn if the latents were finite after the first `finite_steps` of the steps alone."""
    if finite_steps < steps:
        report.warn(
            f"the latents are NaN or infinite from step {finite_steps + 1} of {steps} on; stage 3 refuses them without "
            "--allow_nan. Weights, --guidance_scale or the dtype may be the cause; --dump_stats says where it begins"
        )


def draw_previews(state: "State", n: int, tasks: Sequence[Task], plan: "DenoisingPlan") -> None:
    """Draw the noise-free latents that a step, the n-th, predicts for each video."""
    from cogvideox.files import latent_pictures

    predicted = np.asarray(state.pred_original_sample[:, plan.surplus_frames :]).swapaxes(1, 2)
    for task, latents in zip(tasks, predicted, strict=False):  # a group may be filled up
        title = f"step {n} of {plan.num_inference_steps}, the video that it predicts: {task.config['prompt']}"
        if hosts.is_first():
            map_ = latent_pictures.fitted_map(task.config["model_id"])
            latent_pictures.preview(latents, task.video.folder / PREVIEW, map_, title)


def describe(plan: "DenoisingPlan", arguments: argparse.Namespace, report: Report) -> None:
    """Report the devices, the mesh, attention, guidance and scheduler of the plan, and which of them are defaults."""
    devices = plan.parallelism.mesh.devices
    report.say(f"devices: {devices.size} x {devices.flat[0].device_kind}")
    if devices.size > 1:
        default = "sp has all chips that dp leaves, which moves the fewest bytes"
        reason = "as --sp_num says" if arguments.sp_num else default
        mesh = dict(plan.parallelism.mesh.shape)
        report.say(f"mesh: {mesh}, {reason}; {plan.parallelism.layout} layout of the parameters")
    by = "chosen" if arguments.attention else f"the default on a {plan.attention.platform}"
    blocks = plan.attention.block_sizes or "the kernel's own choice"
    report.say(f"attention: {plan.attention.name}, {by}" + (f"; blocks: {blocks}" if plan.attention.is_kernel else ""))
    if plan.guided:
        kind = ", dynamic" if plan.use_dynamic_cfg else ""
        only = " in steps {} to {} alone".format(*plan.guidance_interval) if plan.guidance_interval else ""
        report.say(f"guidance scale {plan.guidance_scale:g}{kind}{only}: negative and positive prompt in one batch")
    else:
        dp = ", dp is 1" if arguments.use_dp and devices.size > 1 else ""
        report.say(f"guidance scale {plan.guidance_scale:g}: no guidance, the positive prompt alone{dp}")
    scheduler, spacing = (plan.scheduler.get(name) for name in ("_class_name", "timestep_spacing"))
    report.say(f"scheduler: {scheduler}, {spacing} timesteps, {plan.num_inference_steps} steps")
    if all(getattr(arguments, name) == value for name, value in PRESETS["seed"].items()):
        report.say("these are the settings of a draft; --preset authors sets those of the model's authors")
    for remark in untrained(plan):
        report.say(remark)


def describe_cache(skipped: list[int], plan: "DenoisingPlan", report: Report) -> None:
    """Report which steps skip the blocks, and what the residual that they take over needs of a chip."""
    from cogvideox.models.transformer.step import residual_bytes

    steps, size = plan.num_inference_steps, residual_bytes(plan) / 2**30
    which = f": {tensor_dump.as_text(skipped)}" if skipped else ""
    report.say(f"step cache: {len(skipped)} of {steps} steps skip the blocks{which}; it takes {size:.2f} GiB of a chip")
    factor = steps / (steps - len(skipped))
    report.add("step cache", f"{len(skipped)} of {steps} steps skipped, {factor:.2f} x fewer blocks to run")


def untrained(plan: "DenoisingPlan") -> Iterator[str]:
    """Say what the model was not trained on, by its config and by its authors: it runs, but may look worse."""
    scale = spatial_compression_ratio(plan.vae)
    height, width = (plan.transformer[f"sample_{name}"] * scale for name in ("height", "width"))
    if (plan.height, plan.width) != (height, width):
        yield f"the model's config names {height} x {width}; {plan.height} x {plan.width} may look worse"
    if (plan.frames - 1) % 16:
        yield f"CogVideoX 1.5 was trained on 16n + 1 frames, 81 and 161; {plan.frames} may look worse"


def task_of(
    video: Video,
    arguments: argparse.Namespace,
    plan: "DenoisingPlan",
    skipped: Sequence[int],
    lora_files: Sequence[Path],
    digests: Mapping[str, str],
) -> Task:
    """Return what is written with the latents of a video; `digests` has those of all files that are read, by path."""
    of_plan = {
        "scheduler": plan.scheduler["_class_name"],
        "timestep_spacing": plan.scheduler.get("timestep_spacing"),
        "skipped_steps": tensor_dump.as_text(skipped),
        "seed": video.seed,
    }
    of_options = {name: of_plan.get(name, getattr(arguments, name, None)) for name in VIDEO_ENTRIES}
    config = {name: video.text[name] for name in TEXT_ENTRIES} | of_options
    inputs = {provenance.known_as(video.embeddings, video.folder): digests[str(video.embeddings)]}
    inputs |= {str(path): digests[str(path)] for path in lora_files}

    devices = plan.devices
    made_from = {name: config.get(name) for name in LATENT_ENTRIES}
    of_run = {"dtype": plan.dtype, "devices": f"{len(devices)} x {devices[0].device_kind}"}
    decides = made_from | plan.program_options | of_run | inputs | versions("jax", "jaxlib", "libtpu", "torch")
    return Task(video, config, inputs, {name: str(value) for name, value in decides.items()})


def save(latents: np.ndarray, task: Task, arguments: argparse.Namespace) -> None:
    """Write latents [1, C, T, H, W] and the config to the folder of their video."""
    from safetensors.numpy import save_file

    metadata = stage_files.made_from(task.config, LATENT_ENTRIES) | {"decides": json.dumps(task.decides)}
    metadata |= provenance.describe("stage2", task.inputs, arguments)
    with writing.committing(task.video.folder, "stage2") as new:
        save_file({"latents": np.ascontiguousarray(latents)}, new / LATENTS, metadata=metadata)
        stage_files.write_config(new, task.config)


def check_embeddings(shapes: Mapping[str, tuple[int, ...]], transformer: Mapping, path: Path) -> None:
    """Raise UserError unless the embeddings are of one prompt, with as many tokens and the width of the transformer."""
    expected = (1, transformer["max_text_seq_length"], transformer["text_embed_dim"])
    for name, shape in shapes.items():
        if shape != expected:
            raise UserError(
                f"{path}: {name} has shape {list(shape)}, the transformer takes {list(expected)}: the embeddings were "
                "made with another model; run stage 1 again"
            )


if __name__ == "__main__":
    run(main)
