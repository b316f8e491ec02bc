"""Fit what is printed to the width of a terminal; files and pipes get whole lines."""

import io
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, TextIO

LINE_SECONDS = 30  # at least between two lines of progress, where stderr is no terminal
NEXT = "Next: "  # what a line begins with that is a command to run next


def columns(stream: TextIO | None = None) -> int | None:
    """Return how many characters a line of a stream, by default stdout, has room for; None if it is no terminal."""
    return shutil.get_terminal_size().columns if (stream or sys.stdout).isatty() else None


def fitted(text: str, stream: TextIO | None = None) -> str:
    """Return a text whose lines fit a terminal: long ones go on below, under the second column if there is one.

    A command, after NEXT, goes on after a backslash, so that it can be copied.
    """
    width = columns(stream)
    return text if width is None else "\n".join(_wrapped(line, width) for line in text.split("\n"))


def table(rows: Sequence[Sequence[str]], indent: int = 2) -> list[str]:
    """Return a text for each row of a table, with columns below each other, indented by so many spaces.

    Where the terminal is too narrow for a row, its last columns stand in lines below the first ones. A row may have
    fewer cells than others; its last one may be of any length.
    """
    most = max(map(len, rows), default=0)
    sizes = [
        max((len(cells[i]) for cells in rows if i < len(cells) - (len(cells) < most)), default=0) for i in range(most)
    ]
    room, parts, used = columns(), [[0]], indent + (sizes or [0])[0]
    for i, size in enumerate(sizes[1:], 1):
        if room is not None and used + 2 + size > room:
            parts.append([])
            used = indent  # which is 2 more below
        parts[-1].append(i)
        used += 2 + size
    texts = []
    for cells in rows:
        shown = ["  ".join(f"{cells[i]:<{sizes[i]}}" for i in part if i < len(cells)).rstrip() for part in parts]
        texts.append("\n".join(" " * (indent + 2 * (n > 0)) + line for n, line in enumerate(shown) if line or not n))
    return texts


def bar_options() -> dict[str, Any]:
    """Return options of tqdm: a bar on a terminal, and elsewhere a line now and then."""
    if sys.stderr.isatty():
        return {}
    return {"file": _Lines(), "ncols": 0, "miniters": 1, "mininterval": LINE_SECONDS}


class _Lines(io.TextIOBase):
    """A file for tqdm that puts each state of its bar on a line of its own, on stderr."""

    def write(self, text: str) -> int:
        """Write what tqdm shows, without the characters by which it draws over the state before."""
        if shown := text.strip("\r\n").rstrip():
            print(shown, file=sys.stderr, flush=True)
        return len(text)


def _wrapped(line: str, width: int) -> str:
    if len(line) <= width:
        return line
    if line.startswith(NEXT):
        return _wrapped_command(line, width)
    first = re.match(r" *\S+(?: \S+)* {2,}(?=\S)", line)  # the first column of a table, and the space after it
    indent = len(first[0]) if first and len(first[0]) <= width // 2 else len(line) - len(line.lstrip()) + 2
    return textwrap.fill(line, width, subsequent_indent=" " * indent, break_on_hyphens=False)


def _wrapped_command(line: str, width: int) -> str:
    """Return a command in lines that end with a backslash, between its arguments or within a long one's quotes."""
    lines, most = [NEXT.rstrip()], width // 2
    for argument in shlex.split(line.removeprefix(NEXT)):
        pieces = [argument]
        if len(shlex.quote(argument)) + 6 > width:
            pieces = re.findall(rf"(?s).{{1,{most}}}(?: |$)|.{{1,{most}}}", argument)
        if len(lines[-1]) + len(shlex.quote(pieces[0])) + 3 > width:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += f" {shlex.quote(pieces[0])}"
        for piece in pieces[1:]:  # at the beginning of a line, so that a shell joins it to the one before
            lines[-1] += "\\"
            lines.append(shlex.quote(piece))
    return "\n".join(lines)
