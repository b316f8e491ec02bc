"""Compile a stage's programs while it loads the weights, and keep them for the next start.

What is kept is in a folder of jax's persistent compilation cache, which is on by default here. Importing this module
loads no jax.
"""

import argparse
import contextlib
import glob
import os
import re
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogvideox.cli.program import in_background
from cogvideox.cli.report import Report
from cogvideox.errors import UserError
from cogvideox.files import writing
from cogvideox.run import warm

if TYPE_CHECKING:
    import jax

    from cogvideox.models.transformer.plan import DenoisingPlan
    from cogvideox.models.vae.plan import DecodingPlan

NO_CACHE = Path("none")

# Events of jax.monitoring. The first one is recorded for each program, also if it is found in the cache.
OBTAINED = "/jax/core/compile/backend_compile_duration"
FOUND = "/jax/compilation_cache/cache_hits"

# What jax warns of when it cannot use the file of a program.
TROUBLE = re.compile(
    r"Error (?P<doing>reading|writing) persistent compilation cache entry for '(?P<name>.*?)': (?P<why>.*)", re.S
)


def default_folder() -> Path | None:
    """Return the folder in the user's cache where compiled programs are kept; None for a user without a home."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    with contextlib.suppress(RuntimeError):
        return (Path(home) if os.path.isabs(home) else Path("~/.cache").expanduser()) / "cogvideox-tpu"
    return None


def address_of(folder: Path) -> str:
    """Return a folder as text, with both slashes of an address such as gs://bucket/a, of which a path keeps one."""
    return re.sub(r"^(\w\w+):/(?!/)", r"\1://", str(folder))


class Cache:
    """jax's persistent compilation cache, switched on for this process. A fault of it is a warning, never an end.

    In the body of a `with` statement `report` counts all "programs" of this process, and how many of them were "loaded"
    from the cache instead of compiled.

    Args:
        chosen: the folder, or NO_CACHE; None for that of jax's own settings, or else for the default one.
        report: gets the warnings.

    Attributes:
        folder: where the programs are; None if the cache is off.
        keeps: whether new programs can be kept there, as far as is known.
    """

    def __init__(self, chosen: Path | None, report: Report):
        import jax
        from jax.experimental.compilation_cache import compilation_cache

        self._report, self._here, self._started = report, threading.local(), time.time()
        if chosen == NO_CACHE:
            jax.config.update("jax_enable_compilation_cache", False)
        own = jax.config.values["jax_compilation_cache_dir"]  # from JAX_COMPILATION_CACHE_DIR
        self.folder = None
        if jax.config.values["jax_enable_compilation_cache"]:
            self.folder = chosen or (Path(own) if own else default_folder())
            if self.folder is None:
                report.warn(
                    "compiled programs are not kept: there is no home folder; --compilation_cache names another"
                )
        self.keeps = self.folder is not None and self._prepare(self.folder)
        jax.config.update("jax_compilation_cache_dir", address_of(self.folder) if self.folder else None)
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        compilation_cache.reset_cache()  # else jax stays with the folder of this process' first program

    def __enter__(self) -> "Cache":
        import jax

        self._filters, self._show_warning = warnings.filters[:], warnings.showwarning
        warnings.showwarning = self._take_warning
        warnings.filterwarnings("always", message="Error (reading|writing) persistent compilation cache entry")
        jax.monitoring.register_event_listener(self._count_found)
        jax.monitoring.register_event_duration_secs_listener(self._count_obtained)
        return self

    def __exit__(self, *_: object) -> None:
        """Listen no longer; jax goes on to keep programs."""
        import jax

        warnings.showwarning = self._show_warning
        warnings.filters[:] = self._filters  # type: ignore[index]
        jax.monitoring.unregister_event_listener(self._count_found)
        jax.monitoring.unregister_event_duration_listener(self._count_obtained)

    def _prepare(self, folder: Path) -> bool:
        """Make the folder, and return whether files can be written there; without a folder the cache is off."""
        if "://" in address_of(folder):  # cloud storage, which jax can use
            return True
        try:
            writing.check_writable(folder / "program")
        except UserError as error:
            self._report.warn(f"compiled programs are not kept: {error}")
            if not folder.is_dir():
                self.folder = None
            return False
        return True

    @property
    def found_here(self) -> int:
        """How many programs this thread has found in the cache."""
        return getattr(self._here, "found", 0)

    def _count_found(self, event: str, **_: Any) -> None:
        """Count a program that was found."""
        if event == FOUND:
            self._here.found = self.found_here + 1
            self._report.counts["loaded"] += 1

    def _count_obtained(self, event: str, duration_secs: float, **_: Any) -> None:
        """Count a program that was compiled or found."""
        if event == OBTAINED:
            self._report.counts["programs"] += 1

    def _take_warning(
        self, message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        """Say once what goes wrong with the cache, in one line, and remove the file; pass other warnings on."""
        trouble = TROUBLE.match(str(message))
        if trouble is None or self.folder is None:
            self._show_warning(message, category, filename, lineno, file, line)
            return
        is_new = trouble["doing"] == "writing"
        self._forget(trouble["name"], self._started if is_new else 0.0)
        if self.keeps:
            self.keeps = False
            done = "kept" if is_new else "read"
            why = trouble["why"].strip().splitlines()[0]
            self._report.warn(f"a compiled program cannot be {done} in {self.folder}: {why}; it will be compiled again")

    def _forget(self, name: str, since: float) -> None:
        """Remove the files of programs of this name that are not older than `since`: one is incomplete.

        jax would neither read nor replace it.
        """
        for file in Path(self.folder or "").glob(f"{glob.escape(name)}-*-cache"):
            with contextlib.suppress(OSError):
                if file.stat().st_mtime >= since:
                    file.unlink()


class Compiling:
    """Obtains programs, compiled or from --executable, in threads, while the stage loads its weights.

    The threads do not keep the process from ending, because a compilation cannot be interrupted; see `program.run`.

    Args:
        arguments: with the options of `add_compilation_options`.
        what: the programs' name, such as "denoising step".
        plan: whose devices and options the programs have.
        traced: the programs.
        cache: where compiled programs are kept.
        report: says what happens.

    Raises:
        UserError: --executable is no file of compiled programs.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        what: str,
        plan: "DenoisingPlan | DecodingPlan",
        traced: "Sequence[jax.stages.Traced]",
        cache: Cache,
        report: Report,
    ):
        self._what, self._cache, self._report = what, cache, report
        self._advice = "make a smaller video" if plan.batch == 1 else "make fewer --videos_at_once"
        self._start = self._end = time.perf_counter()
        self._found: list[bool] | None = None  # whether each program was in the cache; None if this process has kept it
        self._programs = self._from_file(arguments.executable, plan, traced) if arguments.executable else None
        self._futures = [] if self._programs else warm.kept(f"compiled {what}", [*traced], lambda: self._begin(traced))

    def _from_file(
        self, path: Path, plan: "DenoisingPlan | DecodingPlan", traced: "Sequence[jax.stages.Traced]"
    ) -> "list[jax.stages.Compiled] | None":
        """Return the programs in a file, or None, with a warning, if they are other ones than these."""
        from cogvideox.run import executable

        try:
            wanted = executable.description(self._what, plan.devices, traced, plan.program_options)
            programs = executable.load(path, wanted, plan.devices, traced)
        except executable.Mismatch as mismatch:
            self._report.warn(f"{path} holds other programs, compiling instead: {mismatch}")
            return None
        self._report.say(f"loaded the {self._what} from {path}")
        return programs

    def _begin(self, traced: "Sequence[jax.stages.Traced]") -> list[Future]:
        """Begin to compile."""
        self._found = []
        return [in_background(self._compile, program) for program in traced]

    def _compile(self, program: "jax.stages.Traced") -> "jax.stages.Compiled":
        """Compile a program, or find it in the cache."""
        found = self._cache.found_here
        compiled = program.lower().compile()
        if self._found is not None:
            self._found.append(self._cache.found_here > found)
        self._end = time.perf_counter()
        return compiled

    def wait(self) -> "tuple[list[jax.stages.Compiled], str]":
        """Return the programs as soon as they are there, and a note for the stage's table on what was done before.

        Raises:
            UserError: the programs do not fit the memory of a chip.
        """
        if self._programs is not None:
            return self._programs, ""
        waiting = time.perf_counter()
        with memory_errors(self._what, self._advice):
            programs = [future.result() for future in self._futures]
        if self._found is None:
            self._report.say(f"the compiled {self._what} is that of the run before")
            return programs, ""
        seconds, before = self._end - self._start, min(self._end, waiting) - self._start
        loaded = sum(self._found)
        self._report.compiled(program=self._what, seconds=seconds, before=before, loaded=loaded, of=len(programs))
        kept = f", kept in {self._cache.folder} for the next start" if self._cache.keeps else ""
        if loaded == len(programs):
            self._report.say(f"loaded the compiled {self._what} in {seconds:.2f} s from {self._cache.folder}")
        else:
            self._report.say(f"compiled the {self._what} in {seconds:.2f} s{kept}")
        return programs, f", after {before:.2f} s beside the load"


@contextlib.contextmanager
def memory_errors(what: str, advice: str) -> Iterator[None]:
    """Turn the compiler's error that `what` does not fit a chip into a UserError; `advice` is what else would help."""
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        shortage = memory_shortage(str(error))
        if kernel := kernel_shortage(str(error)):
            raise UserError(f"the {what}: {kernel}") from None
        if shortage is None:
            raise
        needed, available = shortage
        raise UserError(
            f"the {what} needs {needed:.1f} GiB of a chip's {available:.2f} GiB of memory; "
            f"use a slice of more chips, or {advice}"
        ) from None


def kernel_shortage(message: str) -> str | None:
    """Return in words that a kernel needs more VMEM than a core has, or None if the compiler's error is another one."""
    match = re.search(r"memory space vmem\. Used ([\d.]+)M of ([\d.]+)M vmem", message)
    if not match:
        return None
    needed, available = match.groups()
    return f"a kernel needs {needed} MiB of VMEM, and a core of this TPU has {available} MiB; use --attention splash"


def memory_shortage(message: str) -> tuple[float, float] | None:
    """Return the GiB that a program needs and that a chip has, or None if the compiler's error is not about memory."""
    match = re.search(r"Used ([\d.]+)G of ([\d.]+)G hbm", message) or re.search(
        r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", message
    )
    return (float(match[1]), float(match[2])) if match else None
