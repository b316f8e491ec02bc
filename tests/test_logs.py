"""What a stage says and keeps of itself: --verbose, --quiet, --log_json, and timings.json beside its outputs."""

import argparse
import dataclasses
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from cogvideox.cli import program, terminal
from cogvideox.cli import report as report_module
from cogvideox.cli.report import EventLog, Report, memory_of
from cogvideox.files import timings
from cogvideox.files.names import TIMINGS
from cogvideox.inspection import seconds
from cogvideox.run.denoising import online_summary
from tests.forks import Fork
from tests.helpers import LATENTS, SIZE, STAGE1, STAGE2, STAGE3, STAGE3_FLAX, check, stage_command, stage_environment
from tests.in_process import run_here

STEPS = SIZE[-1]


class Clock:
    """A clock that goes on only when it is told to."""

    def __init__(self):
        self.time = 100.0

    def __call__(self) -> float:
        return self.time

    def wait(self, seconds: float) -> None:
        self.time += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(report_module.time, "perf_counter", clock)
    return clock


def options(**given) -> argparse.Namespace:
    return argparse.Namespace(**{"verbose": False, "quiet": False, "log_json": None} | given)


def events(log: Path) -> list[dict]:
    """Return the events of a log; a line that is not whole fails."""
    text = log.read_text(encoding="utf-8")
    assert text.endswith("\n"), text[-200:]
    return [json.loads(line) for line in text.splitlines()]


# --- The report, on a clock of our own ---------------------------------------------------------------------------


def run_report(clock: Clock, folder: Path, **given) -> Report:
    """Let a report tell a run: 2 s of loading in parts, steps of 1, 2 and 4 s with an aside of 10 s in the second."""
    report = Report("stage2", "program", options(seed=7, **given))
    report.title("A run")
    with report.phase("load"):
        for name in ("imports", "tracing", "imports"):
            with report.part(name):
                clock.wait(0.5)
        clock.wait(0.5)
        report.add_part("reading", 0.25)
        report.warn("odd")
    with report.phase("run") as run, report.progress("denoising", "step", 3) as bar:
        for seconds in (1, 2, 4):
            clock.wait(seconds)
            if seconds == 2:
                report.profiled()
                with report.aside("profile"):
                    clock.wait(10)
            bar.update()
    assert run.seconds == 7 and bar.n == 3
    report.say("done")
    report.close([folder], "python next.py")
    return report


def test_seconds_of_phases_and_steps(clock, tmp_path, capsys):
    run_report(clock, tmp_path, log_json=tmp_path / "new" / "log.jsonl")
    told = events(tmp_path / "new" / "log.jsonl")
    assert [event["event"] for event in told] == [
        *("start", "title", "phase_start", "warning", "phase_end", "phase_start"),
        *("step", "aside", "step", "step", "phase_end", "line", "end"),
    ]
    ends = {event["phase"]: event["seconds"] for event in told if event["event"] == "phase_end"}
    steps = [(event["done"], event["total"], event["seconds"]) for event in told if event["event"] == "step"]
    assert ends == {"load": 2, "run": 7}
    assert steps == [(1, 3, 1), (2, 3, 2), (3, 3, 4)]
    assert told[0]["stage"] == "stage2" and told[0]["options"]["seed"] == 7 and "jax" in told[0]["versions"]
    assert told[-1]["seconds"] == 19 and told[-1]["results"]["run"] == "7.00 s"
    assert told[-1]["results"]["load"] == "2.00 s: imports 1.00, tracing 0.50, reading 0.25"
    entry, parts = timings.read_timings(tmp_path)["stage2"], {"imports": 1, "tracing": 0.5, "reading": 0.25}
    assert entry["parts"] == {"load": parts}, "of no other phase"
    assert [event["parts"] for event in told if event["event"] == "phase_end"] == [parts, {}]
    assert entry["seconds"] == ends and entry["steps"] == [1, 2, 4] and entry["profiled"] == [2]
    printed = capsys.readouterr().out
    assert printed.startswith("A run\n  WARNING: odd\n") and printed.endswith("\nNext: python next.py\n"), printed
    assert re.search(r"^  profile +10\.00 s, not part", printed, re.MULTILINE), printed


def test_quiet_prints_warnings_alone(clock, tmp_path, capsys):
    run_report(clock, tmp_path, quiet=True)
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == "WARNING: odd\n"


def test_progress_is_lines_where_nobody_watches(clock, tmp_path, capsys, monkeypatch):
    """At the beginning and the end, and now and then between them; no line is drawn over."""
    run_report(clock, tmp_path)
    found = capsys.readouterr().err
    assert re.fullmatch(r"  denoising: +0% 0/3 .*\n  denoising: 100% 3/3 .*\n", found), found
    monkeypatch.setattr(terminal, "LINE_SECONDS", 0)
    run_report(clock, tmp_path)
    counts = re.findall(r"^  denoising: +\d+% (\d)/3 [^\r\n]*$", capsys.readouterr().err, re.MULTILINE)
    assert [*dict.fromkeys(counts)] == ["0", "1", "2", "3"], counts


def test_verbose_prints_versions_and_steps(clock, tmp_path, capsys):
    run_report(clock, tmp_path, verbose=True)
    printed = capsys.readouterr().out
    for line in (
        r"versions: python 3\.\d+\.\d+, jax \d.*",
        "step 3 of 3: 4.000 s",
        r"memory after load, host: peak .*",
    ):
        assert re.search(rf"^  {line}$", printed, re.MULTILINE), printed


def test_memory_of_devices():
    """Where the backend tells it; -1 stands for what it does not know."""
    full = {"bytes_in_use": 5, "peak_bytes_in_use": 7, "bytes_limit": 9, "num_allocs": 3}
    stats = [full, None, full | {"peak_bytes_in_use": -1}, {"num_allocs": 3}]
    devices = [SimpleNamespace(id=i, memory_stats=lambda stats=stats[i]: stats) for i in range(4)]
    assert memory_of(devices) == [
        {"device": 0, "in use": 5, "peak": 7, "of": 9},
        {"device": 2, "in use": 5, "of": 9},
    ]


@dataclasses.dataclass
class Plan:
    devices: list
    layout: str = "fsdp"
    vae: Mapping = dataclasses.field(default_factory=lambda: {"channels": [16, 32], "scale": {"eps": 1e-6}})


def test_plan_and_memory_are_told(tmp_path, capsys):
    stats = {"bytes_in_use": 2**30, "peak_bytes_in_use": 2**31, "bytes_limit": 2**35}
    devices = [
        SimpleNamespace(id=i, device_kind="TPU v6 lite", coords=[i, 0, 0], memory_stats=lambda: stats) for i in (0, 1)
    ]
    report = Report("stage3", "program", options(verbose=True, log_json=tmp_path / "log.jsonl"))
    report.plan(Plan(devices), devices)
    with report.phase("load"):
        pass
    report.close([tmp_path])
    printed = capsys.readouterr().out
    assert "device 1: TPU v6 lite at [1, 0, 0]" in printed and "device 0" in printed, printed
    table = printed.split("  plan:\n")[1].splitlines()
    assert table[1:4] == ["    layout         fsdp", "    vae.channels   16, 32", "    vae.scale.eps  1e-06"], printed
    assert "memory after load, device 1: in use 1.00 GiB, peak 2.00 GiB, of 32.00 GiB" in printed, printed
    told = {event["event"]: event for event in events(tmp_path / "log.jsonl")}
    assert told["devices"]["devices"][1] == {"id": 1, "kind": "TPU v6 lite", "coords": [1, 0, 0]}
    assert told["plan"]["layout"] == "fsdp"
    assert told["phase_end"]["memory"][1] == {"device": 1, "in use": 2**30, "peak": 2**31, "of": 2**35}
    assert timings.read_timings(tmp_path)["stage3"]["devices"] == "2 x TPU v6 lite"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no device that is always full")
def test_full_disk_ends_the_log_and_not_the_run(capsys):
    log = EventLog(Path("/dev/full"))
    for _ in range(3):
        log.write("line")
    assert capsys.readouterr().err.count("\n") == 1


# --- timings.json ------------------------------------------------------------------------------------------------

ENTRY = {"devices": None, "versions": {"jax": "1"}, "seconds": {"load": 2.0}, "steps": [1.0, 9.0, 3.0], "profiled": [2]}


def test_stages_share_the_file_and_replace_their_own(tmp_path):
    assert timings.write_timings(tmp_path, "stage2", ENTRY) is None
    assert timings.write_timings(tmp_path, "stage1", ENTRY | {"steps": []}) is None
    assert timings.write_timings(tmp_path, "stage2", ENTRY | {"seconds": {"load": 3.0}}) is None
    read = timings.read_timings(tmp_path)
    assert list(read) == ["stage1", "stage2"]
    assert read["stage2"]["seconds"] == {"load": 3.0} and read["stage1"]["seconds"] == {"load": 2.0}
    assert [file.name for file in tmp_path.iterdir()] == ["timings.json"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "JSON"),
        ('{"stage1": {', "JSON"),
        ("[]", "other than"),
        ('{"a": 1}', "other than"),
        (json.dumps({"stage1": ENTRY | {"seconds": {"load": "long"}}}), "other than"),
        (json.dumps({"stage1": ENTRY | {"steps": None}}), "other than"),
        (json.dumps({"stage1": ENTRY | {"parts": {"load": 2.0}}}), "other than"),
        (json.dumps({"stage1": ENTRY | {"parts": {"load": {"imports": "long"}}}}), "other than"),
        (b"\xff\xfe", "JSON"),
    ],
)
def test_what_is_no_file_of_ours_is_replaced(content, reason, tmp_path):
    file = tmp_path / TIMINGS
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=reason):
        timings.read_timings(tmp_path)
    assert next(seconds.lines(tmp_path)).startswith("WARNING")
    warning = timings.write_timings(tmp_path, "stage2", ENTRY)
    assert reason in warning and "replaced" in warning
    assert timings.read_timings(tmp_path) == {"stage2": ENTRY}


def test_timings_that_cannot_be_written_are_a_warning(tmp_path):
    (tmp_path / TIMINGS).mkdir()
    assert "cannot write" in timings.write_timings(tmp_path, "stage2", ENTRY)


def test_lines_for_people(tmp_path):
    """The median and the slowest are of the steps that no profiler slowed down."""
    assert list(seconds.lines(tmp_path)) == []
    timings.write_timings(tmp_path / "a", "stage2", ENTRY)
    parts = {"parts": {"load": {"imports": 5.0}}}  # which earlier versions did not write
    timings.write_timings(tmp_path / "b", "stage2", ENTRY | parts | {"seconds": {"load": 8.0, "save": 1.0}})
    timings.write_timings(tmp_path / "b", "stage3", ENTRY | {"devices": "8 x TPU v6 lite", "steps": []})
    rows = [line.split() for line in seconds.lines(tmp_path / "a")]
    assert ["load", "2.000"] in rows and ["a", "step,", "median", "2.000"] in rows, rows
    assert ["a", "step,", "slowest", "3.000"] in rows, rows
    rows = [line.split() for line in seconds.lines(tmp_path / "a", tmp_path / "b")]
    expected = ("load 2.000 8.000 0.25", "load: imports - 5.000", "save - 1.000", "stage3: 8 x TPU v6 lite")
    for row in (*expected, "load - 2.000"):
        assert row.split() in rows, rows


# --- The stages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--verbose", "--quiet"], ["--quiet", "--verbose"]),
        (["--log_json", "outputs"], ["--log_json outputs", "directory"]),
        (["--log_json", f"outputs/{LATENTS}/log"], ["--log_json"]),
        (["--log_json", ""], ["--log_json", "empty"]),
    ],
)
def test_wrong_options_are_one_line(more, words, outputs, run_stage):
    for script in (STAGE1, STAGE2, STAGE3, STAGE3_FLAX):
        process = run_stage(script, *(("--prompt", "x") if script == STAGE1 else ()), *more, status=2)
        assert len(process.stderr.splitlines()) == 1 and process.stdout == "", process.stderr
        assert all(word in process.stderr for word in words), process.stderr


def test_an_error_is_in_the_log(run_stage, tmp_path):
    process = run_stage(STAGE2, "--input_dir", "nowhere", "--quiet", "--log_json", "log.jsonl", status=2)
    first, last = events(tmp_path / "log.jsonl")
    assert first["event"] == "start" and first["program"] == STAGE2
    assert last["event"] == "error" and last["kind"] == "UserError" and last["traceback"] is None
    assert process.stderr == f"{STAGE2}: error: {last['message']}\n"


def test_a_bug_is_in_the_log_with_its_traceback(tmp_path):
    def main(argv):
        with Report("stage1", "program", options(log_json=tmp_path / "log.jsonl")):
            1 / 0  # noqa: B018  a bug

    with pytest.raises(SystemExit) as ended:
        program.run(main)
    assert ended.value.code == 1
    last = events(tmp_path / "log.jsonl")[-1]
    assert last["kind"] == "ZeroDivisionError" and "Traceback" in last["traceback"]


@pytest.fixture(scope="module")
def quiet_run(tmp_path_factory, random_model) -> SimpleNamespace:
    """Run all three stages with --quiet and one log; return the folder, the log's events and what was printed."""
    folder = tmp_path_factory.mktemp("quiet")
    log, printed = folder / "log.jsonl", []
    for script, *arguments in (
        (STAGE1, "--prompt", "a red circle", "--model_id", random_model, "--output_dir", folder),
        (STAGE2, "--input_dir", folder, *SIZE),
        (STAGE3, "--input_dir", folder),
    ):
        process = check(run_here(script, *arguments, "--quiet", "--log_json", log, folder=folder))
        printed.append(process.stdout + process.stderr)
    return SimpleNamespace(folder=folder, events=events(log), printed=printed)


@pytest.mark.slow
def test_quiet_stages_print_nothing(quiet_run):
    assert quiet_run.printed == ["", "", ""]


@pytest.mark.slow
def test_log_of_three_stages(quiet_run):
    """Each stage starts and ends; phases are closed in the order in which they open; steps lie in them."""
    starts = [i for i, event in enumerate(quiet_run.events) if event["event"] == "start"]
    assert [quiet_run.events[i]["stage"] for i in starts] == ["stage1", "stage2", "stage3"]
    expected = {"stage1": [], "stage2": [(i + 1, STEPS) for i in range(STEPS)], "stage3": [(9, 9)]}
    for i, end in zip(starts, [*starts[1:], None], strict=True):
        told = quiet_run.events[i:end]
        assert told[-1]["event"] == "end"
        assert [event["time"] for event in told] == sorted(event["time"] for event in told)
        names = [(event["event"], event["phase"]) for event in told if event["event"].startswith("phase")]
        assert names[0::2] == [("phase_start", phase) for _, phase in names[1::2]]
        assert names[1::2] == [("phase_end", phase) for _, phase in names[1::2]]
        steps = [event for event in told if event["event"] == "step"]
        assert [(event["done"], event["total"]) for event in steps] == expected[told[0]["stage"]]
        run = next(e["seconds"] for e in told if e["event"] == "phase_end" and e["phase"].startswith("run"))
        total = sum(event["seconds"] for event in steps)
        assert 0 <= total <= run + 1e-5, f"the steps take {total} s of the {run} s of their phase"


@pytest.mark.slow
def test_timings_of_three_stages(quiet_run):
    read = timings.read_timings(quiet_run.folder)
    assert list(read) == ["stage1", "stage2", "stage3"]
    for stage, entry in read.items():
        told = quiet_run.events[next(i for i, e in enumerate(quiet_run.events) if e.get("stage") == stage) :]
        told = told[: next(i for i, event in enumerate(told) if event["event"] == "end")]
        assert entry["seconds"] == {e["phase"]: e["seconds"] for e in told if e["event"] == "phase_end"}
        assert entry["steps"] == [event["seconds"] for event in told if event["event"] == "step"]
        parts = ("imports", "reading") if stage == "stage1" else ("imports", "tracing", "reading", "placing")
        assert entry["parts"].keys() == {"load"} and entry["parts"]["load"].keys() == {*parts}
        assert sum(entry["parts"]["load"].values()) <= entry["seconds"]["load"] + 1e-5
    assert read["stage2"]["devices"] == "1 x cpu"


@pytest.mark.slow
def test_inspect_shows_timings_and_does_not_judge_them(quiet_run, run_stage, tmp_path):
    other = Path(shutil.copytree(quiet_run.folder, tmp_path / "other"))
    timings.write_timings(other, "stage2", timings.read_timings(other)["stage2"] | {"steps": [1e6]})
    assert "a step, median" in run_stage("inspect_tensors.py", other).stdout
    process = run_stage("inspect_tensors.py", quiet_run.folder, "--compare", other)
    assert process.stdout.rstrip().splitlines()[-1].startswith("nothing differs"), process.stdout
    assert re.search(r"a step, slowest +\d\.\d+ +1000000\.000 +0\.00", process.stdout), process.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_stage_leaves_what_happened(kill, outputs, tmp_path):
    log, before = tmp_path / "log.jsonl", (outputs / TIMINGS).read_bytes()
    command = stage_command(STAGE2, "--input_dir", outputs, *SIZE[:-1], 1000, "--quiet", "--log_json", log)
    process = Fork(command, tmp_path, stage_environment(), tmp_path / "out", tmp_path / "err")
    deadline = time.monotonic() + 300
    while not (log.exists() and log.read_text().count('"event": "step"') >= 3) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(kill)
    process.wait(timeout=300)
    told = events(log)
    assert [event["done"] for event in told if event["event"] == "step"][:3] == [1, 2, 3]
    assert "end" not in {event["event"] for event in told}
    last = ("step", "aside") if kill == signal.SIGKILL else ("error",)  # a step, or its state that was kept
    assert told[-1]["event"] in last, told[-1]
    assert (outputs / TIMINGS).read_bytes() == before


@pytest.mark.parametrize(
    ("online", "shares", "said"),
    [
        (0, 0, "none of 4,032 heads of all blocks and steps"),
        (1234, 40.3, "1,234 of 4,032 heads of all blocks and steps, for 1.00% of all queries"),
    ],
)
def test_how_many_heads_were_slow(online, shares, said):
    assert online_summary(online, shares, 4032) == said
