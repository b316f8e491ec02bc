"""Stages that are killed at any moment, run twice at once, or find files that do not belong together."""

import argparse
import errno
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.numpy import load_file, save_file

from cogvideox.cli import next_command
from cogvideox.cli.report import Report
from cogvideox.errors import UserError, as_user_error
from cogvideox.files import provenance, stage_files, writing
from cogvideox.files import tensors as tensors_module
from cogvideox.files.names import STATE, VIDEO
from cogvideox.files.schemas import LATENT_ENTRIES, TEXT_ENTRIES
from cogvideox.files.state import StateFile
from cogvideox.files.video_file import video_writer
from cogvideox.inspection import status
from cogvideox.models.transformer import denoising
from cogvideox.models.transformer.plan import make_denoising_plan
from cogvideox.models.transformer.sparse.heads import SparseAttention
from cogvideox.models.transformer.sparse.patterns import Pattern
from cogvideox.models.transformer.step import abstract_arguments, make_step
from tests.forks import Fork
from tests.helpers import (
    CONFIG,
    EMBEDDINGS,
    LATENTS,
    ROOT,
    SIZE,
    STAGE1,
    STAGE2,
    STAGE3,
    TINY_MODEL,
    check,
    contents,
    edit_config,
    run_command,
    stage_command,
    stage_environment,
)
from tests.in_process import run_here

STEPS = 30
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL)
LONG = (*SIZE[:-1], STEPS)

# --- Killed ------------------------------------------------------------------------------------------------------


def kill(process: subprocess.Popen | Fork, number: int, seconds: float, errors: Path) -> tuple[int, str]:
    """Send a program a signal after some seconds, and return its exit status and what is in its file of errors."""
    time.sleep(seconds)
    process.send_signal(number)
    return process.wait(timeout=300), errors.read_text()


def started(command: list[str], errors: Path) -> subprocess.Popen:
    """Start a program as a person does."""
    default = lambda: [signal.signal(n, signal.SIG_DFL) for n in SIGNALS[:3]]  # noqa: E731  pytest's parent may ignore some
    with open(errors, "w") as file:
        return subprocess.Popen(
            command, env=stage_environment(), stdout=subprocess.DEVNULL, stderr=file, preexec_fn=default
        )


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(path)


def kill_and_run_again(outputs: Path, script: str, moments: list[float], early: list[float], seed: int = 0) -> None:
    """Kill a stage at shares of the time that it takes; whatever is left of it, the same command comes to its end.

    `early` are seconds after its first lines, while it imports libraries; at the `moments` they are there.
    The files of the run before stay whole until then. A signal that can be received ends the stage in one line, but for
    SIGTERM and SIGHUP before anything is there to be put in order: they end it as they end any process.
    """
    options = {
        STAGE1: ("--prompt", "a red circle", "--output_dir", outputs),
        STAGE2: ("--input_dir", outputs, *LONG),
        STAGE3: ("--input_dir", outputs, "--output_frames", outputs / "frames.safetensors"),
    }[script]
    model = json.loads((outputs / CONFIG).read_text())["model_id"]
    options += ("--model_id", model) if script == STAGE1 else ()
    command = stage_command(script, *options)
    name = {STAGE1: EMBEDDINGS, STAGE2: LATENTS, STAGE3: "frames.safetensors"}[script]
    errors = outputs.parent / "errors"

    def fork() -> Fork:
        return Fork(command, outputs, stage_environment(), outputs.parent / "out", errors)

    process, start = fork(), time.perf_counter()
    assert process.wait() == 0, errors.read_text()
    whole = time.perf_counter() - start
    start = time.perf_counter()
    run_command(stage_command(script, "--help"), check=True)
    begun = time.perf_counter() - start  # before, Python itself receives the signals
    expected, files = tensors(outputs / name), set(contents(outputs))
    before = tensors(outputs / name)
    for i, moment in enumerate([*early, *moments]):
        number, is_early = SIGNALS[(i + seed) % len(SIGNALS)], i < len(early)
        there = set(contents(outputs))  # with what SIGKILL has left, if this one ends before it tidies up
        process, seconds = (started(command, errors), begun + moment) if is_early else (fork(), moment * whole)
        status, said = kill(process, number, seconds, errors)
        where = f"{script}, signal {number} after {seconds:.2f} of {whole:.2f} s{', early' * is_early}"
        assert status in (0, -number, 128 + number), f"{where}: exit {status}\n{said}"
        assert "Traceback" not in said and "terminate called" not in said, f"{where}\n{said}"
        if status == 128 + number:
            assert "interrupted" in said.splitlines()[-1], f"{where}\n{said}"
        if number != signal.SIGKILL:
            left = set(contents(outputs)) - there - {STATE}
            assert not left, f"{where}: {left}"
        for found, kept in zip(tensors(outputs / name).values(), before.values(), strict=True):
            assert torch.equal(found, kept), f"{where}: half a file"
    check(run_here(script, *options, folder=outputs))
    assert set(contents(outputs)) == files, f"{where}: {set(contents(outputs)) ^ files}"
    for found, kept in zip(tensors(outputs / name).values(), expected.values(), strict=True):
        assert torch.equal(found, kept), f"{where}: another result"


@pytest.mark.slow
@pytest.mark.parametrize(("script", "times"), [(STAGE1, 4), (STAGE2, 5), (STAGE3, 4)])
def test_killed_at_random(script, times, outputs):
    generator = random.Random()
    seed = generator.randrange(1000)
    moments = [generator.uniform(0.1, 1.0) for _ in range(times)]
    kill_and_run_again(outputs, script, moments, [generator.uniform(0, 3) for _ in range(2)], seed)


def program(body: str) -> subprocess.Popen:
    """Start a program whose main function has a body, and wait for its first line."""
    code = f"""
import gc, os, sys, time
from pathlib import Path
from cogvideox.cli.program import run
from cogvideox.files import writing
from cogvideox.signals import Interruption

def main(argv):
{textwrap.indent(textwrap.dedent(body), "    ")}
run(main)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "there\n"
    return process


BODIES = {  # the body of a program, how often a signal comes, and what is left in the folder
    "where exceptions are lost": (
        """
        def callback(*_):
            print("there", flush=True)
            time.sleep(20)
        gc.callbacks.append(callback)
        gc.collect()
        """,
        1,
        [],
    ),
    "where exceptions are caught": (
        """
        with writing.claimed(Path("{folder}/new"), "stage2"):
            try:
                print("there", flush=True)
                time.sleep(20)
            except BaseException:
                time.sleep(20)
        """,
        1,
        [],
    ),
    "while a file is written": (
        """
        with writing.replacing(Path("{folder}/file")) as temporary:
            print("there", flush=True)
            while Interruption.number is None:
                time.sleep(0.01)
            Path(temporary).write_text("whole")
        time.sleep(20)
        """,
        1,
        ["file"],
    ),
    "twice while files are written": (
        """
        with writing.claimed(Path("{folder}"), "stage2"), writing.committing(Path("{folder}"), "stage2") as new:
            (new / "file").touch()
            print("there", flush=True)
            while True:
                time.sleep(0.01)
        """,
        2,
        [],
    ),
}


@pytest.mark.parametrize("case", BODIES)
def test_a_signal_where_it_must_wait_and_where_it_must_not(case, tmp_path):
    """It ends the process in one line, and what is left is whole."""
    body, times, left = BODIES[case]
    process = program(body.format(folder=tmp_path))
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and errors == "-c: interrupted; the files that are there are whole\n", errors
    assert [file.name for file in tmp_path.iterdir()] == left


def test_ffmpeg_ends_with_an_interrupted_video(tmp_path, monkeypatch):
    """Else it would write the file after that was removed."""
    started: list[subprocess.Popen] = []
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(start(*a, **k)) or started[-1])

    def interrupted() -> None:
        with video_writer(str(tmp_path / VIDEO), 8) as append:
            append(np.zeros((16, 16, 3), np.uint8))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as error:  # which is kept, and with it the writer
        interrupted()
    assert error and started and all(process.poll() is not None for process in started)


@pytest.mark.slow
def test_an_unfinished_run_goes_on(outputs, run_stage, tmp_path):
    """SIGTERM in the loop: the state is kept, the same command does the other steps, other options are refused."""
    run = ("--input_dir", outputs, *SIZE[:-1], 1000)  # steps enough not to come to the end
    out, err = tmp_path / "out", tmp_path / "err"
    process = Fork(stage_command(STAGE2, *run), tmp_path, stage_environment(), out, err)
    while not (outputs / STATE).exists():
        time.sleep(0.02)
        assert process.poll() is None, err.read_text()
    process.send_signal(signal.SIGTERM)
    status, errors = process.wait(), err.read_text()
    assert status == 128 + signal.SIGTERM, errors
    last = errors.strip().splitlines()[-1]
    done = int(load_file(outputs / STATE)["done"])
    assert f"interrupted after step {done} of 1000; the same command goes on from there" in last, errors

    error = run_stage(STAGE2, *run, "--seed", 7, status=2).stderr
    assert "seed = 42, this one has 7; --restart starts over" in error, error
    assert "an unfinished run" in run_stage("utils.py", "status", outputs).stdout
    run_stage(STAGE2, "--input_dir", outputs, *SIZE, "--restart")
    assert not (outputs / STATE).exists()


@pytest.mark.parametrize(
    ("scheduler", "skipped", "given"),
    [
        ("CogVideoXDDIMScheduler", [], "map"),
        ("CogVideoXDPMScheduler", [], "image"),
        ("CogVideoXDDIMScheduler", [1, 2], "image"),
        ("CogVideoXDPMScheduler", [1, 2], "video"),
    ],
    ids=str,
)
def test_a_resumed_run_is_the_same_to_the_last_bit(scheduler, skipped, given, random_model):
    """With a scheduler that draws noise and keeps an estimate, skipped steps, an image, a video, sparse attention.

    It goes on after each step.
    """
    configs = {
        name: json.loads((random_model / name / file).read_text())
        for name, file in (
            ("transformer", "config.json"),
            ("vae", "config.json"),
            ("scheduler", "scheduler_config.json"),
        )
    }
    configs["scheduler"]["_class_name"] = scheduler
    if given == "image":
        channels, embed = (configs["transformer"][name] for name in ("out_channels", "time_embed_dim"))
        configs["transformer"] |= {"in_channels": 2 * channels, "ofs_embed_dim": embed}
    plan = make_denoising_plan(
        **configs,
        devices=jax.devices()[:1],
        platform="cpu",
        height=32,
        width=48,
        frames=9,
        num_inference_steps=5 if given == "video" else 4,
        strength=0.8 if given == "video" else None,
        guidance_scale=6.0,
        dtype=np.float32,
        step_cache=bool(skipped),
        sparse=SparseAttention(((Pattern("frames", 0),) * 4,) * 2, dense_steps=0.5) if given == "map" else None,
    )
    generator = torch.Generator().manual_seed(0)
    width, tokens = plan.transformer["text_embed_dim"], plan.transformer["max_text_seq_length"]
    text = [torch.randn(1, tokens, width, generator=generator) for _ in range(2)]
    frames, height, width = plan.latent_size
    size = 1, plan.transformer["out_channels"], 1 if given == "image" else frames, height, width
    posterior = denoising.Posterior(*torch.randn(2, *size, generator=generator))
    latents = {given: posterior} if given in ("image", "video") else {}
    shapes = abstract_arguments(plan).parameters
    values = np.random.default_rng(0)
    parameters = {name: jax.numpy.asarray(values.normal(0, 0.1, s.shape), s.dtype) for name, s in shapes.items()}
    programs = {kind: make_step(plan, kind=kind) for kind in plan.kinds(skipped)}

    def run(saved: dict | None = None) -> list[dict]:
        run = denoising.Denoising(plan, parameters, *text, seeds=[3], skipped=skipped, **latents)
        if saved:
            run.resume(saved)
        return [run.saved(state) for state in run.run(programs)]

    whole = run()
    assert [step + 1 for step, saved in enumerate(whole) if "residual" in saved] == skipped
    assert len(whole) == 4 and not np.array_equal(whole[1]["latents"], whole[2]["latents"])
    for saved in whole[:3]:
        resumed = run(saved)
        assert len(resumed) == 4 - saved["done"]
        for name, expected in whole[3].items():
            assert np.array_equal(resumed[-1][name], expected), f"after step {saved['done']}: {name}"


# --- Twice at once -----------------------------------------------------------------------------------------------

HOLD = """
import sys, time
sys.path.insert(0, {root!r})
from cogvideox.files import writing
from pathlib import Path
with writing.claimed(Path(sys.argv[1]), "stage2"):
    print("claimed", flush=True)
    time.sleep(60)
"""


def holding(folder: Path) -> subprocess.Popen:
    """Start a process that has claimed a folder."""
    command = [sys.executable, "-c", HOLD.format(root=str(ROOT)), str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "claimed\n"
    return process


def test_a_folder_has_one_run_at_a_time(tmp_path):
    """The second is told of the first; what a killed one had is free again, and what it left is removed."""
    folder = tmp_path / "outputs"
    first = holding(folder)
    with pytest.raises(UserError) as error, writing.claimed(folder, "stage1"):
        pass
    first.kill()
    first.wait()
    assert f"in use by stage2, process {first.pid} on " in str(error.value), error.value
    (folder / ".stage2.new").mkdir()
    (folder / ".stage2.new" / LATENTS).write_bytes(b"half")
    with writing.claimed(folder, "stage1"):
        assert [file.name for file in folder.iterdir()] == [writing.LOCK]
    assert not list(folder.iterdir())
    with writing.claimed(tmp_path / "new" / "folder", "stage1"):
        pass
    assert not (tmp_path / "new" / "folder").exists(), "the run has written nothing"


@pytest.mark.slow
def test_a_stage_in_a_folder_that_is_in_use(outputs, run_stage):
    before = contents(outputs)
    process = holding(outputs)
    for script, *options in ((STAGE2, *SIZE), (STAGE3,)):
        error = run_stage(script, "--input_dir", outputs, *options, status=2).stderr
        assert len(error.splitlines()) == 1 and f"process {process.pid}" in error, error
    process.kill()
    process.wait()
    assert contents(outputs).keys() - {writing.LOCK} == before.keys()


# --- Together or not at all --------------------------------------------------------------------------------------


KILLED_AFTER: list[int] = []  # how many system calls are left, if there is a number


def end_at_a_call(event: str, _: tuple) -> None:
    """Raise SystemExit at the system call that is the last one; Python calls this before each."""
    if KILLED_AFTER and event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.chmod"):
        KILLED_AFTER[0] -= 1
        if KILLED_AFTER[0] < 0:
            raise SystemExit("killed")


sys.addaudithook(end_at_a_call)


def commit(folder: Path, text: str) -> None:
    with writing.committing(folder, "stage2") as new:
        (new / "a").write_text(text)
        (new / "b").write_text(text)


def test_files_appear_together(tmp_path):
    """Interrupted at each of its system calls, a commit leaves all old files or, after `finish`, all new ones."""
    commit(tmp_path, "old")
    found = set()
    for calls in range(20):
        killed = False
        KILLED_AFTER.append(calls)
        try:
            commit(tmp_path, f"new{calls}")
        except SystemExit:
            killed = True
        KILLED_AFTER.clear()
        writing.finish(tmp_path)
        texts = {name: (tmp_path / name).read_text() for name in ("a", "b")}
        assert texts["a"] == texts["b"], f"killed at call {calls}: {texts}"
        found.add((killed, texts["a"] == f"new{calls}"))
    assert {(True, False), (True, True), (False, True)} <= found, "too few moments were tried"


# --- What file systems refuse -----------------------------------------------------------------------------------


def refuse(monkeypatch, call: str, number: int, when: Callable[..., bool] = lambda *_, **__: True) -> None:
    """Let a function of a module fail with an error of the system."""
    module, name = call.split(".")
    real = getattr(sys.modules[module], name)

    def refused(*arguments: object, **named: object) -> object:
        if when(*arguments, **named):
            raise OSError(number, os.strerror(number))
        return real(*arguments, **named)

    monkeypatch.setattr(sys.modules[module], name, refused)


@pytest.mark.parametrize(
    ("call", "number", "warning"),
    [
        ("os.chmod", errno.EPERM, "refuses chmod (Operation not permitted)"),
        ("os.fsync", errno.ENOTSUP, "refuses fsync (Operation not supported)"),
        ("os.rename", errno.EMFILE, None),
        ("fcntl.flock", errno.ENOSYS, None),
        ("fcntl.flock", errno.ENOLCK, None),
    ],
)
def test_what_is_not_needed_is_let_go(call, number, warning, tmp_path, monkeypatch):
    """With one warning if something is lost; the files appear, and others still find the folder in use."""
    refuse(monkeypatch, call, number)
    warnings: list[str] = []
    with writing.claimed(tmp_path, "stage2", warnings.append):
        commit(tmp_path, "new")
        with writing.replacing(tmp_path / "c") as temporary:
            Path(temporary).write_text("new")
        monkeypatch.setattr(writing, "CLAIMED", set())  # as in another process
        with pytest.raises(UserError, match="in use by stage2, process") as error, writing.claimed(tmp_path, "stage1"):
            pass
    assert (writing.HELD in str(error.value)) == (call == "fcntl.flock"), error.value
    assert len(warnings) == (warning is not None) and (warning or "") in "".join(warnings), warnings
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == dict.fromkeys("abc", "new")
    with writing.claimed(tmp_path, "stage2"):
        pass


@pytest.mark.parametrize(
    ("call", "number", "words"),
    [
        ("os.replace", errno.EPERM, "Operation not permitted; choose another path"),
        ("os.fsync", errno.EIO, "Input/output error; choose another path"),
        ("os.fsync", errno.EDQUOT, "Disk quota exceeded; free some disk space or choose another path"),
    ],
)
def test_what_is_needed_is_tried_before_any_work(call, number, words, tmp_path, monkeypatch):
    refuse(monkeypatch, call, number)
    with pytest.raises(UserError) as error, writing.claimed(tmp_path, "stage2", pytest.fail):
        pytest.fail("the work has begun")
    assert str(error.value).startswith(f"cannot write {tmp_path}") and str(error.value).endswith(words), error.value
    assert not list(tmp_path.iterdir())


def test_no_shared_maps(tmp_path, monkeypatch):
    """As on CephFS; where the system gives nothing at all, its reason is said, and nobody gets the model again."""
    path = tmp_path / LATENTS
    save_file({"latents": np.ones(3, np.float32), "none": np.ones((0, 2), np.float32)}, path)
    refuse(monkeypatch, "mmap.mmap", errno.ENODEV, lambda *_, flags=mmap.MAP_SHARED, **__: flags & mmap.MAP_SHARED)
    found = tensors_module.open_tensors(path, "")
    assert found["latents"].tolist() == [1, 1, 1] and found["none"].shape == (0, 2)
    assert not found["latents"].flags.writeable
    refuse(monkeypatch, "mmap.mmap", errno.ENODEV)
    with pytest.raises(UserError, match=f"{LATENTS} cannot be read: No such device$"):
        tensors_module.open_tensors(path, "get the model again")


def test_the_system_s_reason_is_said(tmp_path):
    """Also where safetensors hides it in a text; disk space is spoken of only where it is missing."""
    said = pytest.raises(UserError, match="cannot write x: No such file or directory; choose another path")
    with said, writing.write_errors(Path("x")):
        save_file({"a": np.ones(1)}, tmp_path / "missing" / "x")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")
    assert str(as_user_error(full)) == "x: No space left on device; free some disk space or choose another path"


# --- Belonging together ------------------------------------------------------------------------------------------


@pytest.fixture
def chain(tmp_path) -> Path:
    """Make the files of a run, with little in them."""
    config = {"model_id": "m", "prompt": "p", "negative_prompt": ""}
    video = {"height": 16, "width": 16, "frames": 1, "num_inference_steps": 1, "guidance_scale": 1.0, "seed": 1}
    config |= video | {"scheduler": "s", "fps": 8}
    arguments = argparse.Namespace(seed=1)
    stage_files.write_config(tmp_path, config)
    texts = stage_files.made_from(config, TEXT_ENTRIES) | provenance.as_metadata("stage1", {}, arguments)
    save_file({"prompt_embeds": np.ones((1, 2, 3), np.float32)}, tmp_path / EMBEDDINGS, texts)
    made = provenance.as_metadata("stage2", {EMBEDDINGS: provenance.digest(tmp_path / EMBEDDINGS)}, arguments)
    save_file(
        {"latents": np.ones((1, 1, 1, 2, 2), np.float32)},
        tmp_path / LATENTS,
        stage_files.made_from(config, LATENT_ENTRIES) | made,
    )
    comment = provenance.as_metadata("stage3", {LATENTS: provenance.digest(tmp_path / LATENTS)}, arguments)[
        "provenance"
    ]
    with video_writer(str(tmp_path / VIDEO), 8, comment) as append:
        append(np.zeros((16, 16, 3), np.uint8))
    return tmp_path


def rewrite(path: Path, value: float) -> None:
    """Put other values into the tensors of a file; its metadata stays."""
    with safetensors.safe_open(path, "np") as file:
        metadata = file.metadata()
    save_file({name: np.full_like(array, value) for name, array in load_file(path).items()}, path, metadata)


def test_status(chain):
    """Each kind of file that does not belong to the others is named, and the stage that makes it."""
    lines = lambda: "\n".join(status.status(chain)).replace(f"{next_command.interpreter()} ", "python ")  # noqa: E731
    assert lines().endswith("All is there and fits together."), lines()
    assert lines().count(": made 20") == 3, lines()

    rewrite(chain / LATENTS, 2)
    assert f"{VIDEO}: is stale: it was made from another {LATENTS}" in lines(), lines()
    assert lines().endswith(f"Next: python stage3_vae_decoder.py --input_dir {chain}"), lines()
    rewrite(chain / EMBEDDINGS, 2)
    assert f"{LATENTS}: is stale: it was made from another {EMBEDDINGS}" in lines(), lines()
    assert lines().endswith(f"Next: python stage2_transformer.py --input_dir {chain} --seed 1"), lines()
    edit_config(chain, prompt="another one")
    assert f"{EMBEDDINGS}: is stale: it was made with prompt = 'p', but" in lines(), lines()
    script = "Next: python stage1_text_encoder.py"
    assert lines().endswith(f"{script} '--prompt=another one' --output_dir {chain} --model_id m"), lines()
    (chain / LATENTS).write_bytes(b"broken")
    assert f"{LATENTS}: is damaged" in lines(), lines()
    (chain / CONFIG).unlink()
    assert f"{CONFIG} does not exist" in lines() and f"{script} --prompt=p --output_dir" in lines(), lines()
    (chain / EMBEDDINGS).unlink()
    assert f"for PROMPT: {script.removeprefix('Next: ')} --prompt PROMPT --output_dir {chain}" in lines(), lines()


def test_what_does_not_belong_together_is_refused(chain, capsys):
    """With --force it is taken, with a warning."""
    latents, other = chain / LATENTS, {"model_id": "other"}
    options = argparse.Namespace(verbose=False, quiet=False, log_json=None)
    refuse, force = (
        Report("stage3", STAGE3, argparse.Namespace(**vars(options), force=f)).refuse for f in (False, True)
    )
    with pytest.raises(UserError, match="--force"):
        stage_files.tensor_shapes(latents, 2, ["latents"], other, refuse=refuse)
    stage_files.tensor_shapes(latents, 2, ["latents"], other, refuse=force)
    assert "WARNING" in capsys.readouterr().out
    provenance.check_inputs(latents, refuse)
    rewrite(chain / EMBEDDINGS, 2)
    with pytest.raises(UserError, match=f"was not made from .*{EMBEDDINGS} as it is now"):
        provenance.check_inputs(latents, refuse)
    provenance.check_inputs(latents, force)
    assert "WARNING" in capsys.readouterr().out
    (chain / EMBEDDINGS).unlink()
    provenance.check_inputs(latents, refuse)


def test_files_without_provenance_are_taken(chain):
    """As those of the original project, which say nothing of themselves."""
    save_file(load_file(chain / LATENTS), chain / LATENTS)
    stage_files.tensor_shapes(chain / LATENTS, 2, ["latents"], json.loads((chain / CONFIG).read_text()))
    provenance.check_inputs(chain / LATENTS, refuse=pytest.fail)
    assert f"{LATENTS}: made at an unknown time" in "\n".join(status.status(chain))


# What is changed in a model: the part that is another one then, or None if nothing that decides a result has changed.
CHANGES = {
    "transformer/diffusion_pytorch_model.safetensors": "transformer",
    "vae/diffusion_pytorch_model.safetensors": "vae",
    "text_encoder/model.safetensors": "text_encoder",
    "tokenizer/spiece.model": "text_encoder",
    "scheduler/scheduler_config.json": "transformer",
    "transformer/._diffusion_pytorch_model.safetensors": None,
    "README.md": None,
}


@pytest.mark.parametrize("file", CHANGES)
def test_other_weights_are_seen(file, chain, tmp_path):
    """By the digest, by status, and by the stages; a file that says nothing of its weights is taken as it is."""
    model = shutil.copytree(TINY_MODEL, tmp_path / "model")
    (chain / VIDEO).unlink()  # to look into it takes long
    before = {part: provenance.weights(str(model), part, None) for part in ("text_encoder", "transformer", "vae")}
    for path, part in ((EMBEDDINGS, "text_encoder"), (LATENTS, "transformer")):
        with safetensors.safe_open(chain / path, "np") as opened:
            said = opened.metadata()
        assert "not known" in "\n".join(status.status(chain))
        provenance.check_inputs(chain / path, pytest.fail)
        made = provenance.as_metadata(part, before[part], argparse.Namespace())
        save_file(load_file(chain / path), chain / path, said | made)
    assert not [line for line in status.status(chain) if "stale" in line]

    if file.endswith(".safetensors") and "._" not in file:
        tensors = load_file(model / file)
        name = max(tensors)  # of any size: a value in the middle is another one
        tensors[name].reshape(-1)[tensors[name].size // 2] += 1
        save_file(tensors, model / file)
    else:
        (model / file).write_bytes(b"another" + ((model / file).read_bytes() if (model / file).exists() else b""))
    after = {part: provenance.weights(str(model), part, None) for part in before}
    assert [part for part in before if before[part] != after[part]] == [CHANGES[file]] * (CHANGES[file] is not None)
    name = {"text_encoder": EMBEDDINGS, "transformer": LATENTS}.get(CHANGES[file])
    lines = [line for line in status.status(chain) if "other weights than the" in line]
    assert [line.startswith(f"{chain / name}: is stale") for line in lines] == [True] if name else not lines
    if name:
        with pytest.raises(UserError, match=f"with other weights than the {CHANGES[file]} of {model} has now"):
            provenance.check_inputs(chain / name, stage_files.refuse)


def test_an_unfinished_run_of_other_weights(tmp_path):
    """It does not go on; one that an earlier version has begun, which knows neither weights nor an option, does."""
    weights = {f"transformer of {tmp_path}": "1" * 64}
    arrays = {"latents": np.ones(3, np.float32)}
    for fingerprint, expected in (
        ({"seed": 1} | weights, None),
        ({"seed": 1}, None),
        ({"seed": 2}, "seed = 2"),
        ({"seed": 1, "sparse_attention": "a.json"}, "sparse_attention = a.json, this one has None"),
    ):
        StateFile(tmp_path, fingerprint, 1).keep(arrays, now=False)
        state = StateFile(tmp_path, {"seed": 1, "sparse_attention": None} | weights, 1)
        if expected is None:
            assert state.load(restart=False).keys() == arrays.keys()
        else:
            with pytest.raises(UserError, match=expected):
                state.load(restart=False)
    StateFile(tmp_path, {"seed": 1} | dict.fromkeys(weights, "2" * 64), 1).keep(arrays, now=False)
    with pytest.raises(UserError, match=f"an unfinished run with another transformer of {tmp_path} than it is now"):
        StateFile(tmp_path, {"seed": 1} | weights, 1).load(restart=False)
