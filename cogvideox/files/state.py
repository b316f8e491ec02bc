"""Keep the state of stage 2 on the disk while it runs, so that the same command goes on from there."""

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from cogvideox.errors import UserError, reason, shortened
from cogvideox.files import writing
from cogvideox.files.names import STATE
from cogvideox.files.provenance import differences

SHARE = 0.02  # of a run's time that goes into keeping its state, if nothing else is asked for


class StateFile:
    """The file that holds the state of an unfinished run of stage 2.

    Args:
        folder: of the file.
        fingerprint: everything that the result of the run depends on, by name; another run does not go on from the
            file.
        every: after how many steps the state is kept; 0 for never, None for as often as SHARE allows.
        about: other metadata of the file.
    """

    def __init__(
        self, folder: Path, fingerprint: Mapping[str, object], every: int | None, about: Mapping[str, str] | None = None
    ):
        self.path, self._about = folder / STATE, dict(about or {})
        self._fingerprint = {name: str(value) for name, value in fingerprint.items()}
        self._every = every
        self._written, self._cost = time.perf_counter(), 0.0

    def load(self, restart: bool) -> dict[str, np.ndarray] | None:
        """Return what `keep` has written last; None if there is no unfinished run, or if it is to start over.

        Raises:
            UserError: the file is of a run with another fingerprint, or it cannot be read.
        """
        if restart:
            with writing.write_errors(self.path):
                self.path.unlink(missing_ok=True)
        if not self.path.exists():
            return None
        remedy = "--restart starts over, without the steps that are done"
        try:
            with safe_open(self.path, framework="np") as file:
                found = json.loads(fingerprint_of(file.metadata()) or "")
                for name in differences(found, self._fingerprint):
                    ours, theirs = self._fingerprint.get(name), found.get(name)
                    which = f"{name} = {shortened(str(theirs))}, this one has {shortened(str(ours))}"
                    if all(value and len(value) == 64 for value in (ours, theirs)):  # digests
                        which = f"another {name} than it is now"
                    raise UserError(f"{self.path} is of an unfinished run with {which}; {remedy}")
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
        except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{self.path} cannot be read ({reason(error)}); {remedy}") from error

    def is_due(self, done: int, now: bool) -> bool:
        """Return whether the state after `done` steps is to be kept, because it is time or because it must be now."""
        if now:
            return self._every != 0
        if self._every is None:
            return time.perf_counter() - self._written >= self._cost / SHARE
        return self._every > 0 and done % self._every == 0

    def keep(self, arrays: Mapping[str, np.ndarray], now: bool) -> None:
        """Write the state; if it must be now, the disk has it on return."""
        from safetensors.numpy import save_file

        start = time.perf_counter()
        with writing.replacing(self.path) as temporary:
            metadata = self._about | {"fingerprint": json.dumps(self._fingerprint)}
            save_file(dict(arrays), temporary, metadata=metadata)
            if now:
                writing.to_disk(temporary)
        self._written = time.perf_counter()
        self._cost = self._written - start

    def interruption_message(self, done: int, steps: int) -> str:
        """Say at the end of an interrupted run what is left of it."""
        kept = "; the same command goes on from there, --restart starts over" if self.path.exists() else ""
        return f"interrupted after step {done} of {steps}{kept}"

    def remove(self) -> None:
        """Remove the file: the run is complete."""
        self.path.unlink(missing_ok=True)


def progress(path: Path) -> str:
    """Return how far the unfinished run of a state file is, in words; nothing if it cannot be read."""
    with contextlib.suppress(OSError, SafetensorError, ValueError, KeyError), safe_open(path, framework="np") as file:
        found = json.loads(fingerprint_of(file.metadata()) or "{}")
        steps = found.get("steps", found["num_inference_steps"])  # the first where a given video leaves out some
        return f"{file.get_tensor('done')} of {steps} steps are done"
    return ""


def fingerprint_of(metadata: Mapping[str, str] | None) -> str | None:
    """Return the fingerprint in a file's metadata, which files of earlier versions call `decides`; None without one."""
    found = metadata or {}
    return found.get("fingerprint", found.get("decides"))
