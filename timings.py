"""The seconds that the stages took: timings.json beside their outputs, so that two runs can be compared.

The file holds one entry for each stage, which a rerun of the stage replaces; see docs/files.md.
"""

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import writing
from console import UserError

FILE = "timings.json"


def read(folder: Path) -> dict[str, dict]:
    """Return the entries of timings.json in `folder` by stage; none where there is no such file.

    Raises:
        ValueError: the file is not one that `write` wrote; the message says why.
    """
    try:
        entries = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise ValueError(f"{folder / FILE} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{folder / FILE} is not valid JSON ({error})") from error
    if not isinstance(entries, dict) or not all(map(_is_entry, entries.values())):
        raise ValueError(f"{folder / FILE} holds something other than the timings of stages")
    return entries


def _is_entry(entry: Any) -> bool:
    """Return whether a part of the file has the form of an entry, as far as this module depends on it."""
    forms = {"seconds": dict, "steps": list, "versions": dict}
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name), form) for name, form in forms.items()):
        return False
    return all(isinstance(seconds, (int, float)) for seconds in [*entry["seconds"].values(), *entry["steps"]])


def write(folder: Path, stage: str, entry: Mapping) -> str | None:
    """Put the entry of a stage into timings.json in `folder`; return a warning if something is wrong with the file."""
    warning = None
    try:
        entries = read(folder)
    except ValueError as error:
        warning, entries = f"{error}; it was replaced", {}
    try:
        with writing.replacing(folder / FILE) as temporary:
            text = json.dumps(dict(sorted((entries | {stage: entry}).items())), indent=1, default=str)
            Path(temporary).write_text(text + "\n", encoding="utf-8")
    except UserError as error:
        return str(error)
    return warning


def lines(folder: Path, other: Path | None = None) -> Iterator[str]:
    """Yield timings.json of a folder as lines for people; with another folder's beside it, and the ratio of the two."""
    runs = []
    for path in filter(None, (folder, other)):
        try:
            runs.append(read(path))
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
        yield from _versions(entries)
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


def _versions(entries: Sequence[Mapping]) -> Iterator[str]:
    """Yield a line for each library whose version differs in two runs."""
    versions = [entry["versions"] for entry in entries]
    for name in sorted(set().union(*versions)):
        if len({found.get(name) for found in versions}) > 1:
            yield f"    {name}: {_both(found.get(name) for found in versions)}"


def _seconds(entry: Mapping) -> dict[str, float]:
    """Return the seconds of each phase of a stage, and of its steps, without those that the profiler slowed down."""
    profiled = entry.get("profiled", [])
    steps = [seconds for i, seconds in enumerate(entry["steps"], 1) if i not in profiled] or entry["steps"]
    of_steps = {"a step, median": statistics.median(steps), "a step, slowest": max(steps)} if steps else {}
    return entry["seconds"] | of_steps
