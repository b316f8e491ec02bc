"""Say how a fleet is going: a line of progress, a line for each video in fleet_report.jsonl, a table at the end."""

import collections
import json
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from cogvideox.cli import terminal
from cogvideox.errors import refusal
from cogvideox.files.writing import now

FILE = "fleet_report.jsonl"
RECENT = 50  # videos that the rate is that of


class Report:
    """What is said of a run, to people and in the file of `output_dir`; a context manager that ends its line.

    Args:
        output_dir: the folder of all videos.
        prompts: all of them.
        quiet: whether nothing is printed but warnings.
    """

    def __init__(self, output_dir: Path, prompts: Collection, quiet: bool):
        self._file, self._quiet, self._writes = output_dir / FILE, quiet, True
        self._began = self._shown = time.monotonic()
        self._ends: collections.deque[float] = collections.deque(maxlen=RECENT)
        self._of_node: collections.Counter[str] = collections.Counter()
        self._seconds: collections.Counter[str] = collections.Counter()
        self._total = len(prompts)
        self._bar: tqdm | None = None  # from the first progress on

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def say(self, line: str) -> None:
        """Print a line above the progress."""
        if not self._quiet:
            with tqdm.external_write_mode():
                print(terminal.fitted(line), flush=True)

    def warn(self, line: str) -> None:
        """Print a warning."""
        with tqdm.external_write_mode():
            print(terminal.fitted(f"  WARNING: {line}"), flush=True)

    def progress(self, made: int, running: int, failed: int, left: int, stages: Collection[str], now: bool) -> None:
        """Show how many prompts are made, under way and failed, how many are made an hour, and the time left.

        Args:
            made, running, failed: how many prompts are made, under way, and failed for good.
            left: how many are neither made nor failed.
            stages: those in which some are.
            now: whether it is shown, at any rate, where stderr is no terminal and has a line now and then.
        """
        told = f"{running} under way" + (f" in {' and '.join(sorted(stages))}" if stages else "") + f", {failed} failed"
        if rate := self.rate():
            told += f", {rate:.3g} an hour, {tqdm.format_interval(3600 * left / rate)} left"
        if self._bar is None:
            options = terminal.bar_options() | {"ncols": None, "bar_format": "{desc}: {n_fmt} of {total_fmt}{postfix}"}
            self._bar = tqdm(total=self._total, desc="  prompts made", disable=self._quiet, delay=1e-9, **options)
        self._bar.n = made
        self._bar.set_postfix_str(told, refresh=False)
        if now or sys.stderr.isatty() or time.monotonic() - self._shown >= terminal.LINE_SECONDS:
            self._shown = time.monotonic()
            self._bar.refresh()

    def rate(self) -> float | None:
        """Return how many prompts are made in an hour, by the last of them; None before there are two."""
        since = self._ends[0] if len(self._ends) == RECENT else self._began
        elapsed = time.monotonic() - since
        return 3600 * len(self._ends) / elapsed if len(self._ends) > 1 else None

    def ended(
        self, folders: Sequence[Path], prompt: str, node: str, seconds: Mapping[str, float], **fields: object
    ) -> None:
        """Write a line for each of a prompt's videos: made, with the seconds that it took, or failed, with the error.

        Args:
            folders: of the videos.
            prompt: its text.
            node: the machine that made them, or tried it last.
            seconds: of each stage, the prompt's share of those that were run with it.
            fields: what else there is to say, such as tries and error.
        """
        if not fields.get("error"):
            self._ends.append(time.monotonic())
            self._of_node[node] += 1
            self._seconds.update(seconds)
        for folder in folders:
            of_video = {name: round(value / len(folders), 3) for name, value in seconds.items()}
            about = {"folder": str(folder), "prompt": prompt, "node": node, "seconds": of_video}
            self._write(json.dumps(about | fields | {"time": now()}, ensure_ascii=False))

    def _write(self, line: str) -> None:
        """Append a line to the file; if that fails, say so once, for the videos are what counts."""
        if not self._writes:
            return
        try:
            with open(self._file, "a", encoding="utf-8") as file:
                file.write(f"{line}\n")
        except OSError as error:
            self._writes = False
            self.warn(f"cannot write {self._file}: {refusal(error)}; the report ends here")

    def table(self, made: Collection, failed: Collection) -> None:
        """Print what was made, by which machines, and how long it took."""
        elapsed = time.monotonic() - self._began
        count = self._of_node.total()
        of_them = f", {count} of them now" if count < len(made) else ""
        rows = [["prompts made", f"{len(made)} of {self._total}{of_them}"]]
        rows += [["failed", str(len(failed))]] if failed else []
        rows.append(["time", f"{elapsed:.1f} s" + (f", {3600 * count / elapsed:.3g} an hour" if count else "")])
        rows += [[f"{stage} a prompt", f"{total / count:.2f} s"] for stage, total in sorted(self._seconds.items())]
        rows += [[f"made on {node}", str(n)] for node, n in self._of_node.most_common()]
        self.say("\n".join(["", *terminal.table(rows)]))
