"""Stage 3: decode the latents to a video with diffusers' VAE decoder, run by JAX through TorchAx.

Reads stage 2's files from --input_dir; writes --output_video. stage3_vae_decoder_flax.py is this stage with the Flax
decoder in the place of the TorchAx one.
"""

import importlib

import checkpoint
import utils
from console import ArgumentParser, Report, UserError, number, prepare_libraries, run


def parse_arguments():
    parser = ArgumentParser("Stage 3 of CogVideoX text to video: decode the latents.")
    parser.add_argument("--input_dir", type=utils.path, default=utils.STAGE_OUTPUTS, help="stage 2's output folder")
    parser.add_argument("--output_video", type=utils.path, help=f"default: {utils.VIDEO} in --input_dir")
    parser.add_argument("--output_frames", type=utils.path, help="also save the frames, uncompressed, as safetensors")
    parser.add_argument("--fps", type=number(int, 1), help="frames per second (default: what stage 2 was told)")
    parser.add_argument("--executable", type=utils.path, help="use the programs in this file instead of compiling")
    parser.add_argument("--model_id", help="the model of stage 1, checked against it (default: what stage 1 used)")
    return parser.parse_args()


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
    check_latents(shape, config, vae_config, latents_path)

    report = Report(f"Stage 3: {decoder} VAE decoder of {model_id}")
    with report.phase("load"):
        import jax
        import jax.numpy as jnp
        import numpy as np
        from safetensors.flax import load_file

        from executable import compile_or_load
        from models.decoder import chunk_programs, decode

        vae = importlib.import_module(f"models.vae_{decoder}").make_decoder(vae_config)
        read = checkpoint.tensor_reader(model_id, "vae", [f"decoder.{name}" for name in vae.weight_shapes])
        weights = vae.convert_weights({name: jnp.asarray(read(f"decoder.{name}")) for name in vae.weight_shapes})
        dtype = jax.tree.leaves(weights)[0].dtype
        report.say(f"loaded decoder: {sum(w.size for w in jax.tree.leaves(weights)):,} parameters, {dtype}")
        report.say(f"devices: {len(jax.devices())} x {jax.devices()[0].device_kind}")
        latents = load_file(latents_path)["latents"].astype(dtype) / vae_config["scaling_factor"]

    with report.phase("compile"):
        programs = compile_or_load(
            arguments.executable,
            f"{decoder} decoder",
            jax.devices()[:1],
            chunk_programs(vae, weights, latents),
            {},
            report,
        )

    with report.phase("run") as run_phase, report.progress("decoding", "frame", config["frames"]) as bar:
        chunks = []
        for pixels in decode(programs, weights, latents):
            chunks.append(pixels[0])
            bar.update(min(len(pixels[0]), bar.total - bar.n))
        video = utils.prepare_video_for_export(np.concatenate(chunks), config["frames"])
    report.add("per frame", f"{run_phase.seconds / len(video):.3f} s")

    with report.phase("save"):
        with utils.replacing(output_video) as temporary:
            write_video(video, temporary, fps)
        if arguments.output_frames:
            from safetensors.numpy import save_file

            with utils.replacing(arguments.output_frames) as temporary:
                save_file({"frames": np.stack(video)}, temporary)
    report.say(f"wrote {output_video}" + (f" and {arguments.output_frames}" if arguments.output_frames else ""))

    report.add_array("latents", latents)
    report.add("video", f"{len(video)} frames, {config['width']} x {config['height']}, {fps} frames per second")
    report.close()


def check_latents(shape: tuple[int, ...], config: dict, vae: dict, path) -> None:
    """Raise UserError unless the latents are what the config and the VAE say: [1, C, T, H, W]."""
    spatial = checkpoint.spatial_compression_ratio(vae)
    expected = (
        1,
        vae["latent_channels"],
        (config["frames"] - 1) // vae["temporal_compression_ratio"] + 1,
        config["height"] // spatial,
        config["width"] // spatial,
    )
    if shape != expected:
        raise UserError(
            f"{path}: latents have shape {list(shape)}, but {utils.CONFIG} and the VAE say {list(expected)}; "
            "run stage 2 again"
        )


def write_video(video: list, path: str, fps: int) -> None:
    """Encode frames (float [H, W, 3] in [0, 1]) to `path`; raises OSError if they did not all get there."""
    from diffusers.utils import export_to_video
    from imageio_ffmpeg import count_frames_and_secs

    try:
        # Sizes are even, which is all that H.264 needs; the default of 16 would rescale smaller multiples.
        export_to_video(video, path, fps=fps, macro_block_size=2)
        # imageio does not ask how ffmpeg ended: on a full disk it may leave half a file and say nothing.
        written, _ = count_frames_and_secs(path)
    except (OSError, RuntimeError):
        written = 0
    if written != len(video):
        raise OSError(f"the encoder wrote {written} of {len(video)} frames")


if __name__ == "__main__":
    run(main)
