"""Set the schedules of other projects' attention kernels beside the speed that was measured of them.

    python3.12 -m venv kernels
    kernels/bin/pip install jax==0.11.0 libtpu==0.0.44 flywheel-tpu==0.1.0 tokamax==0.0.15 numpy safetensors tqdm
    kernels/bin/python -m benchmarks.measured_kernels

The programs of reproduce_tables.py are far from the limit of the matrix unit (MXU). These kernels are near it, so they
show how accurate the predictions of compile_for_tpu are there. All are causal attention of 32 heads of 256 in bfloat16
on one device, with the versions that their measurements name. The rows are saved in reports/measured_kernels.json, with
--publish in benchmarks/results/.

Blocks that the causal mask hides are skipped by loops and conditions that depend on data. How often each of these
regions runs was found by reading the kernels' sources beside their schedules, and is written down here.

Sources of the measurements, all by profiler: Flywheel on v6e from the authors' post "Flywheel Attention: Attention
Kernels Built for the TPU" (20 September 2026); Splash Attention on 7x from README_v7x.md of
heavyball-research/flywheel-tpu. For Splash Attention on v6e, the post says that Flywheel is 1.1 to 1.6 times as fast,
least at the greatest length, so that 744 / 1.1 is exact to about 5%. The block sizes of Splash Attention are those in
benchmarks/softmax_attention/ of flywheel-tpu, tuned for each length.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from cogvideox.cli.parser import ArgumentParser
from cogvideox.cli.program import run
from cogvideox.errors import UserError
from cogvideox.run.accelerator import prepare_libraries
from cogvideox.versions import versions
from compile_for_tpu import compiler, kernel_schedule, report, topologies

HEADS, HEAD_DIM = 32, 256


class Row(NamedTuple):
    """One kernel, and what was measured of it."""

    kernel: str  # a key of KERNELS
    topology: str
    tokens: int
    block_q: int
    block_kv: int
    block_kv_compute: int
    measured: float  # TFLOP/s, counted as 2 x heads x tokens ** 2 x head_dim: half of the scores are hidden


ROWS = {
    "1": Row("Flywheel", "v6e-1", 16384, 2048, 2048, 512, 693),
    "2": Row("Flywheel", "v6e-1", 131072, 2048, 2048, 512, 744),
    "3": Row("Splash", "v6e-1", 131072, 2048, 4096, 1024, 744 / 1.1),
    "4": Row("Splash", "7x-4", 16384, 2048, 2048, 512, 573),
}


def blocks(row: Row) -> tuple[int, int]:
    """Return how many blocks of a head's scores the causal mask leaves whole, and how many it cuts."""
    whole = cut = 0
    for first in range(0, row.tokens, row.block_q):
        inside = (first + 1) // row.block_kv  # blocks whose last key is the block's first query, or before it
        whole += inside
        cut += -(-(first + row.block_q) // row.block_kv) - inside
    return whole, cut


# --- The kernels -------------------------------------------------------------------------------------------------


def flywheel(row: Row) -> tuple[Callable, tuple[int, ...]]:
    """Return Flywheel's attention of [heads, tokens, head_dim] arrays, and the shape of its arguments."""
    from flywheel_tpu import flash_attn_func

    def attend(query, key, value):
        return flash_attn_func(query, key, value, causal=True)  # the row's block sizes are its default

    return attend, (1, HEADS, row.tokens, HEAD_DIM)


def flywheel_runs(row: Row) -> list[float]:
    """Return how often the regions of Flywheel's kernel run; see `kernel_schedule.parse_schedule`.

    Three loops, over heads, blocks of queries and their blocks of keys. In the last: queries are scaled before the
    first block; a whole block is computed, and again if its scores overflow, which we take to be never; the same for
    a block that the mask cuts; the output is written after the last block.
    """
    whole, cut = blocks(row)
    rows, steps = row.tokens // row.block_q, whole + cut
    return [HEADS, rows, 1, steps / rows, rows / steps, whole / steps, 0, cut / steps, 0, rows / steps]


def splash(row: Row) -> tuple[Callable, tuple[int, ...]]:
    """Return tokamax's Splash Attention of [heads, tokens, head_dim] arrays, and the shape of its arguments."""
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    config = splash_attention_kernel.SplashConfig(
        block_q=row.block_q,
        block_kv=row.block_kv,
        block_kv_compute=row.block_kv_compute,
        use_experimental_scheduler=True,
    )
    mask = splash_attention_mask.CausalMask((row.tokens, row.tokens))
    kernel = splash_attention_kernel.make_splash_mha_single_device(mask, config=config)

    def attend(query, key, value):
        return kernel(query, key, value)

    return attend, (HEADS, row.tokens, HEAD_DIM)


def splash_runs(row: Row) -> list[float]:
    """Return how often the regions of Splash Attention's kernel run; see `kernel_schedule.parse_schedule`.

    One loop over the blocks that the mask leaves of all heads. In it, if there is anything to do: sums are cleared
    before the first block of a block of queries; a whole block is computed, or a block that the mask cuts; the output
    is written after the last one.
    """
    whole, cut = blocks(row)
    rows, steps = row.tokens // row.block_q, whole + cut
    return [1, HEADS * steps, 1, rows / steps, whole / steps, cut / steps, rows / steps]


KERNELS = {
    "Flywheel": (flywheel, flywheel_runs, "flash_attn_mha_static_t1_guarded_fwd"),
    "Splash": (splash, splash_runs, "splash_mha_fwd_no_residuals"),
}


# --- Prediction --------------------------------------------------------------------------------------------------


def predict(row: Row, dump: Path) -> dict:
    """Compile a row's kernel and predict its speed from its schedule; runs in the process that compiles.

    The keys and values of a block travel while the block before it is computed, which takes longer, so their bytes are
    not counted.
    """
    import jax
    import jax.numpy as jnp

    make, runs, name = KERNELS[row.kernel]
    devices = topologies.devices(row.topology)[:1]
    with topologies.compiling_for(jax.sharding.Mesh(devices, ("chips",))):
        attend, shape = make(row)
        array = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(devices[0]))
        jax.jit(attend).lower(array, array, array).compile()
    (schedule,) = kernel_schedule.read_schedules(dump, {name: ()}, runs(row)).values()
    seconds = schedule.cycles / topologies.chip(row.topology).clock
    predicted = 2 * HEADS * row.tokens**2 * HEAD_DIM / seconds / 1e12
    return row._asdict() | {
        "cycles": schedule.cycles,
        "mxu": schedule.utilization("MXU"),
        "predicted": predicted,
        "ratio": row.measured / predicted,  # of the seconds, predicted to measured, as in tables.json
        "versions": versions("jax", "libtpu", "flywheel-tpu" if row.kernel == "Flywheel" else "tokamax"),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print the rows that are asked for, and replace them in the file of results."""
    parser = ArgumentParser(__doc__.splitlines()[0], prog="python -m benchmarks.measured_kernels")
    parser.add_argument("--rows", nargs="+", default=[*ROWS], help=f"rows to predict, of {', '.join(ROWS)}")
    report.add_publish_option(parser)
    arguments = parser.parse_args(argv)
    names = arguments.rows
    if unknown := set(names) - ROWS.keys():
        raise UserError(f"--rows {min(unknown)} is unknown; known are {', '.join(ROWS)}")
    for name in names:
        topologies.check(ROWS[name].topology)
    if dump := compiler.dump_folder():
        prepare_libraries()
        print(json.dumps(predict(ROWS[names[0]], dump)))
        return

    results = {
        name: compiler.in_a_process("benchmarks.measured_kernels", ["--rows", name], ROWS[name].topology, f"row {name}")
        for name in names
    }
    print(table(results))
    path = report.folder(arguments.publish) / report.MEASURED_KERNELS.name
    report.save_rows(path, results, order=ROWS)
    print(f"\nwrote {os.path.relpath(path)}")


def table(results: dict) -> str:
    """Return the rows as a table to print."""
    form = "{:<4} {:<9} {:<6} {:>7} {:>9} {:>10} {:>6} {:>9}".format
    lines = [form("row", "kernel", "slice", "tokens", "measured", "predicted", "ratio", "MXU busy")]
    for name, row in results.items():
        figures = [f"{row['measured']:.0f}", f"{row['predicted']:.0f}", f"{row['ratio']:.2f}", f"{row['mxu']:.0%}"]
        lines.append(form(name, row["kernel"], row["topology"], row["tokens"], *figures))
    return "\n".join([*lines, "TFLOP/s; ratio of the seconds, predicted to measured; MXU busy is predicted"])


if __name__ == "__main__":
    run(main)
