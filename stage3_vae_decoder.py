"""Stage 3: decode the latents to a video with diffusers' VAE decoder, run by JAX through TorchAx.

Reads stage 2's files from --input_dir; writes --output_video. stage3_vae_decoder_flax.py is this stage with the Flax
decoder in the place of the TorchAx one.
"""

import argparse
import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import checkpoint
import utils
from console import ArgumentParser, Report, UserError, number, prepare_libraries, run


def parse_arguments():
    parser = ArgumentParser("Stage 3 of CogVideoX text to video: decode the latents.")
    parser.add_argument("--input_dir", type=utils.path, default=utils.STAGE_OUTPUTS, help="stage 2's output folder")
    parser.add_argument("--output_video", type=video_path, help=f"default: {utils.VIDEO} in --input_dir")
    parser.add_argument("--output_frames", type=utils.path, help="also save the frames, uint8, as safetensors")
    parser.add_argument("--fps", type=number(int, 1), help="frames per second (default: what stage 2 was told)")
    parser.add_argument("--allow_nan", action="store_true", help="decode latents that hold NaN or infinity")
    parser.add_argument("--executable", type=utils.path, help="use the programs in this file instead of compiling")
    parser.add_argument("--model_id", help="the model of stage 1, checked against it (default: what stage 1 used)")
    add_split_options(parser)
    return parser.parse_args()


def video_path(text: str) -> Path:
    """An argparse type: the path of a video, whose name says which container."""
    path = utils.path(text)
    if path.suffix.lower() not in utils.VIDEO_SUFFIXES:
        raise argparse.ArgumentTypeError(f"{path} is no video's name; it must end in {', '.join(utils.VIDEO_SUFFIXES)}")
    return path


def add_split_options(parser) -> None:
    """The options that the compiled decoder depends on: the split in space."""
    positive = number(int, 1)
    parser.add_argument(
        "--chip_rows",
        type=positive,
        help="rows of chips that split a frame (default: what leaves a chip the least to do)",
    )
    parser.add_argument("--strips", type=positive, help="bands of rows on a chip (default: 8 on a TPU, else 1)")


def main(decoder: str = "torchax") -> None:
    """Run stage 3 with the decoder of `models/vae_<decoder>.py`."""
    arguments = parse_arguments()
    output_video = arguments.output_video or arguments.input_dir / utils.VIDEO
    config = utils.read_config(arguments.input_dir, {1: utils.TEXT_ENTRIES, 2: utils.VIDEO_ENTRIES})
    latents_path = arguments.input_dir / utils.LATENTS
    shape = utils.tensor_shapes(latents_path, 2, ("latents",), config)["latents"]
    for path in filter(None, (output_video, arguments.output_frames)):
        utils.check_writable(path)
    model_id = checkpoint.same_model(arguments.model_id, config["model_id"])
    fps = arguments.fps or config["fps"]

    prepare_libraries()
    vae_config = checkpoint.read_config(model_id, "vae")
    if vae_config.get("use_post_quant_conv"):
        raise UserError("this model's VAE has a post_quant_conv, as no CogVideoX 1.5 for text has; correct --model_id")
    if shape != latent_shape(config, vae_config):
        raise UserError(
            f"{latents_path}: latents have shape {list(shape)}, but {utils.CONFIG} and the VAE say "
            f"{list(latent_shape(config, vae_config))}; run stage 2 again"
        )

    import jax
    import jax.numpy as jnp
    import numpy as np
    from safetensors.flax import load_file

    latents = load_file(latents_path)["latents"]
    if not arguments.allow_nan:
        check_finite(np.asarray(latents.astype(jnp.float32)), latents_path)
    split = make_split(arguments, jax.devices(), shape)

    report = Report(f"Stage 3: {decoder} VAE decoder of {model_id}")
    with report.phase("load"):
        from executable import compile_or_load
        from models.decoder import chunk_programs, decode

        vae = importlib.import_module(f"models.vae_{decoder}").make_decoder(vae_config)
        read = checkpoint.tensor_reader(model_id, "vae", [f"decoder.{name}" for name in vae.weight_shapes])
        weights = vae.convert_weights({name: jnp.asarray(read(f"decoder.{name}")) for name in vae.weight_shapes})
        weights = jax.device_put(weights, split.replicated)
        dtype = jax.tree.leaves(weights)[0].dtype
        report.say(f"loaded decoder: {sum(w.size for w in jax.tree.leaves(weights)):,} parameters, {dtype}")
        report.say(f"devices: {len(jax.devices())} x {jax.devices()[0].device_kind}")
        chosen = "as the options say" if arguments.chip_rows or arguments.strips else "the least to do for a chip"
        report.say(f"split: {split}; {chosen}; exact")
        latents = np.asarray(latents.astype(dtype) / vae_config["scaling_factor"])

    with report.phase("compile"):
        traced = chunk_programs(vae, weights, shape, split)
        devices = split.mesh.devices.flatten().tolist()
        programs = compile_or_load(
            arguments.executable, f"{decoder} decoder", devices, traced, program_options(split), report
        )

    with contextlib.ExitStack() as stack:
        run_phase = stack.enter_context(report.phase("run, with encoding"))
        bar = stack.enter_context(report.progress("decoding", "frame", config["frames"]))
        video = stack.enter_context(utils.replacing(output_video))
        append = stack.enter_context(video_writer(video, fps))
        kept = []
        for frames in decode(programs, weights, latents, split):
            for frame in frames:
                append(frame)
                bar.update()
            if arguments.output_frames:
                kept.append(frames)
    report.add("per frame", f"{run_phase.seconds / config['frames']:.3f} s")

    if arguments.output_frames:
        from safetensors.numpy import save_file

        with report.phase("save frames"), utils.replacing(arguments.output_frames) as temporary:
            save_file({"frames": np.concatenate(kept)}, temporary)
    report.say(f"wrote {output_video}" + (f" and {arguments.output_frames}" if arguments.output_frames else ""))

    report.add_array("latents", latents)
    report.add("video", f"{bar.n} frames, {config['width']} x {config['height']}, {fps} frames per second")
    report.close()


def latent_shape(config: Mapping, vae: Mapping) -> tuple[int, ...]:
    """Shape [1, C, T, H, W] of the latents of the config's height, width and frames."""
    size = checkpoint.latent_size(vae, *(config[name] for name in ("frames", "height", "width")))
    return 1, vae["latent_channels"], *size


def make_split(arguments, devices: list, latents: tuple[int, ...]):
    """The split in space that the options ask for, of latents [1, C, T, H, W] on `devices`."""
    from models.spatial_split import choose_split

    try:
        return choose_split(devices, *latents[3:], arguments.chip_rows, arguments.strips)
    except ValueError as error:
        raise UserError(f"--chip_rows {error}") from error


def program_options(split) -> dict:
    """What the decoder's programs depend on beside the shapes of their arguments."""
    return {"mesh": dict(split.mesh.shape), "strips": split.strips}


def check_finite(latents, path) -> None:
    """Raise UserError if latents [1, C, T, H, W] hold NaN or Inf; says how many and where."""
    import numpy as np

    bad = ~np.isfinite(latents)
    if bad.any():
        frames = ", ".join(str(frame) for frame in np.flatnonzero(bad.any(axis=(0, 1, 3, 4))))
        raise UserError(
            f"{path}: {bad.sum():,} of {bad.size:,} values are NaN or infinite, in latent frames {frames} of "
            f"0 to {latents.shape[2] - 1}; run stage 2 again, or decode them all the same with --allow_nan"
        )


@contextlib.contextmanager
def video_writer(path: str, fps: int) -> Iterator[Callable]:
    """Yield a function that appends a frame, uint8 [height, width, 3], to the H.264 video `path`.

    Raises:
        OSError: the frames did not all get there.
    """
    import imageio.v2 as imageio
    from imageio_ffmpeg import count_frames_and_secs

    appended = 0

    def append(frame) -> None:
        nonlocal appended
        writer.append_data(frame)
        appended += 1

    try:
        # Settings of diffusers.utils.export_to_video, but for the size: H.264 needs it even, and so it is.
        with imageio.get_writer(path, format="FFMPEG", fps=fps, quality=5.0, macro_block_size=2) as writer:
            yield append
        # imageio does not ask how ffmpeg ended: on a full disk it may leave half a file and say nothing.
        written, _ = count_frames_and_secs(path)
    except (OSError, RuntimeError):
        written = 0
    if written != appended or not appended:
        raise OSError(f"the encoder wrote {written} of {appended} frames")


if __name__ == "__main__":
    run(main)
