"""Show a single tensor: as a matrix, token by channel, and where its tokens lie in the frames of the video."""

import json
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cogvideox.files.latent_pictures import NOT_FINITE, NOT_FINITE_TEXT
from cogvideox.files.numbers import as_text
from cogvideox.inspection.figure import HeatMap, Sheet
from cogvideox.inspection.items import Item, progress

MOST_ROWS, MOST_COLUMNS = 300, 450  # of a matrix as it is drawn: no more than pixels
MOST_SAMPLES = 2  # with guidance the negative prompt and the prompt
MOST_QUERIES = 8  # whose attention weights are drawn on the frames
WEIGHTS = ".attn1.weights"


class Tokens(NamedTuple):
    """What a dump of stage 2 says of the tokens: see docs/files.md.

    Attributes:
        text: how many of the first are text.
        video: how many of the others are along the frames, the height and the width.
        queries, heads: of which it has attention weights.
    """

    text: int
    video: tuple[int, int, int]
    queries: list[int]
    heads: list[int]

    def place(self, token: int) -> str:
        """Say where a token is: in the text, or in which frame and at which row and column."""
        if token < self.text:
            return "text"
        frame, row, column = (int(index) for index in np.unravel_index(token - self.text, self.video))
        return f"frame {frame}\nat ({row}, {column})"


def tokens_of(item: Item) -> Tokens | None:
    """Return what the file of a tensor says of the tokens; None if it says nothing."""
    try:
        return Tokens(**json.loads(item.metadata["tokens"]))
    except (KeyError, TypeError, ValueError):
        return None


def heat_map(name: str, item: Item) -> HeatMap | None:
    """Return a tensor as matrices: its tokens x channels, queries x keys, or all but the last axis x the last one.

    Of many rows and columns those that share a pixel show the value that is largest in size. Returns None for a tensor
    of less than two axes, or without values.
    """
    array = item.load().float().numpy()
    if array.ndim < 2 or not array.size:
        return None
    axis, step = progress(item, array.ndim)
    if name.endswith(WEIGHTS):
        rows, columns, matrices = "queries of each head", "key", array.reshape(len(array), -1, array.shape[-1])
    elif step == "token" and axis is not None:
        rows, columns, matrices = "token", "channel", of_tokens(array, axis)
    else:
        rows, columns, matrices = "other axes", "last axis", array.reshape(1, -1, array.shape[-1])
    shown = {sample(i, len(matrices)): reduced(matrices[i]) for i in range(len(matrices))[-MOST_SAMPLES:]}
    return HeatMap(rows, columns, matrices.shape[1:], shown)


def of_tokens(array: np.ndarray, axis: int) -> np.ndarray:
    """Return a tensor whose first axis is that of the samples as [samples, tokens, channels]."""
    tokens = np.moveaxis(array, axis, 1)
    return tokens.reshape(*tokens.shape[:2], -1)


def sample(i: int, count: int) -> str:
    """Return what one of `count` samples is called."""
    return f"sample {i} of {count}" if count > 1 else ""


def reduced(matrix: np.ndarray) -> np.ndarray:
    """Return a matrix of at most MOST_ROWS x MOST_COLUMNS, each of whose values is the largest in size of a part."""
    for axis, most in enumerate((MOST_ROWS, MOST_COLUMNS)):
        count = matrix.shape[axis]
        starts = np.linspace(0, count, min(most, count), endpoint=False).astype(int)
        highest, lowest = (extreme.reduceat(matrix, starts, axis) for extreme in (np.maximum, np.minimum))
        matrix = np.where(-lowest > highest, lowest, highest)
    return matrix


def frames_of_tokens(name: str, item: Item) -> Sheet | None:
    """Return the tokens of the video as frames, or None if the tensor has none or the file does not say where they lie.

    Of channels their root mean square is shown; of attention weights, for each query, the mean over the heads for the
    last sample, which with guidance is that of the prompt.
    """
    tokens = tokens_of(item)
    array = item.load().float().numpy()
    axis, step = progress(item, array.ndim)
    if tokens is None or not array.size:
        return None
    if name.endswith(WEIGHTS):
        rows = dict(rows_of_queries(array[-1].mean(axis=0), tokens))
        title = f"{name}: where each query looks, the mean over heads {as_text(tokens.heads)}"
    elif step == "token" and axis is not None:
        sizes = np.sqrt(np.square(of_tokens(array, axis)).mean(axis=-1))
        rows = {sample(i, len(sizes)): sizes[i] for i in range(len(sizes))[-MOST_SAMPLES:]}
        title = f"{name}: root mean square of each token's channels"
    else:
        return None
    count = math.prod(tokens.video)
    if any(len(row) not in (count, tokens.text + count) for row in rows.values()):
        return None
    title += "; each row from 0 to its own maximum"
    if not all(np.isfinite(row).all() for row in rows.values()):
        title += f"; {NOT_FINITE_TEXT}"
    pictures = {label: colours(row[-count:].reshape(tokens.video)) for label, row in rows.items()}
    return Sheet(title, [f"frame {i} of tokens" for i in range(tokens.video[0])], pictures)


def rows_of_queries(weights: np.ndarray, tokens: Tokens) -> Iterator[tuple[str, np.ndarray]]:
    """Yield a label and the weights of some queries, [queries, keys], evenly spread."""
    for i in np.unique(np.linspace(0, len(weights) - 1, MOST_QUERIES).round().astype(int)):
        query = tokens.queries[i]
        yield f"token {query}\n{tokens.place(query)}\n{weights[i, : tokens.text].sum():.0%} on text", weights[i]


def colours(values: np.ndarray) -> np.ndarray:
    """Return values of at least 0 as colours, uint8 [..., 3]: dark for 0, bright for the largest."""
    import matplotlib as mpl

    finite = np.isfinite(values)
    most = float(values[finite].max()) if finite.any() else 0.0
    shown = mpl.colormaps["viridis"](np.where(finite, values, 0) / (most or 1.0), bytes=True)[..., :3]
    return np.where(finite[..., None], shown, NOT_FINITE)
