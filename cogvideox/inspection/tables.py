"""Show descriptions and comparisons as lines for people."""

import math
from collections.abc import Iterator, Sequence

from cogvideox.inspection.comparison import shares_text

SHOWN = 40  # lines of a comparison
WORST = 10  # of them where nothing differs


def table(found: Sequence[dict]) -> str:
    """Return tensors and videos as lines for people."""
    lines: list[str] = []
    file, before = None, None
    width = max((len(one["tensor"]) for one in found if "tensor" in one), default=0)
    for one in found:
        if one["file"] != file:
            file = one["file"]
            lines.append(file)
            made_from = one.get("made_from") or {}
            if made_from and made_from == before:
                lines.append("  made from the same")
            else:
                lines += [f"  made from {name}: {value}" for name, value in made_from.items()]
            before = made_from
        lines += (
            statistics_lines(one)
            if "steps" in one
            else tensor_lines(one, width)
            if "tensor" in one
            else video_lines(one)
        )
    return "\n".join(lines)


def tensor_lines(one: dict, width: int) -> Iterator[str]:
    """Yield the lines of a tensor."""
    numbers = " ".join(
        f"{name} {'-' if one[name] is None else format(one[name], '.4g'):<10}" for name in ("min", "max", "mean", "std")
    )
    shape = "x".join(map(str, one["shape"])) or "scalar"
    yield f"  {one['tensor']:<{width}}  {shape} {one['dtype']}  {numbers} zeros {one['zeros']:.1%}  {one['digest']}"
    if one["first_not_finite"] is not None:
        yield f"    NOT FINITE: {one['nan']:,} NaN, {one['inf']:,} Inf, the first at {one['first_not_finite']}"


def statistics_lines(one: dict) -> Iterator[str]:
    """Yield the lines of a file of statistics: for each module its extremes over all steps, then what stands out."""
    width = max(map(len, one["statistics"]))
    yield f"  {one['steps'][0]} to {one['steps'][-1]}, in the order of execution; std of the first and of the last"
    for name, rows in one["statistics"].items():
        if isinstance(rows[0][0], list):
            share = [sum(map(sum, row)) / sum(map(len, row)) for row in rows]
            yield f"  {name:<{width}}  {sum(share) / len(share):.2%} of the heads"
            continue
        bad = [step for step, row in zip(one["steps"], rows, strict=True) if not all(map(math.isfinite, row))]
        columns = list(zip(*rows, strict=True))
        extremes = f"min {min(columns[0]):<10.4g} max {max(columns[1]):<10.4g} std {rows[0][3]:.4g} {rows[-1][3]:.4g}"
        yield f"  {name:<{width}}  " + (f"NOT FINITE from {bad[0]} on" if bad else extremes)
    if one["first_not_finite"]:
        yield f"  first not finite: {one['first_not_finite']}"
    if one["largest_growth"]:
        yield "  largest growth from a block to the next: {:.3g} times at {}".format(*one["largest_growth"])


def video_lines(one: dict) -> Iterator[str]:
    """Yield the lines of a video."""
    size = f"{one['frames']} frames, {one['width']} x {one['height']}, {one['fps']:g} frames per second"
    yield f"  {size}: {one['looks']}"
    yield "  brightness of 255: " + " ".join(f"{value:.0f}" for value in one["brightness"])


def comparison_table(rows: Sequence[dict]) -> str:
    """Return a comparison as lines for people, a mark before what differs; of many rows those that matter."""
    shown = [row for row in rows if row["differs"] or "is not in" not in row.get("what", "")]
    if len(shown) > SHOWN:
        different = [row for row in shown if row["differs"]]
        shown = different or sorted(shown, key=lambda row: -(row["relative"] or 0.0))[:WORST]
    width = max((len(row["name"]) for row in shown[:SHOWN]), default=0)
    lines = [line for row in shown[:SHOWN] for line in comparison_lines(row, width)]
    if len(rows) > SHOWN and shown:
        lines.append(
            f"  {len(rows):,} tensors; these are {'the first that differ' if shown[0]['differs'] else 'the worst'}"
        )
    return "\n".join(lines)


def comparison_lines(row: dict, width: int) -> Iterator[str]:
    """Yield the lines of one tensor of a comparison."""
    mark = "!" if row["differs"] else " "
    if "what" in row:
        yield f"{mark} {row['name']:<{width}}  {row['what']}"
        return
    cosine = "-" if row["cosine"] is None else f"{row['cosine']:.6f}"
    line = f"{mark} {row['name']:<{width}}  max {row['max']:<10.3g} relative {row['relative']:<10.3g} cosine {cosine}"
    if "noise" in row:
        line += f" noise {row['noise']:.3g}"
    if row["worst"] and row["max"]:
        ours, theirs = row["worst"]["values"]
        line += f"  worst at {row['worst']['place']}: {ours:.6g} and {theirs:.6g}"
    yield line
    if "shares" in row:
        yield f"    only in {shares_text(row)}"
    if "psnr" in row:
        yield "    PSNR in dB: " + " ".join("equal" if p is None else f"{p:.1f}" for p in row["psnr"])
