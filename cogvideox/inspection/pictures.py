"""Draw pictures of a run: histograms of its tensors, contact sheets of its latents, frames and videos.

`plot` and `plot_comparison` choose what the figure of `inspect_tensors.py --plot` shows; figure.py draws it.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cogvideox.errors import UserError, shortened
from cogvideox.files import stage_files
from cogvideox.files.latent_pictures import (
    NOT_FINITE,
    NOT_FINITE_TEXT,
    LatentMap,
    fitted_map,
    latents_to_rgb,
    principal_components,
    to_bytes,
)
from cogvideox.files.schemas import TextConfig
from cogvideox.inspection.figure import Histogram, Sheet, draw_figure
from cogvideox.inspection.heat_maps import frames_of_tokens, heat_map

if TYPE_CHECKING:
    import torch

    from cogvideox.inspection.items import Item

MOST_HISTOGRAMS = 24
MOST_SHEETS = 6
MOST_OF_VIDEO = 3  # sheets: latents, frames, encoded video
LATENTS = ("latents", "pred_original_sample")  # names in stage 2's file and in its dumps
MOST_FRAMES = 8  # of a video
MOST_BINS = 80  # of a histogram
CHUNK = 2**20  # elements of a tensor that are counted together


class Entry(NamedTuple):
    """A tensor or a video, as one run or each of two runs has it.

    Attributes:
        name: of the tensor or the video.
        items: one, or two, of which one may be missing.
        note: what the title says beside the name.
    """

    name: str
    items: "Sequence[Item | None]"
    note: str = ""


def plot(path: Path, runs: "Sequence[tuple[Path, Mapping[str, Item]]]") -> None:
    """Draw the tensors and videos of files or folders, by their names, to the PNG file `path`.

    Raises:
        UserError: there is nothing to draw, or the file cannot be written.
    """
    prefixes = [f"{folder}: " if len(runs) > 1 else "" for folder, _ in runs]
    entries = [
        Entry(prefix + name, [item])
        for prefix, (_, items) in zip(prefixes, runs, strict=True)
        for name, item in items.items()
    ]
    tensors = [entry for entry in entries if is_tensor(entry)]
    title = ", ".join(str(folder) for folder, _ in runs)
    names = {entry.name.partition("/")[2] or entry.name for entry in tensors}  # without the step
    if len(names) == 1 and not has_sheet(tensors[0]):
        draw_single(path, title, tensors)
        return
    chosen = tensors[:MOST_HISTOGRAMS]
    if len(chosen) < len(tensors):
        title += f"\nhistograms of the first {len(chosen)} of {len(tensors)} tensors in the order of execution"
    draw(path, title, chosen, entries, [""])


def draw_single(path: Path, title: str, entries: Sequence[Entry]) -> None:
    """Draw a tensor, or the same of several steps, with heat maps beside the histograms, and its tokens as frames."""
    shown = evenly_spread(entries)
    found = [(entry.name, item) for entry in shown for item in entry.items if item]
    sheets = [sheet for one in found if (sheet := frames_of_tokens(*one))]
    draw_figure(path, title, [histogram_of(entry, [""]) for entry in shown], sheets, [heat_map(*one) for one in found])


def plot_comparison(
    path: Path,
    ours: "tuple[Path, Mapping[str, Item]]",
    theirs: "tuple[Path, Mapping[str, Item]]",
    rows: Sequence[Mapping],
) -> None:
    """Draw the tensors and videos of two runs together, and the differences of their pictures, to the PNG file `path`.

    Args:
        rows: the comparison, in the order of execution: of each tensor or video its "name", and "relative", the
            normwise relative difference, if there is one, and whether it "differs".

    Raises:
        UserError: see `plot`.
    """
    a, b = ours[1], theirs[1]
    if len(a) == len(b) == 1:  # two files: their only tensors, whatever they are called
        b = dict(zip(a, b.values(), strict=True))

    def relative(row: Mapping) -> float:
        """Return the difference by which rows are sorted; what one run lacks, or is not finite, differs most."""
        found = row.get("relative")
        return (math.inf if row["differs"] else 0.0) if found is None else found

    def entry(row: Mapping) -> Entry:
        size = row.get("relative")
        note = f"relative difference {size:.2g}" if size else "" if size is None else "equal"
        return Entry(row["name"], (a.get(row["name"]), b.get(row["name"])), note)

    chosen = tensors = [row for row in rows if is_tensor(entry(row))]
    title = f"A: {ours[0]}\nB: {theirs[0]}"
    if len(tensors) > MOST_HISTOGRAMS:
        different = sorted(filter(relative, tensors), key=relative, reverse=True)
        chosen = (different or tensors)[:MOST_HISTOGRAMS]
        title += f"\n{len(different)} of {len(tensors)} tensors differ; histograms of "
        title += f"{len(chosen)} of them, the largest difference first" if different else f"the first {len(chosen)}"
    draw(path, title, [entry(row) for row in chosen], [entry(row) for row in rows], ["A", "B"])


def draw(path: Path, title: str, tensors: Sequence[Entry], all_entries: Sequence[Entry], labels: Sequence[str]) -> None:
    """Draw histograms of `tensors`, and contact sheets of what has one among `all_entries`, to a PNG file."""
    histograms = [histogram_of(entry, labels) for entry in tensors]
    shown, note = chosen_for_sheets([entry for entry in all_entries if has_sheet(entry)])
    title += note
    sheets = [sheet for entry in shown if (sheet := sheet_of(entry, labels))]
    if not histograms and not sheets:
        raise UserError(f"there is nothing to plot in {title.splitlines()[0]}: it has no whole tensor and no video")
    draw_figure(path, title, histograms, sheets)


def chosen_for_sheets(entries: Sequence[Entry]) -> tuple[list[Entry], str]:
    """Return the entries whose pictures are drawn, and a line that says so if they are not all.

    Of several videos, each with latents, frames or an encoded video in a folder of its own, the same are chosen in all
    of these, and what belongs to a video stands together.
    """
    videos: dict[Path, list[Entry]] = {}
    for entry in entries:
        videos.setdefault(next(item.file.parent for item in entry.items if item), []).append(entry)
    are_videos = len(videos) > 1 and all(len(of_video) <= MOST_OF_VIDEO for of_video in videos.values())
    groups = [*videos.values()] if are_videos else [[entry] for entry in entries]
    note = ""
    if len(groups) > MOST_SHEETS:
        what = "videos" if are_videos else "that have some"
        note = f"\npictures of {MOST_SHEETS} of {len(groups)} {what}, evenly spread"
        groups = evenly_spread(groups)
    return [entry for group in groups for entry in group], note


def evenly_spread(things: Sequence[Any]) -> list[Any]:
    """Return at most MOST_SHEETS of these."""
    count = min(MOST_SHEETS, len(things))
    return [things[i] for i in np.linspace(0, len(things) - 1, count).round().astype(int)]


def is_tensor(entry: Entry) -> bool:
    """Return whether an entry is a tensor: no video, and no row of a dump's statistics."""
    return all(item is None or (item.tensor is not None and item.row is None) for item in entry.items)


def histogram_of(entry: Entry, labels: Sequence[str]) -> Histogram:
    """Count the finite values of a tensor of each run, in the same bins."""
    tensors = {label: item.load() for label, item in zip(labels, entry.items, strict=True) if item is not None}
    spreads = {label: spread(tensor) for label, tensor in tensors.items()}
    first = next(iter(tensors.values()))
    bad = {label: missing for label, (_, _, missing) in spreads.items() if missing}
    lines = re.findall(r".{1,41}(?:[./]|$)|.{1,42}", entry.name)  # each ends after a part of the name, if it can
    lines += [" and ".join(dict.fromkeys(map(shape_text, tensors.values()))), *filter(None, [entry.note])]
    lines += [f"{missing:,} values NaN or Inf{f' in {label}' * bool(label)}" for label, missing in bad.items()]
    lines += [f"only in {label}" for label in tensors if len(tensors) < len(labels)]
    title = "\n".join(lines)
    low, high = min(s[0] for s in spreads.values()), max(s[1] for s in spreads.values())
    if low > high:
        return Histogram(title, np.arange(2), {}, bool(bad))
    edges = bin_edges(low, high, first.numel(), whole=not first.is_floating_point())
    bounds = edges[0], edges[-1]
    counts = {
        label: np.sum([np.histogram(chunk, len(edges) - 1, bounds)[0] for chunk in chunks(tensor)], axis=0)
        for label, tensor in tensors.items()
    }
    return Histogram(title, edges, counts, bool(bad))


def shape_text(tensor: "torch.Tensor") -> str:
    """Return the shape and the dtype of a tensor for people."""
    return f"{'x'.join(map(str, tensor.shape)) or 'scalar'} {str(tensor.dtype).removeprefix('torch.')}"


def chunks(tensor: "torch.Tensor") -> Iterator[np.ndarray]:
    """Yield the finite values of a tensor in pieces, float64."""
    for chunk in tensor.flatten().split(CHUNK):
        values = chunk.double().numpy()
        finite = np.isfinite(values)
        yield values if finite.all() else values[finite]


def spread(tensor: "torch.Tensor") -> tuple[float, float, int]:
    """Return the least and the largest finite value (infinity and minus infinity if there is none), and what is not."""
    low, high, finite = math.inf, -math.inf, 0
    for chunk in chunks(tensor):
        if chunk.size:
            low, high = min(low, float(chunk.min())), max(high, float(chunk.max()))
            finite += chunk.size
    return low, high, tensor.numel() - finite


def bin_edges(low: float, high: float, count: int, whole: bool) -> np.ndarray:
    """Return the edges of equal bins for `count` values from `low` to `high`; each holds as many whole numbers."""
    bins = min(max(10, math.isqrt(count)), MOST_BINS)
    if whole:
        width = math.ceil((high - low + 1) / bins)
        return low - 0.5 + width * np.arange(math.ceil((high - low + 1) / width) + 1)
    if not high - low > 1e-9 * max(abs(low), abs(high)):  # one value, in the middle bin
        margin = max(abs(low), 1) / 2
        return np.linspace(low - margin, low + margin, 2 * (bins // 2) + 2)
    return np.linspace(low, high, bins + 1)


def has_sheet(entry: Entry) -> bool:
    """Return whether an entry is a video, or has the name of latents or of frames."""
    names = [(item.tensor or "frames").rsplit("/")[-1] for item in entry.items if item is not None]
    return not any(item and item.row is not None for item in entry.items) and names[0] in (*LATENTS, "frames")


def sheet_of(entry: Entry, labels: Sequence[str]) -> Sheet | None:
    """Return the contact sheet of latents [B, C, T, H, W], of frames or of a video, or None for any other shape."""
    items = {label: item for label, item in zip(labels, entry.items, strict=True) if item is not None}
    tensors = {label: item.load() for label, item in items.items()}
    if not all(tensor.numel() for tensor in tensors.values()):
        return None
    if all(tensor.ndim == 5 for tensor in tensors.values()):
        first = next(iter(items.values()))
        if "/" in str(first.tensor):  # in a dump the frames stand before the channels
            tensors = {label: tensor.transpose(1, 2) for label, tensor in tensors.items()}
        batch, channels = next(iter(tensors.values())).shape[:2]
        latents = {label: tensor[0].float().numpy() for label, tensor in tensors.items()}
        name = entry.name + (f", the first of {batch} videos" if batch > 1 else "")
        return latents_sheet(name + prompt_of(entry), latents, map_of(first, channels))
    videos = {label: tensor.numpy() for label, tensor in tensors.items() if str(tensor.dtype) == "torch.uint8"}
    if len(videos) == len(tensors) and all(video.ndim == 4 and video.shape[3] == 3 for video in videos.values()):
        return frames_sheet(entry.name + prompt_of(entry), videos)
    return None


def prompt_of(entry: Entry) -> str:
    """Return the prompt of an entry's tensors or videos for a title; nothing if it is not known, or not the same."""
    found = set()
    for item in filter(None, entry.items):
        made_from = stage_files.read_made_from(item.file, item.metadata)
        with contextlib.suppress(UserError):
            made_from = made_from or stage_files.read_config(item.file.parent, TextConfig)  # a video's
        found.add(made_from.get("prompt"))
    (prompt, *others) = found
    return f" of «{shortened(str(prompt))}»" if prompt and not others else ""


def map_of(item: "Item", channels: int) -> LatentMap | None:
    """Return the map that was fitted for the model that a file was made with, if there is one for so many channels."""
    model_id = stage_files.read_made_from(item.file, item.metadata).get("model_id")
    mapping = fitted_map(model_id) if model_id else None
    return mapping if mapping is not None and len(mapping.weights) == channels else None


def latents_sheet(name: str, latents: Mapping[str, np.ndarray], mapping: LatentMap | None) -> Sheet:
    """Return the contact sheet of latents [C, T, H, W] of one run or of two, which share a map where they can."""
    first = next(iter(latents.values()))
    mapping = mapping or principal_components(first)
    shared = {label: mapping if len(array) == len(first) else None for label, array in latents.items()}
    rows = {label: latents_to_rgb(array, shared[label]) for label, array in latents.items()}
    title = f"{name}: {mapping.origin}"
    if any(not np.isfinite(array).all() for array in latents.values()):
        title += f"; {NOT_FINITE_TEXT}"
    if len(rows) == 2 and len({array.shape for array in latents.values()}) == 1:
        a, b = (array.astype(np.float64) for array in latents.values())
        with np.errstate(invalid="ignore"):  # infinite minus infinite
            size = np.sqrt(np.square(a - b).mean(axis=0))
        known = np.where(np.isfinite(size), size, 0)
        factor = brightening(known, 1.0)
        gray = to_bytes(known * factor)[..., None].repeat(3, axis=-1)
        rows["|A − B|"] = np.where(np.isfinite(size)[..., None], gray, NOT_FINITE)
        title += f"\nthird row: root mean square of A − B over the channels × {factor:g}; white is {1 / factor:g}"
    return Sheet(title, [f"latent frame {i}" for i in range(max(map(len, rows.values())))], rows)


def frames_sheet(name: str, videos: Mapping[str, np.ndarray]) -> Sheet:
    """Return the contact sheet of a few frames of one or two videos, uint8 [frames, height, width, 3]."""
    count = min(map(len, videos.values()))
    numbers = np.linspace(0, count - 1, min(MOST_FRAMES, count)).round().astype(int)
    rows = {label: frames[numbers] for label, frames in videos.items()}
    title = f"{name}: {len(numbers)} of {count} frames"
    if len(rows) == 2 and len({frames.shape[1:] for frames in videos.values()}) == 1:
        a, b = rows.values()
        gap = np.abs(a.astype(np.int16) - b)
        factor = brightening(gap, 255.0)
        rows["|A − B|"] = to_bytes(gap * factor / 255)
        title += f"; third row: |A − B| of each colour × {factor:g}"
    return Sheet(title, [f"frame {number}" for number in numbers], rows)


def brightening(differences: np.ndarray, white: float) -> float:
    """Return the largest of ..., 0.5, 1, 2, 5, ... by which 99.9 % of the differences are at most `white`."""
    largest = float(np.quantile(differences, 0.999)) or float(differences.max())
    if not largest:
        return 1.0
    power = 10.0 ** math.floor(math.log10(white / largest))
    return max(power * step for step in (1, 2, 5) if power * step * largest <= white * (1 + 1e-9))
