"""Run stage 3: decode the latents to a video with diffusers' VAE decoder, run by JAX through TorchAx.

Reads stage 2's files from --input_dir; writes --output_video, or the videos of all folders there (see videos.py).
stage3_vae_decoder_flax.py is this stage with the Flax decoder instead.
"""

import argparse
import collections
import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cogvideox.cli import program
from cogvideox.cli.options import (
    add_compilation_options,
    add_decoding_options,
    add_dump_options,
    add_force_option,
    add_host_options,
    add_log_options,
    add_profile_option,
)
from cogvideox.cli.parser import ArgumentParser
from cogvideox.cli.program import run
from cogvideox.cli.report import Progress, Report
from cogvideox.cli.types import file_path, number
from cogvideox.defaults import MOST_FPS
from cogvideox.errors import UserError
from cogvideox.files import checkpoint, provenance, stage_files, tensor_dump, timings, videos, writing
from cogvideox.files.names import CONFIG, LATENTS, STAGE_OUTPUTS, VIDEO, VIDEO_SUFFIXES
from cogvideox.files.schemas import LATENT_ENTRIES, VideoConfig
from cogvideox.files.video_file import check_ffmpeg, video_writer
from cogvideox.run import accelerator, hosts
from cogvideox.run.accelerator import prepare_libraries
from cogvideox.run.compilation import Cache, Compiling
from cogvideox.run.plans import decoding_plan, dump_recorder, dump_wanted, plan_errors
from cogvideox.run.profiling import Profile

if TYPE_CHECKING:
    import numpy as np

    from cogvideox.models.decoder.decoder import Decoder
    from cogvideox.models.decoder.plan import DecodingPlan


SIZE = ("height", "width", "frames")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser("Stage 3 of CogVideoX text to video: decode the latents.")
    parser.add_argument("--input_dir", type=file_path, default=STAGE_OUTPUTS, help="stage 2's output folder")
    parser.add_argument("--output_video", type=video_path, help=f"the video (default: {VIDEO} in --input_dir)")
    parser.add_argument("--output_frames", type=file_path, help="also save the frames, uint8, as safetensors")
    parser.add_argument(
        "--fps", type=number(int, 1, MOST_FPS), help="frames per second (default: what stage 2 was told)"
    )
    add_force_option(parser)
    parser.add_argument("--allow_nan", action="store_true", help="decode latents that hold NaN or infinity")
    add_compilation_options(parser, "the compiled programs")
    parser.add_argument(
        "--warmup",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="first run each program once, untimed",
    )
    parser.add_argument("--model_id", help="the model; it must be the one that stage 1 used, which is the default")
    add_decoding_options(parser)
    add_dump_options(parser, "chunk")
    add_profile_option(parser, "chunk")
    add_host_options(parser)
    add_log_options(parser)
    return parser.parse_args()


def video_path(text: str) -> Path:
    """Return `text` as the path of a video; an argparse type that accepts the suffixes of our containers only."""
    path = file_path(text)
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        raise argparse.ArgumentTypeError(
            f"{path} is not the name of a video; it must end in {', '.join(VIDEO_SUFFIXES)}"
        )
    return path


class Video(NamedTuple):
    """A video to decode: the folder of its latents, where it goes, and stage 2's entries of generation_config.json."""

    source: Path
    output: Path
    config: Mapping

    @property
    def latents(self) -> Path:
        """The file of its latents."""
        return self.source / LATENTS


def main(decoder: str = "torchax") -> None:
    """Run stage 3 with the decoder of `models/vae_<decoder>.py`."""
    arguments = parse_arguments()
    hosts.join(arguments, inputs=(CONFIG, LATENTS))
    report = Report("stage3", arguments)
    profile = Profile(arguments.profile, "chunk", report)
    found = find_videos(arguments)
    model_id, shapes = check_files(found, arguments)
    check_ffmpeg()

    prepare_libraries()
    import jax
    import numpy as np

    devices = accelerator.devices()
    size = {name: found[0].config[name] for name in SIZE}
    stored = read_latents(found[0], arguments.allow_nan)
    plan = decoding_plan(arguments, model_id, decoder, size, devices, stored.dtype)
    for path, shape in shapes.items():
        check_shape(shape, plan.latent_shape, path)
    for video in found[1:]:  # before hours go into the others
        read_latents(video, arguments.allow_nan)
    wanted = dump_wanted(arguments)
    tensor_dump.steps(arguments.dump_steps, sum(plan.runs))  # wrong ones are said before anything is loaded

    report.title(f"Stage 3: {decoder} VAE decoder of {model_id}")
    report.plan(plan)
    cache = Cache(arguments.compilation_cache, report)
    report.say(f"devices: {len(plan.devices)} x {plan.devices[0].device_kind}")
    reason = "as the options say" if arguments.chip_rows or arguments.strips else "the least work for each chip"
    report.say(f"split: {plan.split}; {reason}; the split does not change the result")
    with report.phase("load"):
        from cogvideox.models.decoder.decoder import warm_up

        vae = plan.make_decoder()
        files = weight_files(vae, model_id)
        hosts.agree_on_model(model_id, "vae")
        abstract = plan.on_devices(files)
        with plan_errors():
            traced = plan.programs(vae, abstract, wanted)
        made_from = stage_files.made_from(found[0].config, LATENT_ENTRIES)  # only a single video is dumped
        runs = [program for program, n in zip(traced, plan.runs, strict=True) for _ in range(n)]
        recorder = dump_recorder(arguments, "stage3", "chunk", made_from, plan.split.mesh, runs)
        compiling = Compiling(arguments, f"{decoder} decoder", plan, traced, cache, report)
        weights = load_weights(files, abstract)
        leaves = jax.tree.leaves(weights)
        report.say(f"loaded decoder: {sum(leaf.size for leaf in leaves):,} parameters, {leaves[0].dtype}")

        def scaled(stored: "np.ndarray") -> "np.ndarray":
            return np.asarray(jax.numpy.asarray(stored, leaves[0].dtype) / plan.vae["scaling_factor"])

        latents = scaled(stored)

    with report.phase("compile") as compile_phase:
        programs, compile_phase.note = compiling.wait()

    if arguments.warmup:
        with report.phase("warm-up"):
            warm_up([*map(recorder.ignoring, programs)], weights, latents, plan.split)
    else:
        report.say("no warm-up: the seconds of the run hold what the first run of each program costs")

    functions = [*map(recorder.recording, profile.traced(programs, len(runs)))]
    seconds = 0.0
    for n, video in enumerate(found, 1):
        label = f", video {n} of {len(found)}" if n > 1 else ""
        latents = scaled(read_latents(video, allow_nan=True))
        seconds += decode_video(video, functions, weights, latents, plan, arguments, report, label)
    report.add("per frame", f"{seconds / len(found) / plan.frames:.3f} s")
    if len(found) > 1:
        report.add("run of all videos", f"{seconds:.2f} s")
    profile.show()

    report.add_array("latents", latents)
    fps = arguments.fps or found[-1].config["fps"]
    report.add("video", f"{plan.frames} frames, {plan.width} x {plan.height}, {fps} frames per second")
    for name, value in recorder.summary():
        report.add(name, value)
    if hosts.is_first():
        report.close(output_folder(found, arguments))


def find_videos(arguments: argparse.Namespace) -> list[Video]:
    """Return the videos whose latents are in --input_dir, or in folders there.

    Raises:
        UserError: a config is missing or wrong, or the options are for a single video, or sizes differ.
    """
    sources = videos.videos(arguments.input_dir)
    for option in ("output_video", "output_frames", "dump"):
        if len(sources) > 1 and getattr(arguments, option):
            raise UserError(
                f"--{option} is for one video, and {arguments.input_dir} has {len(sources)}; give the folder of one as "
                "--input_dir"
            )
    found = [
        Video(source, arguments.output_video or source / VIDEO, stage_files.read_config(source, VideoConfig))
        for source in sources
    ]
    for video in found[1:]:
        for name in (*SIZE, "model_id"):
            ours, first = video.config[name], found[0].config[name]
            if ours != first:
                raise UserError(
                    f"{video.source} has {name} {ours}, and {found[0].source} has {first}; decode each alone, with its "
                    "folder as --input_dir"
                )
    return found


def output_folder(found: Sequence[Video], arguments: argparse.Namespace) -> Path:
    """Return the folder of the only video, or the one around those of all."""
    return found[0].output.parent if len(found) == 1 else arguments.input_dir


def check_files(found: Sequence[Video], arguments: argparse.Namespace) -> tuple[str, dict[Path, tuple[int, ...]]]:
    """Claim the folder of the output, and check the files of the videos.

    Returns:
        The model that the stages before used, and the shapes of the latents in each of their files.

    Raises:
        UserError: another process writes to the folder, or a file is wrong or would replace another one.
    """
    if hosts.is_first():
        program.at_end.enter_context(writing.claimed(output_folder(found, arguments), "stage3"))
    shapes = {}
    for video in found:
        of_file = stage_files.tensor_shapes(
            video.latents, 2, ("latents",), video.config, finite=False, force=arguments.force
        )
        shapes[video.latents] = of_file["latents"]
        provenance.check_inputs(video.latents, arguments.force)
    model_id = checkpoint.same_model(arguments.model_id, found[0].config["model_id"])
    options = [("--output_video", video.output) for video in found] + [("--output_frames", arguments.output_frames)]
    outputs = options if hosts.is_first() else []
    configs = [video.source / CONFIG for video in found]
    inputs = [
        *shapes,
        *configs,
        output_folder(found, arguments) / timings.FILE,
        arguments.executable,
        arguments.log_json,
    ]
    writing.check_outputs(outputs, inputs, model_id)
    return model_id, shapes


def read_latents(video: Video, allow_nan: bool) -> "np.ndarray":
    """Read the latents of a video, [1, C, T, H, W]; raise UserError if they are not finite, unless `allow_nan`."""
    from safetensors.numpy import load_file  # that of safetensors.flax imports flax

    stored = load_file(video.latents)["latents"]
    if not allow_nan:
        check_finite(stored, video.latents)
    return stored


def decode_video(
    video: Video,
    functions: Sequence[Callable],
    weights: Any,
    latents: "np.ndarray",
    plan: "DecodingPlan",
    arguments: argparse.Namespace,
    report: Report,
    label: str,
) -> float:
    """Decode scaled latents and write the video, and its frames if asked for; return the seconds of the decode.

    `label` is the part of the phase's name after "run".
    """
    from cogvideox.models.decoder.decoder import decode

    # What it is made from is read before the timed run.
    inputs = {provenance.known_as(video.latents, video.output.parent): provenance.digest(video.latents)}
    made = provenance.describe("stage3", inputs, arguments)
    fps = arguments.fps or video.config["fps"]
    name = f"run, with encoding{label}"
    timed = report.phase(name, in_table=not label)
    with contextlib.ExitStack() as claims, timed as phase, report.progress("decoding", "frame", plan.frames) as bar:
        chunks = decode(functions, weights, latents, plan.split)
        if hosts.is_first():
            claims.enter_context(writing.claimed(video.output.parent, "stage3"))
            frames = write_video(chunks, video.output, fps, made, bar, keep=arguments.output_frames is not None)
        else:
            collections.deque(chunks, maxlen=0)  # its share of each is decoded

    if arguments.output_frames and hosts.is_first():
        with report.phase("save frames"):
            save_frames(frames, arguments.output_frames, stage_files.made_from(video.config, LATENT_ENTRIES) | made)
    report.say(f"wrote {video.output}" + (f" and {arguments.output_frames}" if arguments.output_frames else ""))
    return phase.seconds


def weight_files(vae: "Decoder", model_id: str) -> Any:
    """Return the decoder's weights as the tree that `vae.decode_chunk` takes, mapped from files, not yet read."""
    shapes = {f"decoder.{name}": shape for name, shape in vae.weight_shapes.items()}
    read = checkpoint.tensor_reader(model_id, "vae", shapes)
    return vae.convert_weights({name: read(f"decoder.{name}") for name in vae.weight_shapes})


def load_weights(files: Any, abstract: Any) -> Any:
    """Load the decoder's weights onto the devices.

    Args:
        files: from `weight_files`.
        abstract: a tree of the same structure with shapes, dtypes and shardings.
    """
    import jax

    from cogvideox.models.shared.loading import load_arrays

    stored, tree = jax.tree.flatten(files)

    def fill(i: int, index: tuple[slice, ...], part: "np.ndarray") -> None:
        part[...] = stored[i][index]

    return jax.tree.unflatten(tree, load_arrays(dict(enumerate(jax.tree.leaves(abstract))), fill).values())


def check_shape(shape: tuple[int, ...], expected: tuple[int, ...], path: Path) -> None:
    """Raise UserError unless the latents have the shape that follows from the configs of the video and the VAE."""
    if shape != expected:
        raise UserError(
            f"{path}: latents have shape {list(shape)}, but {CONFIG} and the VAE say {list(expected)}; "
            "run stage 2 again"
        )


def check_finite(latents: "np.ndarray", path: Path) -> None:
    """Raise UserError if latents [1, C, T, H, W] have NaN or infinite values; say how many and in which frames."""
    import numpy as np

    bad = ~np.isfinite(latents.astype(np.float32))
    if bad.any():
        frames = ", ".join(str(frame) for frame in np.flatnonzero(bad.any(axis=(0, 1, 3, 4))))
        raise UserError(
            f"{path}: {bad.sum():,} of {bad.size:,} values are NaN or infinite, in latent frames {frames} of "
            f"0 to {latents.shape[2] - 1}; run stage 2 again, or decode them anyway with --allow_nan"
        )


def write_video(
    chunks: Iterable["np.ndarray"], path: Path, fps: int, made: Mapping[str, str], bar: Progress, keep: bool
) -> "list[np.ndarray]":
    """Encode each chunk, uint8 [frames, height, width, 3], as soon as it is decoded; return the chunks if `keep`."""
    kept = []
    with writing.replacing(path) as temporary, video_writer(temporary, fps, made["provenance"]) as append:
        for frames in chunks:
            for frame in frames:
                append(frame)
            bar.update(len(frames))
            if keep:
                kept.append(frames)
    return kept


def save_frames(chunks: Sequence["np.ndarray"], path: Path, metadata: Mapping[str, str]) -> None:
    """Write the frames of all chunks as one tensor, uint8 [frames, height, width, 3], in a safetensors file."""
    import numpy as np
    from safetensors.numpy import save_file

    with writing.replacing(path) as temporary:
        save_file({"frames": np.concatenate(chunks)}, temporary, metadata=dict(metadata))


if __name__ == "__main__":
    run(main)
