"""The command line: what people type, the help, and a package that is missing."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import inspect_tensors
import stage1_text_encoder
import stage2_transformer
import stage3_vae_decoder
import utils
from cogvideox import packages
from cogvideox.cli import program
from cogvideox.cli.parser import ALIASES, GROUPS
from cogvideox.defaults import ATTENTIONS, DRAFT
from cogvideox.models.shared.layouts import LAYOUTS
from compile_for_tpu import __main__ as compile_tool
from tests.helpers import ROOT, STAGE1, STAGE2, STAGE3, STAGE3_FLAX, run_command, stage_command

# --- What people type --------------------------------------------------------------------------------------------


def of_stage1(*words: str) -> dict:
    return vars(stage1_text_encoder.parse_arguments(words))


def of_stage2(*words: str) -> dict:
    return vars(stage2_transformer.parse_arguments(words))


def of_stage3(*words: str) -> dict:
    return vars(stage3_vae_decoder.parse_arguments(words, "torchax"))


def of_compile_tool(*words: str) -> dict:
    return vars(compile_tool.parse_arguments(words))


@pytest.mark.parametrize(
    ("parse", "typed", "meant"),
    [
        (of_stage1, "--prompt x --model m --output_path b", "--prompt x --model_id m --output_dir b"),
        (of_stage2, "--num-inference-steps 3 --use-dp", "--num_inference_steps 3 --use_dp"),
        (of_stage2, "--no-use-dp --no_use_k_smooth", "--no-use_dp --no-use_k_smooth"),
        (of_stage2, "--num_frames=9 --steps 3", "--frames=9 --num_inference_steps 3"),
        (of_stage2, "--model-path m --lora_path a --output_path b", "--model_id m --lora a --output_dir b"),
        (of_stage2, "--torch_dtype float32 --guidance-scale=2", "--dtype float32 --guidance_scale=2"),
        (of_stage3, "--output-path b.mp4 --no_warmup", "--output_video b.mp4 --no-warmup"),
        (of_compile_tool, "--topology v6e-1 stage2", "stage2 --topology v6e-1"),
        (of_compile_tool, "stage2 --num-frames 9 --model CogVideoX-5B", "stage2 --frames 9 --model_id CogVideoX-5B"),
    ],
)
def test_spellings(parse, typed, meant):
    """Hyphens and underscores are alike, and so are the names of other programs."""
    assert parse(*typed.split()) == parse(*meant.split())


def test_values_stay_as_they_are():
    parsed = of_stage1("--prompt", "--num-frames of a b", "--negative-prompt=--num-frames", "--output-dir", "a-b")
    assert [parsed[name] for name in ("prompt", "negative_prompt")] == ["--num-frames of a b", "--num-frames"]
    assert str(parsed["output_dir"]) == "a-b"


def test_the_compile_tool_has_presets():
    names = DRAFT.keys() - {"fps"}  # which no program depends on
    authors, draft = of_compile_tool("stage2", "--preset", "authors"), of_compile_tool("stage2")
    assert {name: authors[name] for name in names} == {
        "num_inference_steps": 50,
        "guidance_scale": 6.0,
        "scheduler": "dpm",
        "use_dynamic_cfg": True,
    }
    assert of_compile_tool("stage2", "--guidance_scale", "2", "--preset", "authors")["guidance_scale"] == 2
    assert all(draft[name] == DRAFT[name] for name in names)


def test_the_compile_tool_knows_models_by_name():
    """Those in configs/, whose size it takes."""
    for kind in ("stage2", "stage3"):
        of_5b = of_compile_tool(kind, "--model", "cogvideox-5b")
        assert Path(of_5b["model_id"]).samefile(ROOT / "configs" / "CogVideoX-5B")
        assert (of_5b["height"], of_5b["width"], of_5b["frames"]) == (480, 720, 49)


TOOL = "compile_for_tpu"
MAINS = {
    STAGE1: stage1_text_encoder.main,
    STAGE2: stage2_transformer.main,
    STAGE3: stage3_vae_decoder.main,
    "utils.py": utils.main,
    "inspect_tensors.py": inspect_tensors.main,
    TOOL: compile_tool.main,
}


@pytest.mark.parametrize(
    ("name", "typed", "words"),
    [
        (STAGE1, "'a panda'", 'write --prompt "a panda"'),
        (STAGE1, "--prompt a panda --output_dir x", 'write --prompt "a panda"'),
        (STAGE1, "'a \"red\" panda'", "write --prompt 'a \"red\" panda'"),
        (STAGE1, "--promt x", "unknown option --promt; did you mean --prompt"),
        (STAGE1, "-prompt x", "unknown option -prompt; did you mean --prompt?"),
        (STAGE1, "--prompt x --seed 1", f"--seed belongs to {STAGE2} (see"),
        (STAGE1, "--prompt x --num-steps 9", f"--num_inference_steps belongs to {STAGE2} (see"),
        (STAGE1, "--prompt x --fps 9", f"--fps belongs to {STAGE2} and {STAGE3} (see"),
        (STAGE1, "--prompt x --sp_nmu 9", f"did you mean --sp_num of {STAGE2}?"),
        (STAGE1, "--prompt x --zzz", "unknown option --zzz (see --help)"),
        (STAGE1, "--prompt x --output_path a.mp4", "--output_dir: a.mp4 is the name of a video"),
        (STAGE2, "--prompt x", f"--prompt belongs to {STAGE1} (see"),
        (STAGE2, "--guidance 3", "did you mean --guidance_scale or --guidance_interval?"),
        (STAGE2, "num_frames=9", "did you mean --frames=9?"),
        (STAGE2, "outputs", 'write --input_dir "outputs"'),
        (STAGE2, "--attention flash", "splash_exp2"),
        (STAGE3, "--frames 9", f"--frames belongs to {STAGE1} and {STAGE2} (see"),
        (TOOL, "stage2 --seed 3", f"stage2: error: unknown option --seed; --seed belongs to {STAGE2} (see"),
        (
            TOOL,
            "stage2 --model CogVideo-5B",
            "argument --model_id: CogVideo-5B is neither a folder nor one of those in",
        ),
        (TOOL, "stage2 --model CogVideo-5B", "did you mean CogVideoX-5B?"),
        (TOOL, "stage2 --sparse_attention 0.5*frame:1", "--sparse_attention: frame:1 is no pattern"),
        (TOOL, "stage3 --decodr flax", "did you mean --decoder?"),
        ("inspect_tensors.py", "a --comprae b", "did you mean --compare?"),
        ("utils.py", "status a b", "'b' belongs to no option"),
    ],
)
def test_what_is_meant(name, typed, words, capsys):
    with pytest.raises(SystemExit) as end:
        MAINS[name](shlex.split(typed))
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.count("\n") == 1 and words in printed, printed


def test_make_video_runs_the_stages_on_any_model():
    """As a shell reads the lines that make prints."""
    variables = ("MODEL=a model", 'PROMPT=it\'s "red", not $$blue', "OUT=x", "OPTIONS=--preset authors")
    printed = subprocess.run(["make", "-n", "video", *variables], cwd=ROOT, capture_output=True, text=True, check=True)
    commands = [shlex.split(line) for line in printed.stdout.splitlines() if "stage" in line and ".py" in line]
    assert [command[1] for command in commands] == [STAGE1, STAGE2, STAGE3]
    parsed = of_stage1(*commands[0][2:])
    assert (parsed["model_id"], parsed["prompt"]) == ("a model", 'it\'s "red", not $blue')
    assert of_stage2(*commands[1][2:])["preset"] == "authors"
    assert {str(of_stage3(*commands[2][2:])["input_dir"]), str(parsed["output_dir"])} == {"x"}


# --- The help ----------------------------------------------------------------------------------------------------

SCRIPTS = (STAGE1, STAGE2, STAGE3, STAGE3_FLAX, "utils.py", "inspect_tensors.py")
# Prints the help of each program, as JSON. What is no package of `packages.BASE` cannot be imported.
HELP = """
import contextlib, importlib, io, json, sys
from cogvideox import packages

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if packages.is_required(name) and name.partition(".")[0] not in packages.BASE:
            raise ModuleNotFoundError(f"{name} is imported for the help", name=name)

sys.meta_path.insert(0, Hidden())
found = {}
for command in json.loads(sys.stdin.read()):
    name, *words = command.split()
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        importlib.import_module(name.removesuffix(".py")).main([*words, "--help"])
    found[command] = printed.getvalue()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """Return the help of each program, as on a terminal of 80 columns, where neither jax nor torch is installed."""
    commands = [*SCRIPTS, *(f"{TOOL}.__main__{what}" for what in ("", " stage2", " stage3", " kernel"))]
    process = run_command(
        [sys.executable, "-c", HELP], {"COLUMNS": "80", "PYTHONPATH": str(ROOT)}, input=json.dumps(commands)
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_help_can_be_read(helps):
    assert len(helps) == 10
    for name, text in helps.items():
        assert text.startswith("usage: ") and "--help" in text, name
        assert all(len(line) <= 80 for line in text.splitlines()), name
        assert text.index("\n\n") <= 3 * 80, f"{name}: the usage is long"
        assert not re.search(r"\(default:\s+(False|True|None|\[\])?\)", text), name
        assert not re.search(r"[A-Z]{3,}_[A-Z]", re.sub("[A-Z]+_COMPILATION_[A-Z_]+", "", text)), f"{name}: a metavar"
    assert helps[STAGE3] == helps[STAGE3_FLAX].replace(STAGE3_FLAX, STAGE3)


def test_help_has_groups_and_choices(helps):
    """Of stage 2 all of them, in their order; a name stays whole."""
    titles = re.findall(r"^(\w[\w ]+):$", helps[STAGE2], re.MULTILINE)
    assert titles == ["options", *GROUPS]
    assert f"--layout {{{','.join(LAYOUTS)}}}" in helps[STAGE2]
    assert f"--attention {{{','.join(ATTENTIONS)}}}" in helps[STAGE2]
    assert "zai-org/CogVideoX1.5-5B" in helps[STAGE1] and "(default: on)" in helps[STAGE2]
    assert not [alias for alias in ALIASES if re.search(rf"--{alias}\b", "".join(helps.values()))]


def test_names_in_the_help_are_those_of_the_tables():
    from cogvideox.models.transformer.attention import IMPLEMENTATIONS

    assert tuple(IMPLEMENTATIONS) == ATTENTIONS


# --- A package that is missing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [STAGE2, "inspect_tensors.py", TOOL, "tools.dump_reference"])
def test_outside_the_environment(name):
    """A Python without packages says what installs them, for --help too."""
    command = [sys.executable, "-S", *stage_command(name, "--help")[1:]]
    process = run_command(command, cwd=ROOT)
    assert process.returncode == 2 and process.stderr.count("\n") == 1, process.stderr
    assert f"{sys.executable} -m pip install -r requirements.txt" in process.stderr


def test_an_environment_that_is_not_used_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(packages, "ENVIRONMENT", tmp_path)
    assert ", or run" not in packages.missing("torch")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    assert packages.missing("torch.nn").endswith(", or run " + os.path.relpath(tmp_path / "bin" / "python"))


def test_a_package_that_is_missing_later(capsys):
    def lacking(name: str):
        def main(argv):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)

        return main

    with pytest.raises(SystemExit) as end:
        program.run(lacking("imageio_ffmpeg.binaries"), [], "stage")
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.startswith("stage: error: the package imageio_ffmpeg is"), printed
    with pytest.raises(SystemExit) as end:
        program.run(lacking("cogvideox.nothing"), [], "stage")
    assert end.value.code == 1 and "Traceback" in capsys.readouterr().err
