"""The tables of measurements beside predictions: their rows, and what is kept of some of them. Nothing is compiled."""

import json

import pytest

import compile_for_tpu.__main__ as tool
from benchmarks import reports, reproduce_tables
from cogvideox.errors import UserError
from compile_for_tpu import programs, report


@pytest.mark.parametrize(("row", "tokens"), [("1", 45106), ("7", 25826), ("10", 39826), ("11", 25826)])
def test_tokens_of_a_row(row, tokens):
    """Tokens as the authors of the measurements give them."""
    assert 226 + reproduce_tables.video_tokens(reproduce_tables.ROWS[row].size) == tokens


def test_rows_that_ran_join_the_saved_ones(tmp_path):
    row = lambda seconds: {"measured": 1.0, "predicted_seconds": seconds, "ratio": seconds}  # noqa: E731
    report.save_rows(tmp_path / "tables.json", {"splash": row(3.0), "2": row(1.5)}, reproduce_tables.ROWS)
    reproduce_tables.save({"10": row(1.2), "2": row(1.4)}, tmp_path)
    saved = json.loads((tmp_path / "tables.json").read_text())
    assert list(saved) == ["2", "10", "splash"]
    assert [found["ratio"] for found in saved.values()] == [1.4, 1.2, 3.0]
    assert (tmp_path / "tables.png").read_bytes().startswith(b"\x89PNG")


def test_rows_of_the_repository_are_those_of_the_code():
    for name, saved in json.loads(report.TABLES.read_text()).items():
        row = json.loads(json.dumps(reproduce_tables.ROWS[name]._asdict()))
        assert {field: saved[field] for field in row} == row, name
        assert saved["ratio"] == pytest.approx(saved["predicted_seconds"] / saved["measured"])


def test_published_reports_are_those_of_the_commands():
    """Each command writes a file that is there, no two the same, and there are no others."""
    names = []
    for command in reports.commands():
        arguments = tool.parse_arguments(command.split())
        labels = programs.labels(arguments, defaults=tool.parse_arguments([arguments.what]))
        names.append(report.file_name(arguments.what, arguments.topology, labels))
    there = [path.name for what in programs.KINDS for path in report.RESULTS.glob(f"{what}-*.json")]
    assert sorted(names) == sorted(there)


def test_commands_run_at_a_time_and_failures_are_told(capfd):
    """All run, each says how it ended, and the error comes at the end."""
    jobs = [["json.tool", "--help"], ["json.tool", "nothing.json"], ["json.tool", "--help"]]
    with pytest.raises(UserError, match="1 of 3 failed"):
        reports.run(jobs, 2)
    lines = [line for line in "".join(capfd.readouterr()).splitlines() if " s  json.tool" in line]
    assert len(lines) == 3 and sum("No such file" in line for line in lines) == 1, lines
