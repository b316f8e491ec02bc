"""Compile a stage for a TPU on a machine without one; report memory, predicted seconds, and where the time goes.

    python -m compile_for_tpu stage2 --topology v6e-8
    python -m compile_for_tpu stage3 --topology v6e-8 --decoder flax
    python -m compile_for_tpu kernel --topology v6e-1 --tokens 25826 --heads 6

The compiler in libtpu runs on any x86-64 Linux machine. The memory that it reports is what the program takes on a TPU.
The seconds are predicted from its schedules and its cost model, not measured.
"""

import argparse
import functools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cogvideox.cli.parser import ArgumentParser
from cogvideox.cli.program import run
from cogvideox.cli.types import file_path
from cogvideox.files import generation_defaults, writing
from cogvideox.run.accelerator import prepare_libraries
from compile_for_tpu import compiler, programs, report, topologies


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(__doc__.splitlines()[0], prog="python -m compile_for_tpu")
    kinds = parser.add_subparsers(dest="what", required=True)
    for what, kind in programs.KINDS.items():
        sub = kinds.add_parser(what, help=kind.help)
        sub.add_argument(
            "--topology", default="v6e-8", help=f"slice to compile for, one of {', '.join(topologies.TOPOLOGIES)}"
        )
        sub.add_argument(
            "--output", type=file_path, help="file for the report, JSON (default: a name in benchmarks/results)"
        )
        kind.add_options(sub)
    arguments = parser.parse_args(argv)
    if hasattr(arguments, "model_id"):
        generation_defaults.complete(arguments, generation_defaults.of_model(arguments.model_id))
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Compile what the command line asks for, print the report and write it as JSON."""
    command = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(command)
    topologies.check(arguments.topology)
    if dump := compiler.dump_folder():
        prepare_libraries()
        trace = functools.partial(programs.KINDS[arguments.what].trace, arguments)
        save = getattr(arguments, "save", None)
        print(json.dumps(compiler.compile_and_report(arguments.what, arguments.topology, trace, dump, save)))
        return
    labels = programs.labels(arguments, defaults=parse_arguments([arguments.what]))
    output = arguments.output or report.RESULTS / report.file_name(arguments.what, arguments.topology, labels)
    described = f"{arguments.what} for {arguments.topology}"
    found = compiler.in_a_process("compile_for_tpu", command, arguments.topology, described)
    with writing.replacing(output) as temporary:
        Path(temporary).write_text(json.dumps(found, indent=2) + "\n")
    print(report.text(found))
    print(f"\nwrote {os.path.relpath(output)}")
    if not found["memory"]["fits"]:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
