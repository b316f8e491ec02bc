"""Format a report as text, and name the files of reports."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from cogvideox.files.names import ROOT

RESULTS = ROOT / "benchmarks" / "results"
TABLES = RESULTS / "tables.json"  # written by benchmarks/reproduce_tables.py


def file_name(what: str, topology: str, labels: Sequence[str]) -> str:
    """Return the default name of a report's file, such as "stage2-v6e-8-768x1360x81-guided.json"."""
    return "-".join([what, topology, *labels]) + ".json"


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
    if "saved" in report:
        lines.append(f"  saved      {report['saved']}")
    return "\n".join(lines)


def _prediction_lines(report: Mapping) -> list[str]:
    """Return the lines about predicted seconds and kernels."""
    total, floor = report["predicted_seconds"], report["floor"]
    lines = [f"  caution    {caution()}"] if report["what"] == "stage2" else []
    lines.append(
        f"  predicted  {total:.4g} s, {floor['ratio']:.2f} x the floor"
        f" (compute {floor['compute']:.4g} s, bytes {floor['bytes']:.4g} s)"
    )
    lines += [f"    {seconds:9.4f} s  {seconds / total:4.0%}  {name}" for name, seconds in report["split"].items()]
    lines.append("  slowest operations, predicted")
    lines += [f"    {seconds:9.4f} s  {name}" for name, seconds in report["slowest"].items()]
    for name, kernel in report["kernels"].items():
        if not kernel["useful_scores_per_cycle"]:  # not attention; if it takes long, it is among the slowest operations
            continue
        lines.append(f"  kernel     {name}: {kernel['useful_scores_per_cycle']:.0f} useful scores per cycle, predicted")
        lines.append("    units    " + ", ".join(f"{unit} {share:.0%}" for unit, share in kernel["units"].items()))
    return lines


def caution(tables: Path = TABLES) -> str:
    """Return how predictions compare with measurements, from the rows that benchmarks.reproduce_tables has saved."""
    rows = json.loads(tables.read_text()).values() if tables.exists() else ()
    ratios = [row["ratio"] for row in rows]
    if not ratios:
        return (
            "the following is predicted, not measured "
            "(python -m benchmarks.reproduce_tables compares predictions with measurements)"
        )
    return (
        f"such predictions were {min(ratios):.2f} to {max(ratios):.2f} x what the original project measured "
        "(python -m benchmarks.reproduce_tables)"
    )
