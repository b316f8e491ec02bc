"""Draw pictures of a run: histograms of its tensors, contact sheets of its latents, frames and videos.

`plot` and `plot_comparison` draw the figure of `inspect_tensors.py --plot`, with matplotlib; `preview` draws latents
while a run goes on, with Pillow alone. Both show latents in colours that are linear in them (`LatentMap`).
"""

import argparse
import contextlib
import json
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import utils
import writing
from console import UserError

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

    from inspect_tensors import Item

MOST_HISTOGRAMS = 24
MOST_SHEETS = 6
LATENTS = ("latents", "pred_original_sample")  # names in stage 2's file and in its dumps
MOST_FRAMES = 8  # of a video
MOST_BINS = 80  # of a histogram
CHUNK = 2**20  # elements of a tensor that are counted together


# --- Colours of latents ------------------------------------------------------------------------------------------

MAP_FILE = "latent_rgb.json"  # in the folder of a model's VAE; tools/fit_latent_rgb.py writes it
NOT_FINITE = np.array([255, 0, 255], np.uint8)  # the colour of a latent that is NaN or infinite
NOT_FINITE_TEXT = "magenta is NaN or Inf"
# How red, green and blue grow with each principal component: the largest one is brightness, the others are faint
# tints, so that NOT_FINITE stands out.
COMPONENTS = np.array([[1, 1, 1], [0.6, 0, -0.6], [-0.3, 0.6, -0.3]])


class LatentMap(NamedTuple):
    """A linear map from the channels of latents, as stage 2 saves them, to red, green and blue from 0 to 1.

    Attributes:
        weights: float [channels, 3].
        bias: float [3].
        origin: where the map comes from, for titles.
    """

    weights: np.ndarray
    bias: np.ndarray
    origin: str


def fitted_map(model_id: str) -> LatentMap | None:
    """Read the map that was fitted for a model, or return None if there is none on this machine.

    Args:
        model_id: a folder, or a name on the Hugging Face Hub, of which only the local cache is searched.

    Raises:
        UserError: the file is not what tools/fit_latent_rgb.py writes.
    """
    path = Path(model_id) / "vae" / MAP_FILE
    if not Path(model_id).is_dir():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        with contextlib.suppress(HFValidationError):  # the path of a folder that is gone is no name on the Hub
            cached = try_to_load_from_cache(model_id, f"vae/{MAP_FILE}")
            path = Path(cached) if isinstance(cached, str) else path
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        weights, bias = np.array(stored["weights"], float), np.array(stored["bias"], float)
        origin = f"colours fitted on {stored['fitted_on']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {path} ({error!r}); run python -m tools.fit_latent_rgb again") from error
    if weights.ndim != 2 or weights.shape[1] != 3 or bias.shape != (3,):
        raise UserError(f"{path} has weights {list(weights.shape)}; run python -m tools.fit_latent_rgb again")
    return LatentMap(weights, bias, origin)


def principal_components(latents: np.ndarray) -> LatentMap:
    """Return the map that shows the three largest principal components of latents [C, T, H, W]: COMPONENTS says how.

    Each component is scaled so that all but a hundredth of its values at either end fill the range from 0 to 1. Its
    sign makes the largest of its weights positive. What is not finite is left out.
    """
    values = latents.reshape(len(latents), -1).astype(np.float64)
    values = values[:, np.isfinite(values).all(axis=0)]
    scaled, middle = np.zeros((len(latents), 3)), np.zeros(3)
    if values.size:
        _, directions = np.linalg.eigh(np.atleast_2d(np.cov(values, bias=True)))
        directions = directions[:, ::-1][:, :3]
        directions *= np.sign(directions[np.abs(directions).argmax(axis=0), range(directions.shape[1])])
        low, high = np.quantile(directions.T @ values, (0.01, 0.99), axis=1)
        varied = high - low > 1e-6 * np.abs(values).max()
        scales = np.divide(1, high - low, where=varied, out=np.zeros_like(low))
        scaled[:, : len(scales)] = directions * scales
        middle[: len(scales)] = (low + high) / 2 * scales
    return LatentMap(scaled @ COMPONENTS, 0.5 - middle @ COMPONENTS, "no map is fitted: three principal components")


def latents_to_rgb(latents: np.ndarray, mapping: LatentMap | None) -> np.ndarray:
    """Return latents, float32 [C, T, H, W], as pictures, uint8 [T, H, W, 3].

    Args:
        latents: as stage 2 saves them, that is multiplied by the VAE's scaling_factor.
        mapping: with as many channels; None stands for the latents' own `principal_components`.

    What is not finite has the colour NOT_FINITE.
    """
    mapping = mapping or principal_components(latents)
    finite = np.isfinite(latents).all(axis=0)
    colours = np.tensordot(np.where(finite, latents, 0), mapping.weights, axes=(0, 0)) + mapping.bias
    return np.where(finite[..., None], to_bytes(colours), NOT_FINITE)


def to_bytes(values: np.ndarray) -> np.ndarray:
    """Return values from 0 to 1, clipped to that range, as uint8."""
    return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)


# --- A preview ---------------------------------------------------------------------------------------------------


def preview(latents: np.ndarray, path: Path, mapping: LatentMap | None, title: str) -> None:
    """Write a contact sheet of latents, float32 [C, T, H, W], to the PNG file `path`: a picture for each latent frame.

    Small pictures are enlarged by a whole factor. The title stands above them.

    Args:
        mapping: see `latents_to_rgb`.

    Raises:
        UserError: the file cannot be written.
    """
    from PIL import Image, ImageDraw, ImageFont

    pictures = latents_to_rgb(latents, mapping)
    if not np.isfinite(latents).all():
        title += f"; {NOT_FINITE_TEXT}"
    count, height, width, _ = pictures.shape
    factor = max(1, round(160 / width))
    pictures = pictures.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = height * factor, width * factor

    gap, line = 8, 20
    columns = columns_for(count, most=max(1, 1400 // width))
    font = ImageFont.load_default(14)
    lines = textwrap.wrap(title, max(60, columns * width // 8)) or [""]
    top = gap + line * len(lines)
    sheet_width = max(columns * (width + gap), *(math.ceil(font.getlength(text)) + gap for text in lines)) + gap
    sheet = Image.new("RGB", (sheet_width, top + math.ceil(count / columns) * (line + height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((gap, gap), "\n".join(lines), fill="black", font=font)
    for i, picture in enumerate(pictures):
        x, y = gap + i % columns * (width + gap), top + i // columns * (line + height + gap)
        draw.text((x, y + 1), f"latent frame {i}" if width > 100 else str(i), fill="black", font=font)
        sheet.paste(Image.fromarray(picture), (x, y + line))
    with writing.replacing(path) as temporary:
        sheet.save(temporary, "PNG")


def columns_for(count: int, most: int) -> int:
    """Return how many columns spread `count` pictures evenly over as few rows as `most` columns allow."""
    return math.ceil(count / math.ceil(count / most)) if count else 1


# --- What a figure shows -----------------------------------------------------------------------------------------


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


class Histogram(NamedTuple):
    """The counts of the finite values of a tensor, or of each of two.

    Attributes:
        title: of a few lines.
        edges: float [bins + 1] of the bins.
        counts: by label, int [bins]; empty if there is no finite value.
        alarming: whether the title is to catch the eye.
    """

    title: str
    edges: np.ndarray
    counts: dict[str, np.ndarray]
    alarming: bool


class Sheet(NamedTuple):
    """A contact sheet.

    Attributes:
        title: of a few lines.
        columns: what stands above each picture.
        rows: by label, uint8 [columns, height, width, 3].
    """

    title: str
    columns: Sequence[str]
    rows: dict[str, np.ndarray]


def png_path(text: str) -> Path:
    """Return `text` as the path of a PNG file; an argparse type that accepts no other suffix."""
    path = utils.path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{path} is not the name of a picture; it must end in .png")
    return path


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
    chosen = tensors[:MOST_HISTOGRAMS]
    title = ", ".join(str(folder) for folder, _ in runs)
    if len(chosen) < len(tensors):
        title += f"\nhistograms of the first {len(chosen)} of {len(tensors)} tensors in the order of execution"
    draw(path, title, chosen, entries, [""])


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
        return latents_sheet(name, latents, map_of(first, channels))
    videos = {label: tensor.numpy() for label, tensor in tensors.items() if str(tensor.dtype) == "torch.uint8"}
    if len(videos) == len(tensors) and all(video.ndim == 4 and video.shape[3] == 3 for video in videos.values()):
        return frames_sheet(entry.name, videos)
    return None


def map_of(item: "Item", channels: int) -> LatentMap | None:
    """Return the map that was fitted for the model that a file was made with, if there is one for so many channels."""
    model_id = utils.read_made_from(item.file, item.metadata).get("model_id")
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


# --- Drawing -----------------------------------------------------------------------------------------------------

WIDTH = 14.0  # of the figure; all lengths are inches
HISTOGRAM_COLUMNS, HISTOGRAM_HEIGHT = 4, 2.5
LEAST_COLUMNS, MOST_COLUMNS = 7, 8  # of a contact sheet
AREA: dict = {"color": "tab:blue", "fill": True, "alpha": 0.6}
LOOKS: dict = {"": AREA, "A": AREA, "B": {"color": "tab:orange", "linewidth": 1.2}}
TITLE: dict = {"x": 0.005, "horizontalalignment": "left", "fontsize": 11}
SUBTITLE = TITLE | {"fontsize": 10, "fontweight": "bold"}
STYLE: dict = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "text.parse_math": False,  # a name may have a dollar sign
    "figure.constrained_layout.h_pad": 0.03,
    "figure.constrained_layout.w_pad": 0.03,
    "savefig.dpi": 120,
}


def draw(path: Path, title: str, tensors: Sequence[Entry], all_entries: Sequence[Entry], labels: Sequence[str]) -> None:
    """Draw histograms of `tensors`, and contact sheets of what has one among `all_entries`, to a PNG file."""
    histograms = [histogram_of(entry, labels) for entry in tensors]
    shown = [entry for entry in all_entries if has_sheet(entry)]
    if len(shown) > MOST_SHEETS:
        title += f"\npictures of {MOST_SHEETS} of {len(shown)} that have some, evenly spread"
        shown = [shown[i] for i in np.linspace(0, len(shown) - 1, MOST_SHEETS).round().astype(int)]
    sheets = [sheet for entry in shown if (sheet := sheet_of(entry, labels))]
    if not histograms and not sheets:
        raise UserError(f"there is nothing to plot in {title.splitlines()[0]}: it has no whole tensor and no video")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE), writing.replacing(path) as temporary:
        heights = [histograms_height(histograms)] if histograms else []
        heights += [sheet_height(sheet) for sheet in sheets]
        title_height = 0.25 * (1 + wrapped(title).count("\n")) + 0.1
        figure = Figure(figsize=(WIDTH, sum(heights) + title_height), layout="constrained")
        figure.suptitle(wrapped(title), **TITLE)
        parts = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
        if histograms:
            draw_histograms(parts.pop(0), histograms)
        for part, sheet in zip(parts, sheets, strict=True):
            draw_sheet(part, sheet)
        figure.savefig(temporary, format="png")


def wrapped(title: str) -> str:
    """Return a title in lines that fit the width of the figure."""
    return "\n".join(textwrap.fill(line, 140) for line in title.splitlines())


def histograms_height(histograms: Sequence[Histogram]) -> float:
    """Return the height of all histograms."""
    lines = max(histogram.title.count("\n") for histogram in histograms)
    return math.ceil(len(histograms) / HISTOGRAM_COLUMNS) * (HISTOGRAM_HEIGHT + 0.14 * lines) + 0.3


def draw_histograms(figure: "SubFigure", histograms: Sequence[Histogram]) -> None:
    """Draw the histograms in a grid."""
    compared = any("B" in histogram.counts for histogram in histograms)
    runs = " (A: blue area, B: orange line)" if compared else ""
    figure.suptitle(f"Values: how often each occurs{runs}", **SUBTITLE)
    rows = math.ceil(len(histograms) / HISTOGRAM_COLUMNS)
    axes = figure.subplots(rows, HISTOGRAM_COLUMNS, squeeze=False).flatten()
    for axis, histogram in zip(axes, histograms, strict=False):
        draw_histogram(axis, histogram)
    for axis in axes[len(histograms) :]:
        axis.axis("off")


def draw_histogram(axis: "Axes", histogram: Histogram) -> None:
    """Draw the counts of one run as an area, and those of a second run as a line over it."""
    from matplotlib.ticker import EngFormatter, NullFormatter

    axis.set_title(histogram.title, color="tab:red" if histogram.alarming else "black")
    axis.set_xlabel("value")
    axis.set_ylabel("count")
    if not histogram.counts:
        axis.text(0.5, 0.5, "no finite value", ha="center", va="center", transform=axis.transAxes)
        axis.set(xticks=[], yticks=[])
        return
    axis.set_yscale("log")
    for label, counts in histogram.counts.items():
        axis.stairs(counts, histogram.edges, baseline=0.5, **LOOKS[label])
    axis.set_ylim(bottom=0.5)
    axis.yaxis.set_major_formatter(EngFormatter(sep=""))
    axis.yaxis.set_minor_formatter(NullFormatter())


def blocks(sheet: Sheet) -> list[slice]:
    """Return the pictures of a sheet that stand beside each other; there are several where they are too many."""
    count = len(sheet.columns)
    columns = columns_for(count, MOST_COLUMNS)
    return [slice(start, start + columns) for start in range(0, count, columns)]


def columns_of(sheet: Sheet) -> int:
    """Return the number of columns that a sheet's pictures have room for."""
    return max(LEAST_COLUMNS, columns_for(len(sheet.columns), MOST_COLUMNS))


def sheet_height(sheet: Sheet) -> float:
    """Return the height of a contact sheet."""
    _, height, width, _ = next(iter(sheet.rows.values())).shape
    picture = ((WIDTH - 0.3) / columns_of(sheet) - 0.06) * height / width
    return len(blocks(sheet)) * (len(sheet.rows) * (picture + 0.06) + 0.2) + 0.25 * (
        1 + wrapped(sheet.title).count("\n")
    )


def draw_sheet(figure: "SubFigure", sheet: Sheet) -> None:
    """Draw the pictures of a sheet, a row for each run and one for the differences."""
    figure.suptitle(wrapped(sheet.title), **SUBTITLE)
    columns, parts = columns_of(sheet), blocks(sheet)
    axes = figure.subplots(len(parts) * len(sheet.rows), columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i, part in enumerate(parts):
        for j, (label, pictures) in enumerate(sheet.rows.items()):
            row = axes[i * len(sheet.rows) + j]
            for axis, picture in zip(row, pictures[part], strict=False):
                axis.axis("on")
                axis.set(xticks=[], yticks=[])
                axis.imshow(picture)
            row[0].set_ylabel(label, fontsize=10)
            if j == 0:
                for axis, name in zip(row, sheet.columns[part], strict=False):
                    axis.set_title(name)
