"""Say what decided two runs otherwise: options, weights, inputs, versions, as their files have it."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cogvideox.cli.terminal import table
from cogvideox.errors import shortened
from cogvideox.files.provenance import decided_by
from cogvideox.inspection.items import items


class Cause(NamedTuple):
    """An entry that decided files of two runs otherwise: its name, its two values, and the names of the files."""

    name: str
    ours: str
    theirs: str
    files: tuple[str, ...]


def causes(one: Path, other: Path) -> list[Cause]:
    """Return the entries that decided the files of two runs, which are files or folders, otherwise.

    Entries that one of two files lacks, as those of earlier versions do, are none, nor inputs that both runs have: they
    are compared themselves.

    Raises:
        UserError: a file is not what its name says, or what it says of itself is damaged.
    """
    found: dict[tuple[str, str, str], list[str]] = {}
    pairs = list(pairs_of_files(one, other))
    compared = {path.name for path, _ in pairs}
    for path, beside in pairs:
        ours, theirs = decided_by(path), decided_by(beside)
        for name in ours:
            if name in theirs and ours[name] != theirs[name] and name not in compared:
                found.setdefault((name, ours[name], theirs[name]), []).append(path.name)
    return [Cause(*entry, tuple(files)) for entry, files in found.items()]


def lines(one: Path, other: Path) -> Iterator[str]:
    """Yield the `causes` as lines for people."""
    found, rows = causes(one, other), []
    if found:
        yield f"what decided them differs, {one} and {other}:"
        for cause in found:
            ours, theirs = (shortened(value) or "nothing" for value in (cause.ours, cause.theirs))
            rows.append([cause.name, f"{ours} and {theirs}" + f" ({cause.files[0]})" * (len(cause.files) == 1)])
        yield from table(rows)


def pairs_of_files(one: Path, other: Path) -> Iterator[tuple[Path, Path]]:
    """Yield the files of two runs that belong together: those with the same name and folder, or the only two."""
    ours, theirs = (
        {
            file.relative_to(path) if file != path else file: file
            for file in (item.file for item in items(path).values())
        }
        for path in (one, other)
    )
    if len(ours) == len(theirs) == 1:
        yield next(iter(ours.values())), next(iter(theirs.values()))
        return
    yield from ((file, theirs[name]) for name, file in ours.items() if name in theirs)
