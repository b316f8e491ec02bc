"""Time the three stages and the diffusers pipeline in torch, on the same machine, with the same model and size.

    python -m benchmarks.stage_timing --height 128 --width 192 --frames 17

The time of a stage is that of its process from start to end, with imports, compilation and warm-up. The pipeline
computes in float32, our stages in the dtype of the model's files. On a laptop's CPU, start-up and compilation take most
of the time.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from cogvideox.cli.parser import ArgumentParser
from cogvideox.cli.program import run
from cogvideox.files.names import ROOT
from cogvideox.signals import Interruption

PROMPT = "A panda playing guitar in a bamboo forest"

PIPELINE = """
import sys, torch
from diffusers import CogVideoXPipeline
from diffusers.utils import export_to_video
model, height, width, frames, steps, video = sys.argv[1:]
pipeline = CogVideoXPipeline.from_pretrained(model, dtype=torch.float32)
limit = pipeline.transformer.config.max_text_seq_length
frames = pipeline({prompt!r}, height=int(height), width=int(width), num_frames=int(frames), max_sequence_length=limit,
                  num_inference_steps=int(steps), output_type="np").frames[0]
export_to_video(list(frames), video)
"""


def seconds(*command: object) -> float:
    """Run Python with a command line, and return its wall time in seconds; raise CalledProcessError if it fails."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> None:
    """Time the pipeline and the stages, and print a table."""
    parser = ArgumentParser(__doc__.splitlines()[0], prog="python -m benchmarks.stage_timing")
    parser.add_argument("--model_id", default=str(ROOT / "tiny_model"), help="model to run (default: the tiny model)")
    parser.add_argument("--height", default="128", help="height of the video in pixels")
    parser.add_argument("--width", default="192", help="width of the video in pixels")
    parser.add_argument("--frames", default="17", help="frames of the video, of the form 4n + 1")
    parser.add_argument("--num_inference_steps", default="10", help="denoising steps")
    arguments = parser.parse_args(argv)
    sizes = {name: value for name, value in vars(arguments).items() if name != "model_id"}

    with Interruption.raised(), tempfile.TemporaryDirectory() as folder:
        options = [f"--{name}={value}" for name, value in sizes.items()]
        rows = {
            "diffusers pipeline, torch": seconds(
                "-c", PIPELINE.format(prompt=PROMPT), arguments.model_id, *sizes.values(), f"{folder}/pipeline.mp4"
            ),
            "stage 1": seconds(
                "stage1_text_encoder.py", "--prompt", PROMPT, "--model_id", arguments.model_id, "--output_dir", folder
            ),
            "stage 2": seconds("stage2_transformer.py", "--input_dir", folder, *options),
            "stage 3, TorchAx": seconds("stage3_vae_decoder.py", "--input_dir", folder),
            "stage 3, Flax": seconds("stage3_vae_decoder_flax.py", "--input_dir", folder),
        }
    rows["stages 1, 2 and 3 (TorchAx)"] = rows["stage 1"] + rows["stage 2"] + rows["stage 3, TorchAx"]
    print(f"{'':<28} {'seconds':>8} {'of pipeline':>12}")
    for name, value in rows.items():
        print(f"{name:<28} {value:8.1f} {value / rows['diffusers pipeline, torch']:11.2f}x")


if __name__ == "__main__":
    run(main)
