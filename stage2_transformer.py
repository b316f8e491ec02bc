"""Run stage 2: denoise the latents with the CogVideoX 1.5 transformer, in JAX.

Reads stage 1's files from --input_dir; writes stage2_latents.safetensors and the video entries of
generation_config.json to --output_dir.
"""

import argparse
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import checkpoint
import hosts
import tensor_dump
import utils
from compilation import Cache, Compiling, add_compilation_options
from console import ArgumentParser, Report, UserError, add_log_options, number, prepare_libraries, run
from options import add_denoising_options, add_dump_options, denoising_plan, dump_recorder, dump_wanted, plan_errors
from profiling import Profile, add_profile_option

if TYPE_CHECKING:
    import jax

    from models.denoising import Plan, State


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser("Stage 2 of CogVideoX text to video: denoise the latents.")
    parser.add_argument("--input_dir", type=utils.path, default=utils.STAGE_OUTPUTS, help="stage 1's output folder")
    parser.add_argument("--output_dir", type=utils.path, help="where the files go (default: --input_dir)")
    parser.add_argument("--model_id", help="the model; it must be the one that stage 1 used, which is the default")
    add_denoising_options(parser)
    parser.add_argument("--seed", type=number(int, 0, 2**64 - 1), default=utils.SEED, help="seed of the noise")
    parser.add_argument("--fps", type=number(int, 1), default=utils.FPS, help="frames per second, for stage 3")
    parser.add_argument(
        "--warmup_steps",
        type=number(int, 0),
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
    add_dump_options(parser, "step")
    add_profile_option(parser, "step")
    hosts.add_host_options(parser)
    add_log_options(parser)
    return parser.parse_args()


def main() -> None:
    """Run stage 2."""
    arguments = parse_arguments()
    hosts.join(arguments, inputs=(utils.CONFIG, utils.EMBEDDINGS))
    report = Report("stage2", arguments)
    profile = Profile(arguments.profile, "step", report)
    output_dir = arguments.output_dir or arguments.input_dir
    text_config = utils.read_config(arguments.input_dir, {1: utils.TEXT_ENTRIES})
    embeddings_path = arguments.input_dir / utils.EMBEDDINGS
    shapes = utils.tensor_shapes(embeddings_path, 1, ("prompt_embeds", "negative_prompt_embeds"), text_config)
    if hosts.is_first():
        utils.check_writable(output_dir / utils.LATENTS)
    model_id = checkpoint.same_model(arguments.model_id, text_config["model_id"])

    prepare_libraries()
    import jax

    devices = jax.devices()
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

        read = checkpoint.tensor_reader(model_id, "transformer", stored_shapes(plan.transformer))
        hosts.agree_on_model(model_id, "transformer", "vae", "scheduler")
        with plan_errors():
            plan = plan.with_dtype(read("proj_out.weight").dtype)
            traced = make_step(plan, wanted).trace(*abstract_arguments(plan))
        report.plan(plan)
        describe(plan, arguments, report)
        config = config_of(arguments, text_config, plan)
        made_from = utils.made_from(config, utils.LATENT_ENTRIES)
        steps = plan.num_inference_steps
        recorder = dump_recorder(arguments, "stage2", "step", made_from, plan.parallelism.mesh, [traced] * steps)
        compiling = Compiling(arguments, "denoising step", plan, [traced], cache, report)
        parameters = load_parameters(read, plan.transformer, plan.parallelism)
        report.say(f"loaded transformer: {sum(p.size for p in parameters.values()):,} parameters, {plan.dtype}")
        embeddings = load_file(embeddings_path)
        denoising = Denoising(
            plan, parameters, embeddings["prompt_embeds"], embeddings["negative_prompt_embeds"], arguments.seed
        )

    with report.phase("compile") as compile_phase:
        (program,), compile_phase.note = compiling.wait()

    if arguments.warmup_steps == 0:
        report.say("no warm-up: the seconds of the first step hold what the first run of a program costs")
    with report.phase(f"warm-up ({arguments.warmup_steps} steps)"):
        denoising.warm_up(recorder.ignoring(program), arguments.warmup_steps)

    (step,) = profile.traced([program], steps)
    with report.phase("run") as run_phase, report.progress("denoising", "step", steps) as bar:
        for state in denoising.run(recorder.recording(step)):
            bar.update()
            if arguments.preview_every and bar.n % arguments.preview_every == 0:
                with report.aside("previews"):
                    draw_preview(state, bar.n, config, plan, output_dir / utils.PREVIEW)
    report.add("per step", f"{run_phase.seconds / steps:.3f} s")

    with report.phase("save"):
        latents = jax.numpy.transpose(state.latents[:, plan.surplus_frames :], (0, 2, 1, 3, 4))
        if hosts.is_first():
            save(latents, config, made_from, output_dir)
    report.say(f"wrote {output_dir / utils.LATENTS} and {utils.CONFIG}")
    profile.show()

    report.add_array("latents", latents)
    for name, value in recorder.summary():
        report.add(name, value)
    if hosts.is_first():
        report.close(output_dir, shlex.join(["python", "stage3_vae_decoder.py", "--input_dir", str(output_dir)]))


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
        report.say(f"guidance scale {plan.guidance_scale:g}: negative and positive prompt in one batch")
    else:
        dp = ", dp is 1" if arguments.use_dp and devices.size > 1 else ""
        report.say(f"guidance scale {plan.guidance_scale:g}: no guidance, the positive prompt alone{dp}")
    report.say(f"scheduler: {plan.scheduler['_class_name']}, {plan.num_inference_steps} steps")


def config_of(arguments: argparse.Namespace, text_config: Mapping, plan: "Plan") -> dict:
    """Return the entries that generation_config.json has after this stage."""
    config = {name: text_config[name] for name in utils.TEXT_ENTRIES}
    config |= {name: getattr(arguments, name) for name in utils.VIDEO_ENTRIES if name != "scheduler"}
    return config | {"scheduler": plan.scheduler["_class_name"]}


def save(latents: "jax.Array", config: Mapping, made_from: dict[str, str], output_dir: Path) -> None:
    """Write latents [B, C, T, H, W] and the config to `output_dir`."""
    from safetensors.flax import save_file

    with utils.replacing(output_dir / utils.LATENTS) as temporary:
        save_file({"latents": latents}, temporary, metadata=made_from)
    utils.write_config(output_dir, config)


def check_embeddings(shapes: Mapping[str, tuple[int, ...]], transformer: Mapping, path: Path) -> None:
    """Raise UserError unless the embeddings have the number of tokens and the width that the transformer takes."""
    expected = (transformer["max_text_seq_length"], transformer["text_embed_dim"])
    for name, shape in shapes.items():
        if len(shape) != 3 or shape[1:] != expected:
            raise UserError(
                f"{path}: {name} has shape {list(shape)}, the transformer takes [B, {expected[0]}, {expected[1]}]: "
                "the embeddings were made with another model; run stage 1 again"
            )


if __name__ == "__main__":
    run(main)
