"""Run stage 2: denoise the latents with the CogVideoX transformer, in JAX.

Reads stage 1's files from --input_dir; writes stage2_latents.safetensors and the video entries of
generation_config.json to --output_dir. Where there are several videos, each has a folder of its own; see
cogvideox/files/videos.py.
"""

import argparse
import contextlib
from collections.abc import Sequence

from cogvideox.cli import next_command
from cogvideox.cli.parser import ArgumentParser
from cogvideox.cli.program import run
from cogvideox.cli.report import Report
from cogvideox.cli.stages import STAGES, add_stage2_options
from cogvideox.files import generation_defaults, lora
from cogvideox.files import videos as of_index
from cogvideox.run import accelerator, denoising, jobs, page_cache, sparse_maps, warm
from cogvideox.run.compilation import Cache, Compiling
from cogvideox.run.hosts import join
from cogvideox.run.plans import check_dump, denoising_plan, with_compute_dtype
from cogvideox.run.profiling import Profile
from utils import CONFIG, EMBEDDINGS

PROGRAM = "stage2_transformer.py"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(
        "Stage 2 of CogVideoX on TPUs: denoise the latents.",
        others=STAGES,
        prog=PROGRAM,
        usage="%(prog)s [options]",
    )
    add_stage2_options(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run stage 2 with these options, by default those of the command line."""
    arguments = parse_arguments(argv)
    hosts = join(arguments, inputs=(CONFIG, EMBEDDINGS))
    output_dir = arguments.output_dir or arguments.input_dir
    with Report("stage2", PROGRAM, arguments) as report, contextlib.ExitStack() as until_end:
        profile = Profile(arguments.profile, "step", report)
        videos = jobs.videos_to_denoise(arguments, output_dir, hosts)
        loras = [lora.read_lora(option) for option in arguments.lora]
        hosts.agree_on_files([file for one in loras for file in one.files])
        folders = of_index.kept_for(output_dir, [video.folder for video in videos], arguments.only)
        for folder in folders:
            until_end.enter_context(hosts.claimed(folder, "stage2", report.warn))
        model_id, shapes = jobs.check_files_to_denoise(videos, arguments, output_dir, loras, hosts, report)
        made_for = generation_defaults.of_model(model_id)
        taken = jobs.seeds_of_lines(videos) + jobs.complete_size(arguments, shapes, model_id)
        taken += generation_defaults.complete(arguments, made_for)
        hosts.agree({f"--{name} of the model": str(getattr(arguments, name)) for name in generation_defaults.OURS})
        sparse_map = sparse_maps.file_of(arguments, model_id)
        hosts.agree_on_files([sparse_map] if sparse_map else [])

        accelerator.prepare_libraries(arguments.profile is not None, arguments.verbose)
        if not hosts.are_many:  # of which each may read its part alone
            page_cache.warm(model_id, "transformer", arguments.variant)
        devices = accelerator.devices(arguments.debug)
        strength = jobs.strength_of(videos)
        plan = denoising_plan(arguments, model_id, devices, devices[0].platform, len(videos), strength=strength)
        jobs.check_embeddings(shapes, plan)
        jobs.check_image_scale(arguments, plan)
        check_dump(arguments, plan.steps)

        report.title(f"Stage 2: transformer of {model_id}")
        for line in (*taken, *made_for.untrained(plan.height, plan.width, plan.frames)):
            report.say(line)
        cache = until_end.enter_context(Cache(arguments.compilation_cache, report))
        with report.phase("load"):
            read_weight = denoising.weight_reader(model_id, plan, loras, arguments.variant, report.say)
            hosts.agree_on_model(model_id, "transformer", arguments.variant)
            sparse_maps.check_weights(sparse_map, model_id, loras, arguments.variant, report.warn)
            with report.part("imports"):  # after the files are checked, which takes no time
                denoising.import_modules()
            plan = with_compute_dtype(plan, read_weight.values, arguments, report.say)
            with report.part("tracing"):
                steps = denoising.trace_steps(arguments, plan, model_id, read_weight)
            denoising.report_plan(steps, loras, sparse_map, arguments, hosts, report)
            tasks = jobs.tasks_of(videos, arguments, plan, steps.skipped, loras, sparse_map)
            groups = jobs.groups_of(tasks, plan, arguments, hosts, report)
            if hosts.is_first and arguments.only is None:
                jobs.record_start(tasks, groups, output_dir)
            next_stage = next_command.stage3(output_dir, next_command.taken_over(vars(arguments)))
            if not groups:
                report.next(next_stage)
                return
            recorder = denoising.recorder(arguments, tasks[0], steps)
            compiling = Compiling(arguments, "denoising step", plan, [*steps.traced.values()], cache, report)
            made_from = jobs.weights_of(model_id, loras, arguments.variant)
            parameters = denoising.load_weights(read_weight, plan, loras, made_from, report)
            run_of_groups = denoising.DenoisingRun(steps, parameters, arguments, hosts, report)
            first_run = run_of_groups.start(groups[0])
        with report.phase("compile") as compile_phase:
            compiled, compile_phase.note = compiling.wait()
        warm.make_room(compiled, hosts.own(plan.devices), others=["vae"])
        run_of_groups.warm_up(first_run, compiled, recorder)
        latents = run_of_groups.make_all(groups, first_run, compiled, recorder, profile)
        profile.show()
        report.add_array("latents", latents)
        report.add_rows(recorder.summary())
        if hosts.is_first:
            report.close(folders, next_stage)


if __name__ == "__main__":
    run(main)
