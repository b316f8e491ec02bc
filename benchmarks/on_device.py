"""Check and measure this project on the devices at hand, beside what was predicted for them, in one go.

    python -m benchmarks.on_device
    python -m benchmarks.on_device --quick
    python -m benchmarks.on_device --model CogVideoX-5B
    python -m benchmarks.on_device --beside diffusers

The checks compare the attention kernel with a float32 reference; and a transformer block, a chunk of the decoder, and
a step on every mesh of the devices with the CPU. The measurements are a denoising step and a decode in the sizes of
docs/performance.md, or for another --model in its own; with --beside diffusers those of diffusers in torch on the same
card, too. Weights are drawn on the devices, so nothing is downloaded. Without an accelerator, all of it runs on the CPU
in small sizes.

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
    decode_frames,
    decode_name,
    draw_prompts,
    step_name,
)
from benchmarks.page import pairs, text_of
from benchmarks.reproduce_tables import MIDDLE
from cogvideox.cli.options import add_log_options
from cogvideox.cli.parser import ArgumentParser
from cogvideox.cli.program import run
from cogvideox.cli.report import Report, memory_of
from cogvideox.cli.types import folder_path, number
from cogvideox.errors import UserError
from cogvideox.features import features_of
from cogvideox.files import checkpoint, writing
from cogvideox.files.names import STAGE_OUTPUTS
from cogvideox.run.accelerator import prepare_libraries
from cogvideox.versions import LIBRARIES, versions
from compile_for_tpu import prediction, programs, report

if TYPE_CHECKING:
    import jax
    import numpy as np

    from cogvideox.models.transformer import denoising
    from cogvideox.models.transformer.plan import DenoisingPlan
    from cogvideox.models.vae.decoder import Decoder
    from cogvideox.models.vae.plan import DecodingPlan

# What decides the results, beside the sources of the model.
OWN_SOURCES = [Path(__file__).with_name(f"{name}.py") for name in ("on_device", "entries", "machine")]
NAME = "on_device"  # of the files with the results
MINUTES, QUICK_MINUTES = 30.0, 5.0

# --- The entries -------------------------------------------------------------------------------------------------


# Seconds that the original project measured for a decode, where docs/performance.md has no doubt about the size.
ORIGINAL_DECODES: dict[tuple | None, float] = {("v6e-8", MIDDLE, "torchax"): 0.86}


def entries(machine: Machine) -> list[Entry]:
    """Return all checks and rows in the order of their worth, which is that in which they run."""
    short, long = machine.lengths
    steps, decodes, meshes = step_rows(machine), decode_rows(machine), mesh_checks(machine)
    return [
        kernel_check(machine, machine.attention, "layer_normed", short, quick=True),
        *forced_online(machine, "mixed_heads", short, quick=True),
        kernel_row(machine, short),
        block_check(machine),
        *steps[:1],
        *meshes["tp"][:1],
        *steps[1:2],
        chunk_check(machine),
        *meshes["tp"][1:],
        *decodes[:1],
        *(entry for name in ONLINE if name != "mixed_heads" for entry in forced_online(machine, name, short)),
        kernel_check(machine, machine.attention, "negative_scores", short),
        kernel_check(machine, machine.attention, "layer_normed", long),
        *steps[2:],
        *decodes[1:2],
        *meshes["fsdp"],
        *([kernel_check(machine, "splash", "layer_normed", short)] if machine.platform == "tpu" else []),
        *decodes[2:],
    ]


def forced_online(machine: Machine, inputs: str, length: int, quick: bool = False) -> Iterator[Entry]:
    """Yield the check of a kernel that has an online variant, on inputs that need it; nothing on a GPU."""
    if machine.attention == "splash_exp2":
        yield kernel_check(machine, machine.attention, inputs, length, quick)


def kernel_check(machine: Machine, attention: str, inputs: str, length: int, quick: bool = False) -> Entry:
    """Return the check of an attention implementation at a length."""
    which = "online kernel" if inputs in ONLINE else "fast kernel"
    which = f", {which}" if attention == "splash_exp2" else ""
    name = f"attention {attention}{which}, {inputs.replace('_', ' ')}, {length:,} tokens"
    return Entry(name, "check", functools.partial(check_kernel, machine, attention, inputs, length), 0.5, quick)


def kernel_row(machine: Machine, length: int) -> Entry:
    """Return the measurement of the attention of one chip."""
    name = f"attention {machine.attention}, {machine.scale.heads} heads, {length:,} tokens, one device"
    return Entry(name, "row", functools.partial(measure_kernel, machine, length), 0.3, quick=True)


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
            options = {"use_dp": dp == 2, "sp_num": sp, "layout": layout}
            check = functools.partial(check_step, machine, machine.devices, 2, True, **options)
            name = f"mesh dp {dp} x sp {sp} x tp {count // dp // sp}, layout {layout}, beside the CPU"
            found[layout].append(Entry(name, "check", check, 1.0, quick=layout == "tp" and not found["tp"]))
    return found


def step_rows(machine: Machine) -> list[Entry]:
    """Return the rows of the tables for this slice; where there are none, every configuration of the tables."""
    rows = [row for row in json.loads(report.TABLES.read_text()).values() if row["topology"] == machine.topology]
    rows = rows if machine.is_of_the_tables else []
    found: list[Entry] = []
    for size, guided, minutes in machine.steps:
        same = [row for row in rows if (tuple(row["size"]), row["guided"]) == (size, guided)]
        if rows and not same:
            continue
        video = machine.video(size)
        expected = predicted("stage2", machine, size, ["guided"] * guided)
        expected |= {"original_seconds": min((row["measured"] for row in same), default=None)}
        measure = functools.partial(measure_step, machine, video, guided, expected)
        found.append(Entry(step_name(video, guided), "row", measure, minutes, quick=not found))
    return found


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


def predicted(what: str, machine: Machine, size: tuple[int, int, int], labels: Sequence[str]) -> dict:
    """Return seconds and GiB of a saved prediction for a size; None where there is none."""
    of_model = [] if machine.is_of_the_tables else [f"model={programs.model_name(machine.model)}"]
    return of_report(what, machine.topology, ["x".join(map(str, size)), *labels, *of_model])


def of_report(what: str, topology: str | None, labels: Sequence[str]) -> dict:
    """Return seconds and GiB of a saved report; None where there is none."""
    path = report.RESULTS / report.file_name(what, str(topology), labels)
    saved = json.loads(path.read_text()) if path.exists() else {"memory": {}}
    return {"predicted_seconds": saved.get("predicted_seconds"), "predicted_gib": saved["memory"].get("peak")}


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

KERNEL_TOLERANCE = 5e-3  # of bfloat16 results, as in tests/test_splash_attention.py
REFERENCE_QUERIES = 512  # of which the reference holds the scores at a time


def layer_normed(query: "np.ndarray", key: "np.ndarray") -> "tuple[np.ndarray, np.ndarray]":
    """Return queries and keys as the model has them: layer-normed, with the keys off centre."""
    normed = [(x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) for x in (query, key)]
    return 2.5 * normed[0], 2.5 * normed[1] + 1


def mixed_heads(query: "np.ndarray", key: "np.ndarray") -> "tuple[np.ndarray, np.ndarray]":
    """Return every other head with scores too large for the fast kernel."""
    query[:, 1::2] *= 40
    key[:, 1::2] *= 40
    return query, key


def huge_norms(query: "np.ndarray", key: "np.ndarray") -> "tuple[np.ndarray, np.ndarray]":
    """Return scores so large that nearly all of a row's weight is on one key."""
    return 1000 * query, 1000 * key


def far_bound(query: "np.ndarray", key: "np.ndarray") -> "tuple[np.ndarray, np.ndarray]":
    """Return rows whose bound is hundreds above their maximum: one long key is orthogonal to every query."""
    middle = key.shape[2] // 2
    query[..., 0] = 0
    key[:, :, middle] = 0
    key[:, :, middle, 0] = 2000
    return query, key


def negative_scores(query: "np.ndarray", key: "np.ndarray") -> "tuple[np.ndarray, np.ndarray]":
    """Return scores hundreds below 0, where a padded key that is not masked would win."""
    query[..., 0], key[..., 0] = 20, -60
    return query, key


# What is made of normal queries and keys, [batch, heads, length, head_dim].
INPUTS = {f.__name__: f for f in (layer_normed, mixed_heads, huge_norms, far_bound, negative_scores)}
# The share of the heads that the inputs send to the online kernel; those that are not named send none.
ONLINE = {"mixed_heads": 0.5, "huge_norms": 1.0, "far_bound": 1.0}


def kernel_arrays(machine: Machine, inputs: str, length: int) -> "list[jax.Array]":
    """Return query, key and value on one device, bfloat16 [1, heads, length and padding, head_dim].

    The padding, whose keys do not count, holds the largest values of keys and values.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    shape = (1, machine.scale.heads, length, machine.transformer["attention_head_dim"])
    generator = np.random.default_rng(PROMPT_SEED)
    query, key, value = (generator.standard_normal(shape, np.float32) for _ in range(3))
    query, key = INPUTS[inputs](query, key)
    padding = ((0, 0), (0, 0), (0, 16 + -length % 16), (0, 0))
    arrays = [np.pad(query, padding, "edge")]
    arrays += [np.pad(x, padding, constant_values=x.max()) for x in (key, value)]
    return [jax.device_put(x.astype(jnp.bfloat16), machine.devices[0]) for x in arrays]


def attention_function(machine: Machine, name: str, length: int) -> Callable:
    """Return an implementation of attention as the model calls it, for jax to compile."""
    from cogvideox.models.transformer.attention import Attention

    head_dim = machine.transformer["attention_head_dim"]
    chosen = Attention.choose(name, machine.platform, None, None, head_dim, "bfloat16")
    return functools.partial(chosen, kv_length=length)


def reference_attention(query: "jax.Array", key: "jax.Array", value: "jax.Array") -> "jax.Array":
    """Compute softmax attention in float32 on [batch, heads, length, head_dim], some queries at a time."""
    import jax
    import jax.numpy as jnp

    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    batch, heads, length, head_dim = query.shape
    blocks = -(-length // REFERENCE_QUERIES)
    padded = jnp.pad(query, ((0, 0), (0, 0), (0, blocks * REFERENCE_QUERIES - length), (0, 0)))

    def attend(block: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            scores = jnp.einsum("bhqd,bhkd->bhqk", block, key) * head_dim**-0.5
            return jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(scores), value)

    out = jax.lax.map(attend, jnp.moveaxis(padded.reshape(batch, heads, blocks, -1, head_dim), 2, 0))
    return jnp.moveaxis(out, 0, 2).reshape(batch, heads, -1, head_dim)[:, :, :length]


def check_kernel(machine: Machine, name: str, inputs: str, length: int) -> dict:
    """Compare an attention implementation with the reference, head by head, on inputs that both hold exactly."""
    import jax
    import numpy as np

    from cogvideox.models.transformer.attention import IMPLEMENTATIONS

    arrays = kernel_arrays(machine, inputs, length)
    output = jax.jit(attention_function(machine, name, length))(*arrays)[:, :, :length]
    expected = jax.jit(reference_attention)(*(x[:, :, :length] for x in arrays))
    errors = [relative_error(np.asarray(output[0, h]), np.asarray(expected[0, h])) for h in range(output.shape[1])]
    worst = int(np.argmax(np.nan_to_num(errors, nan=np.inf)))
    note, unmet = f"relative error of head {worst} of {len(errors)}, the worst", None
    if online_heads := IMPLEMENTATIONS[name].online_heads:
        taken = float(jax.jit(functools.partial(online_heads, kv_length=length))(*arrays).mean())
        note += f"; {taken:.0%} of the heads took the online kernel"
        if taken != (wanted := ONLINE.get(inputs, 0.0)):
            unmet = f"{wanted:.0%} of the heads should have taken the online kernel"
    return judged(errors[worst], KERNEL_TOLERANCE, note, unmet)


def check_step(machine: Machine, devices: "Sequence[jax.Device]", layers: int, guided: bool, **options: Any) -> dict:
    """Compare the first step of a model of few blocks with the CPU; `options` choose the mesh."""
    found = few_blocks(machine, layers, guided, devices=devices, attention=machine.attention, **options)
    return judged_beside_cpu(found, functools.partial(step_on_cpu, machine, layers, guided))


def few_blocks(machine: Machine, layers: int, guided: bool, **options: Any) -> "np.ndarray":
    """Run the first step of a model of few blocks with drawn weights; `options` are those of `make_denoising_plan`."""
    config = machine.transformer | {"num_layers": layers}
    plan = machine.denoising_plan(machine.scale.checked_video, guided, transformer=config, **options)
    return one_step(plan, draw_weights(parameter_shapes(plan)))


@functools.cache
def step_on_cpu(machine: Machine, layers: int, guided: bool, dtype: str) -> "np.ndarray":
    """Run `few_blocks` on the CPU with plain attention; the meshes share the result."""
    import jax

    where = {"devices": jax.devices("cpu")[:1], "platform": "cpu", "attention": "xla"}
    return few_blocks(machine, layers, guided, dtype=dtype, **where)


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


def compiled(traced: "Sequence[jax.stages.Traced]") -> "tuple[list[jax.stages.Compiled], float]":
    """Compile programs at the same time; return them and the seconds."""
    from concurrent.futures import ThreadPoolExecutor

    start = time.perf_counter()
    with ThreadPoolExecutor() as pool:
        programs = list(pool.map(lambda program: program.lower().compile(), traced))
    return programs, time.perf_counter() - start


class MemoryUse:
    """The memory of the devices during a measurement, in GiB of the chip that uses the most."""

    def __init__(self, devices: "Sequence[jax.Device]"):
        self._devices = devices
        self._before = self._most("peak")

    def _most(self, what: str) -> float | None:
        sizes = [told[what] / prediction.GIB for told in memory_of(self._devices) if what in told]
        return max(sizes) if sizes else None

    def so_far(self, programs: "Sequence[jax.stages.Compiled]") -> dict:
        """Return what the compiler allots, what is in use now, and the peak if it is this measurement's own."""
        peak = self._most("peak")
        own = peak is not None and peak > (self._before or 0.0)
        return {
            "allotted_gib": prediction.memory(programs, "cpu")["peak"],
            "in_use_gib": self._most("in use"),
            "peak_gib": peak if own else None,  # otherwise it is that of something before
        }


def measure_kernel(machine: Machine, length: int) -> dict:
    """Time the attention of one chip without the rest of the model."""
    import jax

    calls = 10  # at a time, so that starting them is not counted
    memory = MemoryUse(machine.devices[:1])
    arrays = kernel_arrays(machine, "layer_normed", length)
    arrays = [x[:, :, :length] for x in arrays]
    programs, seconds = compiled([jax.jit(attention_function(machine, machine.attention, length)).trace(*arrays)])

    def run_all() -> Iterator[None]:
        for _ in range(1 + machine.scale.repetitions):
            yield jax.block_until_ready([programs[0](*arrays) for _ in range(calls)][-1])

    each = [total / calls for total in durations(run_all())]
    one_chip = machine.topology and f"{machine.topology.split('-')[0]}-1"
    return measured(each, seconds, memory.so_far(programs), of_report("kernel", one_chip, [str(length)]))


def measure_step(machine: Machine, video: tuple[int, int, int], guided: bool, expected: Mapping) -> dict:
    """Time denoising steps with the default options of stage 2."""
    from cogvideox.models.transformer.step import abstract_arguments, make_step

    memory = MemoryUse(machine.devices)
    plan = machine.denoising_plan(video, guided)
    programs, seconds = compiled([make_step(plan).trace(*abstract_arguments(plan))])
    denoising = start_denoising(plan, draw_weights(parameter_shapes(plan)))
    return measured(
        durations(denoising.run(dict.fromkeys(plan.kinds(), programs[0]))), seconds, memory.so_far(programs), expected
    )


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
