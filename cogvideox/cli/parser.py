"""Parse arguments like argparse, with errors of one line."""

import argparse
import sys
from typing import Any, NoReturn

from cogvideox.cli.terminal import fitted
from cogvideox.errors import one_line


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Add the default to the help of an option that has one, unless the help says it itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or "(default: " in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """Parse arguments like argparse, with defaults in the help, no abbreviated options, and errors of one line."""

    def __init__(self, description: str | None = None, **options: Any):
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=HelpFormatter,
            **options,
        )

    def error(self, message: str) -> NoReturn:
        """Print the error as one line on stderr, and end the process with exit status 2."""
        option, _, fault = message.removeprefix("argument ").partition(": ")
        if fault.endswith("one argument"):
            message += f"; a value that begins with a dash is written {option}=-VALUE"
        self.exit(2, fitted(one_line(f"{self.prog}: error: {message} (see --help)"), sys.stderr) + "\n")
