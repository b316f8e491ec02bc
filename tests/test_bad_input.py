"""What users get wrong: one line on stderr that names it, exit status 2, and no file touched."""

import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from tests.helpers import (
    CONFIG,
    EMBEDDINGS,
    LATENTS,
    ROOT,
    SIZE,
    STAGE1,
    STAGE2,
    STAGE3,
    contents,
    edit_config,
    edit_latents,
    poison,
    run_command,
    stage_command,
    stage_environment,
)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


NOTHING = lambda outputs: None  # noqa: E731

CASES = {
    # what: (script, arguments, what happens to the folder before, words of the message)
    "no prompt": (STAGE1, [], NOTHING, ["--prompt"]),
    "unknown option": (STAGE1, ["--prompt", "x", "--sed", "1"], NOTHING, ["--sed"]),
    "empty output": (STAGE1, ["--prompt", "x", "--output_dir", ""], NOTHING, ["--output_dir", "empty"]),
    "output below a file": (STAGE1, ["--prompt", "x", "--output_dir", f"outputs/{CONFIG}"], NOTHING, ["cannot write"]),
    "unknown model": (STAGE1, ["--prompt", "x", "--model_id", "no/thing"], NOTHING, ["no/thing", "network"]),
    "no model there": (STAGE1, ["--prompt", "x", "--model_id", "outputs"], NOTHING, ["transformer/config.json"]),
    "no input folder": (STAGE2, ["--input_dir", "nowhere"], NOTHING, ["nowhere", "stage 1"]),
    "input is a file": (STAGE2, ["--input_dir", f"outputs/{CONFIG}"], NOTHING, [CONFIG, "stage 1"]),
    "no embeddings": (STAGE2, [], lambda o: (o / EMBEDDINGS).unlink(), [EMBEDDINGS, "stage 1"]),
    "truncated embeddings": (STAGE2, [], lambda o: truncate(o / EMBEDDINGS), [EMBEDDINGS, "stage 1"]),
    "latents for embeddings": (STAGE2, [], lambda o: shutil.copy(o / LATENTS, o / EMBEDDINGS), ["prompt_embeds"]),
    "no JSON": (STAGE2, [], lambda o: (o / CONFIG).write_text("{"), [CONFIG, "JSON"]),
    "JSON, but a list": (STAGE2, [], lambda o: (o / CONFIG).write_text("[]"), [CONFIG]),
    "no model_id": (STAGE2, [], lambda o: edit_config(o, model_id=None), [CONFIG, "model_id"]),
    "other prompt": (STAGE2, [], lambda o: edit_config(o, prompt="a dog"), [EMBEDDINGS, "a dog", "stage 1"]),
    "other model": (STAGE2, ["--model_id", "nobody/nothing"], NOTHING, ["nobody/nothing", "stage 1"]),
    "height": (STAGE2, ["--height", 100], NOTHING, ["--height 100", "multiple of 16", "96"]),
    "width too large": (STAGE2, ["--height", 64, "--width", 4800], NOTHING, ["--width 4800", "480"]),
    "frames": (STAGE2, ["--height", 64, "--width", 64, "--frames", 80], NOTHING, ["80", "4n + 1", "77", "81"]),
    "no steps": (STAGE2, ["--num_inference_steps", 0], NOTHING, ["--num_inference_steps"]),
    "too many steps": (STAGE2, [*SIZE[:-1], 1001], NOTHING, ["--num_inference_steps", "1000"]),
    "negative fps": (STAGE2, ["--fps", -8], NOTHING, ["--fps"]),
    "guidance is no number": (STAGE2, ["--guidance_scale", "nan"], NOTHING, ["--guidance_scale"]),
    "unknown attention": (STAGE2, ["--attention", "magic"], NOTHING, ["--attention", "magic", "xla"]),
    "latents missing": (STAGE3, [], lambda o: (o / LATENTS).unlink(), [LATENTS, "stage 2"]),
    "latents truncated": (STAGE3, [], lambda o: truncate(o / LATENTS), [LATENTS, "stage 2"]),
    "stage 2 not run": (STAGE3, [], lambda o: edit_config(o, frames=None), [CONFIG, "frames", "stage 2"]),
    "frames of another type": (STAGE3, [], lambda o: edit_config(o, frames="9"), [CONFIG, "frames", "int"]),
    "other seed": (STAGE3, [], lambda o: edit_config(o, seed=1), [LATENTS, "seed", "stage 2"]),
    "fps zero": (STAGE3, ["--fps", 0], NOTHING, ["--fps"]),
    "video is a folder": (STAGE3, ["--output_video", "outputs/x.mp4"], lambda o: (o / "x.mp4").mkdir(), ["directory"]),
    "no video's name": (STAGE3, ["--output_video", "outputs/video.txt"], NOTHING, ["video.txt", ".mp4"]),
    "other channels": (STAGE3, [], lambda o: edit_latents(o, lambda x: x[:, :3]), ["[1, 3, 3, 4, 6]", "[1, 16,"]),
    "fewer frames": (STAGE3, [], lambda o: edit_latents(o, lambda x: x[:, :, :2]), ["[1, 16, 2,", "stage 2"]),
    "NaN": (STAGE3, [], lambda o: edit_latents(o, poison), ["3 of 1,152", "frames 0, 2 of", "--allow_nan"]),
    "no strips": (STAGE3, ["--strips", 0], NOTHING, ["--strips"]),
    "rows of chips": (STAGE3, ["--chip_rows", 3], NOTHING, ["--chip_rows 3", "[1]"]),
}  # fmt: skip


SLOW_CASES = ("width too large", "frames", "too many steps")  # found after jax is imported, as "height" is


@pytest.mark.parametrize(
    ("script", "arguments", "before", "words"),
    [pytest.param(*case, marks=pytest.mark.slow if what in SLOW_CASES else []) for what, case in CASES.items()],
    ids=CASES,
)
def test_one_line_and_exit_2(script, arguments, before, words, outputs, random_model, run_stage, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before(outputs)
    untouched = contents(outputs)
    if script == STAGE1 and "--model_id" not in arguments:
        arguments = ["--model_id", random_model, *arguments]
    if (script == STAGE1 and "--output_dir" not in arguments) or (script != STAGE1 and "--input_dir" not in arguments):
        arguments = ["--output_dir" if script == STAGE1 else "--input_dir", "outputs", *arguments]
    process = run_stage(script, *arguments, status=2)
    assert len(process.stderr.splitlines()) == 1 and process.stderr.startswith(script), process.stderr
    assert all(word in process.stderr for word in words), process.stderr
    assert process.stdout == ""
    assert contents(outputs) == untouched


@pytest.mark.slow
def test_embeddings_of_another_model(outputs, other_model, run_stage):
    """A config edited by hand to name another model: the shapes give it away."""
    save_torch(load_torch(outputs / EMBEDDINGS), outputs / EMBEDDINGS)  # without metadata
    edit_config(outputs, model_id=str(other_model))
    process = run_stage(STAGE2, "--input_dir", outputs, *SIZE, status=2)
    assert "[B, 40, 48]" in process.stderr and len(process.stderr.splitlines()) == 1, process.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "component", "entry", "words"),
    [
        (STAGE2, "transformer", {"patch_size_t": None}, "not a CogVideoX 1.5"),  # CogVideoX 1.0
        (STAGE2, "transformer", {"ofs_embed_dim": 512}, "not a CogVideoX 1.5"),  # begins with an image
        (STAGE2, "transformer", {"use_learned_positional_embeddings": True}, "not a CogVideoX 1.5"),
        (STAGE2, "transformer", {"time_embed_dim": 48}, "norm_out.linear.weight among them, which has shape [256, 64]"),
        (STAGE3, "vae", {"use_post_quant_conv": True}, "post_quant_conv"),
    ],
)
def test_a_model_of_another_kind(script, component, entry, words, outputs, random_model, tmp_path, run_stage):
    model = Path(shutil.copytree(random_model, tmp_path / "model"))
    config = model / component / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | entry))
    for name in (EMBEDDINGS, LATENTS):
        save_torch(load_torch(outputs / name), outputs / name)  # without metadata
    edit_config(outputs, model_id=str(model))
    process = run_stage(script, "--input_dir", outputs, *(SIZE if script == STAGE2 else ()), status=2)
    assert words in process.stderr and len(process.stderr.splitlines()) == 1, process.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--guidance_scale", 1], ["8 chips", "4 attention heads"]),
        (["--sp_num", 3], ["--sp_num 3", "[1, 2, 4]"]),
        (["--mesh_order", "tp,sp"], ["--mesh_order", "dp,sp,tp"]),
        (["--attention", "splash", "--block_sizes", 100, 128, 128], ["--block_sizes", "block_q=100", "128 works"]),
    ],
)
def test_mesh_or_blocks_that_do_not_fit(options, words, outputs, run_stage):
    process = run_stage(STAGE2, "--input_dir", outputs, *SIZE, *options, status=2, virtual_devices=True)
    assert len(process.stderr.splitlines()) == 1, process.stderr
    assert all(word in process.stderr for word in words), process.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", [STAGE1, STAGE2, STAGE3])
def test_full_disk(script, outputs, random_model, tmp_path):
    """A file size limit stands in for a full disk: one line, and the old files stay."""
    untouched = contents(outputs)
    arguments = {
        STAGE1: ["--prompt", "x", "--model_id", random_model, "--output_dir", outputs],
        STAGE2: ["--input_dir", outputs, *SIZE],
        STAGE3: ["--input_dir", outputs],
    }[script]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # noqa: E731
    process = run_command(stage_command(script, *arguments), preexec_fn=limit)
    assert process.returncode == 2, process.stderr
    assert "cannot write" in process.stderr.splitlines()[-1] and "Traceback" not in process.stderr, process.stderr
    assert contents(outputs) == untouched


@pytest.mark.slow
@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_killed_in_the_middle(kill, outputs):
    """Ctrl-C, or worse, while stage 2 runs: the files of the run before are whole."""
    untouched = contents(outputs)
    process = subprocess.Popen(
        stage_command(STAGE2, "--input_dir", outputs, *SIZE[:-1], 1000),
        env=stage_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    for line in process.stdout:
        if "compiled" in line:
            break
    process.send_signal(kill)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if kill == signal.SIGINT else -signal.SIGKILL), errors
    if kill == signal.SIGINT:
        assert "interrupted" in errors.splitlines()[-1] and "Traceback" not in errors, errors
    assert contents(outputs) == untouched


INTERRUPTED = """
import gc, time
from console import run

def callback(phase, _):
    if phase == "start":
        print("collecting", flush=True)
        time.sleep(2)

def main():
    gc.callbacks.append(callback)
    gc.collect()
    time.sleep(20)

run(main)
"""


def test_interrupted_while_garbage_is_collected():
    """Python forgets what a callback of the collector raises; Ctrl-C must end a stage all the same."""
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "collecting\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=15)
    assert process.returncode == 130 and "interrupted" in errors, errors
