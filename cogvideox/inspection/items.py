"""Find the tensors and videos of a run, in the order in which it made them."""

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cogvideox.errors import UserError
from cogvideox.files import tensor_dump, videos
from cogvideox.files.names import CONFIG, VIDEO_SUFFIXES
from cogvideox.files.tensors import unreadable
from cogvideox.files.video_file import read_video

if TYPE_CHECKING:
    import torch
    from safetensors import safe_open

# Where a run's tensors and dumps come in the order of the stages; other tensors come before them, videos after them.
ORDER = {
    **{"prompt_embeds": 0, "negative_prompt_embeds": 1, "image_mean": 2, "image_logvar": 3},
    **{"video_mean": 2, "video_logvar": 3, "stage2": 4, "latents": 5, "stage3": 6, "frames": 7},
}

# The axis along which a tensor goes on, and what a step of it is called, by a pattern of its name and its dimensions.
PROGRESS = (
    (r"(negative_)?prompt_embeds", 3, 1, "token"),
    (r"latents|(image|video)_(mean|logvar)", 5, 2, "latent frame"),
    (r"frames", 4, 0, "frame"),
    (r"step_\d+/(latents|noise_pred|pred_original_sample|prev_sample)", 5, 1, "latent frame"),
    (r"step_\d+/.*norm_[qk]", 4, 2, "token"),
    (r"step_\d+/.*", 3, 1, "token"),
    (r"chunk_\d+/decoder\..*", 4, 0, "frame"),
)


class Item(NamedTuple):
    """One tensor of a safetensors file, one row of a tensor of statistics, or, where `tensor` is None, a video."""

    file: Path
    tensor: str | None
    row: int | None = None

    def load(self) -> "torch.Tensor":
        """Read the tensor, or the video's frames as uint8 [frames, height, width, 3]."""
        import torch

        if self.tensor is None:
            return torch.from_numpy(read_video(self.file))
        tensor = opened(self.file).get_tensor(self.tensor)
        return tensor if self.row is None else tensor[self.row]

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of the file."""
        return {} if self.tensor is None else opened(self.file).metadata() or {}


@functools.cache
def opened(path: Path) -> "safe_open":
    """Open a safetensors file, once; its header is read, and no tensor.

    Raises:
        UserError: the file is not what its name says.
    """
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(unreadable(path, error)) from error


def items(path: Path) -> dict[str, Item]:
    """Return the tensors and videos of a file or a folder by name, in the order of the stages and of numbers in names.

    The name of a tensor is its own, below the folder of its file, so that files may be split in other places. Rows of
    statistics are named as the tensors of a dump are; where a dump has both, there is the tensor. Of a run, the folders
    of other runs inside its own are no part.

    Raises:
        UserError: there is nothing to look at, or a file is not what its name says.
    """
    suffixes, others = {".safetensors", *VIDEO_SUFFIXES}, other_runs(path)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes)
    files = [file for file in files if not any(file.is_relative_to(other) for other in others)]
    if not files:
        raise UserError(f"{path} has no safetensors file and no video" if path.is_dir() else f"{path} does not exist")
    found = []
    for file in files:
        folder = "" if file == path else "".join(f"{part}/" for part in file.relative_to(path).parts[:-1])
        if file.suffix.lower() != ".safetensors":
            found.append((folder + file.name, Item(file, None), 0))
            continue
        names = opened(file).offset_keys()
        rows = tensor_dump.row_names(opened(file).metadata() or {})
        for place, name in enumerate(names):
            found += [(f"{folder}{row}/{name}", Item(file, name, i), place) for i, row in enumerate(rows)]
            found += [(folder + name, Item(file, name), place)] * (not rows)
    return {name: item for name, item, place in sorted(found, key=lambda each: execution_order(*each))}


def other_runs(path: Path) -> list[Path]:
    """Return the folders in that of a run, or of several videos, which are runs of their own."""
    prompts, own = videos.prompts(path), {path, *videos.prompts(path), *videos.videos(path)}
    if prompts == [path] and not (path / CONFIG).exists():
        return []
    return sorted(file.parent for file in path.rglob(CONFIG) if file.parent not in own)


def execution_order(name: str, item: Item, place: int) -> tuple:
    """Return a key that sorts by stage, then by the place in a dump, or by names in which numbers count as numbers."""
    if tensor_dump.in_order(item.metadata):
        return ORDER.get(item.file.name.partition("_")[0], -1), natural_order(str(item.file)), item.row or 0, place
    stage = len(ORDER) if item.tensor is None else ORDER.get(item.tensor, -1)
    return stage, natural_order(name), 0, place


def natural_order(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts by names in which numbers count as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def progress(item: Item, dimensions: int) -> tuple[int | None, str]:
    """Return the axis along which a tensor goes on and what a step of it is called; None where there is none."""
    name = item.tensor or "frames"
    if item.row is None:
        for pattern, ndim, axis, step in PROGRESS:
            if ndim == dimensions and re.fullmatch(pattern, name):
                return axis, step
    return None, ""
