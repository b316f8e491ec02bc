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
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cogvideox.cli.parser import ArgumentParser
from cogvideox.cli.program import run
from cogvideox.cli.types import file_path, number, png_path
from cogvideox.errors import UserError
from cogvideox.files import writing
from cogvideox.inspection import pictures, seconds
from cogvideox.inspection.comparison import compare_runs, conclusion_of, provenance_lines
from cogvideox.inspection.description import described
from cogvideox.inspection.items import items, opened
from cogvideox.inspection.tables import comparison_table, table

if TYPE_CHECKING:
    pass


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
        found = [entry for path in arguments.paths for entry in described(path)]
        print(json.dumps(found, indent=2) if arguments.json else table(found))
        for line in itertools.chain(*map(seconds.lines, [] if arguments.json else arguments.paths)):
            print(line)
        if arguments.plot:
            pictures.plot(arguments.plot, [(path, items(path)) for path in arguments.paths])
        return
    if len(arguments.paths) != 1:
        raise UserError(f"--compare takes one path to compare with, not {len(arguments.paths)}")
    ours, theirs = items(arguments.paths[0]), items(arguments.compare)
    rows = compare_runs(arguments, ours, theirs)
    conclusion = conclusion_of(rows)
    if arguments.json:
        print(json.dumps({"tensors": rows, "conclusion": conclusion}, indent=2))
    else:
        print("\n".join([*provenance_lines(ours, theirs), comparison_table(rows)]))
        for line in seconds.lines(arguments.paths[0], arguments.compare):
            print(line)
        print(conclusion)
    if arguments.plot:
        pictures.plot_comparison(arguments.plot, (arguments.paths[0], ours), (arguments.compare, theirs), rows)
    sys.exit(any(row["differs"] for row in rows))


if __name__ == "__main__":
    run(main)
