"""Format a report as text, say how far to trust it, and name and write the files of reports."""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from cogvideox.files import writing
from cogvideox.files.names import ROOT

REPORTS = Path("reports")  # where reports go; git ignores it
RESULTS = ROOT / "benchmarks" / "results"  # where published ones go, from which the figures of the pages come
TABLES = RESULTS / "tables.json"  # written by benchmarks/reproduce_tables.py
MEASURED_KERNELS = RESULTS / "measured_kernels.json"  # written by benchmarks/measured_kernels.py


def file_name(what: str, topology: str, labels: Sequence[str]) -> str:
    """Return the default name of a report's file, such as "stage2-v6e-8-768x1360x81-guided.json"."""
    return "-".join([what, topology, *labels]) + ".json"


def add_publish_option(parser: argparse._ActionsContainer) -> None:
    """Add --publish, which `folder` takes."""
    parser.add_argument(
        "--publish",
        action="store_true",
        help=f"write to benchmarks/results/, where the figures of the pages come from, instead of {REPORTS}/",
    )


def folder(publish: bool) -> Path:
    """Return the folder of reports."""
    return RESULTS if publish else REPORTS


def save_rows(path: Path, rows: Mapping[str, dict], order: Iterable[str]) -> dict[str, dict]:
    """Add named rows to those in a JSON file, in the place of those of the same names; return all, in `order`."""
    found = {**(json.loads(path.read_text()) if path.exists() else {}), **rows}
    saved = {name: found[name] for name in order if name in found}
    with writing.replacing(path) as temporary:
        Path(temporary).write_text(json.dumps(saved, indent=2) + "\n")
    return saved


def text(report: Mapping) -> str:
    """Return a report as text to print."""
    options = [f"{name} {value}" for name, value in report["options"].items()]
    facts = ", ".join([report["model"], *options] if "model" in report else options)
    lines = [f"{report['what']} for {report['topology']}: {facts}"]
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
        lines += _prediction_lines(report)
    if "unpredicted" in report:
        lines.append(f"  predicted  nothing, as a schedule cannot be read: {report['unpredicted']}")
    if "saved" in report:
        lines.append(f"  saved      {report['saved']}")
    return "\n".join(lines)


def _prediction_lines(report: Mapping) -> list[str]:
    """Return the lines about predicted seconds and kernels."""
    total, floor = report["predicted_seconds"], report["floor"]
    lines = [
        f"  predicted  {total:.4g} s, {floor['ratio']:.2f} x the floor"
        f" (compute {floor['compute']:.4g} s, bytes {floor['bytes']:.4g} s)",
        f"  in range   {total * min(times_predicted()):.4g} to {total * max(times_predicted()):.4g} s",
        f"  caution    {trust()}",
    ]
    lines += [f"    {seconds:9.4f} s  {seconds / total:4.0%}  {name}" for name, seconds in report["split"].items()]
    lines.append("  slowest operations, predicted")
    lines += [f"    {seconds:9.4f} s  {name}" for name, seconds in report["slowest"].items()]
    for name, kernel in report["kernels"].items():
        if not kernel["useful_scores_per_cycle"]:  # not attention; if it takes long, it is among the slowest operations
            continue
        lines.append(f"  kernel     {name}: {kernel['useful_scores_per_cycle']:.0f} useful scores per cycle, predicted")
        lines.append("    units    " + ", ".join(f"{unit} {share:.0%}" for unit, share in kernel["units"].items()))
    return lines


def times_predicted() -> list[float]:
    """Return measured to predicted seconds of all programs that others measured and we predicted."""
    files = (TABLES, MEASURED_KERNELS)
    return [1 / row["ratio"] for file in files for row in json.loads(file.read_text()).values()]


def trust() -> str:
    """Return how far to trust predicted seconds, in the one sentence that the tool and the pages share."""
    found = times_predicted()
    return (
        f"Expect {min(found):.2f} to {max(found):.2f} times the predicted seconds: "
        f"all {len(found)} programs of others that were measured on TPUs lay in this range, "
        "whole steps at its lower end, and attention kernels, most of what a step of ours is, at its upper one."
    )
