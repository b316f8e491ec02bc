"""Measure on this machine's CPU how fast the stages load weights, and how long they take to their first line.

    python -m benchmarks.loading

It makes a model of CogVideoX1.5-5B's widths with few blocks and random weights in a temporary folder (3 GB). Each load
runs in a process of its own, in turn with one that only reads the same tensors with safetensors; before that the files
are in the system's cache. Ratios of the medians say more than the seconds, which depend on the machine; on a busy
machine, put `taskset -c 1` in front.

Peak memory is that of the process. It counts the pages of files that the process has mapped, which the system can
take back, and, because the devices are the CPU, also the loaded weights.
"""

import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cogvideox.cli.parser import ArgumentParser
from cogvideox.cli.program import run
from cogvideox.cli.types import file_path, number
from cogvideox.files import checkpoint, writing
from cogvideox.files.names import ROOT, VIDEO
from cogvideox.files.tensors import DTYPES
from cogvideox.run import decoding
from cogvideox.run.accelerator import prepare_libraries
from cogvideox.signals import Interruption
from compile_for_tpu.programs import BUILT_IN_MODEL

if TYPE_CHECKING:
    from transformers import T5Config

TINY_MODEL = ROOT / "tiny_model"
PROMPT = "a red circle moving left on a white background"
BFLOAT16 = DTYPES["BF16"]


# --- The model ---------------------------------------------------------------------------------------------------


def write_weights(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write random bfloat16 tensors of the given shapes to the safetensors file `path`."""
    from safetensors.numpy import save_file

    generator = np.random.default_rng(0)
    tensors = {
        name: generator.standard_normal(shape, dtype=np.float32).astype(BFLOAT16) for name, shape in shapes.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})


def make_model(folder: Path, blocks: int, text_blocks: int) -> None:
    """Write the transformer, the VAE's decoder and the text encoder at their real widths, with few blocks."""
    from transformers import T5Config

    from cogvideox.models.transformer import parameters
    from cogvideox.models.vae import vae_flax

    config = checkpoint.read_config(BUILT_IN_MODEL, "transformer") | {"num_layers": blocks}
    name = "diffusion_pytorch_model.safetensors"
    write_weights(folder / "transformer" / name, parameters.stored_shapes(config))
    (folder / "transformer" / "config.json").write_text(json.dumps(config))

    vae = checkpoint.read_config(BUILT_IN_MODEL, "vae")
    shapes = {f"decoder.{name}": shape for name, shape in vae_flax.make_decoder(vae).weight_shapes.items()}
    write_weights(folder / "vae" / name, shapes)
    (folder / "vae" / "config.json").write_text(json.dumps(vae))

    # The text encoder of CogVideoX is that of T5 v1.1 XXL, but for the number of blocks.
    t5 = T5Config(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_heads=64,
        num_layers=text_blocks,
        feed_forward_proj="gated-gelu",
        dtype="bfloat16",
    )
    t5.architectures = ["T5EncoderModel"]
    write_weights(folder / "text_encoder" / "model.safetensors", text_encoder_shapes(t5))
    t5.save_pretrained(folder / "text_encoder")


def text_encoder_shapes(config: "T5Config") -> dict[str, tuple[int, ...]]:
    """Return the shapes of a T5 encoder's tensors by name, the shared embedding once."""
    import torch
    from transformers import T5EncoderModel

    with torch.device("meta"):
        weights = T5EncoderModel(config).state_dict()
    return {name: tuple(weight.shape) for name, weight in weights.items() if name != "encoder.embed_tokens.weight"}


# --- What is measured, each in a process of its own ----------------------------------------------------------------


def prepare_reading(folder: Path) -> Callable[[], object]:
    """Return a function that reads all tensors of a folder as safetensors does for NumPy."""
    from safetensors import safe_open

    def read() -> object:
        with safe_open(next(folder.glob("*.safetensors")), framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict

    return read


def prepare_transformer(folder: Path) -> Callable[[], object]:
    """Return a function that loads the transformer as stage 2 does, onto one device."""
    import jax

    from cogvideox.models.shared.sharding import Parallelism, make_mesh
    from cogvideox.models.transformer import parameters

    model, config = str(folder.parent), json.loads((folder / "config.json").read_text())
    parallelism = Parallelism(make_mesh({"dp": 1, "sp": 1, "tp": 1}, jax.devices()[:1]))

    def load() -> object:
        read = checkpoint.tensor_reader(model, folder.name, parameters.stored_shapes(config))
        return jax.block_until_ready(parameters.load_parameters(read, config, parallelism, max(read.values)))

    return load


def prepare_vae(folder: Path) -> Callable[[], object]:
    """Return a function that loads the VAE's decoder as stage 3 does, onto one device."""
    import jax

    from cogvideox.models.vae.plan import make_decoding_plan

    size = {"height": 768, "width": 1360, "frames": 81}
    vae = json.loads((folder / "config.json").read_text())
    plan = make_decoding_plan(vae=vae, decoder="flax", devices=jax.devices()[:1], dtype=BFLOAT16, **size)
    decoder = plan.make_decoder()

    def load() -> object:
        files = decoding.weight_files(decoder, str(folder.parent))
        return jax.block_until_ready(decoding.load_weights(files, plan.on_devices(files)))

    return load


def prepare_text_encoder(folder: Path) -> Callable[[], object]:
    """Return a function that loads the text encoder as stage 1 does."""
    from transformers import T5EncoderModel

    return lambda: T5EncoderModel.from_pretrained(folder, dtype="auto")


LOADS = {
    "stage 2, transformer": ("transformer", prepare_transformer),
    "stage 3, VAE decoder": ("vae", prepare_vae),
    "stage 1, text encoder": ("text_encoder", prepare_text_encoder),
}


def measure(what: str, folder: str, only_read: bool) -> None:
    """Load one of LOADS, or only read its tensors; print the seconds and the peak memory in bytes as JSON."""
    prepare_libraries()
    component, prepare = LOADS[what]
    function = (prepare_reading if only_read else prepare)(Path(folder) / component)
    start = time.perf_counter()
    loaded = function()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps([seconds, peak]))
    del loaded


def measured_load(what: str, folder: Path, only_read: bool) -> tuple[float, int]:
    """Run `measure` in a new process, and return its seconds and bytes."""
    code = f"from benchmarks.loading import measure; measure({what!r}, {str(folder)!r}, {only_read})"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    seconds, peak = json.loads(process.stdout.splitlines()[-1])
    return seconds, peak


# --- Starts --------------------------------------------------------------------------------------------------------


def start_commands(outputs: Path) -> dict[str, list[object]]:
    """Return the command of each stage on the tiny model, after running the stages once to make their inputs."""
    size = ("--height", 64, "--width", 64, "--frames", 17, "--num_inference_steps", 1)
    video = ("--input_dir", outputs, "--output_video", outputs / VIDEO)
    commands: dict[str, list[object]] = {
        "stage 1": ["stage1_text_encoder.py", "--prompt", PROMPT, "--model_id", TINY_MODEL, "--output_dir"],
        "stage 2": ["stage2_transformer.py", "--input_dir", outputs, *size, "--output_dir"],
        "stage 3, TorchAx": ["stage3_vae_decoder.py", *video],
        "stage 3, Flax": ["stage3_vae_decoder_flax.py", *video],
    }
    for name in ("stage 1", "stage 2"):
        run = [sys.executable, *map(str, commands[name]), str(outputs)]
        subprocess.run(run, cwd=ROOT, check=True, capture_output=True)
        commands[name].append(outputs / "started")  # the inputs of the others stay as they are
    return commands


def seconds_to_first_line(command: list[object]) -> float:
    """Start a program, and return the seconds until it prints its first line; then end it."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    seconds = time.perf_counter() - start
    process.kill()
    process.communicate()
    if not line:
        raise RuntimeError(f"{command[0]} printed nothing")
    return seconds


def seconds_of_imports(command: list[object]) -> float:
    """Run a program to its end, and return the seconds that all its imports took."""
    process = subprocess.run(
        [sys.executable, "-X", "importtime", *map(str, command)], cwd=ROOT, check=True, capture_output=True, text=True
    )
    fields = [line.removeprefix("import time:").split("|") for line in process.stderr.splitlines() if "|" in line]
    return sum(int(field[0]) for field in fields if len(field) == 3 and field[0].strip().isdigit()) / 1e6


# --- The tables ----------------------------------------------------------------------------------------------------


def measure_loads(folder: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Return medians for each of LOADS: seconds to load and to read, and the peak memory of both in bytes."""
    runs: dict[tuple[str, bool], list[tuple[float, int]]] = {}
    for _ in range(repeats):
        for what in LOADS:
            for only_read in random.sample([True, False], 2):
                runs.setdefault((what, only_read), []).append(measured_load(what, folder, only_read))
    table = {}
    for what in LOADS:
        (load, load_peak), (read, read_peak) = (
            map(statistics.median, zip(*runs[what, only_read], strict=True)) for only_read in (False, True)
        )
        table[what] = {"load": load, "read": read, "load_peak": load_peak, "read_peak": read_peak}
    return table


def measure_starts(outputs: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Return medians for each stage: seconds to the first line, and of all imports."""
    commands = start_commands(outputs)
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            runs[name].append((seconds_to_first_line(command), seconds_of_imports(command)))
    medians = {name: [statistics.median(values) for values in zip(*pairs, strict=True)] for name, pairs in runs.items()}
    return {name: {"first_line": first, "imports": imports} for name, (first, imports) in medians.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print two tables; write them as JSON where --output says."""
    positive = number(int, 1)
    parser = ArgumentParser(__doc__.splitlines()[0], prog="python -m benchmarks.loading")
    parser.add_argument("--blocks", type=positive, default=6, help="blocks of the transformer")
    parser.add_argument("--text_blocks", type=positive, default=2, help="blocks of the text encoder")
    parser.add_argument("--repeats", type=positive, default=5, help="runs, of which the median counts")
    parser.add_argument("--output", type=file_path, help="write the figures to this file, as JSON")
    arguments = parser.parse_args(argv)
    if arguments.output:
        writing.check_writable(arguments.output)
    prepare_libraries()

    with Interruption.raised(), tempfile.TemporaryDirectory() as folder:
        print(f"making a model of {arguments.blocks} blocks in {folder}", flush=True)
        make_model(Path(folder), arguments.blocks, arguments.text_blocks)
        loads = measure_loads(Path(folder), arguments.repeats)
        starts = measure_starts(Path(folder) / "outputs", arguments.repeats)

    print(f"\n{'load of weights':<22} {'seconds':>8} {'reading alone':>14} {'ratio':>6} {'peak memory':>12}")
    for name, row in loads.items():
        ratio, peak = row["load"] / row["read"], row["load_peak"] / 2**30
        print(f"{name:<22} {row['load']:8.2f} {row['read']:14.2f} {ratio:6.2f} {peak:8.2f} GiB")
    print(f"\n{'start':<22} {'seconds to the first line':>26} {'seconds of all imports':>24}")
    for name, start in starts.items():
        print(f"{name:<22} {start['first_line']:26.2f} {start['imports']:24.2f}")
    if arguments.output:
        sizes = {name: getattr(arguments, name) for name in ("blocks", "text_blocks", "repeats")}
        with writing.replacing(arguments.output) as temporary:
            Path(temporary).write_text(json.dumps(sizes | {"loads": loads, "starts": starts}, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
