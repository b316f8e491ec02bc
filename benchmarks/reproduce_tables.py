"""The seed project's stage-2 tables: its measured seconds a step beside what the compiler's schedule predicts.

    python benchmarks/reproduce_tables.py --rows all

This is how far the predictions of compile_for_tpu.py can be trusted. Each row's configuration is built as the seed had
it: diffusers' own block through TorchAx, partitioned by GSPMD with the seed's parameter shardings, Splash Attention in
shard_map. One block is compiled and counted 42 times; what comes before and after the blocks is left out. Beside each
row stands our own stage 2 in the same size on the same chips (--ours).

The seed's exp2 kernel is not in this repository: its rows take the block's time from the compiler and the kernel's from
451 useful scores a cycle, what that kernel's own schedule gives at the Wan2.1 blocks. The seed does not say which
kernel rows 1 to 4 ran; JAX's Splash Attention with the original blocks is assumed.
"""

import argparse
import functools
import json
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402
from benchmarks import compile_for_tpu, tpu  # noqa: E402
from console import ArgumentParser, UserError, prepare_libraries, run  # noqa: E402

SEED_EXP2_SCORES_PER_CYCLE = 451
LARGE, SMALL = (768, 1360, 81), (640, 1280, 61)


class Row(NamedTuple):
    """One row: what the seed ran, and the seconds a step that it measured."""

    name: str
    topology: str
    size: tuple[int, int, int]  # height, width, frames
    guided: bool
    dp: int
    mesh_order: tuple[str, str, str]
    constraint: bool  # on the attention's output
    exp2: bool  # the seed's kernel, else JAX's Splash Attention with blocks 2048/1024/512
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
    "splash": Row("no CFG, small, JAX's Splash", "v6e-1", SMALL, False, 1, BEST, True, False, 3.38),
}

# The seed's parameter shardings ("fsdp"), [out, in]; its rule for ff.net.0 misses CogVideoX's ff.net.0.proj, which is
# therefore replicated. Source: the public code of yangwhale/gpu-tpu-pedia.
SEED_SHARDINGS = {
    "attn1.to_q.weight": (None, ("tp", "sp")),
    "attn1.to_k.weight": (None, ("tp", "sp")),
    "attn1.to_v.weight": (None, ("tp", "sp")),
    "attn1.to_out.0.weight": (("tp", "sp"), None),
    "ff.net.2.weight": (("tp", "sp"), None),
}


def trace_seed_block(row: Row, devices) -> tuple:
    """The seed's block for a row, traced; and the facts that the prediction needs. See compile_for_tpu.trace_stage2."""
    import jax
    import jax.numpy as jnp
    import torch
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    import checkpoint
    from models import attention, sharding
    from models.torch_function import jax_function

    config = checkpoint.read_config(str(compile_for_tpu.BUILT_IN_MODEL), "transformer")
    sizes = {"dp": row.dp, "sp": 1, "tp": len(devices) // row.dp}
    mesh = sharding.make_mesh(sizes, devices, row.mesh_order)
    height, width, frames = row.size
    video = math.ceil(((frames - 1) // 4 + 1) / 2) * (height // 16) * (width // 16)
    text, heads, head_dim = config["max_text_seq_length"], config["num_attention_heads"], config["attention_head_dim"]
    tokens, batch, embed = text + video, 1 + row.guided, heads * head_dim

    def splash(query, key, value, **_):
        spec = P("dp", "tp", None, None)
        kernel = functools.partial(attention.splash_attention, kv_length=query.shape[2])
        key = key - key.mean(axis=2, keepdims=True)
        out = jax.shard_map(kernel, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(query, key, value)
        if row.constraint:
            out = jax.lax.with_sharding_constraint(out, NamedSharding(mesh, P("dp", None, ("tp", "sp"), None)))
        return out

    with torch.device("meta"):
        module = CogVideoXBlock(
            dim=embed,
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            time_embed_dim=config["time_embed_dim"],
            attention_bias=config["attention_bias"],
        ).eval()

    def abstract(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=NamedSharding(mesh, P(*spec)))

    bf16 = jnp.bfloat16
    weights = {
        name: abstract(weight.shape, bf16, *SEED_SHARDINGS.get(name, ()))
        for name, weight in module.state_dict().items()
    }
    block = jax.jit(jax_function(module, {torch.nn.functional.scaled_dot_product_attention: splash}))
    with compile_for_tpu.compiling_for(mesh):
        traced = block.trace(
            weights,
            abstract((batch, video, embed), bf16, "dp"),
            abstract((batch, text, embed), bf16, "dp"),
            abstract((batch, config["time_embed_dim"]), bf16, "dp"),
            (abstract((video, head_dim), jnp.float32),) * 2,
        )
    scores = batch * heads / len(devices) * tokens**2
    return traced, config["num_layers"], mesh.devices.flatten().tolist(), scores


def predict_seed(row: Row, dump: Path) -> dict:
    """Predicted seconds a step of the seed's configuration, split by category; in the process that compiles."""
    import jax
    import numpy as np

    traced, layers, devices, scores = trace_seed_block(row, tpu.devices(row.topology))
    with compile_for_tpu.compiling_for(jax.sharding.Mesh(np.asarray(devices), ("chips",))):
        compiled = [traced.lower().compile()]
    facts = {"scores_per_kernel": scores}
    report = compile_for_tpu.prediction(row.topology, dump, devices, [traced], [layers], compiled, facts)
    split = report["split"]
    if row.exp2:
        split["Pallas kernels"] = layers * scores / SEED_EXP2_SCORES_PER_CYCLE / tpu.chip(row.topology).clock
    return {"split": split, "predicted_seconds": sum(split.values())}


def predict_ours(row: Row) -> dict:
    """The report of our own stage 2 in a row's size on its chips."""
    height, width, frames = row.size
    size = [
        f"--height={height}",
        f"--width={width}",
        f"--frames={frames}",
        f"--guidance_scale={6 if row.guided else 1}",
    ]
    command = ["stage2", f"--topology={row.topology}", *size]
    return compile_for_tpu.compile_in_a_process(compile_for_tpu.__file__, command, row.topology, "our stage 2")


def main() -> None:
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=["all"], help=f"of {', '.join(ROWS)}; or all")
    parser.add_argument("--ours", action=argparse.BooleanOptionalAction, default=True, help="our stage 2 beside it")
    arguments = parser.parse_args()
    names = list(ROWS) if arguments.rows == ["all"] else arguments.rows
    if unknown := set(names) - ROWS.keys():
        raise UserError(f"--rows {min(unknown)} is unknown; known are {', '.join(ROWS)} and all")
    if compile_for_tpu.DUMP in os.environ:
        prepare_libraries()
        print(json.dumps(predict_seed(ROWS[names[0]], Path(os.environ[compile_for_tpu.DUMP]))))
        return

    results, ours = {}, {}
    for name in names:
        row = ROWS[name]
        seed = compile_for_tpu.compile_in_a_process(__file__, ["--rows", name], row.topology, f"row {name}")
        results[name] = seed | row._asdict() | {"ratio": seed["predicted_seconds"] / row.measured}
        if arguments.ours:
            configuration = row.topology, row.size, row.guided
            if configuration not in ours:
                ours[configuration] = predict_ours(row)
            report = ours[configuration]
            results[name] |= {"ours_seconds": report.get("predicted_seconds"), "ours_gib": report["memory"]["peak"]}
    print(table(results))
    if len(results) > 1:
        print(summary(results))
    if names == list(ROWS):
        compile_for_tpu.RESULTS.mkdir(exist_ok=True)
        with utils.replacing(compile_for_tpu.RESULTS / "tables.json") as temporary:
            Path(temporary).write_text(json.dumps(results, indent=2) + "\n")
        plot(results, compile_for_tpu.RESULTS / "tables.png")
        print(f"wrote {os.path.relpath(compile_for_tpu.RESULTS)}/tables.json and tables.png")


def table(results: dict) -> str:
    form = "{:<7} {:<28} {:<6} {:>9} {:>10} {:>6} {:>16} {:>6}".format
    lines = [form("row", "", "slice", "measured", "predicted", "ratio", "ours, predicted", "GiB")]
    for name, row in results.items():
        seconds = [f"{row['measured']:.2f} s", f"{row['predicted_seconds']:.2f} s", f"{row['ratio']:.2f}"]
        ours = [f"{row['ours_seconds']:.3f} s", f"{row['ours_gib']:.2f}"] if row.get("ours_seconds") else ["-", "-"]
        lines.append(form(name, row["name"], row["topology"], *seconds, *ours))
    return "\n".join(lines)


def summary(results: dict) -> str:
    """Rank correlation (Spearman) and median error of predicted against measured, as it is and with one fitted factor.

    Each row is left out of the fit that corrects it.
    """
    import numpy as np

    predicted, measured = (
        np.array([row[key] for row in results.values()]) for key in ("predicted_seconds", "measured")
    )
    ranks = [values.argsort().argsort() for values in (predicted, measured)]
    correlation = np.corrcoef(*ranks)[0, 1]
    ratios = measured / predicted
    factors = np.array([np.median(np.delete(ratios, i)) for i in range(len(ratios))])
    errors = [np.median(np.abs(factor * predicted / measured - 1)) for factor in (1, factors)]
    return (
        f"{len(results)} rows: rank correlation {correlation:.2f}, median error {errors[0]:.0%}\n"
        f"fitted: times {np.median(ratios):.2f}, the median ratio of the other rows, median error {errors[1]:.0%}"
    )


def plot(results: dict, path: Path) -> None:
    """Predicted against measured seconds, log axes, as a PNG."""
    from PIL import Image, ImageDraw

    side, margin = 640, 60
    seconds = [value for row in results.values() for value in (row["measured"], row["predicted_seconds"])]
    low, high = math.log(min(seconds) / 1.3), math.log(max(seconds) * 1.3)

    def place(value):
        return (math.log(value) - low) / (high - low) * (side - 2 * margin)

    image = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(image)
    corner = (margin, side - margin)
    draw.rectangle([margin, margin, side - margin, side - margin], outline="black")
    draw.line([*corner, side - margin, margin], fill="gray")
    for tick in (0.5, 1, 2, 4):
        if low < math.log(tick) < high:
            offset = place(tick)
            draw.line([corner[0] + offset, corner[1], corner[0] + offset, corner[1] + 5], fill="black")
            draw.line([corner[0] - 5, corner[1] - offset, corner[0], corner[1] - offset], fill="black")
            draw.text((corner[0] + offset - 6, corner[1] + 10), f"{tick} s", fill="black")
            draw.text((corner[0] - 36, corner[1] - offset - 6), f"{tick} s", fill="black")
    draw.text((side / 2 - 60, side - 24), "measured by the seed", fill="black")
    draw.text((10, 24), "predicted", fill="black")
    for name, row in results.items():
        x, y = corner[0] + place(row["measured"]), corner[1] - place(row["predicted_seconds"])
        draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill="steelblue")
        draw.text((x + 8, y - 6), name, fill="black")
    with utils.replacing(path) as temporary:
        image.save(temporary)


if __name__ == "__main__":
    run(main)
