"""The READMEs' commands are run, and the options that the pages name are those that the programs have.

Commands stand in fenced blocks marked bash, one a line, and python blocks beside them. They run in a copy of the
checkout, in the order of the page, with a model and a video as small as a test allows.
"""

import functools
import itertools
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import HAS_LIBTPU, ROOT, STAGE1, STAGE2, STAGE3, STAGE3_FLAX, run_command, stage_command

READMES = ("README.md", "README.zh-CN.md")
OPTIONS_PAGE = "docs/options.md"
STAGES = (STAGE1, STAGE2, STAGE3, STAGE3_FLAX)
COMPILE_TOOL = "compile_for_tpu"

# Commands that cannot run here, as expressions that match all of a command, and why.
CANNOT_RUN = {
    r"make( PYTHON=\S+)? (test|test-fast|lint)": "runs the tests, this one among them, or what they run beside it",
    r"make PYTHON=\S+ .*": "asks for a Python that may not be here",
    r"git clone .*": "needs the network",
    r"(\S*pip|\S*python[\d.]* -m pip|\S*uv|\S*python[\d.]* -m uv) .*": "installs packages from the network",
    r"\S*python[\d.]* -m venv .*": "makes an environment, in the place of the tests' own",
    r"(sudo|gcloud|ssh|scp|curl|wget) .*": "changes this machine, or needs another one",
    r"(hf|huggingface-cli) .*": "downloads the published model",
    r"python -m benchmarks\.reproduce_tables.*": "compiles the full-size model many times, for more than an hour",
}

MODEL = "random_model"  # as wide as eight chips need, and in the place of the published one
SMALL_VIDEO = {"--height": 64, "--width": 96, "--frames": 17, "--num_inference_steps": 4}  # at most
VIDEO_DEFAULTS = {"--height": 768, "--width": 1360, "--frames": 81, "--num_inference_steps": 10}

# Commands that run, as expressions found at their start. What is added to them comes after their own options: a model
# where they name none or the published one, a video of at most SMALL_VIDEO, and the options that stand here.
PROGRAM = r"(\w+=\S+ )*(\.venv/bin/)?python "
RUN = {
    r"make( help| clean| demo.*)?$": [],
    r"(source|export|cd|ls|cat) ": [],
    PROGRAM + r"stage1_text_encoder\.py ": ["model"],
    PROGRAM + r"stage2_transformer\.py": ["video"],
    PROGRAM + r"stage3_vae_decoder(_flax)?\.py": [],
    PROGRAM + r"-m compile_for_tpu stage2": ["model", "video"],
    PROGRAM + r"-m compile_for_tpu stage3": ["model", "video"],
    PROGRAM + r"-m compile_for_tpu kernel": [],
    PROGRAM + r"-m benchmarks\.quality": ["--captions", "1", "--videos", "1"],
    PROGRAM + r"-m benchmarks\.stage_timing": ["video"],
    PROGRAM + r"-m benchmarks\.on_device": ["--minutes", "0.3"],
    PROGRAM + r"-m tools\.make_tiny_model": [],
    PROGRAM + r"-m tools\.train_tiny_model": ["--effort", "0.002", "--device", "cpu"],
    PROGRAM + r"-c ": [],
    PROGRAM + r"\S+\.py --help$": [],
}


def page(name: str) -> str:
    """Read a page of the project."""
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yield the language and the text of each fenced block."""
    for match in re.finditer(r"^ *```(\w*)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL):
        yield match[1], match[2]


def commands(text: str) -> list[str]:
    """Return the commands of a page in order: the lines of bash blocks without comments, and whole python blocks."""
    found = []
    for language, block in blocks(text):
        if language == "python":
            found.append(shlex.join([".venv/bin/python", "-c", block]))
        elif language == "bash":
            for line in block.replace("\\\n", " ").splitlines():
                command = re.sub(r"\s+# .*|^#.*", "", line).strip()
                found += [part.strip() for part in command.split(" && ") if part]
    return found


def reason_not_to_run(command: str) -> str | None:
    """Return why a command cannot run here, or None."""
    return next((reason for pattern, reason in CANNOT_RUN.items() if re.fullmatch(pattern, command)), None)


def made_small(command: str) -> str:
    """Return a command with the options added that RUN asks for; a command that is not in RUN fails the test."""
    additions = [added for pattern, added in RUN.items() if re.match(pattern, command)]
    assert additions, f"'{command}' is neither in RUN nor in CANNOT_RUN"
    own = shlex.split(command)
    options = dict(itertools.pairwise(own))
    added = []
    for addition in additions[0]:
        if addition == "model":
            added += [] if "tiny_model" in options.get("--model_id", "") else ["--model_id", MODEL]
        elif addition == "video":
            sizes = {name: int(options.get(name, default)) for name, default in VIDEO_DEFAULTS.items()}
            for name, most in SMALL_VIDEO.items():
                has_steps = "compile_for_tpu" not in command or name != "--num_inference_steps"
                added += [name, str(most)] if has_steps and sizes[name] > most else []
        else:
            added.append(addition)
    if not added:
        return command
    rest = own.index("--") if "--" in own else len(own)
    return shlex.join([*own[:rest], *added, *own[rest:]])


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """Make a copy of the checkout, with this process' environment as its .venv and a small model."""
    from tools.make_tiny_model import make_pipeline

    folder = tmp_path_factory.mktemp("scratch") / "checkout"
    left_out = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__", "stage_outputs", "training")
    shutil.copytree(ROOT, folder, ignore=left_out)
    (folder / "stage_outputs").mkdir()
    (folder / ".venv").mkdir()
    for entry in Path(sys.prefix).iterdir():
        (folder / ".venv" / entry.name).symlink_to(entry)
    for marker in ("installed", "installed-for-tests"):  # so that make finds nothing to install
        (folder / ".venv" / marker).unlink(missing_ok=True)
        (folder / ".venv" / marker).touch()
    make_pipeline(folder / MODEL, num_attention_heads=8)
    return folder


@pytest.mark.slow
def test_every_command_runs(checkout):
    """In one folder, as a person would go through the pages; what stands on both is run once."""
    environment = {"HOME": str(checkout), "HF_HUB_OFFLINE": "1"}
    seen = []
    for name in READMES:
        session = []  # lines that change the shell that later commands run in
        for command in commands(page(name)):
            without_compiler = COMPILE_TOOL in command and not HAS_LIBTPU
            if reason_not_to_run(command) or without_compiler or command in seen:
                continue
            small = made_small(command)
            lines = "\n".join([*session, small])
            process = run_command(["bash", "-ec", lines], cwd=checkout, env=environment)
            assert process.returncode == 0, f"{name}: {command}\nas {small}\n{process.stdout}\n{process.stderr}"
            if re.match("(source|export|cd) ", command):
                session.append(command)
            else:
                seen.append(command)
    for script in (STAGE1, STAGE2, STAGE3):
        assert any(script in command for command in seen), f"no command of the READMEs runs {script}"
    assert any(command.startswith("make demo") for command in seen)


@pytest.mark.parametrize("name", READMES)
def test_every_command_is_known(name):
    """Each is in one of the two lists, and none hides outside of the blocks that are run."""
    text = page(name)
    assert any(not reason_not_to_run(command) for command in commands(text))
    for command in commands(text):
        assert reason_not_to_run(command) or made_small(command)
    starts = r"^\s*(\$ |make |python |python3 |pip |git |\.venv/)"
    for language, block in blocks(text):
        if language not in ("bash", "python"):
            assert not re.search(starts, block, re.MULTILINE), (
                f"{name} has a command in a block of {language}:\n{block}"
            )
    outside = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert not (line := re.search(r"^ {4,}(\$|make|python3?|pip|git) .*", outside, re.MULTILINE)), f"{name}: {line[0]}"


def options_in(text: str) -> set[str]:
    """Return the names of all options in a text; XLA's flags are none."""
    return {name for name in re.findall(r"(?<![\w-])--[a-z][\w-]*", text) if not name.startswith("--xla_")}


@functools.cache
def options_of(program: str, *subcommand: str) -> set[str]:
    """Return the names of all options that the help of a program has."""
    process = run_command(stage_command(program, *subcommand, "--help"), cwd=ROOT, check=True)
    return options_in(process.stdout) - {"--help"}


def programs() -> Iterator[tuple[str, ...]]:
    """Yield the command line of each program of the project."""
    yield from ((stage,) for stage in STAGES)
    yield ("inspect_tensors.py",)
    yield from ((COMPILE_TOOL, what) for what in ("stage2", "stage3", "kernel"))
    for folder in ("benchmarks", "tools"):
        for file in sorted((ROOT / folder).glob("*.py")):
            if '__name__ == "__main__"' in file.read_text():
                yield (f"{folder}.{file.stem}",)


def sections(text: str) -> dict[str, str]:
    """Return what the options page says of each script: from the heading that names it to the next such heading."""
    texts, names = {}, []
    for line in text.splitlines():
        if line.startswith("#"):
            names = re.findall(r"\w+\.py", line)
        for name in names:
            texts[name] = f"{texts.get(name, '')}{line}\n"
    return texts


@pytest.mark.parametrize("script", STAGES)
def test_options_page_says_what_help_says(script):
    """Every option of the help has its place in the table, and the table has no other."""
    section = sections(page(OPTIONS_PAGE)).get(script)
    assert section, f"{OPTIONS_PAGE} has no heading that names {script}"
    rows = re.findall(r"^\|([^|]*--[^|]*)\|", section, re.MULTILINE)
    assert options_in("\n".join(rows)) == options_of(script)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*READMES, OPTIONS_PAGE])
def test_options_that_a_page_names_exist(name):
    """Options of other people's programs stand only in the commands that cannot run."""
    text = page(name)
    for _, block in blocks(text):
        for line in block.splitlines():
            if reason_not_to_run(re.sub(r"\s+# .*", "", line).strip()):
                text = text.replace(line, "")
    known = set().union(*(options_of(*program) for program in programs()), {"--help"})
    assert len(known) > 30
    assert not (unknown := options_in(text) - known), f"{name} names options that no program has: {sorted(unknown)}"


def test_make_lists_its_targets():
    """`make` alone says what there is, and does nothing."""
    targets = re.search(r"^\.PHONY: (.+)$", page("Makefile"), re.MULTILINE)[1].split()
    for command in (["make"], ["make", "help"]):
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        for target in targets:
            assert re.search(rf"^  make {target} +\w", process.stdout, re.MULTILINE), process.stdout
