"""Draw histograms and contact sheets with matplotlib."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cogvideox.files import writing
from cogvideox.files.contact_sheet import columns_for
from cogvideox.files.latent_pictures import NOT_FINITE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure


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


class HeatMap(NamedTuple):
    """A tensor as matrices, such as one of each prompt.

    Attributes:
        rows, columns: what stands along them.
        shape: how many of them the matrices stand for, which may have been reduced.
        matrices: by label, float [rows, columns].
    """

    rows: str
    columns: str
    shape: tuple[int, int]
    matrices: dict[str, np.ndarray]


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


WIDTH = 14.0  # of the figure; all lengths are inches
HISTOGRAM_COLUMNS, HISTOGRAM_HEIGHT = 4, 2.5
HEAT_MAP_HEIGHT = 3.6
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


def draw_figure(
    path: Path,
    title: str,
    histograms: Sequence[Histogram],
    sheets: Sequence[Sheet],
    heat_maps: Sequence[HeatMap | None] = (),
) -> None:
    """Draw histograms, and contact sheets below them, to a PNG file.

    If there are heat maps, there is one for each histogram, or None, and stands beside it.

    Raises:
        UserError: the file cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE), writing.replacing(path) as temporary:
        heights = [HEAT_MAP_HEIGHT] * len(heat_maps) or ([histograms_height(histograms)] if histograms else [])
        heights += [sheet_height(sheet) for sheet in sheets]
        title_height = 0.25 * (1 + wrapped(title).count("\n")) + 0.1
        figure = Figure(figsize=(WIDTH, sum(heights) + title_height), layout="constrained")
        figure.suptitle(wrapped(title), **TITLE)
        parts = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
        for histogram, heat_map in zip(histograms, heat_maps, strict=False):
            draw_heat_map(parts.pop(0), histogram, heat_map)
        if histograms and not heat_maps:
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


def draw_heat_map(figure: "SubFigure", histogram: Histogram, heat_map: HeatMap | None) -> None:
    """Draw a histogram, and the matrices of the same tensor beside it, which share their colours."""
    import matplotlib as mpl

    matrices = heat_map.matrices if heat_map else {"": np.zeros((1, 1))}
    axes = figure.subplots(1, 1 + len(matrices), width_ratios=[1, *[3 / len(matrices)] * len(matrices)])
    draw_histogram(axes[0], histogram)
    if heat_map is None:
        axes[1].axis("off")
        return
    finite = np.concatenate([matrix[np.isfinite(matrix)] for matrix in matrices.values()])
    most = float(np.quantile(np.abs(finite), 0.999)) if finite.size else 0.0
    signed = bool(finite.size) and finite.min() < 0
    colours = mpl.colormaps["RdBu_r" if signed else "viridis"].with_extremes(bad=tuple(NOT_FINITE / 255))
    rows, columns = heat_map.shape
    for axis, (label, matrix) in zip(axes[1:], matrices.items(), strict=True):
        axis.set_title(label)
        image = axis.imshow(
            np.where(np.isfinite(matrix), matrix, np.nan),
            aspect="auto",
            interpolation="nearest",
            cmap=colours,
            vmin=-most if signed else 0.0,
            vmax=most or 1.0,
            extent=(-0.5, columns - 0.5, rows - 0.5, -0.5),
        )
        axis.set_xlabel(heat_map.columns)
        axis.set_ylabel(heat_map.rows)
    figure.colorbar(image, ax=axes[1:], extend="both" if signed else "max", pad=0.01)


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
