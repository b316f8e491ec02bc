"""Keep the state of stage 2 on the disk while it runs, so that the same command goes on from there."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from cogvideox.cli.report import Report
from cogvideox.errors import UserError, first_line
from cogvideox.files import writing

if TYPE_CHECKING:
    import numpy as np

    from cogvideox.models.transformer.denoising import Denoising
    from cogvideox.models.transformer.step import State


FILE = "stage2_state.safetensors"
SHARE = 0.02  # of a run's time that goes into keeping its state, if nothing else is asked for


class StateFile:
    """The file that holds the state of an unfinished run of stage 2.

    Args:
        folder: of the file.
        decides: everything that decides the result of the run, by name; another run does not go on from the file.
        every: after how many steps the state is kept; 0 for never, None for as often as SHARE allows.
        report: of the stage.
    """

    def __init__(self, folder: Path, decides: Mapping[str, object], every: int | None, report: Report):
        self.path = folder / FILE
        self._decides = {name: str(value) for name, value in decides.items()}
        self._every, self._report = every, report
        self._written, self._cost = time.perf_counter(), 0.0

    def load(self, restart: bool) -> "dict[str, np.ndarray] | None":
        """Return what `keep` has written last; None if there is no unfinished run, or if it is to start over.

        Raises:
            UserError: the file is of a run that something else decides, or it cannot be read.
        """
        if restart:
            with writing.write_errors(self.path):
                self.path.unlink(missing_ok=True)
        if not self.path.exists():
            return None
        remedy = "--restart starts over, without the steps that are done"
        try:
            with safe_open(self.path, framework="np") as file:
                decided = json.loads((file.metadata() or {})["decides"])
                for name in sorted(decided.keys() | self._decides):
                    ours, theirs = self._decides.get(name), decided.get(name)
                    if ours != theirs:
                        raise UserError(
                            f"{self.path} is of an unfinished run with {name} = {theirs}, this one has {ours}; {remedy}"
                        )
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
        except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{self.path} cannot be read ({first_line(error)}); {remedy}") from error

    def keep(self, denoising: "Denoising", state: "State", now: bool = False) -> None:
        """Write the state after the last step if it is time, or if it must be now; then the disk has it on return."""
        start = time.perf_counter()
        if now:
            due = self._every != 0
        elif self._every is None:
            due = start - self._written >= self._cost / SHARE
        else:
            due = self._every > 0 and denoising.done % self._every == 0
        if not due:
            return
        from safetensors.numpy import save_file

        with self._report.aside("keeping the state"), writing.replacing(self.path) as temporary:
            save_file(denoising.saved(state), temporary, metadata={"decides": json.dumps(self._decides)})
            if now:
                with open(temporary, "rb") as file:
                    os.fsync(file)
        self._written = time.perf_counter()
        self._cost = self._written - start

    def farewell(self, done: int, steps: int) -> str:
        """Say at the end of an interrupted run what is left of it."""
        kept = "; the same command goes on from there, --restart starts over" if self.path.exists() else ""
        return f"interrupted after step {done} of {steps}{kept}"

    def remove(self) -> None:
        """Remove the file: the run is complete."""
        self.path.unlink(missing_ok=True)
