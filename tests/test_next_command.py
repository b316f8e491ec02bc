"""The line that a stage, or `utils.py status`, prints of the next command: it runs as it is printed, for this run."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import stage1_text_encoder
import stage2_transformer
import stage3_vae_decoder
from cogvideox.cli import next_command
from cogvideox.files import generation_defaults, sparse_map
from cogvideox.files.names import STATE, VIDEO
from cogvideox.files.state import StateFile
from tests.helpers import EMBEDDINGS, LATENTS, STAGE1, STAGE2, STAGE3, TINY_MODEL, edit_config, values
from tests.in_process import run_here

PROMPT = "it's a red circle"


def printed_command(printed: str) -> list[str]:
    """Return the words of the line that comes last, for a shell."""
    last = printed.strip().splitlines()[-1]
    assert last.startswith("Next: "), printed
    return shlex.split(last.removeprefix("Next: "))


def run_printed(printed: str, folder: Path, status: int = 0) -> subprocess.CompletedProcess:
    """Run the command of the last line of what was printed in `folder`, in this process."""
    interpreter, script, *arguments = printed_command(printed)
    assert (folder / (shutil.which(interpreter) or interpreter)).samefile(sys.executable), interpreter
    assert (folder / script).is_file(), script
    process = run_here(Path(script).name, *arguments, folder=folder)
    assert process.returncode == status, f"{script} {arguments}\n{process.stdout}\n{process.stderr}"
    return process


@pytest.fixture(scope="module")
def encoded(made_once) -> Path:
    """Run stage 1 with the tiny model, and keep what it printed beside the folder of its files."""

    def make(folder: Path) -> None:
        options = ("--prompt", PROMPT, "--negative_prompt=-x", "--model_id", TINY_MODEL, "--output_dir", "out put")
        (folder / "printed").write_text(run_here(STAGE1, *options, folder=folder).stdout)

    return made_once("encoded_by_the_tiny_model", make)


keep = StateFile.keep


def keep_and_end(self, *arguments, **named):
    keep(self, *arguments, **named)
    raise KeyboardInterrupt


@pytest.fixture
def folder(encoded, tmp_path) -> Path:
    return Path(shutil.copytree(encoded, tmp_path / "work"))


@pytest.mark.slow
def test_from_stage_to_stage(folder):
    """Of the tiny model, whose size nobody types; what each stage prints, and what `status` prints after it."""
    printed = (folder / "printed").read_text()
    said = run_here("utils.py", "status", "out put", folder=folder).stdout
    assert printed_command(said) == printed_command(printed)
    process = run_printed(printed, folder)
    assert "made for: --height 64 --width 64 --frames 17 --num_inference_steps 10" in process.stdout, process.stdout
    assert "may look worse" not in process.stdout, process.stdout
    said = run_here("utils.py", "status", "out put", folder=folder).stdout
    assert printed_command(said) == printed_command(process.stdout)
    run_printed(process.stdout, folder)
    assert (folder / "out put" / VIDEO).stat().st_size
    said = run_here("utils.py", "status", "out put", folder=folder).stdout
    assert "fits together" in said and "; mesh dp 1 sp 1 tp 1, layout tp, attention xla," in said, said

    (folder / "out put" / EMBEDDINGS).unlink()
    said = run_here("utils.py", "status", "out put", folder=folder).stdout
    shell = subprocess.run(
        ["bash", "-c", f"{shlex.join(printed_command(said))} --help"], cwd=folder, capture_output=True, check=True
    )
    assert b"usage: stage1" in shell.stdout
    before = values(folder / "out put" / LATENTS)
    run_printed(run_printed(said, folder).stdout, folder)
    assert "fits together" in run_here("utils.py", "status", "out put", folder=folder).stdout
    assert values(folder / "out put" / LATENTS) == before


def test_status_of_no_folder(folder):
    process = run_here("utils.py", "status", "nowhere", folder=folder)
    assert process.returncode == 2 and "nowhere is no folder" in process.stderr, process


@pytest.mark.slow
def test_an_unfinished_run(folder, monkeypatch):
    """`status` says how far it is, and the command that goes on with it, with all options that decide it."""
    lora = {"lora_A": np.ones((2, 192), np.float32) / 9, "lora_B": np.ones((192, 2), np.float32) / 9}
    save_file(
        {f"transformer.transformer_blocks.0.attn1.to_q.{n}.weight": a for n, a in lora.items()},
        folder / "l.safetensors",
    )
    options = ("--preset", "authors", "--num_inference_steps", 4, "--seed", 11, "--fps", 7.5, "--height", 48)
    options += ("--guidance_interval", "0,2", "--scheduler", "ddim", "--cache_schedule", "1-2", "--attention", "xla")
    options += ("--lora", "l.safetensors:0.5", "--no-use_dp", "--dtype", "float32", "--frames", 9)
    weights, patterns = sparse_map.weights_of(str(TINY_MODEL), None), (("dense", *["frames:0"] * 3),) * 4
    of_run = sparse_map.SparseMap(height=48, width=64, frames=9, weights=weights, found={}, patterns=patterns)
    sparse_map.write(folder / "m.json", of_run)
    options += ("--sparse_attention", "m.json", "--dense_steps", 0.5)
    directories = ("--input_dir", "out put", "--output_dir", "other")
    run_here(STAGE2, *directories, *options, folder=folder)
    whole = values(folder / "other" / LATENTS)
    with monkeypatch.context() as patched:
        patched.setattr(StateFile, "keep", keep_and_end)
        process = run_here(
            STAGE2, *directories, *options, "--checkpoint_every", 1, "--restart", "--seed", 12, folder=folder
        )
    assert process.returncode == 130 and (folder / "other" / STATE).exists(), process.stderr

    said = run_here("utils.py", "status", "other", folder=folder).stdout
    assert f"other/{STATE}: an unfinished run of stage 2; 1 of 4 steps are done" in said, said
    assert f"other/{VIDEO}: is not there" in said and STAGE3 not in said, said
    words = printed_command(said)
    assert words[2:6] == ["--input_dir", "out put", "--output_dir", "other"], words
    process = run_printed(said, folder)
    assert "going on after step 1 of 4" in process.stdout, process.stdout
    assert values(folder / "other" / LATENTS) != whole
    edit_config(folder / "out put", seed=99)  # as another run there does
    said = run_here("utils.py", "status", "other", folder=folder).stdout
    assert "stale" not in said and STAGE3 in said, said
    assert printed_command(process.stdout)[2:] == ["--input_dir", "other", "--dtype", "float32"]

    # Without latents generation_config.json says what decided them.
    (folder / "other" / LATENTS).unlink()
    words = printed_command(run_here("utils.py", "status", "other", folder=folder).stdout)
    assert Path(words[1]).name == STAGE1, words  # for nothing says any more that stage 1's files are elsewhere
    shutil.copy(folder / "out put" / EMBEDDINGS, folder / "other")
    said = run_here("utils.py", "status", "other", folder=folder).stdout
    expected = "--height 48 --frames 9 --num_inference_steps 4 --guidance_scale 6.0 --scheduler ddim --use_dynamic_cfg"
    assert expected in said and "--fps 7.5 --seed 12 --lora" in said and "--guidance_interval 0,2" in said, said
    assert f"--cache_schedule 1-2 --sparse_attention {folder}/m.json --dense_steps 0.5" in said, said


@pytest.mark.slow
def test_after_another_prompt(folder, monkeypatch):
    """A state of the prompt before is in the way, so the command says --restart; the settings stay."""
    with monkeypatch.context() as patched:
        patched.setattr(StateFile, "keep", keep_and_end)
        options = ("--input_dir", "out put", "--num_inference_steps", 3, "--checkpoint_every", 1)
        assert run_here(STAGE2, *options, folder=folder).returncode == 130
    options = ("--prompt", "a blue square", "--model_id", TINY_MODEL, "--output_dir", "out put")
    printed = run_here(STAGE1, *options, folder=folder).stdout
    assert printed_command(printed)[2:] == ["--input_dir", "out put", "--num_inference_steps", "3", "--restart"]
    assert printed_command(run_here("utils.py", "status", "out put", folder=folder).stdout) == printed_command(printed)
    run_printed(printed, folder)


# What decides no result: where files are, what is printed and written beside them, how the run starts and ends.
DECIDES_NOTHING = {
    *("input_dir", "output_dir", "output_video", "output_frames", "log_json", "verbose", "quiet", "debug", "force"),
    *(
        "dump",
        "dump_names",
        "dump_steps",
        "dump_stats",
        "dump_shards",
        "dump_queries",
        "dump_heads",
        "profile",
        "executable",
        "compilation_cache",
    ),
    *("num_processes", "process_id", "coordinator_address", "warmup", "warmup_steps", "preview_every"),
    *("checkpoint_every", "prompt", "prompt_file", "model_id", "preset", "decoder", "only"),
}


@pytest.mark.parametrize(
    ("options", "known"),
    [
        (stage1_text_encoder.parse_arguments(["--prompt", "a"]), next_command.OF_STAGE1),
        (stage2_transformer.parse_arguments([]), next_command.OF_STAGE2 | generation_defaults.OURS),
        (stage3_vae_decoder.parse_arguments([], "flax"), next_command.OF_STAGE3),
    ],
    ids=[STAGE1, STAGE2, STAGE3],
)
def test_no_option_is_forgotten(options, known):
    """Each that decides a result comes into the command, and has the default that the stage gives it."""
    assert vars(options).keys() - DECIDES_NOTHING == known.keys() - {"model_id", "only"}
    defaults = {
        name: value for name, value in vars(options).items() if name in known.keys() - generation_defaults.OURS.keys()
    }
    assert defaults == {name: known[name] for name in defaults}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"use_dp": False, "use_k_smooth": True, "restart": False}, ["--use_k_smooth", "--no-use_dp"]),
        (
            {"lora": ["a:1", "b:2"], "block_sizes": [1, 2]},
            ["--lora", "a:1", "--lora", "b:2", "--block_sizes", "1", "2"],
        ),
        ({"preset": "authors", "fps": 16, "scheduler": "ddim"}, ["--scheduler", "ddim", "--preset", "authors"]),
        ({"preset": "draft", "guidance_scale": 6.0, "height": 64}, ["--preset", "draft"]),
        ({"sparse_attention": "auto", "dense_steps": 0.5}, ["--sparse_attention", "auto", "--dense_steps", "0.5"]),
        ({"guidance_scale": 2.0, "frames": 17, "seed": 42, "attention": None}, []),
    ],
    ids=str,
)
def test_words_of_options(options, expected):
    """As they are typed; without what stage 2 takes by itself from the tiny model."""
    line = next_command.stage2(Path("o"), Path("o"), str(TINY_MODEL), options)
    assert sorted(shlex.split(line)[4:]) == sorted(expected), line
    arguments = stage2_transformer.parse_arguments(shlex.split(line)[2:])
    generation_defaults.complete(arguments, generation_defaults.of_model(str(TINY_MODEL)))
    assert all(vars(arguments)[name] == value or name == "lora" for name, value in options.items()), arguments


def test_the_interpreter(tmp_path, monkeypatch):
    """By its name where the shell finds it; of two environments that share one interpreter, the one that runs."""
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "python").symlink_to(os.path.realpath(sys.executable))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "ours" / "python"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for path, expected in (("ours", "python"), ("theirs", str(tmp_path / "ours" / "python"))):
        monkeypatch.setenv("PATH", str(tmp_path / path))
        assert next_command.interpreter() == expected
    monkeypatch.chdir(tmp_path)
    assert next_command.interpreter() == "ours/python"
