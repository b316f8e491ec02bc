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

from cogvideox.cli import terminal
from cogvideox.cli.parser import ArgumentParser
from cogvideox.cli.program import run
from cogvideox.cli.stages import STAGES
from cogvideox.cli.types import file_path
from cogvideox.files import generation_defaults, writing
from cogvideox.run.accelerator import prepare_libraries
from compile_for_tpu import compiler, programs, report, topologies


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(
        __doc__.splitlines()[0],
        prog="python -m compile_for_tpu",
        usage=f"%(prog)s {{{','.join(programs.KINDS)}}} [options]",
    )
    kinds = parser.add_subparsers(dest="what", required=True, metavar="PROGRAM", prog=parser.prog, title="programs")
    by_kind = {}
    for what, kind in programs.KINDS.items():
        by_kind[what] = sub = kinds.add_parser(
            what,
            help=kind.help,
            description=f"Compile {kind.help} for a TPU, and report memory and predicted seconds.",
            usage="%(prog)s [options]",
            others=STAGES,
        )
        sub.group("devices").add_argument(
            "--topology",
            default="v6e-8",
            metavar="SLICE",
            help=f"slice to compile for, one of {', '.join(topologies.TOPOLOGIES)}",
        )
        output = sub.group("input and output").add_mutually_exclusive_group()
        output.add_argument(
            "--output", type=file_path, help=f"file for the report, JSON (default: a name in {report.REPORTS}/)"
        )
        report.add_publish_option(output)
        kind.add_options(sub)
    words = list(sys.argv[1:] if argv is None else argv)
    if found := next((word for word in words if word in by_kind), None):  # it may stand behind options
        words.insert(0, words.pop(words.index(found)))
    arguments = parser.parse_args(words)
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
    name = report.file_name(arguments.what, arguments.topology, labels)
    output = arguments.output or report.folder(arguments.publish) / name
    described = f"{arguments.what} for {arguments.topology}"
    found = compiler.in_a_process("compile_for_tpu", command, arguments.topology, described)
    with writing.replacing(output) as temporary:
        Path(temporary).write_text(json.dumps(found, indent=2) + "\n")
    print(terminal.fitted(report.text(found)))
    print(f"\nwrote {os.path.relpath(output)}")
    if not found["memory"]["fits"]:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
