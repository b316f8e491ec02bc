"""Look at the tensors and videos of a run, or compare those of two runs.

    python inspect_tensors.py stage_outputs
    python inspect_tensors.py stage_outputs --compare other_outputs --tolerance 1e-3

A path is a safetensors file, a video, or a folder of them (a stage's outputs, a model, what --dump wrote). One tensor
is in memory at a time, when runs are compared one of each.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from cogvideox.cli import terminal
from cogvideox.cli.parser import ArgumentParser
from cogvideox.cli.program import run
from cogvideox.cli.types import file_path, number, png_path
from cogvideox.errors import UserError
from cogvideox.files import writing
from cogvideox.inspection import causes, pictures, seconds
from cogvideox.inspection.comparison import compare_runs, conclusion_of
from cogvideox.inspection.description import described
from cogvideox.inspection.items import items, opened, other_runs
from cogvideox.inspection.tables import comparison_table, table

MOST_NAMED = 3  # runs that lie inside another one


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(
        __doc__.splitlines()[0], prog="inspect_tensors.py", usage="%(prog)s PATH [PATH ...] [options]"
    )
    parser.add_argument(
        "paths", type=file_path, nargs="+", metavar="PATH", help="safetensors files, videos, or folders of them"
    )
    parser.add_argument(
        "--compare", type=file_path, metavar="PATH", help="compare the one path with this one; differences end with 1"
    )
    parser.add_argument(
        "--noise",
        type=file_path,
        metavar="PATH",
        help="the run of --compare in bfloat16: a difference counts where it exceeds --tolerance times this one's",
    )
    parser.add_argument(
        "--tolerance",
        type=number(float, 0),
        help="normwise relative difference that is allowed (default: 0); with --noise a multiple of it (default: 3)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--plot", type=png_path, help="also draw histograms and contact sheets to this PNG file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Print what is asked for; end with status 1 if two runs differ."""
    arguments = parse_arguments(argv)
    import torch

    torch.set_num_threads(1)  # a chunk is small, and its digest is computed beside it
    opened.cache_clear()  # a file may be another one than in an earlier call
    if arguments.plot:
        writing.check_writable(arguments.plot)
    if arguments.compare is None:
        if arguments.noise is not None or arguments.tolerance is not None:
            raise UserError("--noise and --tolerance belong to --compare")
        describe_runs(arguments)
        return
    if len(arguments.paths) != 1:
        raise UserError(f"--compare takes one path to compare with, not {len(arguments.paths)}")
    sys.exit(compare_two_runs(arguments))


def describe_runs(arguments: argparse.Namespace) -> None:
    """Print and draw what the paths hold."""
    found = [entry for path in arguments.paths for entry in described(path)]
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        show(table(found), *itertools.chain(*map(seconds.lines, arguments.paths)), *left_out(arguments.paths))
    if arguments.plot:
        pictures.plot(arguments.plot, [(path, items(path)) for path in arguments.paths])
        wrote(arguments)


def compare_two_runs(arguments: argparse.Namespace) -> bool:
    """Print and draw how two runs differ; return whether they do."""
    paths = arguments.paths[0], arguments.compare
    ours, theirs = map(items, paths)
    rows = compare_runs(arguments, ours, theirs)
    conclusion = conclusion_of(rows)
    if arguments.json:
        found = {"tensors": rows, "causes": [cause._asdict() for cause in causes.causes(*paths)]}
        print(json.dumps(found | {"conclusion": conclusion}, indent=2))
    else:
        show(*causes.lines(*paths), comparison_table(rows), *seconds.lines(*paths), *left_out(paths), conclusion)
    if arguments.plot:
        pictures.plot_comparison(arguments.plot, (paths[0], ours), (paths[1], theirs), rows)
        wrote(arguments)
    return any(row["differs"] for row in rows)


def show(*lines: str) -> None:
    """Print lines, each where the terminal has room for it."""
    for line in lines:
        print(terminal.fitted(line))


def left_out(paths: Iterable[Path]) -> Iterator[str]:
    """Yield a line for each run that has others in folders inside it, which are no part of it."""
    for path in paths:
        if others := [str(other) for other in other_runs(path)]:
            more = f" and {len(others) - MOST_NAMED} more" if len(others) > MOST_NAMED else ""
            yield f"no part of {path}, but runs of their own: {', '.join(others[:MOST_NAMED])}{more}"


def wrote(arguments: argparse.Namespace) -> None:
    """Say where the picture is; beside JSON on stderr."""
    print(f"wrote {arguments.plot}", file=sys.stderr if arguments.json else sys.stdout)


if __name__ == "__main__":
    run(main)
