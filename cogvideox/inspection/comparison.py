"""Compare the tensors and videos of two runs."""

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any

from cogvideox.errors import UserError
from cogvideox.files import provenance, tensor_dump
from cogvideox.inspection.description import CHUNK, coordinate
from cogvideox.inspection.items import Item, items, progress


def compare_runs(arguments: argparse.Namespace, ours: Mapping[str, Item], theirs: Mapping[str, Item]) -> list[dict]:
    """Compare the tensors of two runs, by name, in the order of execution; return a row for each.

    What one run lacks is a difference, unless it is an input of that run, which lies elsewhere, or stands in a dump,
    which has what was asked for.
    """
    if len(ours) == len(theirs) == 1:  # two files: their only tensors, whatever they are called
        theirs = dict(zip(ours, theirs.values(), strict=True))
    inputs = [set().union(*map(provenance.input_names, {item.file for item in run.values()})) for run in (ours, theirs)]
    noise = items(arguments.noise) if arguments.noise else None
    rows = []
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        if name not in ours or name not in theirs:
            one, where, needed = (
                (ours[name], arguments.compare, inputs[1])
                if name in ours
                else (theirs[name], arguments.paths[0], inputs[0])
            )
            is_note = one.file.name in needed or tensor_dump.in_order(one.metadata)
            rows.append({"name": name, "differs": not is_note, "what": f"is not in {where}"})
            continue
        pair = ours[name], theirs[name]
        beside: dict[str, Any] = {}
        allowed = arguments.tolerance or 0.0
        if noise is not None:
            if name not in noise:
                raise UserError(f"{name} is not in {arguments.noise}")
            beside["noise"] = difference(noise[name], theirs[name])["relative"]
            allowed = (3.0 if arguments.tolerance is None else arguments.tolerance) * (beside["noise"] or 0.0)
        row = {"name": name} | difference(*pair, allowed) | beside
        row["differs"] = row["relative"] is None or not row["relative"] <= allowed
        if row["differs"] and "what" not in row:
            row |= differing_shares(*pair, allowed)
        rows.append(row)
    return rows


def difference(ours: Item, theirs: Item, allowed: float = 0.0) -> dict:
    """Return how two tensors differ: largest and normwise relative difference, cosine, worst place, first step.

    The first step is that whose own normwise relative difference is above `allowed`.
    """
    import torch

    a, b = ours.load(), theirs.load()
    if (ours.row is None) != (theirs.row is None):  # one dump has the array, the other its statistics
        a, b = (
            x if item.row is not None else torch.from_numpy(tensor_dump.statistics_of(x.double().numpy()))
            for item, x in ((ours, a), (theirs, b))
        )
    if a.shape != b.shape:
        return {"relative": None, "what": f"has shape {list(a.shape)}, not {list(b.shape)}"}
    axis, step = progress(ours, a.ndim) if theirs.row is None else (None, "")
    # One row for each step along the axis: squares of the difference and of both, and their product.
    moved = [x.reshape(1) if not x.ndim else x.movedim(axis or 0, 0) for x in (a, b)]
    sums, most, worst = torch.zeros(4, len(moved[0]), dtype=torch.float64), -1.0, None
    rows = max(CHUNK // max(moved[0][:1].numel(), 1), 1)
    for start in range(0, len(moved[0]) if a.numel() else 0, rows):
        x, y = (each[start : start + rows].double().flatten(1 if each.ndim > 1 else 0) for each in moved)
        gap = (x - y).abs()
        if not gap.sum().isfinite():
            place = place_of(int((~(x.isfinite() & y.isfinite())).flatten().nonzero()[0]), start, a.shape, axis or 0)
            values = a[tuple(place)], b[tuple(place)]
            if all(not value.isfinite() for value in values) and torch.equal(a.isnan(), b.isnan()):
                return {"relative": None, "what": f"is not finite in both, first at {place}"}
            return {"relative": None, "what": f"is not finite at {place}: {values[0]:g} and {values[1]:g}"}
        for i, product in enumerate((gap * gap, x * x, y * y, x * y)):
            sums[i, start : start + rows] = product.reshape(len(x), -1).sum(1)
        if float(gap.max()) > most:
            most, worst = float(gap.max()), place_of(int(gap.argmax()), start, a.shape, axis or 0)
    error, norm, other, dot = (float(total) for total in sums.sum(1))
    found: dict[str, Any] = {
        "max": max(most, 0.0),
        "relative": math.sqrt(error / other) if other else (0.0 if error == 0 else math.inf),
        "cosine": dot / math.sqrt(norm * other) if norm and other else None,
        "worst": worst and {"place": worst, "values": [float(a[tuple(worst)]), float(b[tuple(worst)])]},
    }
    if worst and len(a) == len(tensor_dump.STATISTICS) and (ours.row is not None or theirs.row is not None):
        found["worst"]["place"] = tensor_dump.STATISTICS[worst[0]]
    if axis is not None and error:
        steps = (sums[0] > allowed**2 * sums[2]).nonzero()
        found |= {"first": f"{step} {int(steps[0])}"} if len(steps) else {}
    if ours.tensor is None:
        errors = sums[0] / max(a[0].numel(), 1)
        found["psnr"] = [round(10 * math.log10(255**2 / e), 2) if (e := float(error)) else None for error in errors]
    return found


def place_of(place: int, start: int, shape: Sequence[int], axis: int) -> list[int]:
    """Return the indices of an element, by its place from index `start` on with `axis` moved to the front."""
    if not shape:
        return []
    moved = [shape[axis], *shape[:axis], *shape[axis + 1 :]]
    first, *others = coordinate(place + start * math.prod(moved[1:]), moved)
    return [*others[:axis], first, *others[axis:]]


def differing_shares(ours: Item, theirs: Item, allowed: float) -> dict:
    """Return which chips' shares differ by more than `allowed`, of a run on a mesh, unless all or none do."""
    if ours.row is not None or theirs.row is not None:
        return {}
    name = ours.tensor or ""
    shares = [*tensor_dump.shares(ours.metadata, name)] or [*tensor_dump.shares(theirs.metadata, name)]
    if not shares:
        return {}
    a, b = ours.load(), theirs.load()
    differing = []
    for chip, where in shares:
        x, y = a[where].double(), b[where].double()
        if float((x - y).norm()) > allowed * float(y.norm()):
            differing.append(chip)
    return {"shares": differing, "chips": len(shares)} if 0 < len(differing) < len(shares) else {}


def conclusion_of(rows: Sequence[dict]) -> str:
    """Say in one sentence whether two runs differ, and where first."""
    different = [row for row in rows if row["differs"]]
    alone = sum("is not in" in row.get("what", "") for row in rows if not row["differs"])
    left_out = f"; {alone} in one of the two alone" if alone else ""
    if not different:
        return f"nothing differs: {len(rows) - alone} compared{left_out}"
    first = different[0]
    if "what" in first:
        said = f"{first['name']} {first['what']}"
    else:
        place = f", from {first['first']} on" if "first" in first else ""
        beside = f" ({first['noise']:.2g} for the noise)" if "noise" in first else ""
        said = f"{first['name']} differs by {first['relative']:.2g} of its norm{beside}{place}"
    if "shares" in first:
        said += f", only in {shares_text(first)}"
    return f"first in the order of execution: {said}; {len(different)} of {len(rows) - alone} differ{left_out}"


def shares_text(row: dict) -> str:
    """Say which chips' shares differ."""
    return f"the share of {len(row['shares'])} of {row['chips']} chips: {'; '.join(row['shares'])}"
