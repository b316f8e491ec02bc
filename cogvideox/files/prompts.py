"""Read the prompts of a run, each with the image and the seed that belong to it: of the options, or of a file of many.

A file of prompts is plain text with a prompt on each line, or JSON lines with an object on each. The first line that is
not empty decides which: JSON lines begin with an object.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cogvideox.errors import UserError
from cogvideox.files import videos
from cogvideox.files.schemas import PromptLine, parse_json

OBJECT = re.compile(r'\{\s*(["}]|$)')  # how a JSON object begins, and what is to be one; {red|blue} is a text

ARRAY = re.compile(r"\[\s*(\{|$)")  # [cinematic] is a text


class Prompt(NamedTuple):
    """A prompt.

    Attributes:
        text: what the video shows.
        folder: of its files.
        source: where it comes from, in words.
        is_line: whether it is a line of --prompt_file.
        image: the file of the picture that the video begins with, by its absolute path; None for a video of text alone.
        seed: the one that its line says.
    """

    text: str
    folder: Path
    source: str
    is_line: bool = False
    image: Path | None = None
    seed: int | None = None

    def entries(self, height: int | None, width: int | None) -> dict[str, Any]:
        """Return what generation_config.json has of its image, which is encoded with this size, and of its seed."""
        of_image: dict[str, Any] = {"image": str(self.image), "height": height, "width": width} if self.image else {}
        return of_image | ({} if self.seed is None else {"prompt_seed": self.seed})


def read_prompts(file: Path, output_dir: Path, image: Path | None) -> list[Prompt]:
    """Return the prompts of a file, at least one, with folders in `output_dir`; empty lines are passed over.

    Args:
        file: of --prompt_file.
        output_dir: the folder of all of them.
        image: of each line that says none.

    Raises:
        UserError: the file cannot be read, has no prompt, or a line is not what the first one is.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # which stands for \r\n and \r, too
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise UserError(f"--prompt_file {file} cannot be read: {reason}") from error
    found = {f"{file}, line {n}": text for n, line in enumerate(lines, 1) if (text := line.strip())}
    if ARRAY.match(next(iter(found.values()), "")):
        raise UserError(f"--prompt_file {file} is a JSON array; write its objects alone, one on each line")
    if not found:
        raise UserError(f"--prompt_file {file} has no prompt; write one on each line")
    return [
        Prompt(
            line.prompt,
            videos.of_prompt(output_dir, number),
            f"{where},",
            is_line=True,
            image=(file.parent / line.image).absolute() if line.image else image,
            seed=line.seed,
        )
        for number, (where, line) in enumerate(zip(found, _parsed(found), strict=True), 1)
    ]


def _parsed(found: dict[str, str]) -> Iterator[PromptLine]:
    """Yield what the lines of a file of prompts say; raise UserError, which names the line, if one is of another kind.

    `found` has the lines by where they are, in words.
    """
    is_json = OBJECT.match(next(iter(found.values())))
    for where, text in found.items():
        if is_json:
            yield PromptLine(**parse_json(text, where, PromptLine))
        elif OBJECT.match(text):
            raise UserError(f"{where}: this is JSON, but the first line is a plain text; write all lines in one way")
        else:
            yield PromptLine(prompt=text)
