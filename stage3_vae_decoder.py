"""Run stage 3: decode the latents to a video with diffusers' VAE decoder, run by JAX through TorchAx.

Reads stage 2's files from --input_dir; writes the video, or those of all folders there (see cogvideox/files/videos.py),
to --output_dir. stage3_vae_decoder_flax.py is this stage with the Flax decoder instead.
"""

import argparse
import contextlib
from collections.abc import Sequence

from cogvideox.cli import next_command
from cogvideox.cli.parser import ArgumentParser
from cogvideox.cli.program import run
from cogvideox.cli.report import Report
from cogvideox.cli.stages import STAGES, add_stage3_options
from cogvideox.files import provenance, stage_files
from cogvideox.files import videos as of_index
from cogvideox.files.video_file import check_ffmpeg
from cogvideox.run import accelerator, decoding, jobs, page_cache, warm
from cogvideox.run.compilation import Cache, Compiling
from cogvideox.run.hosts import join
from cogvideox.run.plans import check_dump, decoding_plan, with_compute_dtype
from cogvideox.run.profiling import Profile
from utils import CONFIG, LATENTS


def parse_arguments(argv: Sequence[str] | None, decoder: str) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(
        "Stage 3 of CogVideoX on TPUs: decode the latents.",
        others=STAGES,
        prog=next_command.STAGE3[decoder],
        usage="%(prog)s [options]",
    )
    add_stage3_options(parser)
    parser.set_defaults(decoder=decoder)  # which the files say of themselves
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, decoder: str = "torchax") -> None:
    """Run stage 3 with these options, by default those of the command line, and a decoder, "torchax" or "flax"."""
    arguments = parse_arguments(argv, decoder)
    hosts = join(arguments, inputs=(CONFIG, LATENTS))
    with Report("stage3", next_command.STAGE3[decoder], arguments) as report, contextlib.ExitStack() as until_end:
        profile = Profile(arguments.profile, "chunk", report)
        videos = jobs.videos_to_decode(arguments)
        output_dir = jobs.decoding_folder(arguments)
        if arguments.output_video:
            until_end.enter_context(
                hosts.claimed(arguments.output_video.parent, "stage3", report.warn, arguments.output_video)
            )
        folders = of_index.kept_for(output_dir, jobs.places_of(videos, arguments), arguments.only)
        for folder in folders if arguments.output_dir or not arguments.output_video else ():
            until_end.enter_context(hosts.claimed(folder, "stage3", report.warn))
        model_id, shapes = jobs.check_files_to_decode(videos, arguments, hosts, report)
        check_ffmpeg()

        accelerator.prepare_libraries(arguments.profile is not None, arguments.verbose)
        page_cache.warm(model_id, "vae", arguments.variant)
        devices = accelerator.devices(arguments.debug)
        stored = stage_files.read_latents(videos[0].latents, arguments.allow_nan)
        size = {name: videos[0].config[name] for name in jobs.SIZE}
        plan = decoding_plan(arguments, model_id, decoder, size, devices, stored.dtype)
        jobs.check_latents(videos, shapes, plan, arguments)
        check_dump(arguments, sum(plan.runs))

        report.title(f"Stage 3: {decoder} VAE decoder of {model_id}")
        cache = until_end.enter_context(Cache(arguments.compilation_cache, report))
        decoding.report_plan(plan, arguments, report)
        with report.phase("load"):
            with report.part("imports"):
                decoding.import_modules(decoder)
            with report.part("tracing"):
                vae = warm.kept("decoder", plan, plan.make_decoder)
            files = decoding.weight_files(vae, model_id, arguments.variant, report.say)
            plan = with_compute_dtype(plan, decoding.values_of(files), arguments, report.say)
            report.plan(plan, hosts.own(plan.devices))
            hosts.agree_on_model(model_id, "vae", arguments.variant)
            if arguments.only:
                videos = decoding.not_decoded(videos, model_id, plan, arguments)
            if not videos:
                report.say("already decoded: all videos")
                return
            with report.part("tracing"):
                traced = decoding.trace_chunks(arguments, plan, vae, files)
            recorder = decoding.recorder(arguments, videos[0], model_id, plan, traced)
            compiling = Compiling(arguments, f"{decoder} decoder", plan, traced, cache, report)
            weights = warm.kept(
                "vae",
                (provenance.weights(model_id, "vae", arguments.variant), plan),
                lambda: decoding.load_weights(files, plan.on_devices(files), report),
            )
        with report.phase("compile") as compile_phase:
            compiled, compile_phase.note = compiling.wait()
        warm.make_room(compiled, hosts.own(plan.devices), others=["transformer"])
        run_of_videos = decoding.DecodingRun(model_id, plan, weights, arguments, hosts, report)
        run_of_videos.warm_up(stored, compiled, recorder)
        latents = run_of_videos.decode_all(videos, compiled, recorder, profile)

        profile.show()
        report.add_array("latents", latents)
        report.add("video", decoding.video_row(videos[-1], plan, arguments))
        report.add_rows(recorder.summary())
        if hosts.is_first:
            report.close(folders)


if __name__ == "__main__":
    run(main)
