"""Show the seconds of one run, or of two runs side by side."""

import statistics
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from cogvideox.files.timings import read_timings


def lines(folder: Path, other: Path | None = None) -> Iterator[str]:
    """Yield timings.json of a folder as lines for people; with another folder's beside it, and the ratio of the two."""
    runs = []
    for path in filter(None, (folder, other)):
        try:
            runs.append(read_timings(path))
        except ValueError as error:
            yield f"WARNING: {error}"
            runs.append({})
    stages = sorted(set().union(*runs))
    if stages:
        yield f"seconds of {folder}" + (
            f" and of {other}, and their ratio; they never count as a difference" if other else ""
        )
    for stage in stages:
        entries = [run[stage] for run in runs if stage in run]
        yield f"  {stage}: {_both(entry.get('devices') or 'the host' for entry in entries)}"
        found = [_seconds(run[stage]) if stage in run else {} for run in runs]
        for name in dict.fromkeys(name for seconds in found for name in seconds):
            values = [seconds[name] for seconds in found if name in seconds]
            columns = [format(seconds[name], ".3f") if name in seconds else "-" for seconds in found]
            if len(values) == 2 and values[1]:
                columns.append(f"{values[0] / values[1]:.2f}")
            yield f"    {name:<24}" + "".join(f"{column:>12}" for column in columns)


def _both(values: Iterable[object]) -> str:
    """Return two values, or one if they are equal, as text."""
    return " | ".join(dict.fromkeys(map(str, values)))


def _seconds(entry: Mapping) -> dict[str, float]:
    """Return the seconds of each phase and part of a stage, and of its steps, without those under the profiler."""
    profiled = entry.get("profiled", [])
    steps = [seconds for i, seconds in enumerate(entry["steps"], 1) if i not in profiled] or entry["steps"]
    of_steps = {"a step, median": statistics.median(steps), "a step, slowest": max(steps)} if steps else {}
    parts, phases = entry.get("parts", {}), dict[str, float]()
    for phase, seconds in entry["seconds"].items():
        phases |= {phase: seconds} | {f"{phase}: {part}": of_part for part, of_part in parts.get(phase, {}).items()}
    return phases | of_steps
