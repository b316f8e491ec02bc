"""Checks and measurements: run one after another, as long as there is time, and kept after each."""

import dataclasses
import datetime
import gc
import itertools
import json
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.page import as_markdown, text_of
from cogvideox.cli.report import Report
from cogvideox.errors import UserError
from cogvideox.files import writing

if TYPE_CHECKING:
    import numpy as np


@dataclasses.dataclass(frozen=True)
class Entry:
    """A check or a measurement.

    Attributes:
        name: of the entry in all reports.
        kind: "check" or "row".
        run: does it, and returns what `judged` or `measured` returns.
        minutes: what it takes on a TPU, mostly compilation, by that on two cores; with less left it does not start.
        quick: whether --quick has it.
    """

    name: str
    kind: str
    run: Callable[[], dict]
    minutes: float
    quick: bool = False


NOISE_FACTOR = 2.0  # how much further from float32 a device may be in bfloat16 than the reference in bfloat16


def judged(figure: float, tolerance: float, note: str, unmet: str | None = None) -> dict:
    """Return the result of a check: it fails if the figure is above the tolerance or no number, or for `unmet`."""
    passed = figure <= tolerance and unmet is None
    found = {"status": "passed" if passed else "failed", "figure": figure if math.isfinite(figure) else None}
    return found | {"tolerance": tolerance, "note": f"{unmet}; {note}" if unmet else note}


def relative_error(values: "np.ndarray", expected: "np.ndarray") -> float:
    """Return the norm of the difference by the norm of what is expected."""
    import numpy as np

    values, expected = (np.asarray(x, np.float64) for x in (values, expected))
    return float(np.linalg.norm(values - expected) / np.linalg.norm(expected))


def measured(seconds: Sequence[float], compile_seconds: float | None, memory: Mapping, expected: Mapping) -> dict:
    """Return the result of a measurement: the median with its spread, beside what was expected."""
    return {
        "status": "measured",
        "seconds": statistics.median(seconds),
        "least": min(seconds),
        "most": max(seconds),
        "repetitions": len(seconds),
        "compile_seconds": compile_seconds,
        **memory,
        **expected,
    }


def durations(done: Iterable[Any]) -> list[float]:
    """Return the seconds that an iterator takes for each item, except the first, which warms up."""
    times = [time.perf_counter() for _ in itertools.chain([None], done)]
    return [after - before for before, after in itertools.pairwise(times)][1:]


# --- Results -----------------------------------------------------------------------------------------------------

STARTED, NO_TIME, NOT_QUICK = "started", "left out: no time", "left out: --quick"
FAILURES = ("failed", "error")


class Results:
    """What is known so far: a JSON file and a page in a folder, both replaced after every entry.

    Args:
        folder: where they are.
        name: of both files.
        made_with: devices, versions and sources, which the results that are there must have.
        again: begin anew.

    Raises:
        UserError: the folder has results of something else.
    """

    def __init__(self, folder: Path, name: str, made_with: Mapping, again: bool):
        self.json, self.markdown = folder / f"{name}.json", folder / f"{name}.md"
        self._content: dict[str, Any] = {"begun": now(), "made_with": dict(made_with), "entries": {}}
        if self.json.exists() and not again:
            self._content = self._read(made_with)
        self.entries: dict[str, dict] = self._content["entries"]

    def _read(self, made_with: Mapping) -> dict:
        """Return what the file holds."""
        mend = "choose another --output, or give --again to replace it"
        try:
            content = json.loads(self.json.read_text(encoding="utf-8"))
            before = content["made_with"]
            entries = {name: dict(found, status=str(found["status"])) for name, found in content["entries"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{self.json} holds no results of this program; {mend}") from None
        for name, value in made_with.items():
            if before.get(name) != value:
                raise UserError(f"{self.json} has results of other {name}; {mend}")
        return content | {"entries": entries}

    def is_done(self, name: str) -> bool:
        """Return whether an entry needs no other run."""
        return self.entries.get(name, {}).get("status", NO_TIME) not in (STARTED, NO_TIME, NOT_QUICK)

    def keep(self, name: str, kind: str, found: Mapping) -> None:
        """Keep what an entry found, and write both files."""
        self.entries[name] = {"kind": kind, **found}
        text = json.dumps(self._content | {"updated": now()}, indent=1)
        for path, content in ((self.json, f"{text}\n"), (self.markdown, as_markdown(self._content))):
            with writing.replacing(path) as temporary:
                Path(temporary).write_text(content, encoding="utf-8")


def now() -> str:
    """Return date and time, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


# --- The run -----------------------------------------------------------------------------------------------------


OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "CUDA out of memory")  # in the errors of jax and torch


def attempt(entry: Entry) -> dict:
    """Run an entry, and return what it found; an error is a result too, so that the others run."""
    from cogvideox.run.compilation import memory_shortage

    start = time.perf_counter()
    try:
        found = entry.run()
    except Exception as error:
        message = str(error).strip() or type(error).__name__
        lack = memory_shortage(message) or any(words in message for words in OUT_OF_MEMORY)
        status = "out of memory" if lack and entry.kind == "row" else "error"
        first = f"{type(error).__name__}: {message.splitlines()[0]}"
        found = {"status": status, "message": first.replace("|", "/"), "traceback": traceback.format_exc()}
    gc.collect()
    return found | {"wall_seconds": round(time.perf_counter() - start, 3), "finished": now()}


def run_entries(
    todo: Sequence[Entry], results: Results, quick: bool, seconds: float, pace: float, told: Report
) -> None:
    """Run the entries that are not done, as long as there is time for them; for `pace` see `Scale`."""
    end = time.perf_counter() + seconds
    cut_off = {entry.name for entry in todo if results.entries.get(entry.name, {}).get("status") == STARTED}
    with told.progress("on this device", "entry", len(todo)) as bar:
        for entry in sorted(todo, key=lambda entry: entry.name in cut_off):  # one may have ended the process
            if results.is_done(entry.name):
                told.say(f"{entry.name}: done before")
            elif quick and not entry.quick:
                results.keep(entry.name, entry.kind, {"status": NOT_QUICK})
            elif time.perf_counter() + 60 * pace * entry.minutes > end:
                results.keep(entry.name, entry.kind, {"status": NO_TIME})
            else:
                told.say(f"{entry.name} ...")
                results.keep(entry.name, entry.kind, {"status": STARTED})
                results.keep(entry.name, entry.kind, attempt(entry))
                found = results.entries[entry.name]
                (told.warn if found["status"] in FAILURES else told.say)(f"{entry.name}: {text_of(found)}")
            bar.update()
