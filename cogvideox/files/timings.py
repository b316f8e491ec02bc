"""The seconds that the stages took: timings.json beside their outputs, so that two runs can be compared.

The file holds one entry for each stage, which a rerun of the stage replaces; see docs/files.md.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cogvideox.errors import UserError
from cogvideox.files import writing
from cogvideox.files.names import TIMINGS


def read_timings(folder: Path) -> dict[str, dict]:
    """Return the entries of timings.json in `folder` by stage; none where there is no such file.

    Raises:
        ValueError: the file is not one that `write_timings` wrote; the message says why.
    """
    try:
        entries = json.loads((folder / TIMINGS).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise ValueError(f"{folder / TIMINGS} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{folder / TIMINGS} is not valid JSON ({error})") from error
    if not isinstance(entries, dict) or not all(map(_is_entry, entries.values())):
        raise ValueError(f"{folder / TIMINGS} holds something other than the timings of stages")
    return entries


def _is_entry(entry: Any) -> bool:
    """Return whether a part of the file has the form of an entry, as far as this module depends on it."""
    forms = {"seconds": dict, "steps": list, "versions": dict}
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name), form) for name, form in forms.items()):
        return False
    parts = entry.get("parts", {})  # which earlier versions did not write
    if not isinstance(parts, dict) or not all(isinstance(of_phase, dict) for of_phase in parts.values()):
        return False
    of_parts = [seconds for of_phase in parts.values() for seconds in of_phase.values()]
    found = [*entry["seconds"].values(), *of_parts, *entry["steps"]]
    return all(isinstance(seconds, (int, float)) for seconds in found)


def write_timings(folder: Path, stage: str, entry: Mapping) -> str | None:
    """Put the entry of a stage into timings.json in `folder`; return a warning if something is wrong with the file."""
    warning = None
    try:
        entries = read_timings(folder)
    except ValueError as error:
        warning, entries = f"{error}; it was replaced", {}
    try:
        with writing.replacing(folder / TIMINGS) as temporary:
            text = json.dumps(dict(sorted((entries | {stage: entry}).items())), indent=1, default=str)
            Path(temporary).write_text(text + "\n", encoding="utf-8")
    except UserError as error:
        return str(error)
    return warning
