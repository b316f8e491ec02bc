"""Check and measure this project on the devices at hand, beside what was predicted for them, in one go.

    python -m benchmarks.on_device
    python -m benchmarks.on_device --quick
    python -m benchmarks.on_device --model CogVideoX-5B
    python -m benchmarks.on_device --beside diffusers

The checks compare the attention kernels, dense and block-sparse, with a float32 reference; and a transformer block, a
chunk of the decoder, and a step on every mesh of the devices with the CPU. The measurements are a denoising step and a
decode in the sizes of docs/performance.md, or for another --model in its own; with --beside diffusers those of
diffusers in torch on the same card, too. Weights are drawn on the devices, so nothing is downloaded. Without an
accelerator, all of it runs on the CPU in small sizes.

Results are kept in the output folder after each entry, and the same command goes on where it ended. The exit status is
1 if a check failed.
"""

import argparse
import functools
import hashlib
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.attention_entries import (
    ONLINE,
    forced_online,
    has_patterns_kernel,
    kernel_check,
    kernel_row,
    patterns_checks,
    patterns_row,
)
from benchmarks.diffusers_comparison import WRITTEN, comparisons, run_diffusers, torch_device
from benchmarks.entries import (
    FAILURES,
    NO_TIME,
    NOISE_FACTOR,
    Entry,
    Results,
    durations,
    judged,
    measured,
    relative_error,
    run_entries,
)
from benchmarks.machine import (
    FULL,
    LATENT_SEED,
    PROMPT_SEED,
    SCALES,
    WEIGHT_SEED,
    Machine,
    Size,
    decode_frames,
    decode_name,
    draw_prompts,
    step_name,
)
from benchmarks.measuring import MemoryUse, compiled, predicted
from benchmarks.page import pairs, text_of
from benchmarks.reproduce_tables import MIDDLE
from cogvideox.cli.options import add_log_options
from cogvideox.cli.parser import ArgumentParser
from cogvideox.cli.program import run
from cogvideox.cli.report import Report
from cogvideox.cli.types import folder_path, number
from cogvideox.errors import UserError
from cogvideox.features import features_of
from cogvideox.files import checkpoint, sparse_map, writing
from cogvideox.files.names import STAGE_OUTPUTS
from cogvideox.run.accelerator import prepare_libraries
from cogvideox.versions import LIBRARIES, versions
from compile_for_tpu import programs, report

if TYPE_CHECKING:
    import jax
    import numpy as np

    from cogvideox.models.transformer import denoising
    from cogvideox.models.transformer.plan import DenoisingPlan
    from cogvideox.models.transformer.sparse.heads import SparseAttention
    from cogvideox.models.vae.decoder import Decoder
    from cogvideox.models.vae.plan import DecodingPlan

# What decides the results, beside the sources of the model.
OWN_FILES = ("on_device", "attention_entries", "entries", "measuring", "machine")
OWN_SOURCES = [Path(__file__).with_name(f"{name}.py") for name in OWN_FILES]
NAME = "on_device"  # of the files with the results
MINUTES, QUICK_MINUTES = 30.0, 5.0

# --- The entries -------------------------------------------------------------------------------------------------


# Seconds that the original project measured for a decode, where docs/performance.md has no doubt about the size.
ORIGINAL_DECODES: dict[tuple | None, float] = {("v6e-8", MIDDLE, "torchax"): 0.86}
# Maps of sparse attention: of a check, whose heads are alike, so that drawn weights need no other order; of a row.
ALIKE, MADE_UP = "1*frames:0", "0.75*frames:1"


def entries(machine: Machine) -> list[Entry]:
    """Return all checks and rows in the order of their worth, which is that in which they run."""
    short, long = machine.lengths
    steps, decodes, meshes = step_rows(machine), decode_rows(machine), mesh_checks(machine)
    patterns = patterns_checks(machine)
    return [
        kernel_check(machine, machine.attention, "layer_normed", short, quick=True),
        *forced_online(machine, "mixed_heads", short, quick=True),
        kernel_row(machine, short),
        block_check(machine),
        *steps[:1],
        *meshes["tp"][:1],
        *steps[1:2],
        *patterns[:1],
        patterns_block_check(machine),
        *patterns_row(machine),
        chunk_check(machine),
        *meshes["tp"][1:],
        *decodes[:1],
        *patterns_step_row(machine),
        *patterns[1:],
        *(entry for name in ONLINE if name != "mixed_heads" for entry in forced_online(machine, name, short)),
        kernel_check(machine, machine.attention, "negative_scores", short),
        kernel_check(machine, machine.attention, "layer_normed", long),
        *steps[2:],
        *decodes[1:2],
        *meshes["fsdp"],
        *([kernel_check(machine, "splash", "layer_normed", short)] if machine.platform == "tpu" else []),
        *decodes[2:],
    ]


def patterns_block_check(machine: Machine) -> Entry:
    """Return the check of a model of one block whose heads have a pattern, on the default mesh of all devices."""
    attention = machine.attention if has_patterns_kernel(machine) else "xla"
    check = functools.partial(check_step, machine, machine.devices, 1, False, made_up=ALIKE, attention=attention)
    return Entry(f"transformer block with {ALIKE}, all devices, beside the CPU", "check", check, 1.0)


def patterns_step_row(machine: Machine) -> Iterator[Entry]:
    """Yield the row of the first step with guidance, with a made-up map; nothing without kernels or such a step."""
    for size, guided, minutes, _ in step_sizes(machine) if has_patterns_kernel(machine) else ():
        if guided:
            video, options = machine.video(size), [f"sparse_attention={programs.label(MADE_UP)}"]
            expected = predicted("stage2", machine, size, ["guided"], options)
            measure = functools.partial(measure_step, machine, video, guided, expected, made_up=MADE_UP)
            name = f"step with {MADE_UP}{step_name(video, guided).removeprefix('step')}"
            yield Entry(name, "row", measure, minutes + 1.0)  # there are kernels for each kind of pattern to compile
            return


def block_check(machine: Machine) -> Entry:
    """Return the check of a model of one block."""
    check = functools.partial(check_step, machine, machine.devices[:1], 1, False)
    return Entry("transformer block, one device, beside the CPU", "check", check, 1.0, quick=True)


def chunk_check(machine: Machine) -> Entry:
    """Return the check of one chunk of the decoder."""
    return Entry("decoder chunk, one device, beside the CPU", "check", functools.partial(check_chunk, machine), 4.0)


def mesh_checks(machine: Machine) -> dict[str, list[Entry]]:
    """Return by layout a check for each mesh that the devices allow, the default first; none for one device."""
    count, heads = len(machine.devices), machine.transformer["num_attention_heads"]
    found: dict[str, list[Entry]] = {"tp": [], "fsdp": []}
    for layout, dp in itertools.product(found, (2, 1)):
        if count == 1 or count % dp or heads % (count // dp):
            continue
        for sp in (n for n in range(count // dp, 0, -1) if count // dp % n == 0):
            options: dict[str, Any] = {"use_dp": dp == 2, "sp_num": sp, "layout": layout}
            check = functools.partial(check_step, machine, machine.devices, 2, True, **options)
            name = f"mesh dp {dp} x sp {sp} x tp {count // dp // sp}, layout {layout}, beside the CPU"
            found[layout].append(Entry(name, "check", check, 1.0, quick=layout == "tp" and not found["tp"]))
    return found


def step_rows(machine: Machine) -> list[Entry]:
    """Return the rows of the steps."""
    found: list[Entry] = []
    for size, guided, minutes, original in step_sizes(machine):
        video = machine.video(size)
        expected = predicted("stage2", machine, size, ["guided"] * guided) | {"original_seconds": original}
        measure = functools.partial(measure_step, machine, video, guided, expected)
        found.append(Entry(step_name(video, guided), "row", measure, minutes, quick=not found))
    return found


def step_sizes(machine: Machine) -> Iterator[tuple[Size, bool, float, float | None]]:
    """Yield size, guidance, minutes, and the original project's seconds, of the rows of the tables for this slice.

    Where there are none, it yields every configuration of the tables.
    """
    rows = [row for row in json.loads(report.TABLES.read_text()).values() if row["topology"] == machine.topology]
    rows = rows if machine.is_of_the_tables else []
    for size, guided, minutes in machine.steps:
        same = [row for row in rows if (tuple(row["size"]), row["guided"]) == (size, guided)]
        if same or not rows:
            yield size, guided, minutes, min((row["measured"] for row in same), default=None)


def decode_rows(machine: Machine) -> list[Entry]:
    """Return the rows of the decoder."""
    found = []
    for size, decoder, minutes in machine.decodes:
        video = machine.video(size)
        expected = predicted("stage3", machine, size, [decoder] * (decoder != "torchax"))
        original = (str(machine.topology), size, decoder) if machine.is_of_the_tables else None
        expected["original_seconds"] = ORIGINAL_DECODES.get(original)
        name = f"{decode_name(video)}, {decoder}"
        found.append(Entry(name, "row", functools.partial(measure_decode, machine, video, decoder, expected), minutes))
    return found


# --- Weights and inputs ------------------------------------------------------------------------------------------


def draw_weights(shapes: Mapping[str, "jax.ShapeDtypeStruct"]) -> "dict[str, jax.Array]":
    """Draw weights on the devices, by their names in the checkpoint, each in the dtype and the sharding of its shape.

    The values do not depend on the sharding, and bfloat16 holds them exactly. With them a layer's output is about as
    large as its input.
    """
    import jax

    def draw(name: str, x: jax.ShapeDtypeStruct, seed: int) -> jax.Array:
        shape = x.shape[1:] if name.startswith("blocks.") else x.shape  # of one layer's
        centre = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0  # of a norm
        spread = 0.1 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5
        values = centre + spread * 3**0.5 * hashed(x.shape, seed)
        return jax.lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7).astype(x.dtype)

    def draw_all() -> dict[str, jax.Array]:
        return {name: draw(name, x, WEIGHT_SEED + i) for i, (name, x) in enumerate(shapes.items())}

    return jax.jit(draw_all, out_shardings={name: x.sharding for name, x in shapes.items()})()


def hashed(shape: tuple[int, ...], seed: int) -> "jax.Array":
    """Return values that look random, float32 from -1 to 1: a hash of each element's place.

    jax.random would take many times as long to compile, and on some devices more memory than the weights. Source of
    the hash: lowbias32 of Chris Wellons' hash-prospector.
    """
    import jax
    import jax.numpy as jnp

    place = jnp.full(shape, seed * 0x9E3779B9 % 2**32, jnp.uint32)
    for axis in range(len(shape)):
        place += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(math.prod(shape[axis + 1 :]))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        place = (place ^ (place >> shift)) * jnp.uint32(factor)
    return (place ^ (place >> 16)).astype(jnp.float32) * 2.0**-31 - 1.0


def start_denoising(plan: "DenoisingPlan", weights: "Mapping[str, jax.Array]") -> "denoising.Denoising":
    """Return a run of a plan from drawn prompts and images, which bfloat16 holds exactly, as it does the noise."""
    from cogvideox.models.transformer.denoising import Denoising

    return Denoising(plan, weights, *draw_prompts(plan), [LATENT_SEED] * plan.batch, image=draw_image(plan))


def draw_image(plan: "DenoisingPlan") -> "denoising.Posterior | None":
    """Draw the latents of an image, in the dtype of the prompts, for a model that takes one."""
    import torch

    from cogvideox.models.transformer.denoising import Posterior

    if not plan.features.image:
        return None
    batch, _, channels, height, width = plan.latent_shape
    generator = torch.Generator().manual_seed(PROMPT_SEED)
    mean = torch.randn(batch, channels, 1, height, width, generator=generator).bfloat16()
    return Posterior(mean, torch.full_like(mean, -2.0))


def one_step(plan: "DenoisingPlan", weights: "Mapping[str, jax.Array]") -> "np.ndarray":
    """Run one step, and return the noise-free latents that it predicts, float32: at the first step the model's own."""
    import numpy as np

    from cogvideox.models.transformer.step import make_step

    programs = dict.fromkeys(plan.kinds(), make_step(plan))
    return np.asarray(next(start_denoising(plan, weights).run(programs)).pred_original_sample)


def draw_latents(plan: "DecodingPlan") -> "np.ndarray":
    """Draw the latents of a decode, in the plan's dtype; bfloat16 holds them exactly."""
    import jax.numpy as jnp
    import numpy as np

    values = np.random.default_rng(LATENT_SEED).standard_normal(plan.latent_shape, np.float32)
    return values.astype(jnp.bfloat16).astype(plan.dtype)


def draw_decoder_weights(plan: "DecodingPlan", decoder: "Decoder") -> Any:
    """Draw the weights of a decoder on all devices of the plan, as the tree that it takes."""
    import jax

    where = plan.split.replicated
    shapes = {n: jax.ShapeDtypeStruct(x, plan.dtype, sharding=where) for n, x in decoder.weight_shapes.items()}
    return jax.device_put(decoder.convert_weights(draw_weights(shapes)), where)


# --- Checks ------------------------------------------------------------------------------------------------------


def check_step(
    machine: Machine,
    devices: "Sequence[jax.Device]",
    layers: int,
    guided: bool,
    made_up: str | None = None,
    **options: Any,
) -> dict:
    """Compare the first step of a model of few blocks with the CPU; `options` choose the mesh."""
    options = {"devices": devices, "attention": machine.attention} | options
    found = few_blocks(machine, layers, guided, made_up, **options)
    return judged_beside_cpu(found, functools.partial(step_on_cpu, machine, layers, guided, made_up=made_up))


def few_blocks(machine: Machine, layers: int, guided: bool, made_up: str | None, **options: Any) -> "np.ndarray":
    """Run the first step of a model of few blocks with drawn weights.

    Args:
        machine: whose model it is.
        layers: how many blocks.
        guided: whether with guidance.
        made_up: see `sparse_attention_of`.
        options: those of `make_denoising_plan`.
    """
    config = machine.transformer | {"num_layers": layers}
    sparse = sparse_attention_of(config, made_up)
    plan = machine.denoising_plan(machine.scale.checked_video, guided, transformer=config, sparse=sparse, **options)
    return one_step(plan, draw_weights(parameter_shapes(plan)))


@functools.cache
def step_on_cpu(machine: Machine, layers: int, guided: bool, dtype: str, made_up: str | None = None) -> "np.ndarray":
    """Run `few_blocks` on the CPU with plain attention; the meshes share the result."""
    import jax

    where = {"devices": jax.devices("cpu")[:1], "platform": "cpu", "attention": "xla"}
    return few_blocks(machine, layers, guided, made_up, dtype=dtype, **where)


def parameter_shapes(plan: "DenoisingPlan") -> "Mapping[str, jax.ShapeDtypeStruct]":
    """Return the transformer's parameters as shapes with shardings."""
    from cogvideox.models.transformer.parameters import abstract_parameters

    return abstract_parameters(plan.transformer, plan.dtype, plan.parallelism)


def check_chunk(machine: Machine) -> dict:
    """Compare a chunk of the decoder on one device with the CPU."""
    import jax

    def on_cpu(dtype: str) -> "np.ndarray":
        return decoded(machine.decoding_plan(machine.scale.chunk_video, "torchax", jax.devices("cpu")[:1], dtype))

    found = decoded(machine.decoding_plan(machine.scale.chunk_video, "torchax", machine.devices[:1]))
    return judged_beside_cpu(found, on_cpu)


def decoded(plan: "DecodingPlan") -> "np.ndarray":
    """Decode drawn latents with drawn weights to float32 pixels in [0, 1], [frames, height, width, 3]."""
    decoder = plan.make_decoder()
    return decode_frames(plan, decoder, draw_decoder_weights(plan, decoder), draw_latents(plan))


def judged_beside_cpu(found: "np.ndarray", on_cpu: "Callable[[str], np.ndarray]") -> dict:
    """Judge a result in bfloat16 beside the CPU's in float32, by how far the CPU's in bfloat16 is from that."""
    exact = on_cpu("float32")
    noise = relative_error(on_cpu("bfloat16"), exact)
    note = f"relative error beside the CPU in float32; the CPU's own in bfloat16 is {noise:.1e}"
    return judged(relative_error(found, exact), NOISE_FACTOR * noise, note)


# --- Measurements ------------------------------------------------------------------------------------------------


def measure_step(machine: Machine, video: Size, guided: bool, expected: Mapping, made_up: str | None = None) -> dict:
    """Time denoising steps with the default options of stage 2, and in all of them the map of `sparse_map.made_up`."""
    from cogvideox.models.transformer.step import abstract_arguments, make_step

    memory = MemoryUse(machine.devices)
    plan = machine.denoising_plan(video, guided, sparse=sparse_attention_of(machine.transformer, made_up))
    programs, seconds = compiled([make_step(plan).trace(*abstract_arguments(plan))])
    denoising = start_denoising(plan, draw_weights(parameter_shapes(plan)))
    return measured(
        durations(denoising.run(dict.fromkeys(plan.kinds(), programs[0]))), seconds, memory.so_far(programs), expected
    )


def sparse_attention_of(config: Mapping, made_up: str | None) -> "SparseAttention | None":
    """Return the patterns that a text of `sparse_map.made_up` gives a transformer's heads, in all steps; or None."""
    from cogvideox.models.transformer.sparse.heads import SparseAttention
    from cogvideox.models.transformer.sparse.patterns import Pattern

    if made_up is None:
        return None
    texts = sparse_map.made_up(made_up, config["num_layers"], config["num_attention_heads"])
    return SparseAttention(tuple(tuple(map(Pattern.parse, of_layer)) for of_layer in texts), dense_steps=0)


def measure_decode(machine: Machine, video: tuple[int, int, int], decoder: str, expected: Mapping) -> dict:
    """Time the decoding of a video until all its frames are on the host, with the default options of stage 3."""
    from cogvideox.models.vae.decoder import decode

    memory = MemoryUse(machine.devices)
    plan = machine.decoding_plan(video, decoder, machine.devices)
    vae = plan.make_decoder()
    weights = draw_decoder_weights(plan, vae)
    programs, seconds = compiled(plan.programs(vae, weights))
    latents = draw_latents(plan)

    def decode_all() -> Iterator[int]:
        for _ in range(1 + machine.scale.repetitions):
            yield sum(len(frames) for frames in decode(programs, weights, latents, plan.split))

    return measured(durations(decode_all()), seconds, memory.so_far(programs), expected)


# --- The run -----------------------------------------------------------------------------------------------------


def made_with(model_id: str) -> dict:
    """Return what decides the results, other than the devices: the model, versions, and the project's sources."""
    from cogvideox.run import executable

    sources = b"".join(path.read_bytes() for path in [*executable.SOURCES, *OWN_SOURCES])
    return {
        "model": programs.model_name(model_id),
        "versions": versions(*LIBRARIES) | {"python": sys.version.split()[0]},
        "source files": hashlib.sha256(sources).hexdigest()[:16],
    }


def described(machine: Machine) -> str:
    """Return number and kind of the devices, and the slice if they are TPUs."""
    kind = machine.devices[0].device_kind
    return f"{len(machine.devices)} x {kind}" + (f" ({machine.topology})" if machine.topology else "")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(__doc__.splitlines()[0], prog="python -m benchmarks.on_device")
    parser.add_argument("--quick", action="store_true", help="only the entries that matter most")
    parser.add_argument(
        "--minutes",
        type=number(float, 0),
        help=f"start nothing that takes longer than is left of this (default: {MINUTES:g}, --quick: {QUICK_MINUTES:g})",
    )
    parser.add_argument(
        "--output", type=folder_path, default=STAGE_OUTPUTS / "on_device", help="folder for the results"
    )
    parser.add_argument(
        "--beside",
        choices=("diffusers",),
        help="also run the steps and decodes of diffusers in torch on one device, and compare latents and frames",
    )
    parser.add_argument("--again", action="store_true", help="run what is done already again too")
    programs.add_model_option(parser)
    add_log_options(parser)
    return parser.parse_args(argv)


def find_machine(model_id: str) -> Machine:
    """Return the devices that jax has, for a model; raises UserError if it has no CPU to compare with."""
    import jax

    try:
        jax.devices("cpu")
    except RuntimeError:
        raise UserError("jax has no CPU, which results are compared with; unset JAX_PLATFORMS") from None
    devices = jax.devices()
    return Machine(devices, SCALES.get(devices[0].platform, FULL), model_id)


def tell(found: Mapping[str, Mapping], told: Report) -> None:
    """Add the results to the closing table; a row that diffusers has too says how it compares."""
    ratios = {name: theirs["seconds"] / ours["seconds"] for name, ours, theirs in pairs(found)}
    for name, one in found.items():
        beside = f"; diffusers takes {ratios[name]:.2f} times that" if name in ratios else ""
        told.add(name, text_of(one) + beside)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the entries, and say what they found."""
    arguments = parse_arguments(argv)
    with Report("on_device", "on_device.py", arguments) as told:
        prepare_libraries()
        minutes = arguments.minutes if arguments.minutes is not None else QUICK_MINUTES if arguments.quick else MINUTES
        end, theirs, made = time.perf_counter() + 60 * minutes, {}, made_with(arguments.model_id)
        writing.check_writable(Results(arguments.output, NAME, made, arguments.again).json)
        if arguments.beside:
            if features_of(checkpoint.read_config(arguments.model_id, "transformer")).image:
                raise UserError("--beside diffusers compares models of text alone; drop it, or choose another --model")
            theirs = run_diffusers(torch_device(), minutes, arguments, told)
        machine = find_machine(arguments.model_id)
        results = Results(arguments.output, NAME, {"devices": described(machine)} | made, arguments.again)
        told.title(f"{made['model']} on {len(machine.devices)} x {machine.devices[0].device_kind}")
        if machine.platform == "cpu":
            told.say("there is no accelerator: everything runs on the CPU in small sizes")
        todo = [*comparisons(machine, arguments.output, theirs), *entries(machine)]
        for name, one in theirs.items():
            if one["status"] != WRITTEN:
                results.keep(name, one["kind"], one)
        run_entries(todo, results, arguments.quick, end - time.perf_counter(), machine.scale.pace, told)

        found = {name: results.entries[name] for name in [*theirs, *(entry.name for entry in todo)]}
        tell(found, told)
        told.close([arguments.output])
        told.say(f"wrote {results.json} and {results.markdown.name}")
        if any(one["status"] == NO_TIME for one in found.values()):
            told.say("for what had no time, run the same command again: what is done is kept")
        if machine.platform != "cpu":
            told.say(f"Please send us what you see: open an issue where you got this project, paste {results.markdown}")
            told.say(f"into it and attach {results.json}.")
        failed = [name for name, one in found.items() if one["status"] in FAILURES]
        if failed:
            told.warn(f"{len(failed)} of {len(found)} entries failed: {'; '.join(failed)}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
