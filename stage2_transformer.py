"""Run stage 2: denoise the latents with the CogVideoX 1.5 transformer, in JAX.

Reads stage 1's files from --input_dir; writes stage2_latents.safetensors and the video entries of
generation_config.json to --output_dir.
"""

import argparse
import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import checkpoint
import console
import hosts
import lora
import provenance
import tensor_dump
import utils
import writing
from compilation import Cache, Compiling, add_compilation_options
from console import (
    ArgumentParser,
    Interruption,
    Report,
    UserError,
    add_log_options,
    number,
    prepare_libraries,
    run,
    versions,
)
from models.sizes import spatial_compression_ratio
from options import (
    add_denoising_options,
    add_dump_options,
    denoising_plan,
    dump_recorder,
    dump_wanted,
    plan_errors,
    skipped_steps,
)
from profiling import Profile, add_profile_option
from reading import MOST_FPS, TextConfig
from resume import StateFile

if TYPE_CHECKING:
    import jax

    from models.denoising import Plan, State


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser("Stage 2 of CogVideoX text to video: denoise the latents.")
    parser.add_argument("--input_dir", type=utils.path, default=utils.STAGE_OUTPUTS, help="stage 1's output folder")
    parser.add_argument("--output_dir", type=utils.path, help="where the files go (default: --input_dir)")
    utils.add_force_option(parser)
    parser.add_argument("--model_id", help="the model; it must be the one that stage 1 used, which is the default")
    add_denoising_options(parser)
    parser.add_argument(
        "--preset",
        choices=utils.PRESETS,
        default="seed",
        help="set steps, guidance, scheduler and fps at once: to a draft's, or to those of the model's authors",
    )
    parser.add_argument(
        "--lora",
        type=lora.option,
        action="append",
        default=[],
        metavar="PATH[:SCALE]",
        help="add a LoRA to the weights, a safetensors file or its folder, times a scale; can be given several times "
        "(default: none)",
    )
    parser.add_argument("--seed", type=number(int, 0, 2**64 - 1), default=utils.SEED, help="seed of the noise")
    parser.add_argument(
        "--fps", type=number(int, 1, MOST_FPS), default=utils.FPS, help="frames per second, for stage 3"
    )
    parser.add_argument(
        "--warmup_steps",
        type=number(int, 0, 1000),
        default=utils.WARMUP_STEPS,
        help="steps that run before the first one, untimed",
    )
    add_compilation_options(parser, "the compiled step")
    parser.add_argument(
        "--preview_every",
        type=number(int, 1),
        metavar="N",
        help=f"after every N steps draw the latents that they predict as {utils.PREVIEW} in the output folder",
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
    hosts.add_host_options(parser)
    add_log_options(parser)
    given, _ = parser.parse_known_args()
    parser.set_defaults(**utils.PRESETS[given.preset])
    return parser.parse_args()


def main() -> None:
    """Run stage 2."""
    arguments = parse_arguments()
    hosts.join(arguments, inputs=(utils.CONFIG, utils.EMBEDDINGS))
    report = Report("stage2", arguments)
    profile = Profile(arguments.profile, "step", report)
    output_dir = arguments.output_dir or arguments.input_dir
    text_config = utils.read_config(arguments.input_dir, TextConfig)
    if hosts.is_first():
        console.at_end.enter_context(writing.claimed(output_dir, "stage2"))
    embeddings_path = arguments.input_dir / utils.EMBEDDINGS
    names = ("prompt_embeds", "negative_prompt_embeds")
    shapes = utils.tensor_shapes(embeddings_path, 1, names, text_config, force=arguments.force)
    model_id = checkpoint.same_model(arguments.model_id, text_config["model_id"])
    loras = [lora.read(option) for option in arguments.lora]
    lora_files = [file for one in loras for file in one.files]
    hosts.agree_on_files(lora_files)
    outputs = [("--output_dir", output_dir / name) for name in (utils.LATENTS, utils.CONFIG) if hosts.is_first()]
    inputs = [embeddings_path, *lora_files, arguments.executable, arguments.log_json]
    writing.check_outputs(outputs, inputs, model_id)

    prepare_libraries()
    import jax

    devices = console.devices()
    plan = denoising_plan(arguments, model_id, devices, devices[0].platform, batch=shapes["prompt_embeds"][0])
    check_embeddings(shapes, plan.transformer, embeddings_path)
    wanted = dump_wanted(arguments)
    tensor_dump.steps(arguments.dump_steps, plan.num_inference_steps)  # wrong ones are said before anything is loaded

    report.title(f"Stage 2: transformer of {model_id}")
    cache = Cache(arguments.compilation_cache, report)
    with report.phase("load"):
        from safetensors.torch import load_file

        from models.denoising import Denoising, abstract_arguments, make_step
        from models.transformer import load_parameters, stored_shapes

        shapes_of_weights = stored_shapes(plan.transformer)
        for one in loras:
            one.check(shapes_of_weights)
        read = checkpoint.tensor_reader(model_id, "transformer", shapes_of_weights)
        hosts.agree_on_model(model_id, "transformer", "vae", "scheduler")
        with plan_errors():
            plan = plan.with_dtype(read("proj_out.weight").dtype)
            kinds = [False, True] if plan.step_cache else [False]  # whether the step skips the blocks
            traced = [make_step(plan, wanted, short).trace(*abstract_arguments(plan)) for short in kinds]
        report.plan(plan)
        describe(plan, arguments, report)
        for one in loras:
            report.say(one.summary)
        skipped = skipped_steps(arguments, plan, model_id, read)
        if plan.step_cache:
            describe_cache(skipped, plan, report)
        config = config_of(arguments, text_config, plan, skipped)
        made_from = utils.made_from(config, utils.LATENT_ENTRIES)
        steps = plan.num_inference_steps
        made = provenance.describe("stage2", [embeddings_path], arguments, lora_files)
        state_file = StateFile(output_dir, decides(plan, config, made), arguments.checkpoint_every, report)
        keeps_state = not arguments.dump and not hosts.are_many()
        saved = state_file.load(arguments.restart) if keeps_state else None
        programs_of_run = [traced[i in skipped] for i in range(steps)]
        recorder = dump_recorder(arguments, "stage2", "step", made_from, plan.parallelism.mesh, programs_of_run)
        compiling = Compiling(arguments, "denoising step", plan, traced, cache, report)
        parameters = load_parameters(read, plan.transformer, plan.parallelism, [one.add for one in loras])
        report.say(f"loaded transformer: {sum(p.size for p in parameters.values()):,} parameters, {plan.dtype}")
        embeddings = load_file(embeddings_path)
        denoising = Denoising(
            plan,
            parameters,
            embeddings["prompt_embeds"],
            embeddings["negative_prompt_embeds"],
            arguments.seed,
            skipped,
        )
        if saved:
            denoising.resume(saved)
            report.say(f"going on after step {denoising.done} of {steps}, from {state_file.path}")

    with report.phase("compile") as compile_phase:
        programs, compile_phase.note = compiling.wait()

    if arguments.warmup_steps == 0:
        report.say("no warm-up: the seconds of the first step hold what the first run of a program costs")
    with report.phase(f"warm-up ({arguments.warmup_steps} steps)"):
        denoising.warm_up(arguments.warmup_steps, *map(recorder.ignoring, programs))

    done = denoising.done
    functions = [*map(recorder.recording, profile.traced(programs, steps - done))]
    with Interruption.held_back():
        with report.phase("run") as run_phase, report.progress("denoising", "step", steps, done) as bar:
            for state in denoising.run(*functions):
                bar.update()
                if arguments.preview_every and bar.n % arguments.preview_every == 0:
                    with report.aside("previews"):
                        draw_preview(state, bar.n, config, plan, output_dir / utils.PREVIEW)
                if keeps_state and bar.n < steps:
                    state_file.keep(denoising, state, now=Interruption.number is not None)
                if Interruption.number and bar.n < steps:
                    raise KeyboardInterrupt(state_file.farewell(bar.n, steps))
        report.add("per step", f"{run_phase.seconds / (steps - done):.3f} s")
        warn_if_not_finite(int(state.finite_steps), steps, report)

        with report.phase("save"):
            latents = jax.numpy.transpose(state.latents[:, plan.surplus_frames :], (0, 2, 1, 3, 4))
            if hosts.is_first():
                save(latents, config, made_from | made, output_dir)
                state_file.remove()
    report.say(f"wrote {output_dir / utils.LATENTS} and {utils.CONFIG}")
    profile.show()

    report.add_array("latents", latents)
    for name, value in recorder.summary():
        report.add(name, value)
    if hosts.is_first():
        report.close(output_dir, shlex.join(["python", "stage3_vae_decoder.py", "--input_dir", str(output_dir)]))


def warn_if_not_finite(finite_steps: int, steps: int, report: Report) -> None:
    """Warn if the latents were finite after the first `finite_steps` of the steps alone."""
    if finite_steps < steps:
        report.warn(
            f"the latents are NaN or infinite from step {finite_steps + 1} of {steps} on; stage 3 refuses them without "
            "--allow_nan. Weights, --guidance_scale or the dtype may be the cause; --dump_stats says where it begins"
        )


def draw_preview(state: "State", n: int, config: Mapping, plan: "Plan", path: Path) -> None:
    """Draw the noise-free latents that a step, the n-th, predicts."""
    import pictures

    predicted = np.asarray(state.pred_original_sample[0, plan.surplus_frames :]).swapaxes(0, 1)
    title = f"step {n} of {plan.num_inference_steps}, the video that it predicts: {config['prompt']}"
    if hosts.is_first():
        pictures.preview(predicted, path, pictures.fitted_map(config["model_id"]), title)


def describe(plan: "Plan", arguments: argparse.Namespace, report: Report) -> None:
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
        report.say(f"guidance scale {plan.guidance_scale:g}{kind}: negative and positive prompt in one batch")
    else:
        dp = ", dp is 1" if arguments.use_dp and devices.size > 1 else ""
        report.say(f"guidance scale {plan.guidance_scale:g}: no guidance, the positive prompt alone{dp}")
    scheduler, spacing = (plan.scheduler.get(name) for name in ("_class_name", "timestep_spacing"))
    report.say(f"scheduler: {scheduler}, {spacing} timesteps, {plan.num_inference_steps} steps")
    if all(getattr(arguments, name) == value for name, value in utils.PRESETS["seed"].items()):
        report.say("these are the settings of a draft; --preset authors sets those of the model's authors")
    for remark in untrained(plan):
        report.say(remark)


def describe_cache(skipped: list[int], plan: "Plan", report: Report) -> None:
    """Report which steps skip the blocks, and what the residual that they take over needs of a chip."""
    from models.denoising import residual_bytes

    steps, size = plan.num_inference_steps, residual_bytes(plan) / 2**30
    which = f": {tensor_dump.as_text(skipped)}" if skipped else ""
    report.say(f"step cache: {len(skipped)} of {steps} steps skip the blocks{which}; it takes {size:.2f} GiB of a chip")
    factor = steps / (steps - len(skipped))
    report.add("step cache", f"{len(skipped)} of {steps} steps skipped, {factor:.2f} x fewer blocks to run")


def untrained(plan: "Plan") -> Iterator[str]:
    """Say what the model was not trained on, by its config and by its authors: it runs, but may look worse."""
    scale = spatial_compression_ratio(plan.vae)
    height, width = (plan.transformer[f"sample_{name}"] * scale for name in ("height", "width"))
    if (plan.height, plan.width) != (height, width):
        yield f"the model's config names {height} x {width}; {plan.height} x {plan.width} may look worse"
    if (plan.frames - 1) % 16:
        yield f"CogVideoX 1.5 was trained on 16n + 1 frames, 81 and 161; {plan.frames} may look worse"


def config_of(arguments: argparse.Namespace, text_config: Mapping, plan: "Plan", skipped: list[int]) -> dict:
    """Return the entries that generation_config.json has after this stage."""
    config = {name: text_config[name] for name in utils.TEXT_ENTRIES}
    of_plan = {"scheduler": plan.scheduler["_class_name"], "timestep_spacing": plan.scheduler.get("timestep_spacing")}
    of_plan["skipped_steps"] = tensor_dump.as_text(skipped)
    of_options = {name: getattr(arguments, name) for name in utils.VIDEO_ENTRIES if name not in of_plan}
    return config | of_options | of_plan


def decides(plan: "Plan", config: Mapping, made: Mapping[str, str]) -> dict[str, object]:
    """Return all that the latents depend on, to the last bit, by names for people."""
    devices = plan.devices
    made_from = {name: config.get(name) for name in utils.LATENT_ENTRIES}
    of_run = {"dtype": plan.dtype, "devices": f"{len(devices)} x {devices[0].device_kind}"}
    inputs = json.loads(made["provenance"])["inputs"]
    return made_from | plan.program_options | of_run | inputs | versions("jax", "jaxlib", "libtpu", "torch")


def save(latents: "jax.Array", config: Mapping, metadata: dict[str, str], output_dir: Path) -> None:
    """Write latents [B, C, T, H, W] and the config to `output_dir`."""
    from safetensors.flax import save_file

    with writing.committing(output_dir, "stage2") as new:
        save_file({"latents": latents}, new / utils.LATENTS, metadata=metadata)
        utils.write_config(new, config)


def check_embeddings(shapes: Mapping[str, tuple[int, ...]], transformer: Mapping, path: Path) -> None:
    """Raise UserError unless the embeddings have the number of tokens and the width that the transformer takes.

    All must be of as many prompts.
    """
    expected = (transformer["max_text_seq_length"], transformer["text_embed_dim"])
    batch = shapes["prompt_embeds"][0]
    for name, shape in shapes.items():
        if shape != (batch, *expected):
            raise UserError(
                f"{path}: {name} has shape {list(shape)}, the transformer takes [B, {expected[0]}, {expected[1]}], and "
                f"B is {batch} of prompt_embeds: the embeddings were made with another model; run stage 1 again"
            )


if __name__ == "__main__":
    run(main)
