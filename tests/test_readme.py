"""README and docs say what is so: their commands run, and options, figures, links and paths are those of the project.

Commands stand in fenced blocks marked bash, one a line, and python blocks beside them. Those of a page run in a copy of
the checkout, in their order, with models and videos as small as a test allows. The project's programs run in this
process, because starting one takes longer than what it does here.
"""

import functools
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import write_figures
from cogvideox.cli.parser import ALIASES, plain
from compile_for_tpu import report
from compile_for_tpu.programs import KINDS
from tests.helpers import CONFIG, ROOT, STAGE1, STAGE2, STAGE3, STAGE3_FLAX, run_command
from tests.in_process import run_here

ENGLISH, CHINESE = "README.md", "README.zh-CN.md"
PAGES = (
    ENGLISH,
    "CONTRIBUTING.md",
    "tiny_model/README.md",
    "tiny_model_i2v/README.md",
    *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md"))),
)
OPTIONS_PAGE = "docs/options.md"
STAGES = (STAGE1, STAGE2, STAGE3, STAGE3_FLAX)

# Commands that cannot run here, as expressions that match all of a command, and why.
CANNOT_RUN = {
    r"make( PYTHON=\S+)? (test|test-fast|lint)": "runs the tests, this one among them, or what they run beside it",
    r"git clone .*|cd cogvideox-tpu": "needs the network, and goes into what it brought",
    r"(\S*pip|\S*python[\d.]* -m (pip|uv)) .*": "installs packages from the network",
    r"gcloud .*": "needs a TPU VM",
    r"\S*python -m benchmarks\.reproduce_tables.*": "compiles the full-size model some sixty times",
    r"\S*python -m benchmarks\.measured_kernels": "needs other projects' packages, of other versions",
    r"(env .* )?\S*python -m fleet .*--(address|preset) .*": "needs a cluster, or a TPU",
    r"(RAY_AUTH_MODE=token )?(\S*/)?ray .*": "starts Ray on other machines, or talks to it",
    r"(git archive|docker|kubectl) .*": "needs a registry of images and a Kubernetes cluster",
}

# Commands that take so long, or need several processes, that another test has them, with checks of its own.
RUN_ELSEWHERE = {
    r"\S*python -m compile_for_tpu stage2 .*--save.*": "test_compile_for_tpu.py::test_executable_round_trip",
    r"\S*python -m compile_for_tpu stage2 .*": "test_compile_for_tpu.py::test_stage2_of_the_tiny_model",
    r"\S*python -m compile_for_tpu stage3 .*": "test_compile_for_tpu.py::test_decoder_round_trip",
    r"\S*python -m compile_for_tpu encoder .*": "test_compile_for_tpu.py::test_encoder",
    r"\S*python -m compile_for_tpu kernel .*": "test_compile_for_tpu.py::test_kernel",
    r"\S*python -m benchmarks\.on_device( --beside diffusers)?": "test_on_device.py::test_everything_runs",
    r"\S*python -m benchmarks\.quality.*": "test_tiny_model.py::test_quality_of_a_few_captions",
    r"\S*python -m tools\.fit_sparse_attention .*": "test_fit_sparse_attention.py::test_known_heads_are_found",
    r"python stage2_transformer\.py .*--sparse_attention .*": "test_sparse_map.py::test_a_run_with_a_map",
    r"\S*python -m tools\.train_tiny_image_model.*": "test_tiny_image_model.py::test_the_recipe_on_a_few_batches",
    r"\S*python -m tools\.train.*": "test_train_tiny_model.py::test_all_parts_and_the_folder_that_comes_out",
    r"python stage2_transformer\.py --num_processes .*": "test_hosts.py::test_latents_of_several_processes",
    r"python -m fleet --prompt_file .*": "test_fleet.py::test_a_full_disk_and_a_killed_driver",
}

# What a page's reader has before its first command.
BEFORE = {
    "docs/files.md": [
        "printf 'a red circle\\na blue square\\n' > prompts.txt",
        "python stage1_text_encoder.py --model_id tiny_model --prompt_file prompts.txt",
    ],
}

MODEL = "random_model"  # in the place of the published one
VIDEO_DEFAULTS = {"--height": 768, "--width": 1360, "--frames": 81}
SMALL_VIDEO = {"--height": "32", "--width": "48", "--frames": "9", "--num_inference_steps": "2"}  # in its place
STATUS = {"--compare": (0, 1)}  # exit statuses other than 0 that an option allows: 1 says that two runs differ


def page(name: str) -> str:
    """Read a page of the project."""
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yield the language and the text of each fenced block."""
    for match in re.finditer(r"^ *```(\w*)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL):
        yield match[1], match[2]


def without_blocks(text: str) -> str:
    """Return a page without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[tuple[str, str]]:
    """Return ("bash", command) and ("python", block) of a page in order; comments are left out of the former."""
    found = []
    for language, block in blocks(text):
        if language == "python":
            found.append((language, block))
        elif language == "bash":
            for line in block.replace("\\\n", " ").splitlines():
                command = re.sub(r"\s+# .*|^#.*", "", line).strip()
                found += [(language, part.strip()) for part in command.split(" && ") if part]
    return found


def entry(table: dict[str, str], command: str) -> str | None:
    """Return the entry of the first expression that matches all of a command, or None."""
    return next((value for pattern, value in table.items() if re.fullmatch(pattern, command)), None)


def is_run(language: str, command: str) -> bool:
    """Whether a command runs here."""
    return language == "python" or not (entry(CANNOT_RUN, command) or entry(RUN_ELSEWHERE, command))


def module_of(words: list[str]) -> tuple[str, list[str]] | None:
    """Return the module of the project that a command line runs, and its arguments; None for other commands."""
    if not re.fullmatch(r"(\.venv/bin/)?python", words[0]):
        return None
    module, arguments = (words[2], words[3:]) if words[1] == "-m" else (words[1].removesuffix(".py"), words[2:])
    return module, arguments


def made_small(module: str, arguments: list[str]) -> list[str]:
    """Return the arguments of a stage, where they are for the published model or its size with small ones instead."""
    options = dict(itertools.pairwise(arguments))
    if f"{module}.py" == STAGE1 and "--model_id" not in options:
        return [*arguments, "--model_id", MODEL]
    is_large = all(int(options.get(name, n)) == n for name, n in VIDEO_DEFAULTS.items())
    if f"{module}.py" == STAGE2 and is_large and not is_of_tiny_model(options.get("--input_dir", "stage_outputs")):
        return [*arguments, *itertools.chain(*SMALL_VIDEO.items())]
    return arguments


def is_of_tiny_model(folder: str) -> bool:
    """Return whether stage 1 has used a tiny model, which says its size, for the prompts in a folder."""
    configs = [json.loads(file.read_text()) for file in Path(folder).rglob(CONFIG)]
    return any(Path(config["model_id"]).name.startswith("tiny_model") for config in configs)


@pytest.fixture
def checkout(tmp_path, monkeypatch, random_model) -> Path:
    """Make a copy of the checkout, with this process' environment as its .venv, and go there."""
    folder = tmp_path / "checkout"
    left_out = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__", "stage_outputs", "training")
    shutil.copytree(ROOT, folder, ignore=left_out)
    (folder / MODEL).symlink_to(random_model)
    (folder / ".venv").mkdir()
    for path in Path(sys.prefix).iterdir():
        (folder / ".venv" / path.name).symlink_to(path)
    for marker in ("installed", "installed-for-tests"):  # so that make finds nothing to install
        (folder / ".venv" / marker).unlink(missing_ok=True)
        (folder / ".venv" / marker).touch()
    monkeypatch.chdir(folder)
    for command in (["git", "init", "--quiet"], ["git", "add", "--all"]):
        subprocess.run(command, check=True)
    return folder


def run_line(command: str) -> None:
    """Run a command of a bash block; of `make demo` the lines that it would run."""
    if command.startswith("make demo"):
        recipe = run_command([*shlex.split(command), "--dry-run", "--no-print-directory"], check=True).stdout
        for line in recipe.splitlines():
            run_line(line)
        return
    words = shlex.split(command)
    program = module_of(words)
    if program is None or program[0] == "fleet":  # the fleet's processes end with the one that has started them
        process = run_command(["bash", "-ec", command] if program is None else [sys.executable, *words[1:]])
        assert process.returncode == 0, f"{command}\n{process.stdout}\n{process.stderr}"
        return
    module, arguments = program
    process = run_here(module, *made_small(module, arguments), folder=Path.cwd())
    allowed = next((statuses for option, statuses in STATUS.items() if option in arguments), (0,))
    assert process.returncode in allowed, f"{command}\n{process.stdout}\n{process.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PAGES if any(is_run(*command) for command in commands(page(name)))])
def test_every_command_runs(name, checkout):
    """In a folder, as a person would go through the page; git sees nothing of it afterwards."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    names: dict[str, object] = {"__name__": "__main__"}
    for language, command in [*(("bash", line) for line in BEFORE.get(name, [])), *commands(page(name))]:
        if not is_run(language, command):
            continue
        if language == "python":
            exec(compile(command, name, "exec"), names)
        else:
            run_line(command)
    unstaged = ["git", "diff", "--name-only"], ["git", "ls-files", "--others", "--exclude-standard"]
    left = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for command in unstaged]
    assert not any(left), f"the commands change files of the repository, or leave some that git sees: {left}"


def test_what_does_not_run_here():
    """Every line of the two lists is needed, and a test that has a command is there."""
    lines = [command for name in PAGES for language, command in commands(page(name)) if language == "bash"]
    for pattern in (*CANNOT_RUN, *RUN_ELSEWHERE):
        assert any(re.fullmatch(pattern, line) for line in lines), f"no page has a command like {pattern}"
    for place in RUN_ELSEWHERE.values():
        file, _, test = place.partition("::")
        assert re.search(rf"^def {test}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), place
    for script in (STAGE1, STAGE2, STAGE3, "make demo", "inspect_tensors.py", "tools.dump_reference"):
        assert any(script in line and is_run("bash", line) for line in lines), f"no command of the pages runs {script}"


@pytest.mark.parametrize("name", [*PAGES, CHINESE])
def test_no_command_hides(name):
    """None stands outside of the blocks that are run."""
    starts = r"^\s*(\$ |make |python |python3 |pip |git |\.venv/)"
    for language, block in blocks(page(name)):
        if language not in ("bash", "python"):
            assert not re.search(starts, block, re.MULTILINE), f"{name}: a command in a block of {language}:\n{block}"
    indented = re.search(r"^ {4,}(\$|make|python3?|pip|git|import|from) .*", without_blocks(page(name)), re.MULTILINE)
    assert not indented, f"{name}: {indented}"


def test_the_readmes_have_the_same_commands_and_figures():
    """And at most 130 lines, and the same sections, images and links to other pages."""
    english, chinese = page(ENGLISH), page(CHINESE)
    assert commands(english) == commands(chinese)
    for pattern in (r"<!-- figure: .*? -->", r"^#+ ", r"\]\(([^)#]+)[^)]*\)", r"^\|[ |-]*\|$", r"`[^`\n]+`"):
        found = [sorted(re.findall(pattern, text, re.MULTILINE)) for text in (english, chinese)]
        found = [[item for item in items if not item.startswith("README")] for items in found]
        assert found[0] == found[1], pattern
    for name, text in ((ENGLISH, english), (CHINESE, chinese)):
        assert len(text.splitlines()) <= 130, f"{name} has {len(text.splitlines())} lines"


# --- Figures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", write_figures.pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_figures_are_those_of_the_results(path):
    """`python -m benchmarks.write_figures` would change nothing."""
    text = path.read_text(encoding="utf-8")
    assert write_figures.with_figures(text) == text, "run: python -m benchmarks.write_figures"
    # Markdown takes a line that begins with a comment for HTML, and ends the paragraph there.
    assert not re.search(r"^ *<!-- figure", text, re.MULTILINE), path.name
    assert len(re.findall("<!-- (?:figure|table): ", text)) == text.count("<!-- / -->"), (
        f"{path.name}: a comment is open"
    )


def test_a_figure_that_differs_is_written(tmp_path):
    """Also in a table; an unknown one is an error of one line."""
    text = "a <!-- figure: tables.json 5/measured .2f -->9<!-- / --> s\n<!-- table: speed -->\nold\n<!-- / -->\n"
    new = write_figures.with_figures(text)
    assert new.startswith("a <!-- figure: tables.json 5/measured .2f -->2.31<!-- / --> s\n<!-- table: speed -->\n| ")
    assert "old" not in new and new.endswith(" |\n<!-- / -->\n") and write_figures.with_figures(new) == new
    for wrong in ("tables.json 5/nothing .2f", "tables.json 5 .2f", "nothing.json 5 .2f", "nothing"):
        with pytest.raises(write_figures.UserError):
            write_figures.figure(wrong)


def test_pages_say_how_far_to_trust_predictions_as_the_tool_does():
    """In the same sentence, with the same range; a Chinese one has its figures."""
    sentence = report.trust()
    for name in (ENGLISH, "docs/compile-for-tpu.md", "docs/performance.md", "docs/tpu-vm.md"):
        assert sentence in " ".join(page(name).split()), name
    figures = re.findall(r"[\d.]+\d", sentence)
    assert len(figures) == 3 and all(figure in write_figures.TABLES["trust in Chinese"]() for figure in figures)


def test_no_predicted_figure_stands_alone():
    """Seconds, GiB and scores of ours that are written somewhere are written everywhere; only logs have old ones."""
    steps = {
        f"{write_figures.step_of(row)['predicted_seconds']:.{digits}f}"
        for row in write_figures.result("tables.json").values()
        for digits in (2, 3)
    }
    scores = {write_figures.FIGURES[f"useful scores at {tokens}"]() for tokens in ("25,826", "45,106")}
    for path in write_figures.pages():
        if path.name in ("CHANGELOG.md", "speed-log.md"):
            continue
        text = write_figures.BLOCK.sub("", write_figures.INLINE.sub("", path.read_text(encoding="utf-8")))
        found = re.findall(rf"(?<![\d.])(?:(?:{'|'.join(steps)}) s|(?:{'|'.join(scores)}))(?![\d.])", text)
        assert not found, f"{path.name}: {found} without comments around"


# --- Links and paths ---------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", [*PAGES, CHINESE, "CHANGELOG.md", "configs/README.md"])
def test_links_lead_somewhere(name):
    text = without_blocks(page(name))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https:", "http:")):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), f"{name} links to {target}"
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), f"{name} links to {target}"


@pytest.mark.parametrize("name", [*PAGES, CHINESE])
def test_paths_exist(name):
    """Python files and folders that a page names; those of models and of other projects have other endings."""
    files = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    names = {Path(file).name for file in files}
    for path in re.findall(r"`([\w./-]+\.py)`", page(name)):
        assert path in files or path in names, f"{name} names {path}"
    for folder in re.findall(
        r"`((?:cogvideox|tests|tools|benchmarks|docs|configs|compile_for_tpu)/[\w./-]*/)`", page(name)
    ):
        assert (ROOT / folder).is_dir(), f"{name} names {folder}"


# What other programs say; the other messages on the page are ours.
FOREIGN = ("uv", "pip", "libtpu", "jax", "No module named pip", "No space left on device")


def test_messages_exist():
    """Those that the page on troubleshooting names, without the parts that differ from time to time."""
    sources = "".join(
        path.read_text() for path in [ROOT / "Makefile", *ROOT.glob("*.py"), *ROOT.glob("cogvideox/**/*.py")]
    )
    rows = re.findall(r"^\| (.+?) \|", page("docs/troubleshooting.md"), re.MULTILINE)
    messages = [message for row in rows for message in re.findall("`([^`]+)`", row) if message not in FOREIGN]
    assert len(messages) > 8
    for message in messages:
        pieces = [
            piece.strip(" ,=") for piece in re.split(r"\.\.\.|\d+(?:\.\d+)?|stage2|tpu\b|prompt|seed|cpu", message)
        ]
        assert any(len(piece) > 6 and piece in sources for piece in pieces), f"no program says '{message}'"


# --- Options -----------------------------------------------------------------------------------------------------


def options_in(text: str) -> set[str]:
    """Return the names of all options in a text; XLA's flags are none."""
    return {name for name in re.findall(r"(?<![\w-])--[a-z][\w-]*", text) if not name.startswith("--xla_")}


@functools.cache
def options_of(module: str, *subcommand: str) -> set[str]:
    """Return the names of all options that the help of a program has."""
    return options_in(run_here(module, *subcommand, "--help", folder=ROOT).stdout) - {"--help"}


def programs() -> Iterator[tuple[str, ...]]:
    """Yield the module of each program of the project, and its subcommand."""
    yield from ((script.removesuffix(".py"),) for script in (*STAGES, "inspect_tensors.py"))
    yield from (("compile_for_tpu.__main__", what) for what in KINDS)
    for folder in ("benchmarks", "fleet", "tools"):
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
    assert options_in("\n".join(rows)) == options_of(script.removesuffix(".py"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PAGES, CHINESE])
def test_options_that_a_page_names_exist(name):
    """Options of other people's programs stand only in the commands that cannot run."""
    text = page(name)
    for _, block in blocks(text):
        for line in block.splitlines():
            if entry(CANNOT_RUN, re.sub(r"\s+# .*", "", line).strip()):
                text = text.replace(line, "")
    known = set().union(*(options_of(*program) for program in programs()), {"--help"}, map("--{}".format, ALIASES))
    assert len(known) > 30
    unknown = {plain(option) for option in options_in(text)} - {plain(option) for option in known}
    assert not unknown, f"{name} names options that no program has: {sorted(unknown)}"


def test_make_lists_its_targets():
    """`make` alone says what there is, and does nothing."""
    targets = re.search(r"^\.PHONY: (.+)$", page("Makefile"), re.MULTILINE)[1].split()
    for command in (["make"], ["make", "help"]):
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        for target in targets:
            assert re.search(rf"^  make {target} +\w", process.stdout, re.MULTILINE), process.stdout
