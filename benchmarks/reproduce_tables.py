"""Compile all that the tables of the pages are made of, and the original project's configurations beside them.

    python -m benchmarks.reproduce_tables --publish
    python -m benchmarks.reproduce_tables --rows 10 11 12
    python -m benchmarks.reproduce_tables --reports "stage3 --topology v6e-8"

The reports of our own programs are those of benchmarks/reports.py. The original project is the CogVideoX scripts in
yangwhale/gpu-tpu-pedia, whose authors measured on TPUs. Their figures show how accurate the predictions of
compile_for_tpu are. Each row has a configuration of theirs: diffusers' own block through TorchAx, partitioned by GSPMD
with their parameter shardings, and Splash Attention in shard_map. One block is compiled and counted 42 times; the
operations before and after the blocks are not counted. The new rows replace those in reports/tables.json, with
--publish in benchmarks/results/, and the picture beside it is drawn again.

The original's exp2 kernel is not in this repository. In its rows, the kernel's time is computed from 451 useful scores
a cycle, the result of that kernel's own schedule at the Wan2.1 blocks; the other times come from the compiler. The
original project does not say which kernel rows 1 to 4 ran; JAX's Splash Attention with the original blocks is assumed.
"""

import functools
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks import reports
from benchmarks.reports import LARGE, MIDDLE, SMALL
from cogvideox.cli.parser import ArgumentParser
from cogvideox.cli.program import run
from cogvideox.errors import UserError
from cogvideox.files import checkpoint, writing
from cogvideox.run.accelerator import prepare_libraries
from cogvideox.versions import versions
from compile_for_tpu import compiler, prediction, programs, report, topologies

if TYPE_CHECKING:
    import jax
    import torch

ORIGINAL_EXP2_SCORES_PER_CYCLE = 451


class Row(NamedTuple):
    """One row: a configuration of the original project, and the seconds a step that its authors measured."""

    name: str
    topology: str
    size: tuple[int, int, int]  # height, width, frames
    guided: bool
    dp: int
    mesh_order: tuple[str, str, str]
    constraint: bool  # on the attention's output
    exp2: bool  # the original's kernel, else JAX's Splash Attention with blocks 2048/1024/512
    measured: float


BEST = ("dp", "sp", "tp")
ROWS = {
    "1": Row("baseline", "v6e-8", LARGE, True, 1, ("tp", "dp", "sp"), False, False, 4.04),
    "2": Row("+ sharding constraint", "v6e-8", LARGE, True, 1, ("tp", "dp", "sp"), True, False, 3.93),
    "3": Row("+ dp", "v6e-8", LARGE, True, 2, ("tp", "sp", "dp"), True, False, 3.08),
    "4": Row("+ mesh order", "v6e-8", LARGE, True, 2, BEST, True, False, 2.75),
    "5": Row("+ exp2, Wan2.1 blocks", "v6e-8", LARGE, True, 2, BEST, True, True, 2.31),
    "6": Row("no CFG", "v6e-8", LARGE, False, 1, BEST, True, True, 1.50),
    "7": Row("no CFG, small", "v6e-8", SMALL, False, 1, BEST, True, True, 0.71),
    "8": Row("no CFG, small", "v6e-4", SMALL, False, 1, BEST, True, True, 1.07),
    "9": Row("no CFG, small", "v6e-1", SMALL, False, 1, BEST, True, True, 2.73),
    # Later figures of the same authors: yangwhale/gpu-tpu-pedia, December 2025.
    "10": Row("guided, middle", "v6e-8", MIDDLE, True, 2, BEST, True, True, 2.08),
    "11": Row("guided, small", "v6e-8", SMALL, True, 2, BEST, True, True, 1.13),
    "12": Row("guided, small, tp 8", "v6e-8", SMALL, True, 1, BEST, True, True, 1.79),
    "splash": Row("no CFG, small, JAX's Splash", "v6e-1", SMALL, False, 1, BEST, True, False, 3.38),
}

# The original's parameter shardings ("fsdp"), [out, in]. Its rule for ff.net.0 does not match CogVideoX's
# ff.net.0.proj, which is therefore replicated. Source: the public code of yangwhale/gpu-tpu-pedia.
ORIGINAL_SHARDINGS = {
    "attn1.to_q.weight": (None, ("tp", "sp")),
    "attn1.to_k.weight": (None, ("tp", "sp")),
    "attn1.to_v.weight": (None, ("tp", "sp")),
    "attn1.to_out.0.weight": (("tp", "sp"), None),
    "ff.net.2.weight": (("tp", "sp"), None),
}


def trace_original_block(row: Row, devices: list) -> prediction.Programs:
    """Trace the original's block for a row; one block, run 42 times, stands for a step."""
    import jax
    import jax.numpy as jnp
    import torch
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from cogvideox.models.shared import sharding
    from cogvideox.models.vae.torch_function import jax_function

    config = checkpoint.read_config(programs.BUILT_IN_MODEL, "transformer")
    sizes = {"dp": row.dp, "sp": 1, "tp": len(devices) // row.dp}
    mesh = sharding.make_mesh(sizes, devices, row.mesh_order)
    text, heads, head_dim = config["max_text_seq_length"], config["num_attention_heads"], config["attention_head_dim"]
    video, batch, embed = video_tokens(row.size), 1 + row.guided, heads * head_dim

    def abstract(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=NamedSharding(mesh, P(*spec)))

    module, bf16 = original_block(config), jnp.bfloat16
    weights = {
        name: abstract(weight.shape, bf16, *ORIGINAL_SHARDINGS.get(name, ()))
        for name, weight in module.state_dict().items()
    }
    attention = {torch.nn.functional.scaled_dot_product_attention: original_attention(mesh, row.constraint)}
    with topologies.compiling_for(mesh):
        traced = jax.jit(jax_function(module, attention)).trace(
            weights,
            abstract((batch, video, embed), bf16, "dp"),
            abstract((batch, text, embed), bf16, "dp"),
            abstract((batch, config["time_embed_dim"]), bf16, "dp"),
            (abstract((video, head_dim), jnp.float32),) * 2,
        )
    return prediction.Programs(
        traced=[traced],
        times=[config["num_layers"]],
        devices=mesh.devices.flatten().tolist(),
        scores_per_kernel=batch * heads / len(devices) * (text + video) ** 2,
    )


def video_tokens(size: tuple[int, int, int]) -> int:
    """Return the number of video tokens of a size; each token stands for 2 latent frames and 16 x 16 pixels."""
    height, width, frames = size
    return math.ceil(((frames - 1) // 4 + 1) / 2) * (height // 16) * (width // 16)


def original_block(config: dict) -> "torch.nn.Module":
    """Return diffusers' block for a transformer config, without weights."""
    import torch
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock

    with torch.device("meta"):
        return CogVideoXBlock(
            dim=config["num_attention_heads"] * config["attention_head_dim"],
            num_attention_heads=config["num_attention_heads"],
            attention_head_dim=config["attention_head_dim"],
            time_embed_dim=config["time_embed_dim"],
            attention_bias=config["attention_bias"],
        ).eval()


def original_attention(mesh: "jax.sharding.Mesh", constraint: bool) -> Callable:
    """Return the original's attention: Splash Attention in shard_map, with or without a sharding constraint."""
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from cogvideox.models.transformer import attention

    def splash(query, key, value, **_):
        spec = P("dp", "tp", None, None)
        kernel = functools.partial(attention.splash_attention, kv_length=query.shape[2])
        key = key - key.mean(axis=2, keepdims=True)
        out = jax.shard_map(kernel, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(query, key, value)
        if constraint:
            out = jax.lax.with_sharding_constraint(out, NamedSharding(mesh, P("dp", None, ("tp", "sp"), None)))
        return out

    return splash


def predict_original(row: Row, dump: Path) -> dict:
    """Predict the seconds a step of the original's configuration, by category; runs in the process that compiles."""
    import jax
    import numpy as np

    block = trace_original_block(row, topologies.devices(row.topology))
    with topologies.compiling_for(jax.sharding.Mesh(np.asarray(block.devices), ("chips",))):
        compiled = [program.lower().compile() for program in block.traced]
    split = prediction.predict(row.topology, dump, block, compiled)["split"]
    if row.exp2:
        cycles = block.times[0] * block.useful_scores("exp2_splash") / ORIGINAL_EXP2_SCORES_PER_CYCLE
        split["Pallas kernels"] = cycles / topologies.chip(row.topology).clock
    return {"split": split, "predicted_seconds": sum(split.values()), "versions": versions("jax", "libtpu")}


def predict_row(name: str) -> dict:
    """Return the entries of a row in tables.json."""
    row = ROWS[name]
    found = compiler.in_a_process("benchmarks.reproduce_tables", ["--rows", name], row.topology, f"row {name}")
    return found | row._asdict() | {"ratio": found["predicted_seconds"] / row.measured}


def save(results: dict, folder: Path) -> None:
    """Replace or add rows in a folder's tables.json, and draw its tables.png again."""
    path = folder / report.TABLES.name
    plot(report.save_rows(path, results, order=ROWS), path.with_suffix(".png"))
    print(f"wrote {os.path.relpath(path)} and {path.stem}.png")


def main(argv: Sequence[str] | None = None) -> None:
    """Predict the rows that the command line asks for, print them as a table and save them; compile our reports."""
    parser = ArgumentParser(__doc__.splitlines()[0], prog="python -m benchmarks.reproduce_tables")
    parser.add_argument("--rows", nargs="+", help=f"rows to predict, and no report: {', '.join(ROWS)}, or all")
    parser.add_argument(
        "--reports", metavar="WORDS", help="compile the reports whose commands have these words, and no row"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="how many to compile at a time (default: the machine's cores)"
    )
    report.add_publish_option(parser)
    arguments = parser.parse_args(argv)
    names = list(ROWS) if arguments.rows == ["all"] else arguments.rows
    if unknown := set(names or ()) - ROWS.keys():
        raise UserError(f"--rows {min(unknown)} is unknown; known are {', '.join(ROWS)} and all")
    for name in names or ROWS:
        topologies.check(ROWS[name].topology)
    if dump := compiler.dump_folder():
        prepare_libraries()
        print(json.dumps(predict_original(ROWS[names[0]], dump)))
        return
    if names is None:
        publish = ["--publish"] * arguments.publish
        jobs = [["benchmarks.reproduce_tables", "--rows", "all", *publish]] if arguments.reports is None else []
        commands = [command for command in reports.commands() if (arguments.reports or "") in command]
        jobs += [["compile_for_tpu", *command.split(), *publish] for command in commands]
        if not jobs:
            raise UserError(f"--reports: no command has the words '{arguments.reports}'")
        reports.run(jobs, arguments.jobs)
        return

    results = {name: predict_row(name) for name in names}
    print(table(results))
    if len(results) > 1:
        print(summary(results))
    save(results, report.folder(arguments.publish))


def table(results: dict) -> str:
    """Return the rows as a table to print."""
    form = "{:<7} {:<28} {:<6} {:>9} {:>10} {:>6} {:>16} {:>6}".format
    lines = [form("row", "", "slice", "measured", "predicted", "ratio", "ours, predicted", "GiB")]
    for name, row in results.items():
        seconds = [f"{row['measured']:.2f} s", f"{row['predicted_seconds']:.2f} s", f"{row['ratio']:.2f}"]
        step = reports.step(row["topology"], row["size"], row["guided"])
        ours = [f"{step['predicted_seconds']:.3f} s", f"{step['memory']['peak']:.2f}"] if step else ["-", "-"]
        lines.append(form(name, row["name"], row["topology"], *seconds, *ours))
    return "\n".join(lines)


def summary(results: dict) -> str:
    """Return rank correlation (Spearman) and median error of predicted seconds, without and with a fitted factor.

    The factor for a row is fitted on the other rows.
    """
    import numpy as np

    predicted, measured = (
        np.array([row[key] for row in results.values()]) for key in ("predicted_seconds", "measured")
    )
    predicted_ranks, measured_ranks = (values.argsort().argsort() for values in (predicted, measured))
    correlation = np.corrcoef(predicted_ranks, measured_ranks)[0, 1]
    ratios = measured / predicted
    factors = np.array([np.median(np.delete(ratios, i)) for i in range(len(ratios))])
    errors = [np.median(np.abs(factor * predicted / measured - 1)) for factor in (1, factors)]
    return (
        f"{len(results)} rows: rank correlation {correlation:.2f}, median error {errors[0]:.0%}\n"
        f"fitted: times {np.median(ratios):.2f}, the median ratio of the other rows, median error {errors[1]:.0%}"
    )


def plot(results: dict, path: Path) -> None:
    """Draw predicted against measured seconds on logarithmic axes, each dot with the name of its row, as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, NullFormatter

    rows = sorted(results.items(), key=lambda item: item[1]["measured"])
    seconds = [row[key] for _, row in rows for key in ("measured", "predicted_seconds")]
    limits = min(seconds) / 1.3, max(seconds) * 1.3
    figure = Figure(figsize=(7, 7), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", aspect="equal")
    axes.set_title("Steps of the original project, one dot for each row of the table")
    axes.set_xlabel("measured by its authors, seconds a step")
    axes.set_ylabel("predicted from the compiler's output, seconds a step")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks([0.5, 1, 2, 4], minor=False)
        axis.set_major_formatter(FormatStrFormatter("%g"))
        axis.set_minor_formatter(NullFormatter())
    axes.set(xlim=limits, ylim=limits)
    axes.plot(limits, limits, color="gray", linewidth=1)
    axes.annotate(
        "predicted = measured", (limits[1] / 1.35,) * 2, (6, -6), textcoords="offset points", rotation=45, color="gray",
        rotation_mode="anchor", ha="center", va="top",
    )  # fmt: skip
    for i, (name, row) in enumerate(rows):  # names stand on both sides in turn, so that none hides another
        place, away = (row["measured"], row["predicted_seconds"]), (-14, 10) if i % 2 else (10, -16)
        axes.plot(*place, "o", color="tab:blue")
        axes.annotate(
            f"row {name}" if name.isdigit() else name, place, away, textcoords="offset points",
            ha="right" if i % 2 else "left", arrowprops={"arrowstyle": "-", "color": "gray"},
        )  # fmt: skip
    with writing.replacing(path) as temporary:
        figure.savefig(temporary, format="png")


if __name__ == "__main__":
    run(main)
