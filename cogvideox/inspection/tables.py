"""Show descriptions and comparisons as lines for people."""

import math
from collections.abc import Iterator, Sequence

from cogvideox.cli import terminal
from cogvideox.files.numbers import as_text
from cogvideox.inspection.comparison import shares_text

SHOWN = 40  # lines of a comparison
WORST = 10  # of them where nothing differs


def table(found: Sequence[dict]) -> str:
    """Return tensors and videos as lines for people."""
    lines: list[str] = []
    file, before = None, None
    tensors = iter(terminal.table([tensor_cells(one) for one in found if "tensor" in one]))
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
        if "tensor" not in one:
            lines += statistics_lines(one) if "steps" in one else video_lines(one)
            continue
        lines.append(next(tensors))
        if one["first_not_finite"] is not None:
            lines.append(
                f"    NOT FINITE: {one['nan']:,} NaN, {one['inf']:,} Inf, the first at {one['first_not_finite']}"
            )
        if "patterns" in one:
            parts = ((pattern, as_text(heads), "s" * (len(heads) > 1)) for pattern, heads in one["patterns"].items())
            lines.append("    " + "; ".join(f"head{plural} {heads}: {pattern}" for pattern, heads, plural in parts))
    return "\n".join(lines)


def tensor_cells(one: dict) -> list[str]:
    """Return what the table has of a tensor."""
    names = ("min", "max", "mean", "std")
    numbers = [f"{name} {'-' if one[name] is None else format(one[name], '.4g')}" for name in names]
    shape = "x".join(map(str, one["shape"])) or "scalar"
    return [one["tensor"], f"{shape} {one['dtype']}", *numbers, f"zeros {one['zeros']:.1%}", one["digest"]]


def statistics_lines(one: dict) -> list[str]:
    """Return the lines of a file of statistics: for each module its extremes over all steps, then what stands out."""
    rows = []
    for name, values in one["statistics"].items():
        if isinstance(values[0][0], list):
            share = [sum(map(sum, row)) / sum(map(len, row)) for row in values]
            rows.append([name, f"{sum(share) / len(share):.2%} of the heads"])
            continue
        bad = [step for step, row in zip(one["steps"], values, strict=True) if not all(map(math.isfinite, row))]
        least, most, _, _ = zip(*values, strict=True)
        extremes = [f"min {min(least):.4g}", f"max {max(most):.4g}", f"std {values[0][3]:.4g} {values[-1][3]:.4g}"]
        rows.append([name, f"NOT FINITE from {bad[0]} on"] if bad else [name, *extremes])
    order = f"  {one['steps'][0]} to {one['steps'][-1]}, in the order of execution; std of the first and of the last"
    lines = [order, *terminal.table(rows)]
    if one["first_not_finite"]:
        lines.append(f"  first not finite: {one['first_not_finite']}")
    if one["largest_growth"]:
        lines.append("  largest growth from a block to the next: {:.3g} times at {}".format(*one["largest_growth"]))
    return lines


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
    texts = zip(terminal.table([comparison_cells(row) for row in shown[:SHOWN]], indent=0), shown, strict=False)
    lines = [line for text, row in texts for line in (text, *comparison_notes(row))]
    if len(rows) > SHOWN and shown:
        lines.append(
            f"  {len(rows):,} tensors; these are {'the first that differ' if shown[0]['differs'] else 'the worst'}"
        )
    return "\n".join(lines)


def comparison_cells(row: dict) -> list[str]:
    """Return what the table of a comparison has of one tensor."""
    name = f"{'!' if row['differs'] else ' '} {row['name']}"
    if "what" in row:
        return [name, row["what"]]
    cosine = "-" if row["cosine"] is None else f"{row['cosine']:.6f}"
    cells = [name, f"max {row['max']:.3g}", f"relative {row['relative']:.3g}", f"cosine {cosine}"]
    if "noise" in row:
        cells.append(f"noise {row['noise']:.3g}")
    if row["worst"] and row["max"]:
        ours, theirs = row["worst"]["values"]
        cells.append(f"worst at {row['worst']['place']}: {ours:.6g} and {theirs:.6g}")
    return cells


def comparison_notes(row: dict) -> Iterator[str]:
    """Yield what stands below the row of a tensor or a video."""
    if "shares" in row:
        yield f"    only in {shares_text(row)}"
    if "psnr" in row:
        yield "    PSNR in dB: " + " ".join("equal" if p is None else f"{p:.1f}" for p in row["psnr"])
