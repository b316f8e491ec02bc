"""Compiled programs are kept for the next start, whatever happens to the folder where they are."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from cogvideox.run import compilation
from tests.helpers import ROOT, SIZE, STAGE2, STAGE3, STAGE3_FLAX, needs_libtpu, run_command, stage_command

pytestmark = pytest.mark.slow

FULL = "cannot be kept in"  # what the warnings say
BROKEN = "cannot be read in"
NO_FOLDER = "compiled programs are not kept"


def start(outputs: Path, cache: object, script: str = STAGE2, prefix: tuple[str, ...] = (), **options) -> tuple:
    """Run a stage; return what it printed, and how many programs it compiled and loaded, by its own log."""
    log = outputs / "log.jsonl"
    log.unlink(missing_ok=True)
    size = SIZE if script == STAGE2 else ()
    command = stage_command(script, "--input_dir", outputs, *size, "--compilation_cache", cache, "--log_json", log)
    process = run_command([*prefix, *command], **options)
    assert process.returncode == 0, process.stderr
    events = [json.loads(line) for line in log.read_text().splitlines()]
    counts: Counter[str] = sum((Counter(event["counts"]) for event in events if "counts" in event), Counter())
    return process.stdout, counts["programs"] - counts["loaded"], counts["loaded"]


@pytest.mark.parametrize("script", [STAGE2, STAGE3, STAGE3_FLAX])
def test_the_second_start_compiles_nothing(script, outputs, tmp_path):
    """Counted by jax's own events, in a process with another working directory and another output folder."""
    cache = tmp_path / "cache"
    printed, compiled, loaded = start(outputs, cache, script, cwd=tmp_path)
    assert compiled >= (1 if script == STAGE2 else 2) and f"kept in {cache} for the next start" in printed, printed
    first = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    elsewhere = Path(shutil.copytree(outputs, tmp_path / "elsewhere"))
    printed, compiled, loaded_again = start(elsewhere, cache, script, cwd=elsewhere)
    assert (compiled, loaded_again - loaded) == (0, len(first)), f"{compiled} were compiled\n{printed}"
    assert "loaded the compiled " in printed and f" from {cache}\n" in printed, printed
    assert {file: file.stat().st_mtime_ns for file in cache.iterdir()} == first


def test_no_first_run_of_a_program_is_timed(outputs):
    """All programs of a stage are obtained before its run, and the small ones beside them too."""
    for script, phase in ((STAGE2, "run"), (STAGE3, "run, with encoding")):
        start(outputs, "none", script)
        events = [json.loads(line) for line in (outputs / "log.jsonl").read_text().splitlines()]
        counts = {event["phase"]: event["counts"] for event in events if event["event"] == "phase_end"}
        assert counts[phase] == {} and any(counts.values()), f"{script}: {counts}"


def limit_files() -> None:
    """Let no file of this process grow beyond 24 kB: enough for all that the stage writes but its program."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (24_000, 24_000))


def test_a_full_disk_and_broken_files(outputs, tmp_path):
    """Warnings, said once; no incomplete file stays, and broken ones are replaced."""
    cache = tmp_path / "cache"
    printed, _, _ = start(outputs, cache, preexec_fn=limit_files)
    assert printed.count("WARNING") == printed.count(FULL) == 1, printed
    assert "for the next start" not in printed, printed
    assert not list(cache.glob("jit_step-*")), "the incomplete program is still there"

    printed, compiled, _ = start(outputs, cache)
    assert compiled == 1 and "WARNING" not in printed, f"{compiled} were compiled\n{printed}"
    for file in cache.glob("*-cache"):
        file.write_bytes(file.read_bytes()[:-40])
    printed, compiled, loaded = start(outputs, cache)
    assert loaded == 0 and printed.count("WARNING") == printed.count(BROKEN) == 1, printed
    printed, compiled_again, loaded = start(outputs, cache)
    assert (compiled_again, loaded) == (0, compiled) and "WARNING" not in printed, printed


def test_a_folder_that_cannot_be_written(outputs, tmp_path):
    """What is kept in a read-only folder is used; where there can be no folder, a stage does without one."""
    cache = tmp_path / "cache"
    start(outputs, cache)
    if os.getuid() == 0 and not shutil.which("setpriv"):
        pytest.skip("root may write everywhere, and setpriv, which could forbid it, is not installed")
    prefix = ("setpriv", "--bounding-set=-dac_override") if os.getuid() == 0 else ()
    cache.chmod(0o555)
    printed, compiled, _ = start(outputs, cache, prefix=prefix)
    cache.chmod(0o755)
    assert compiled == 0 and printed.count("WARNING") == printed.count(NO_FOLDER) == 1, printed

    (tmp_path / "file").write_text("")
    printed, compiled, loaded = start(outputs, tmp_path / "file" / "cache")
    assert compiled and not loaded and printed.count("WARNING") == printed.count(NO_FOLDER) == 1, printed


def test_where_programs_are_kept(outputs, tmp_path):
    """An option wins over jax's variable, and that over the user's cache folder; "none" keeps nothing."""
    code = """
        import argparse, pathlib, sys
        from cogvideox.cli.report import Report
        from cogvideox.run import accelerator, compilation
        accelerator.prepare_libraries()
        import jax
        chosen = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else None
        report = Report("stage", "program", argparse.Namespace(quiet=1, verbose=0, log_json=None))
        with compilation.Cache(chosen, report) as cache: jax.jit(lambda x: x + 1)(1.0)
        print(cache.folder)
    """
    command = [sys.executable, "-c", "\n".join(line.strip() for line in code.splitlines())]
    unset = {name: value for name, value in os.environ.items() if "COMPILATION_CACHE" not in name}
    home = unset | {"XDG_CACHE_HOME": str(tmp_path / "home")}
    variable = home | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "variable")}

    def folder(environment: dict, *options: str) -> str:
        return subprocess.check_output([*command, *options], cwd=ROOT, env=environment, text=True).strip()

    cases = [
        (folder(home), tmp_path / "home" / "cogvideox-tpu"),
        (folder(variable), tmp_path / "variable"),
        (folder(variable, str(tmp_path / "option")), tmp_path / "option"),
    ]
    for found, expected in cases:
        assert found == str(expected) and list(expected.glob("*-cache")), f"{found}, not {expected}"
    before = sorted(tmp_path.rglob("*-cache"))
    assert folder(variable, "none") == folder(variable | {"JAX_ENABLE_COMPILATION_CACHE": "0"}) == "None"
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
