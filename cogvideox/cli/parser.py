"""Parse arguments like argparse, with a help in groups, and errors of one line that say what to type instead."""

import argparse
import contextlib
import difflib
import itertools
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from cogvideox.cli.terminal import fitted
from cogvideox.errors import one_line

# The titles of groups of options, in the order of the help.
GROUPS = (
    "input and output",
    "video",
    "sampling",
    "speed and memory",
    "devices",
    "looking inside",
    "printed output",
)

# What other programs call some of our options: diffusers, the demo of CogVideo, MaxDiffusion. Each stands for the first
# of these that a program has.
ALIASES = {
    "lora_path": ("lora",),
    "model": ("model_id",),
    "model_path": ("model_id",),
    "num_frames": ("frames",),
    "num_steps": ("num_inference_steps",),
    "output_path": ("output_video", "output_dir"),
    "pretrained_model_name_or_path": ("model_id",),
    "steps": ("num_inference_steps",),
    "torch_dtype": ("dtype",),
}

# What the help calls a value, by the name of the function that reads it.
METAVARS = {
    "int": "N",
    "float": "X",
    "frame_rate": "X",
    "file_path": "FILE",
    "folder_path": "DIR",
    "model_id": "MODEL",
    "model_or_config": "MODEL",
    "png_path": "FILE",
    "utf8": "TEXT",
    "video_path": "FILE",
}

# What a word that belongs to no option is most likely meant for: the first of these that a program has.
OF_WORDS = ("--prompt", "--input_dir")


class HelpFormatter(argparse.HelpFormatter):
    """Name values alike in all programs, and add to the help of an option the default that it has."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)  # names stay whole

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        default = super()._get_default_metavar_for_optional(action)
        return METAVARS.get(getattr(action.type, "__name__", ""), default)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = (action.help or "").removesuffix(" (default: %(default)s)")  # which some Pythons add to a switch
        if "(default: " in text or action.default in (None, "", [], argparse.SUPPRESS):
            return text
        if not isinstance(action.default, bool):
            return f"{text} (default: %(default)s)"
        if isinstance(action, argparse.BooleanOptionalAction):
            return f"{text} (default: {'on' if action.default else 'off'})"
        return text  # a switch that is off until it is given


class ArgumentParser(argparse.ArgumentParser):
    """Parse arguments like argparse, with these differences.

    Hyphens and underscores in the name of an option are alike, and it may be one of ALIASES; no option is abbreviated.
    Errors are one line. That about an unknown option says which is meant, or to which other program it belongs.

    Args:
        description: of the program, for its help.
        others: programs whose options a user may mean, by name, with the functions that add their options.
        options: those of argparse.
    """

    def __init__(
        self,
        description: str | None = None,
        others: "Mapping[str, Callable[[ArgumentParser], None]] | None" = None,
        **options: Any,
    ):
        super().__init__(description=description, allow_abbrev=False, formatter_class=HelpFormatter, **options)
        self._others = others or {}
        self._pairs: set[tuple[str, str]] = set()  # of words that follow each other on the command line
        self._groups = {title: self.add_argument_group(title) for title in GROUPS}  # the help leaves out empty ones

    def group(self, title: str) -> argparse._ArgumentGroup:
        """Return the group of options with one of the titles in GROUPS."""
        return self._groups[title]

    def parse_known_args(  # type: ignore[override]  # the overloads of argparse tell one form of the result from another
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse like argparse, but refuse what belongs to no option before anything else is missed."""
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        words[:end] = map(self._spelled, words[:end])
        self._pairs = {*itertools.pairwise(words)}
        with self._requiring_nothing():
            found, strays = super().parse_known_args(words)
        if strays:
            self.error(self._unknown(strays[0]) if strays[0].startswith("-") else self._stray(strays, found))
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Print the error as one line on stderr, and end the process with exit status 2."""
        option, _, fault = message.removeprefix("argument ").partition(": ")
        if fault.endswith("one argument") and any(one == option and value[:1] == "-" for one, value in self._pairs):
            message += f"; a value that begins with a dash is written {option}=-VALUE"
        self.exit(2, fitted(one_line(f"{self.prog}: error: {message} (see --help)"), sys.stderr) + "\n")

    def _spellings(self) -> dict[str, str]:
        """Return the options of this program by their names without hyphens."""
        return {plain(option): option for option in self._option_string_actions if option.startswith("--")}

    def _spelled(self, word: str) -> str:
        """Return an option, or OPTION=VALUE, as this program spells it; any other word as it is."""
        option, equals, value = word.partition("=")
        if not option.startswith("--") or option in self._option_string_actions:
            return word
        known, name = self._spellings(), plain(option)
        meant = next((known[one] for one in (name, *ALIASES.get(name, ())) if one in known), option)
        return f"{meant}{equals}{value}"

    @contextlib.contextmanager
    def _requiring_nothing(self) -> Iterator[None]:
        """Let no option be required in the body of a `with` statement."""
        candidates: list[Any] = [*self._actions, *self._mutually_exclusive_groups]
        required = [one for one in candidates if one.required]
        for one in required:
            one.required = False
        try:
            yield
        finally:
            for one in required:
                one.required = True

    def _unknown(self, word: str) -> str:
        """Say which option is meant by one that this program does not have."""
        option, known = word.partition("=")[0], self._spellings()
        if plain(option) in known:  # one dash is missing
            return f"unknown option {option}; did you mean {known[plain(option)]}?"
        owners: dict[str, list[str]] = {}
        for program, add_options in self._others.items():
            other = ArgumentParser(prog=program)
            add_options(other)
            if (spelled := other._spelled(option)) in other._option_string_actions:
                owners.setdefault(spelled, []).append(program)
            known = {name: f"{theirs} of {program}" for name, theirs in other._spellings().items()} | known
        for spelled, programs in owners.items():
            return f"unknown option {option}; {spelled} belongs to {' and '.join(programs)}"
        close = [known[name] for name in difflib.get_close_matches(plain(option), known, n=2)]
        return f"unknown option {option}" + (f"; did you mean {' or '.join(close)}?" if close else "")

    def _stray(self, strays: Sequence[str], found: argparse.Namespace) -> str:
        """Say how to give words that belong to no option."""
        words = list(itertools.takewhile(lambda word: not word.startswith("-"), strays))
        fault = f"'{' '.join(words)}' belongs to no option"
        meant = self._spelled(f"--{words[0]}")  # num_frames=81, as MaxDiffusion's options are written
        if "=" in meant and meant.partition("=")[0] in self._option_string_actions:
            return f"{fault}; did you mean {meant}?"
        for option in OF_WORDS:
            if option in self._option_string_actions:
                begun = [found.prompt] if option == "--prompt" and found.prompt else []  # a prompt without quotes
                return f"{fault}; write {option} {_quoted(' '.join([*begun, *words]))}"
        return fault


def plain(option: str) -> str:
    """Return the name of an option without leading dashes, with underscores alone."""
    return option.lstrip("-").replace("-", "_")


def _quoted(text: str) -> str:
    """Return `text` as one word of a shell, in double quotes where these do."""
    return shlex.quote(text) if set(text) & set('"$`\\!') else f'"{text}"'
