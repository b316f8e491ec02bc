"""What is printed fits a terminal of 80 columns; a file or a pipe gets whole lines."""

import json
import re
import shlex
import subprocess

import pytest
import torch
from safetensors.torch import save_file

from cogvideox.cli import terminal
from cogvideox.files.names import CONFIG
from compile_for_tpu import report
from tests.helpers import SIZE, STAGE2, check
from tests.in_process import run_here

TOOL = "inspect_tensors.py"
LONG = "a red circle that moves from the left to the right, slowly, over a field of grass below a grey evening sky"


@pytest.fixture(scope="module")
def dumps(tmp_path_factory):
    """Two dumps with names, shapes and numbers as long as those of the 5B model, whose tensors differ."""
    folder = tmp_path_factory.mktemp("dumps")
    torch.manual_seed(0)
    for name in "ab":
        (folder / name).mkdir()
        tensors = {
            f"step_{i:03}/transformer_blocks.2{i}.attn1.{layer}": torch.randn(2, 48, 17, 64) * -1e-5
            for i in range(5)
            for layer in ("to_out.0", "norm_k")
        }
        metadata = {"order": "execution", "made_from": json.dumps({"prompt": LONG, "seed": 42, "lora": [LONG, LONG]})}
        save_file(tensors, folder / name / "stage2_tensors.safetensors", metadata)
        rows = {f"transformer_blocks.2{i}.attn1.to_out.0": torch.randn(2, 4) * 1e-5 for i in range(5)}
        metadata |= {"statistics": json.dumps(["min", "max", "mean", "std"]), "step": "[0, 1]"}
        save_file(rows, folder / name / "stage2_statistics.safetensors", metadata)
    return folder


def widths(text: str) -> list[int]:
    """Return the columns of the lines that are shown; a bar of progress is drawn over itself."""
    return [len(line.rpartition("\r")[2].rstrip()) for line in text.split("\n")]


def plain(text: str) -> str:
    """Return a text without its breaks and indents."""
    return re.sub(r"\s+", " ", text)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ((TOOL, "a"), 0),
        ((TOOL, "a", "--compare", "b"), 1),
        ((TOOL, "a/" + "x" * 200), 2),
        ((TOOL, "a", "--tolerance", LONG), 2),
    ],
    ids=["table", "comparison", "error", "usage"],
)
def test_tool_fits_a_terminal(arguments, status, dumps):
    """The same words are in it as in a pipe, whose lines are longer."""
    found = check(run_here(*arguments, folder=dumps, columns=80), status)
    whole = check(run_here(*arguments, folder=dumps), status)
    assert max(widths(found.stdout + found.stderr)) <= 80 < max(widths(whole.stdout + whole.stderr)), found.stdout
    words, expected = (set(plain(run.stdout + run.stderr).split()) for run in (found, whole))
    assert all(word in words or len(word) > 80 for word in expected), expected - words


def test_status_and_stage_fit_a_terminal(outputs, tmp_path):
    config = json.loads((outputs / CONFIG).read_text())
    (outputs / CONFIG).write_text(json.dumps(config | {"prompt": LONG}))
    found = check(run_here("utils.py", "status", outputs, folder=tmp_path, columns=80))
    assert LONG in plain(found.stdout) and max(widths(found.stdout)) <= 80, found.stdout
    (outputs / CONFIG).write_text(json.dumps(config))
    found = check(run_here(STAGE2, "--input_dir", outputs, *SIZE, "--verbose", folder=tmp_path, columns=80))
    assert max(widths(found.stdout + found.stderr)) <= 80, found.stdout + found.stderr
    assert "\r" in found.stderr and "transformer.num_layers" in found.stdout


def test_reports_of_the_compile_tool_fit_a_terminal(monkeypatch):
    files = [*report.RESULTS.glob("stage2-*.json"), *report.RESULTS.glob("stage3-*.json")]
    whole = [report.text(json.loads(file.read_text())) for file in files]
    monkeypatch.setattr(terminal, "columns", lambda _: 80)
    assert max(widths("\n".join(whole))) > 160
    for text in whole:
        assert max(widths(terminal.fitted(text))) <= 80 and plain(terminal.fitted(text)) == plain(text)


def test_columns_stand_below_each_other(monkeypatch):
    rows = [["short", "1", "22"], ["a longer name", "333"], ["x", "4", "5"]]
    assert terminal.table(rows) == [
        "  short          1  22",
        "  a longer name  333",
        "  x              4  5",
    ]
    monkeypatch.setattr(terminal, "columns", lambda: 21)
    assert terminal.table(rows) == ["  short          1\n    22", "  a longer name  333", "  x              4\n    5"]


def test_a_command_that_is_wrapped_is_the_same_command(monkeypatch, tmp_path):
    """A shell runs it as it runs the whole line."""
    long, quotes = shlex.quote(LONG), shlex.quote("'it\"s'  $HOME\\" * 9)
    command = f"printf '%s|' --prompt {long} --negative_prompt {quotes} '' --height 480 --width 720 --frames 81"
    monkeypatch.setattr(terminal, "columns", lambda _: 80)
    shown = terminal.fitted(f"{terminal.NEXT}{command}")
    assert max(widths(shown)) <= 80, shown
    whole, wrapped = (
        subprocess.run(["sh", "-c", text], capture_output=True, check=True).stdout
        for text in (command, shown.removeprefix(terminal.NEXT))
    )
    assert whole == wrapped
