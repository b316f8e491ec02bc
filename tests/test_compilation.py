"""Compiled programs are kept for the next start, whatever happens to the folder where they are."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import pytest

from cogvideox.cli.report import Report
from cogvideox.run import compilation
from tests.helpers import ROOT, SIZE, STAGE2, STAGE3, STAGE3_FLAX, check, needs_libtpu, run_command, stage_command
from tests.in_process import jax_options_kept, limited_files, run_here

pytestmark = pytest.mark.slow

FULL = "cannot be kept in"  # what the warnings say
BROKEN = "cannot be read in"
NO_FOLDER = "compiled programs are not kept"


def start(outputs: Path, cache: object, script: str = STAGE2, **options) -> tuple[str, int, int]:
    """Run a stage that has compiled nothing; return what it printed, and how many programs it compiled and loaded.

    With `options` of `run_command` it has a process of its own.
    """
    log = outputs / "log.jsonl"
    log.unlink(missing_ok=True)
    size = SIZE if script == STAGE2 else ()
    arguments = ("--input_dir", outputs, *size, "--compilation_cache", cache, "--log_json", log)
    if options:
        process = run_command([*options.pop("prefix", ()), *stage_command(script, *arguments)], **options)
    else:
        jax.clear_caches()
        process = run_here(script, *arguments, folder=outputs)
    return check(process).stdout, *counted(log)


def events(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def counted(log: Path) -> tuple[int, int]:
    """Return how many programs a stage compiled and loaded, by its own log."""
    counts: Counter[str] = sum((Counter(event["counts"]) for event in events(log) if "counts" in event), Counter())
    return counts["programs"] - counts["loaded"], counts["loaded"]


@pytest.mark.parametrize("script", [STAGE2, STAGE3, STAGE3_FLAX])
def test_the_second_start_compiles_nothing(script, processes_folder, processes, tmp_path):
    """Counted by jax's own events, in a process with another working directory and another output folder."""
    cache = processes_folder / "cache" / script
    compiled, loaded = counted(processes_folder / f"{script}.jsonl")
    printed = processes[script].stdout
    assert compiled >= (1 if script == STAGE2 else 2) and f"kept in {cache} for the next start" in printed, printed
    first = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    elsewhere = Path(shutil.copytree(processes_folder / "stage_outputs", tmp_path / "elsewhere"))
    printed, compiled, loaded_again = start(elsewhere, cache, script, cwd=elsewhere)
    assert (compiled, loaded_again - loaded) == (0, len(first)), f"{compiled} were compiled\n{printed}"
    assert "loaded the compiled " in printed and f" from {cache}\n" in printed, printed
    assert {file: file.stat().st_mtime_ns for file in cache.iterdir()} == first


def test_no_first_run_of_a_program_is_timed(processes_folder):
    """All programs of a stage are obtained before its run, and the small ones beside them too."""
    for script, phase in ((STAGE2, "run"), (STAGE3, "run, with encoding")):
        told = events(processes_folder / f"{script}.jsonl")
        counts = {event["phase"]: event["counts"] for event in told if event["event"] == "phase_end"}
        assert counts[phase] == {} and any(counts.values()), f"{script}: {counts}"


def test_a_full_disk_and_broken_files(outputs, tmp_path):
    """Warnings, said once; no incomplete file stays, and broken ones are replaced."""
    cache = tmp_path / "cache"
    with limited_files(24_000):  # enough for all that the stage writes but its program
        printed, _, _ = start(outputs, cache)
    assert printed.count("WARNING") == printed.count(FULL) == 1, printed
    assert "for the next start" not in printed, printed
    assert not list(cache.glob("jit_step-*")), "the incomplete program is still there"

    printed, compiled, _ = start(outputs, cache)
    assert compiled == 1 and "WARNING" not in printed, f"{compiled} were compiled\n{printed}"
    for file in cache.glob("*-cache"):
        file.write_bytes(file.read_bytes()[:-40])
    printed, _, loaded = start(outputs, cache)
    assert loaded == 0 and printed.count("WARNING") == printed.count(BROKEN) == 1, printed
    printed, compiled_again, loaded = start(outputs, cache)
    assert compiled_again == 0 < loaded and "WARNING" not in printed, printed  # jax itself still has one now and then


def test_a_folder_that_cannot_be_written(outputs, processes_folder, tmp_path):
    """What is kept in a read-only folder is used; where there can be no folder, a stage does without one."""
    cache = processes_folder / "cache" / STAGE2
    if os.getuid() == 0 and not shutil.which("setpriv"):
        pytest.skip("root may write everywhere, and setpriv, which could forbid it, is not installed")
    prefix = ("setpriv", "--bounding-set=-dac_override") if os.getuid() == 0 else ()
    cache.chmod(0o555)
    try:
        printed, compiled, _ = start(outputs, cache, prefix=prefix, cwd=outputs)
    finally:
        cache.chmod(0o755)
    assert compiled == 0 and printed.count("WARNING") == printed.count(NO_FOLDER) == 1, printed

    (tmp_path / "file").write_text("")
    printed, compiled, loaded = start(outputs, tmp_path / "file" / "cache")
    assert compiled and not loaded and printed.count("WARNING") == printed.count(NO_FOLDER) == 1, printed


def test_where_programs_are_kept(tmp_path, monkeypatch):
    """An option wins over jax's variable, and that over the user's cache folder; "none" keeps nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    report = Report("stage", "program", argparse.Namespace(quiet=1, verbose=0, log_json=None))

    def folder(chosen: Path | None, variable: Path | None, enabled: bool = True) -> Path | None:
        """Compile a program; jax has put what its variables say, the folder and whether to keep any, in its options."""
        with jax_options_kept():
            jax.config.update("jax_compilation_cache_dir", variable and str(variable))
            jax.config.update("jax_enable_compilation_cache", enabled)
            with compilation.Cache(chosen, report) as cache:
                jax.jit(lambda x: x + 1)(1.0)
        return cache.folder

    variable, option = tmp_path / "variable", tmp_path / "option"
    cases = [
        (folder(None, None), tmp_path / "home" / "cogvideox-tpu"),
        (folder(None, variable), variable),
        (folder(option, variable), option),
    ]
    for found, expected in cases:
        assert found == expected and list(expected.glob("*-cache")), f"{found}, not {expected}"
    before = sorted(tmp_path.rglob("*-cache"))
    assert folder(compilation.NO_CACHE, variable) is folder(None, variable, enabled=False) is None
    assert sorted(tmp_path.rglob("*-cache")) == before


@needs_libtpu
def test_the_key_of_a_kernel_is_the_same_everywhere(tmp_path):
    """A kernel has the paths of its sources inside, which do not depend on the working directory."""
    script = tmp_path / "key.py"
    script.write_text(
        f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from cogvideox.cli.parser import ArgumentParser
from cogvideox.run.accelerator import prepare_libraries
prepare_libraries()
import jax
from jax._src import cache_key
from compile_for_tpu import programs, topologies
parser = ArgumentParser()
programs.add_kernel_options(parser)
arguments = parser.parse_args(["--tokens", "2048", "--heads", "1"])
module = programs.trace_kernel(arguments, topologies.devices("v6e-1")).traced[0].lower().compiler_ir()
print(hash(cache_key._canonicalize_ir(module, cache_key.IgnoreCallbacks.NO)))
"""
    )
    keys = []
    for folder in (tmp_path, ROOT):
        environment = os.environ | {"PYTHONHASHSEED": "0"}
        keys.append(subprocess.check_output([sys.executable, script], cwd=folder, env=environment))
    assert keys[0] == keys[1]


@pytest.mark.parametrize(
    ("given", "address"),
    [("gs://bucket/programs", "gs://bucket/programs"), ("/tmp/a:/b", "/tmp/a:/b"), ("programs", "programs")],
)
def test_the_address_of_a_bucket(given, address):
    """A path has one slash in the place of two."""
    assert compilation.address_of(Path(given)) == address
