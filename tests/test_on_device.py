"""`python -m benchmarks.on_device` on a CPU: that it finds what is wrong, goes on, and keeps what it has."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks import attention_entries, beside_diffusers, diffusers_comparison, on_device, reproduce_tables
from benchmarks.diffusers_comparison import FILES, LATENTS, WRITTEN
from benchmarks.entries import NO_TIME, NOT_QUICK, STARTED, Entry
from benchmarks.machine import FULL, ON_A_CPU, ON_A_GPU, STEPS, Machine
from cogvideox.errors import UserError
from cogvideox.files import published
from cogvideox.models.transformer import attention, parameters
from cogvideox.models.transformer import plan as plan_module
from cogvideox.models.transformer.sparse import xla
from compile_for_tpu import report
from tests.helpers import ROOT, VIRTUAL_DEVICES, stage_command, stage_environment
from tests.in_process import run_here

# Beginnings of the names of the entries, in parts that tests can run beside each other.
PARTS = ("attention", "transformer block", "decoder chunk", "mesh", "step", "decode,")
FAST, ONLINE = "attention splash_exp2, fast kernel, layer normed", "attention splash_exp2, online kernel, mixed heads"


@functools.cache
def small_machine(devices: int) -> Machine:
    """Return the same machine to all tests, because what it computes on the CPU to compare with is kept."""
    return Machine(jax.devices()[:devices], ON_A_CPU)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the command in this process with the entries whose names begin with one of `only`, or with `entries`.

    Returns the exit status, and the entries of the results by name.
    """
    all_entries = on_device.entries

    def run(*options, only=("",), entries=None, devices=1, scale=None):
        machine = Machine(jax.devices()[:devices], scale) if scale else small_machine(devices)
        chosen = [entry for entry in all_entries(machine) if entry.name.startswith(tuple(only))]
        monkeypatch.setattr(on_device, "entries", lambda machine: chosen if entries is None else entries)
        monkeypatch.setattr(on_device, "find_machine", lambda model_id: machine)
        try:
            on_device.main(["--output", str(tmp_path / "results"), *options])
            status = 0
        except SystemExit as end:
            status = end.code
        return status, json.loads((tmp_path / "results" / "on_device.json").read_text())["entries"]

    return run


def entry(name, kind="check", error=None, minutes=0.0, quick=True, figure=0.5):
    """Return an entry that raises `error`, or whose figure is `figure` of 1."""

    def do():
        if error:
            raise error
        return on_device.judged(figure, 1.0, "made up")

    return Entry(name, kind, do, minutes, quick)


def statuses(found):
    return {name: one["status"] for name, one in found.items()}


# --- All of it ---------------------------------------------------------------------------------------------------


def test_parts_are_everything():
    names = [entry.name for entry in on_device.entries(small_machine(2))]
    assert sum(name.startswith(part) for part in PARTS for name in names) == len(names) == 29
    assert sum(name.startswith("mesh") for name in names) == 6  # dp 2, sp 2 and tp 2, in two layouts


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_everything_runs(part, run, tmp_path, capsys):
    status, found = run(devices=2, only=(part,))
    assert status == 0, statuses(found)
    assert found and set(statuses(found).values()) <= {"passed", "measured"}
    for name, one in found.items():
        if one["kind"] == "check":
            assert 0 <= one["figure"] <= one["tolerance"], name
        else:
            assert 0 < one["least"] <= one["seconds"] <= one["most"] and one["repetitions"] == 3, name
            assert one["compile_seconds"] > 0 and one["allotted_gib"] > 0, name
    page = (tmp_path / "results" / "on_device.md").read_text()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in page.splitlines() if line.startswith("| ")]
    assert set(found) < set(rows), page
    assert "Please send" not in capsys.readouterr().out  # a CPU's results are of no use to anyone


# --- What is wrong is found --------------------------------------------------------------------------------------


def test_a_wrong_kernel_fails_and_the_rest_goes_on(run, monkeypatch, capsys):
    right = attention.IMPLEMENTATIONS["splash_exp2"]
    wrong = right._replace(function=lambda *arrays, **options: right.function(*arrays, **options) * 1.01)
    monkeypatch.setitem(attention.IMPLEMENTATIONS, "splash_exp2", wrong)
    status, found = run(only=(f"{FAST}, 270", "step, 16 x 24 x 9, no guidance"))
    kernel, step = found
    assert status == 1 and found[kernel]["status"] == "failed" and found[step]["status"] == "measured", found
    assert found[kernel]["figure"] == pytest.approx(1.01 - 1, rel=0.3)  # in bfloat16 the factor is 1.008
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"failed: {kernel}" in last, last


def test_the_wrong_kernel_of_two_fails(run, monkeypatch):
    """Inputs that never reach the online kernel prove nothing about it."""
    never = attention.IMPLEMENTATIONS["splash_exp2"]._replace(
        online_heads=lambda query, *_, **__: jax.numpy.zeros(query.shape[:2], bool)
    )
    monkeypatch.setitem(attention.IMPLEMENTATIONS, "splash_exp2", never)
    status, found = run(only=(ONLINE,))
    (one,) = found.values()
    assert status == 1 and one["figure"] < one["tolerance"], one
    assert one["note"].startswith("50% of the heads should have taken the online kernel"), one


@pytest.mark.parametrize("windows", ["right", "wrong"])
def test_what_xla_does_with_patterns_is_checked(windows, run, monkeypatch):
    """As on a GPU, where the kernels are not; wrong are heads that attend no other frame than their own."""
    right = xla.xla_attention

    def narrow(*arrays, **options):
        *qkv, table = arrays
        return right(*qkv, table._replace(windows=0 * table.windows), **options)

    monkeypatch.setattr(attention_entries, "has_patterns_kernel", lambda machine: False)
    monkeypatch.setattr(xla, "xla_attention", right if windows == "right" else narrow)
    status, found = run(only=("attention with patterns by XLA",))
    (one,) = found.values()
    assert one["status"] == {"right": "passed", "wrong": "failed"}[windows] and status == (windows == "wrong"), one
    assert windows == "right" or one["note"] == "relative error of head 1 of 4, the worst, frames:1", one


@pytest.mark.slow
def test_a_wrong_mesh_fails_alone(run, monkeypatch):
    make_plan = plan_module.make_denoising_plan

    def wrong_for_tp(**options):
        plan = make_plan(**options)
        if plan.parallelism.tp == 1:
            return plan
        scaled = lambda *arrays, kv_length: plan.attention(*arrays, kv_length=kv_length) * 1.5  # noqa: E731
        return dataclasses.replace(plan, attention=scaled)

    monkeypatch.setattr(plan_module, "make_denoising_plan", wrong_for_tp)
    status, found = run(only=("mesh dp 1",), devices=2)  # sp and tp of two, in two layouts
    failed = [name for name, one in found.items() if one["status"] == "failed"]
    expected = [f"mesh dp 1 x sp 1 x tp 2, layout {layout}, beside the CPU" for layout in ("tp", "fsdp")]
    assert status == 1 and failed == expected, statuses(found)
    assert len(found) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformer block, one device", "decoder chunk"])
def test_a_device_unlike_the_cpu_fails(run, monkeypatch, name):
    """The first result of such a check is the device's own."""
    judge = on_device.judged_beside_cpu
    monkeypatch.setattr(on_device, "judged_beside_cpu", lambda found, on_cpu: judge(found * 1.03, on_cpu))
    status, found = run(only=(name,), devices=2)
    (one,) = found.values()
    assert status == 1 and one["status"] == "failed" and one["tolerance"] < one["figure"] < 0.1, one


def test_not_a_number_fails(run):
    status, found = run(entries=[entry("strange", figure=float("nan"))])
    assert status == 1 and found["strange"]["status"] == "failed"


def test_errors_are_results_and_the_rest_goes_on(run, tmp_path, capsys):
    lack = RuntimeError("RESOURCE_EXHAUSTED: 5 GiB")
    rows = [entry("too large", "row", lack), entry("broken", error=ValueError("no | way\nmore")), entry("right")]
    status, found = run(entries=rows)
    assert status == 1
    assert statuses(found) == {"too large": "out of memory", "broken": "error", "right": "passed"}
    assert "raise error\nValueError: no | way\nmore" in found["broken"]["traceback"]
    page = (tmp_path / "results" / "on_device.md").read_text()
    assert "| too large | - | out of memory: RuntimeError: RESOURCE_EXHAUSTED: 5 GiB |" in page, page
    assert "| broken | error | - | - | ValueError: no / way |" in page, page
    out = capsys.readouterr().out
    assert "1 of 3 entries failed: broken" in out and "Traceback" not in out

    assert run(entries=rows[:1])[0] == 0  # a row that does not fit is no failure


# --- Time, and what is kept --------------------------------------------------------------------------------------


def test_what_has_no_time_is_left_out_and_run_later(run, capsys):
    rows = [entry("long", minutes=20.0), entry("rare", minutes=1.0, quick=False), entry("short", minutes=1.0)]
    timed = dataclasses.replace(ON_A_CPU, pace=1.0)
    status, found = run("--quick", entries=rows, scale=timed)
    assert status == 0 and statuses(found) == {"long": NO_TIME, "rare": NOT_QUICK, "short": "passed"}
    assert "run the same command again" in capsys.readouterr().out
    short = found["short"]
    status, found = run("--minutes", "10", entries=rows, scale=timed)
    assert status == 0 and statuses(found) == {"long": NO_TIME, "rare": "passed", "short": "passed"}
    assert found["short"] == short
    status, found = run(entries=rows, scale=timed)
    assert statuses(found) == dict.fromkeys(("long", "rare", "short"), "passed")
    assert "run the same command again" not in capsys.readouterr().out.splitlines()[-1]
    assert list(found) == ["long", "rare", "short"]  # in the order of the list, whatever ran when


def test_results_of_other_versions_are_not_mixed(run, monkeypatch, tmp_path):
    assert run(entries=[entry("one")])[0] == 0
    monkeypatch.setattr(on_device, "versions", lambda *names: {"jax": "0.0.1"})
    with pytest.raises(UserError, match=r"on_device\.json has results of other versions; choose another --output"):
        run(entries=[entry("one")])
    assert run("--again", entries=[entry("two")])[1].keys() == {"two"}
    (tmp_path / "results" / "on_device.json").write_text('{"entries": []}')
    with pytest.raises(UserError, match="holds no results of this program; choose another --output"):
        run(entries=[entry("one")])


@pytest.mark.slow
def test_killed_in_the_middle_it_keeps_what_it_has(run, tmp_path):
    path = tmp_path / "results" / "on_device.json"
    environment = stage_environment() | {"XLA_FLAGS": VIRTUAL_DEVICES}
    command = stage_command("benchmarks.on_device", "--output", path.parent, "--quiet")
    process = subprocess.Popen(command, cwd=on_device.report.RESULTS.parents[1], env=environment)
    deadline = time.monotonic() + 300
    before = {}
    while len(before) < 3:  # two done, the third begun
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
        before = json.loads(path.read_text())["entries"] if path.exists() else {}
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = json.loads(path.read_text())["entries"]
    done, begun = list(before)[:-1], list(before)[-1]
    assert before[begun]["status"] == STARTED and len(done) >= 2, statuses(before)

    following = "attention splash_exp2, online kernel, far bound"
    status, after = run(only=(*done, begun, following), devices=8)
    assert status == 0, statuses(after)
    assert {name: after[name] for name in done} == {name: before[name] for name in done}
    (new,) = (name for name in after if name.startswith(following))
    assert after[begun]["finished"] > after[new]["finished"]  # what the process may have died of comes last


# --- Beside diffusers --------------------------------------------------------------------------------------------

STEP = "step, 16 x 24 x 9, no guidance"  # the one of --quick
ENDLESS = """
from jax._src import xla_bridge

from benchmarks import diffusers_comparison, on_device
from cogvideox.cli.program import run

wait_for = diffusers_comparison.wait_for


def wait_for_long(command):
    print(xla_bridge.backends_are_initialized(), flush=True)
    return wait_for(["sh", "-c", "echo $$; exec sleep 300"])


diffusers_comparison.wait_for = wait_for_long
run(on_device.main, program="on_device")
"""


@pytest.fixture(scope="module")
def diffusers(tmp_path_factory):
    """Run diffusers' process once in this one, and return the folder of its results."""
    folder = tmp_path_factory.mktemp("diffusers")
    options = ("--device", "cpu", "--output", folder, "--minutes", 1, "--quick")
    process = run_here("benchmarks.beside_diffusers", *options, folder=folder)
    assert process.returncode == 0, process.stderr
    return folder


@pytest.fixture
def beside(diffusers, run, tmp_path, monkeypatch):
    """Run on_device beside diffusers, whose process goes on in this one from the results of `diffusers`."""

    def wait_for(command):
        assert command[1] == "-m"
        return run_here(*command[2:], folder=tmp_path).returncode

    monkeypatch.setattr(diffusers_comparison, "wait_for", wait_for)
    shutil.copytree(diffusers, tmp_path / "results")
    return functools.partial(run, "--beside", "diffusers", "--quick", only=(STEP,))


def test_diffusers_computes_the_same_and_is_shown_beside(beside, tmp_path, capsys):
    status, found = beside()
    assert status == 0, statuses(found)
    for name in FILES:
        assert found[name]["status"] == "passed" and 0 < found[name]["figure"] < 1e-4, found[name]
    theirs, ours = found[f"diffusers: {STEP}"], found[STEP]
    assert 0 < theirs["least"] <= theirs["seconds"] <= theirs["most"] and theirs["peak_gib"] is None
    assert found["diffusers: decode, 32 x 40 x 9"]["status"] == NOT_QUICK
    page = (tmp_path / "results" / "on_device.md").read_text()
    figures = f"{theirs['seconds']:.3g} | {ours['seconds']:.3g} | {theirs['seconds'] / ours['seconds']:.3g}"
    assert f"\n| {STEP} | {figures} | - | {ours['allotted_gib']:.2f} |\n" in page, page
    assert f"; diffusers takes {theirs['seconds'] / ours['seconds']:.2f} times that\n" in capsys.readouterr().out
    assert not [*(tmp_path / "results").glob("*.safetensors")]  # they are large
    assert beside() == (0, found)  # all of it was done before


def scaled_parameters(load, *arguments, **options):
    """Return the parameters with one that is 1 % too large."""
    loaded = load(*arguments, **options)
    return loaded | {"proj_out.weight": loaded["proj_out.weight"] * 1.01}


@pytest.mark.parametrize("name", FILES)
def test_unlike_diffusers_fails(diffusers, monkeypatch, tmp_path, name):
    if name == LATENTS:
        where, function, wrong = parameters, "load_parameters", scaled_parameters
    else:
        where, function, wrong = diffusers_comparison, "decode_frames", lambda right, *others: right(*others) * 1.01
    monkeypatch.setattr(where, function, functools.partial(wrong, getattr(where, function)))
    file = Path(shutil.copy(diffusers / FILES[name], tmp_path))
    (comparison,) = diffusers_comparison.comparisons(small_machine(1), tmp_path, {name: {"status": WRITTEN}})
    found = comparison.run()
    assert found["status"] == "failed" and found["tolerance"] < found["figure"] < 0.1, found
    assert file.exists()  # to look into


@pytest.mark.parametrize(("error", "status"), [(0.003, "passed"), (0.005, "failed"), (np.nan, "failed")])
def test_bfloat16_may_be_twice_as_far_as_diffusers(tmp_path, error, status):
    exact = np.linspace(1, 2, 50, dtype=np.float32)
    results = {"float32": exact, "bfloat16": exact * np.float32(1.002)}
    save_file({f"results.{dtype}": array for dtype, array in results.items()}, tmp_path / "file")
    gpu = Machine([SimpleNamespace(device_kind="NVIDIA H200", platform="gpu")], ON_A_GPU)
    found = diffusers_comparison.compared(gpu, lambda *_: exact * (1 + error), tmp_path / "file")
    assert found["status"] == status and found["tolerance"] == pytest.approx(0.004, rel=1e-3), found


def test_without_a_device_for_torch_nothing_begins(run, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    with pytest.raises(
        UserError, match=r"--beside diffusers: torch \S+ has no device to compare the platform tpu with"
    ):
        run("--beside", "diffusers")
    assert not [*(tmp_path / "results").glob("*")]


@pytest.mark.parametrize(("status", "ends"), [(2, True), (-9, False)])
def test_when_diffusers_ends_early(run, monkeypatch, tmp_path, capsys, status, ends):
    """It has said what its user can mend; of what the system does to it, this project's own entries know nothing."""
    monkeypatch.setattr(diffusers_comparison, "wait_for", lambda command: status)
    if ends:
        with pytest.raises(SystemExit) as end:
            on_device.main(["--beside", "diffusers", "--output", str(tmp_path)])
        assert end.value.code == 2
    else:
        assert run("--beside", "diffusers", entries=[entry("right")])[0] == 0
        assert "WARNING: diffusers' process ended with exit status -9" in capsys.readouterr().out


@pytest.mark.slow
def test_a_signal_ends_both_processes_and_jax_has_not_begun(tmp_path):
    command = [*stage_command("-c")[:1], "-c", ENDLESS, "--beside", "diffusers", "--output", str(tmp_path)]
    environment = stage_environment() | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"False\n"
    child = int(process.stdout.readline())
    process.terminate()
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and printed.startswith(b"on_device: interrupted"), printed
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_half_an_hour_is_enough_for_a_gpu():
    gpu = Machine([SimpleNamespace(device_kind="NVIDIA H200", platform="gpu")], ON_A_GPU)
    ours, theirs = on_device.entries(gpu), beside_diffusers.all_entries(beside_diffusers.Torch("cuda", gpu), ROOT)
    assert ON_A_GPU.pace * sum(entry.minutes for entry in [*ours, *theirs]) < on_device.MINUTES
    names = {entry.name for entry in ours if entry.name.startswith(("step", "decode,"))}  # none of them with patterns
    rows = {entry.name.removeprefix("diffusers: ") for entry in theirs if entry.kind == "row"}
    assert len(rows) == 8 and {name.removesuffix(", torchax").removesuffix(", flax") for name in names} == rows


# --- The tables on a TPU, without one ----------------------------------------------------------------------------


def tpu(count, kind="TPU v6 lite"):
    return Machine([SimpleNamespace(device_kind=kind, platform="tpu")] * count, FULL)


def test_rows_of_a_slice_are_those_of_the_tables():
    rows = {entry.name: entry for entry in on_device.entries(tpu(8))}
    assert len(rows) == len(on_device.entries(tpu(8)))
    assert len([name for name in rows if name.startswith("mesh")]) == 14
    assert FULL.lengths == (25826, 45106)
    with_patterns = [name for name in rows if " with " in name]
    assert with_patterns == [
        "attention with patterns, fast kernels, layer normed, 25,826 tokens",
        "transformer block with 1*frames:0, all devices, beside the CPU",
        "attention with frames:1, 6 heads, 45,106 tokens, one device",
        "step with 0.75*frames:1, 768 x 1360 x 81, guidance",
        "attention with patterns, online kernels, mixed heads, 25,826 tokens",
    ]
    saved = json.loads((report.RESULTS / "stage2-v6e-8-768x1360x81-guided.json").read_text())
    expected = rows["step, 768 x 1360 x 81, guidance"].run.args[-1]
    assert expected["predicted_seconds"] == saved["predicted_seconds"]
    assert expected["original_seconds"] == 2.31  # the best of rows 1 to 5
    decode = json.loads((report.RESULTS / "stage3-v6e-8-640x1280x61.json").read_text())
    expected = rows["decode, 640 x 1280 x 61, torchax"].run.args[-1]
    assert expected["predicted_seconds"] == decode["predicted_seconds"]
    assert expected["predicted_gib"] == decode["memory"]["peak"]


@pytest.mark.parametrize(("machine", "steps"), [(tpu(1), 1), (tpu(4), 1), (tpu(8), 5), (tpu(4, "TPU v5"), 5)])
def test_steps_of_a_slice(machine, steps):
    assert len(on_device.step_rows(machine)) == steps


def test_every_configuration_of_the_tables_is_there():
    assert {(size, guided) for size, guided, _ in STEPS} == {
        (row.size, row.guided) for row in reproduce_tables.ROWS.values()
    }


# --- Other models -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CogVideoX-2B", "CogVideoX-5B-I2V", "CogVideoX1.5-5B-I2V"])
def test_other_models(name):
    """Flat patches and all kinds of positions, an image and ofs, in small sizes."""
    machine = Machine(jax.devices()[:1], ON_A_CPU, str(published.by_name(name)))
    found = on_device.step_on_cpu(machine, 1, True, "float32")
    assert found.any() and np.isfinite(found).all()


def test_rows_of_another_model():
    """Its own size, with and without guidance, beside its own predictions."""
    machine = Machine(tpu(8).devices, FULL, str(published.by_name("CogVideoX-5B")))
    rows = {entry.name: entry for entry in on_device.entries(machine)}
    expected = rows["step, 480 x 720 x 49, guidance"].run.args[-1]
    saved = json.loads((report.RESULTS / "stage2-v6e-8-480x720x49-guided-model=CogVideoX-5B.json").read_text())
    assert expected["predicted_seconds"] == saved["predicted_seconds"]
    assert expected["original_seconds"] is None
    assert "attention splash_exp2, 6 heads, 17,776 tokens, one device" in rows, list(rows)


def test_an_image_model_beside_diffusers_is_one_line(tmp_path):
    with pytest.raises(UserError, match="--beside diffusers compares models of text alone"):
        on_device.main(["--model", "CogVideoX-5B-I2V", "--beside", "diffusers", "--output", str(tmp_path)])
