"""Compile a stage for a TPU that is not there: does it fit, how long will it take, and where does the time go.

    python benchmarks/compile_for_tpu.py stage2 --topology v6e-8
    python benchmarks/compile_for_tpu.py stage3 --topology v6e-8 --decoder flax
    python benchmarks/compile_for_tpu.py kernel --topology v6e-1 --tokens 25826 --heads 6

The compiler in libtpu runs on any x86-64 Linux machine. What it says of memory is what a TPU will have to give; the
seconds are predictions from its schedules and cost model, no measurement (README.md, "Predicted").
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import stage2_transformer as stage2  # noqa: E402
import stage3_vae_decoder as stage3  # noqa: E402
import utils  # noqa: E402
from benchmarks import tpu  # noqa: E402
from console import ArgumentParser, UserError, number, prepare_libraries, run  # noqa: E402

BUILT_IN_MODEL = ROOT / "benchmarks" / "CogVideoX1.5-5B"  # the configs of zai-org/CogVideoX1.5-5B, without weights
RESULTS = ROOT / "benchmarks" / "results"
DUMP = "COMPILE_FOR_TPU_DUMP"  # set in the process that compiles: libtpu reads its flags once
RARE_KERNELS = ("exp2_splash_online",)  # for heads with unusual scores; custom_splash_attention.py
GIB = 2**30


def parse_arguments():
    parser = ArgumentParser(__doc__.splitlines()[0])
    stages = parser.add_subparsers(dest="what", required=True)
    for what in ("stage2", "stage3", "kernel"):
        sub = stages.add_parser(what)
        sub.add_argument("--topology", default="v6e-8", help=f"one of {', '.join(tpu.TOPOLOGIES)}")
        sub.add_argument("--output", type=utils.path, help="JSON report (default: a name in benchmarks/results)")
        if what != "kernel":
            sub.add_argument("--model_id", default=str(BUILT_IN_MODEL), help="a model; only its configs are read")
            sub.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the weights")
            sub.add_argument("--save", type=utils.path, help="write the compiled programs, for a stage's --executable")
        if what == "stage2":
            stage2.add_step_options(sub)
        if what == "stage3":
            sub.add_argument("--decoder", default="torchax", choices=["torchax", "flax"], help="which decoder")
            for name, default in (("height", utils.HEIGHT), ("width", utils.WIDTH), ("frames", utils.FRAMES)):
                sub.add_argument(f"--{name}", type=number(int, 1), default=default, help="of the video")
            stage3.add_split_options(sub)
        if what == "kernel":
            sub.add_argument("--attention", default="splash_exp2", choices=[a for a in utils.ATTENTION if a != "xla"])
            sub.add_argument("--tokens", type=number(int, 1), default=25826, help="length of the sequence")
            sub.add_argument("--heads", type=number(int, 1), default=6, help="attention heads of one chip")
            sub.add_argument("--head_dim", type=number(int, 1), default=64, help="width of a head")
            sub.add_argument(
                "--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of query, key, value"
            )
            sub.add_argument("--block_sizes", type=int, nargs="+", help="of the kernel, in the order of its BlockSizes")
            sub.set_defaults(use_k_smooth=None)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.topology not in tpu.TOPOLOGIES:
        raise UserError(f"--topology {arguments.topology} is unknown; known are {', '.join(tpu.TOPOLOGIES)}")
    if arguments.topology != "cpu" and importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu is not installed; pip install -r requirements.txt (jax[tpu]) brings it")
    if DUMP in os.environ:
        prepare_libraries()
        print(json.dumps(worker(arguments, Path(os.environ[DUMP]))))
        return
    report = compile_in_a_process(
        __file__, sys.argv[1:], arguments.topology, f"{arguments.what} for {arguments.topology}"
    )
    output = arguments.output or RESULTS / f"{name_of(report)}.json"
    with utils.replacing(output) as temporary:
        Path(temporary).write_text(json.dumps(report, indent=2) + "\n")
    print(text_of(report))
    print(f"\nwrote {os.path.relpath(output)}")
    if not report["memory"]["fits"]:
        sys.exit(1)


def compile_in_a_process(script: str, command: list[str], topology: str, what: str) -> dict:
    """Run `script`, a benchmark of ours, as the worker for `command` and return the report that it prints.

    Shows the seconds that pass, on a terminal; raises UserError where the worker does.
    """
    with tempfile.TemporaryDirectory() as dump:
        environment = os.environ | tpu.compiler_environment(topology, dump) | {DUMP: dump}
        with open(Path(dump) / "log", "w+") as log:
            process = subprocess.Popen(
                [sys.executable, script, *command], env=environment, stdout=subprocess.PIPE, stderr=log, text=True
            )
            start = time.monotonic()
            print(f"compiling {what} ...", file=sys.stderr, flush=True)
            while True:
                try:
                    output, _ = process.communicate(timeout=1)
                    break
                except subprocess.TimeoutExpired:
                    if sys.stderr.isatty():
                        print(f"\r  {time.monotonic() - start:.0f} s ", end="", file=sys.stderr, flush=True)
                except BaseException:
                    process.kill()
                    raise
            if sys.stderr.isatty():
                print("\r", end="", file=sys.stderr)
            log.seek(0)
            errors = log.read()
    if process.returncode == 2:
        raise UserError(errors.strip().splitlines()[-1].split("error: ", 1)[-1])
    if process.returncode:
        raise RuntimeError(f"the compiling process ended with {process.returncode}:\n{errors}")
    return json.loads(output.splitlines()[-1])


# --- In the process that compiles --------------------------------------------------------------------------------


def worker(arguments, dump: Path) -> dict:
    import jax
    import numpy as np

    devices = tpu.devices(arguments.topology)
    traced, times, facts = {"stage2": trace_stage2, "stage3": trace_stage3, "kernel": trace_kernel}[arguments.what](
        arguments, devices
    )
    used = facts.pop("devices")
    report = {
        "what": arguments.what,
        "topology": arguments.topology,
        "options": {name: str(value) for name, value in facts.pop("options").items()},
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
    }
    mesh = jax.sharding.Mesh(np.asarray(used), ("chips",))
    start = time.perf_counter()
    try:
        with compiling_for(mesh):
            compiled = [program.lower().compile() for program in traced]
    except jax.errors.JaxRuntimeError as error:
        return report | {"memory": out_of_memory(str(error), arguments)}
    report["compile_seconds"] = time.perf_counter() - start
    report["memory"] = memory(compiled, arguments.topology)
    flops = sum(n * matrix_flops(program.jaxpr, len(used)) for n, program in zip(times, traced, strict=True))
    report["flops"] = flops + facts["attention_flops"]
    if arguments.topology != "cpu":
        report |= prediction(arguments.topology, dump, used, traced, times, compiled, facts)
        floor = {
            "compute": report["flops"] / tpu.chip(arguments.topology).flops,
            "bytes": sum(report["memory"][kind] for kind in ("arguments", "output")) * GIB
            / tpu.chip(arguments.topology).hbm_bandwidth,
        }  # fmt: skip
        report["floor"] = floor | {"ratio": report["predicted_seconds"] / max(floor.values())}
    if getattr(arguments, "save", None):
        import executable

        made_for = executable.description(facts["name"], used, traced, facts["program_options"])
        with utils.replacing(arguments.save) as temporary:
            executable.save(temporary, compiled, made_for)
        report["saved"] = str(arguments.save)
    return report


@contextlib.contextmanager
def compiling_for(mesh) -> Iterator[None]:
    """Without it Pallas asks the CPU of this machine which TPU it is."""
    import jax

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


def trace_stage2(arguments, devices):
    import jax.numpy as jnp

    import checkpoint
    from models.scheduler import CogVideoXDPMScheduler
    from models.transformer import abstract_step_arguments, make_denoise_step

    config, vae = (checkpoint.read_config(arguments.model_id, component) for component in ("transformer", "vae"))
    scheduler = checkpoint.read_config(arguments.model_id, "scheduler", "scheduler_config.json")
    stage2.check_sizes(arguments, config, vae, scheduler)
    parallelism = stage2.make_parallelism(arguments, config, devices)
    platform = "cpu" if arguments.topology == "cpu" else "tpu"
    attention = stage2.make_attention(arguments, platform, config, arguments.dtype)
    _, shape = stage2.latent_frames_and_shape(arguments, 1, config, vae)
    guided = arguments.guidance_scale > 1.0
    noisy = scheduler["_class_name"] == CogVideoXDPMScheduler.__name__
    step = make_denoise_step(config, parallelism, attention)
    values = abstract_step_arguments(config, parallelism, shape, guided, noisy, jnp.dtype(arguments.dtype))
    with compiling_for(parallelism.mesh):
        traced = step.trace(*values)

    tokens = config["max_text_seq_length"] + values[4][0].shape[0]
    options = stage2.program_options(parallelism, attention)
    scores = (1 + guided) * config["num_attention_heads"] / len(devices) * tokens**2
    return [traced], [1], {
        "devices": parallelism.mesh.devices.flatten().tolist(),
        "name": "denoising step",
        "program_options": options,
        "options": size_of(arguments) | {"guided": guided} | options,
        "scores_per_kernel": scores,
        "attention_flops": 4 * config["attention_head_dim"] * scores * config["num_layers"],
    }  # fmt: skip


def trace_stage3(arguments, devices):
    import jax
    import jax.numpy as jnp

    import checkpoint
    from models.decoder import chunk_programs, chunk_sizes

    vae = checkpoint.read_config(arguments.model_id, "vae")
    shape = stage3.latent_shape(vars(arguments), vae)
    split = stage3.make_split(arguments, devices, shape)
    decoder = importlib.import_module(f"models.vae_{arguments.decoder}").make_decoder(vae)

    def abstract(shape):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(arguments.dtype), sharding=split.replicated)

    weights = {name: abstract(shape) for name, shape in decoder.weight_shapes.items()}
    weights = jax.tree.map(lambda x: abstract(x.shape), jax.eval_shape(decoder.convert_weights, weights))
    with compiling_for(split.mesh):
        traced = chunk_programs(decoder, weights, shape, split)
    return traced, [1, len(chunk_sizes(shape[2])) - 1][: len(traced)], {
        "devices": split.mesh.devices.flatten().tolist(),
        "name": f"{arguments.decoder} decoder",
        "program_options": stage3.program_options(split),
        "options": size_of(arguments) | {"decoder": arguments.decoder, "split": split},
        "scores_per_kernel": 0,
        "attention_flops": 0,
    }  # fmt: skip


def trace_kernel(arguments, devices):
    import functools

    import jax
    import jax.numpy as jnp

    config = {"attention_head_dim": arguments.head_dim}
    function = stage2.make_attention(arguments, "tpu", config, arguments.dtype)
    where = jax.sharding.SingleDeviceSharding(devices[0])
    shape = (1, arguments.heads, arguments.tokens, arguments.head_dim)
    array = jax.ShapeDtypeStruct(shape, jnp.dtype(arguments.dtype), sharding=where)
    with compiling_for(jax.sharding.Mesh(devices[:1], ("chips",))):
        traced = jax.jit(functools.partial(function, kv_length=arguments.tokens)).trace(array, array, array)
    scores = arguments.heads * arguments.tokens**2
    names = ("attention", "tokens", "heads", "head_dim", "dtype", "block_sizes")
    return [traced], [1], {
        "devices": devices[:1],
        "options": {name: getattr(arguments, name) for name in names},
        "scores_per_kernel": scores,
        "attention_flops": 4 * arguments.head_dim * scores,
    }  # fmt: skip


def size_of(arguments) -> dict:
    return {name: getattr(arguments, name) for name in ("height", "width", "frames", "dtype")}


def prediction(topology, dump, devices, traced, times, compiled, facts) -> dict:
    """Predicted seconds of `times` runs of each program: total, split, the dearest operations, the kernels."""
    from benchmarks import hlo_schedule, kernel_schedule

    chip = tpu.chip(topology)
    grids = {}
    for program in traced:
        grids |= kernel_schedule.grids(program.jaxpr)
    grids = {name: grid for name, grid in grids.items() if name not in RARE_KERNELS}
    kernels = kernel_schedule.read_schedules(dump, grids) if grids else {}
    coordinates = {device.id: tuple(device.coords) for device in devices}

    def collective(opcode, size, group):
        group = [devices[i].id for i in group]  # a program numbers its devices by their place in the mesh
        return tpu.collective_seconds(opcode, size, group, coordinates, chip.link_bandwidth)

    def kernel(name, size):  # as long as its schedule or, if that is more, as its bytes take between HBM and VMEM
        schedule = kernels.get(name) or next(k for other, k in kernels.items() if base(other) == base(name))
        return max(schedule.cycles / chip.clock, size / chip.hbm_bandwidth)

    def base(name):  # calls of one kernel, numbered by the compiler, which keeps one program for all
        return re.sub(r"\.\d+$", "", name)

    costs = []
    for n, program in zip(times, compiled, strict=True):
        parsed = hlo_schedule.Program.parse(program.as_text())
        found = hlo_schedule.costs(parsed, chip.clock, kernel, collective, RARE_KERNELS)
        costs += [cost for cost in found for _ in range(n)]
    split = Counter(dict.fromkeys(hlo_schedule.CATEGORIES, 0.0))
    operations = Counter()
    for cost in costs:
        split[cost.category] += cost.seconds
        operations[f"{cost.category}: {cost.source} ({cost.name})"] += cost.seconds
    return {
        "predicted_seconds": sum(split.values()),
        "split": dict(split),
        "dearest": dict(operations.most_common(10)),
        "kernels": {
            name: {
                "cycles": kernel.cycles,
                "useful_scores_per_cycle": facts["scores_per_kernel"] / kernel.cycles,
                "units": {unit: kernel.utilization(unit) for unit in kernel.capacity},
            }
            for name, kernel in kernels.items()
        },
    }


def memory(compiled, topology: str) -> dict:
    """HBM of one chip in GiB, of the program that needs most."""
    analyses = [program.memory_analysis() for program in compiled]
    one = max(analyses, key=lambda a: a.argument_size_in_bytes + a.temp_size_in_bytes)
    sizes = {
        "arguments": one.argument_size_in_bytes,
        "temporaries": one.temp_size_in_bytes,
        "output": one.output_size_in_bytes - one.alias_size_in_bytes,
        "program": one.generated_code_size_in_bytes,
    }
    sizes = {name: size / GIB for name, size in sizes.items()}
    peak, limit = sum(sizes.values()), None if topology == "cpu" else tpu.chip(topology).hbm_gib
    return sizes | {"peak": peak, "limit": limit, "fits": limit is None or peak <= limit}


def out_of_memory(message: str, arguments) -> dict:
    """The compiler's out-of-memory answer as numbers and one line; raises RuntimeError if it is another error."""
    from executable import memory_shortage

    shortage = memory_shortage(message)
    if not shortage:
        raise RuntimeError(message)
    peak, limit = shortage
    if arguments.what == "stage3":
        help_ = "a slice of more chips, or a smaller --height or --width"
    elif arguments.what == "kernel":
        help_ = "fewer --tokens or --heads"
    elif (arguments.attention or "splash") == "xla":
        help_ = "--attention splash, which keeps no scores in memory"
    elif not arguments.use_fsdp and len(tpu.devices(arguments.topology)) > 1:
        help_ = "--use_fsdp, or a slice of more chips"
    else:
        help_ = "a slice of more chips, --guidance_scale 1 or a smaller size"
    line = f"does not fit: {peak:.1f} GiB a chip of {limit:.2f}, {peak - limit:.1f} too much; would help: {help_}"
    return {"peak": peak, "limit": limit, "fits": False, "line": line}


def matrix_flops(jaxpr, devices: int) -> float:
    """FLOP of one device for the matrix products and convolutions of a jaxpr, Pallas kernels left out.

    Outside of shard_map shapes are of all devices together and are taken to be split evenly.
    """
    import math

    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted) / devices
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            features = params["dimension_numbers"].rhs_spec[0]
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / kernel[features] / devices
        elif name != "pallas_call":
            inside = 1 if name == "shard_map" else devices
            trips = params["length"] if name == "scan" else 1
            for value in params.values():
                for inner in value if isinstance(value, (tuple, list)) else [value]:
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        total += trips * matrix_flops(inner, inside)
    return total


# --- What a person reads -----------------------------------------------------------------------------------------


def name_of(report: dict) -> str:
    options = re.sub(r"[^\w]+", "_", "-".join(report["options"].values())).strip("_")
    return f"{report['what']}-{report['topology']}-{options}"


def text_of(report: dict) -> str:
    """The report as lines for people."""
    lines = [
        f"{report['what']} for {report['topology']}: " + ", ".join(f"{k} {v}" for k, v in report["options"].items())
    ]
    sizes = report["memory"]
    if "line" in sizes:
        return "\n".join([*lines, f"  memory     {sizes['line']}"])
    parts = ", ".join(f"{name} {sizes[name]:.2f}" for name in ("arguments", "temporaries", "output", "program"))
    verdict = (
        f" a chip of {sizes['limit']:.2f}: {'fits' if sizes['fits'] else 'does not fit'}" if sizes["limit"] else ""
    )
    lines.append(f"  compiled   in {report['compile_seconds']:.0f} s")
    lines.append(f"  memory     {sizes['peak']:.2f} GiB{verdict} ({parts})")
    lines.append(f"  work       {report['flops']:.3g} FLOP a chip")
    if "predicted_seconds" in report:
        total, floor = report["predicted_seconds"], report["floor"]
        if report["what"] == "stage2":
            lines.append(
                "  caution    such predictions were 1.26 to 1.37 x what the seed project measured (reproduce_tables.py)"
            )
        lines.append(f"  predicted  {total:.4g} s, {floor['ratio']:.2f} x the floor"
                     f" (compute {floor['compute']:.4g} s, bytes {floor['bytes']:.4g} s)")  # fmt: skip
        lines += [f"    {seconds:9.4f} s  {seconds / total:4.0%}  {name}" for name, seconds in report["split"].items()]
        lines.append("  dearest operations, predicted")
        lines += [f"    {seconds:9.4f} s  {name}" for name, seconds in report["dearest"].items()]
        for name, kernel in report["kernels"].items():
            if not kernel["useful_scores_per_cycle"]:  # not attention: among the dearest operations if it matters
                continue
            lines.append(
                f"  kernel     {name}: {kernel['useful_scores_per_cycle']:.0f} useful scores per cycle, predicted"
            )
            lines.append("    units    " + ", ".join(f"{unit} {share:.0%}" for unit, share in kernel["units"].items()))
    if "saved" in report:
        lines.append(f"  saved      {report['saved']}")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
