"""Describe a tensor, a file of statistics or a video in numbers."""

import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from cogvideox.files import stage_files, tensor_dump
from cogvideox.files.video_file import read_video
from cogvideox.inspection.items import Item, items, opened

if TYPE_CHECKING:
    import numpy as np
    import torch

CHUNK = 2**20  # elements that are looked at together: few enough to stay in a processor's cache
# What `appearance` calls a video by, of 255.
BLACK = 8  # the brightest value is at most this
PLAIN = 2  # no frame's standard deviation is larger
FROZEN = 0.05  # no frame differs more from the one before, on average
PATTERNS = ".attn1.patterns"  # ends the names of what `taps.tap_patterns` taps


def described(path: Path) -> Iterator[dict]:
    """Yield what the table has of each tensor, each video and each file of statistics."""
    for item in items(path).values():
        if item.row is None:
            yield describe(item)
        elif item.row == 0 and item.tensor == opened(item.file).offset_keys()[0]:  # all rows at once
            yield describe_statistics(item.file)


def describe_statistics(file: Path) -> dict:
    """Return the rows of a file of statistics by name, what is not finite first, and the largest growth.

    The growth is that of the standard deviation from a module of one block to the same module of the next block.
    """
    metadata = opened(file).metadata()
    steps, names = tensor_dump.row_names(metadata), opened(file).offset_keys()
    rows = {name: opened(file).get_tensor(name).tolist() for name in names}
    statistics = {name: found for name, found in rows.items() if not isinstance(found[0][0], list)}
    bad = [f"{s}/{n}" for i, s in enumerate(steps) for n in statistics if not all(map(math.isfinite, rows[n][i]))]
    growth: list[tuple[float, str]] = []
    for name in statistics:
        block = re.fullmatch(r"(transformer_blocks)\.(\d+)(.*)", name)
        before = f"{block[1]}.{int(block[2]) - 1}{block[3]}" if block else ""
        if before in statistics:
            pairs = zip(steps, rows[before], rows[name], strict=True)
            growth += [(after[3] / one[3], f"{step}/{name}") for step, one, after in pairs if one[3]]
    finite = [each for each in growth if math.isfinite(each[0])]
    return {
        "file": str(file),
        "steps": steps,
        "columns": tensor_dump.STATISTICS,
        "statistics": rows,
        "first_not_finite": bad[0] if bad else None,
        "largest_growth": max(finite) if finite else None,
        "made_from": stage_files.read_made_from(file, metadata),
    }


def describe(item: Item) -> dict:
    """Return all that the table has of a tensor or a video."""
    if item.tensor is None:
        return {"file": str(item.file)} | describe_video(item.file)
    tensor = item.load()
    shape, dtype = list(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    found = {"file": str(item.file), "tensor": item.tensor, "shape": shape, "dtype": dtype} | statistics(tensor)
    if item.tensor.endswith(PATTERNS):
        found["patterns"] = patterns(tensor.tolist())
    return found | {"made_from": stage_files.read_made_from(item.file, opened(item.file).metadata())}


def patterns(of_heads: Sequence[tuple[int, int]]) -> dict[str, list[int]]:
    """Return which heads of a block have each pattern, by its text; of a head, see `taps.tap_patterns`."""
    from cogvideox.models.transformer.sparse.patterns import KINDS, Pattern

    found: dict[str, list[int]] = {}
    for head, (kind, window) in enumerate(of_heads):
        found.setdefault(str(Pattern(KINDS[kind], window)), []).append(head)
    return dict(sorted(found.items()))


def statistics(tensor: "torch.Tensor") -> dict:
    """Return minimum, maximum, mean and deviation of the finite values, the zeros, what is not finite, a digest.

    The digest is the beginning of the SHA-256 of the values' bytes.
    """
    import torch

    flat = tensor.contiguous().flatten()
    with ThreadPoolExecutor(1) as pool:  # beside the rest, for hashing takes as long
        digest = pool.submit(lambda: hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()[:16])
        least, most, zeros, counts, first = math.inf, -math.inf, 0, [0, 0], None
        count, mean, squares = 0, 0.0, 0.0  # squares of the distances from the mean
        for start in range(0, len(flat), CHUNK):
            chunk = flat[start : start + CHUNK].to(torch.float64 if flat.dtype == torch.float64 else torch.float32)
            zeros += len(chunk) - int(torch.count_nonzero(chunk))
            low, high = map(float, torch.aminmax(chunk))
            if not (math.isfinite(low) and math.isfinite(high)):
                finite = torch.isfinite(chunk)
                if first is None:
                    first = start + int((~finite).nonzero()[0])
                counts = [counts[0] + int(chunk.isnan().sum()), counts[1] + int(chunk.isinf().sum())]
                chunk = chunk[finite]
                if not len(chunk):
                    continue
                low, high = map(float, torch.aminmax(chunk))
            least, most = min(least, low), max(most, high)
            # Chan's rule joins the chunks' means and squares, and keeps the digits where the mean is far from zero.
            own_mean = float(chunk.mean())
            away = chunk - own_mean
            count, distance = count + len(chunk), own_mean - mean
            mean += distance * len(chunk) / count
            squares += float(away.square_().sum()) + distance**2 * len(chunk) * (count - len(chunk)) / count
        found = {
            "min": least if count else None,
            "max": most if count else None,
            "mean": mean if count else None,
            "std": math.sqrt(squares / count) if count else None,
            "zeros": zeros / max(len(flat), 1),
            "nan": counts[0],
            "inf": counts[1],
            "first_not_finite": None if first is None else coordinate(first, tensor.shape),
        }
        return found | {"digest": digest.result()}


def coordinate(place: int, shape: Sequence[int]) -> list[int]:
    """Return the indices of the element at a place of a flattened tensor."""
    import numpy as np

    return [int(index) for index in np.unravel_index(place, tuple(shape))]


def describe_video(path: Path) -> dict:
    """Return size, rate, brightness of each frame and what a video looks like: black, plain, frozen or moving."""
    import imageio.v3 as imageio

    frames = read_video(path)
    return {
        "frames": len(frames),
        "height": frames.shape[1],
        "width": frames.shape[2],
        "fps": imageio.immeta(path)["fps"],
        "brightness": [round(float(frame.mean()), 2) for frame in frames],
        "looks": appearance(frames),
    }


def appearance(frames: "np.ndarray") -> str:
    """Say what is plainly wrong with frames, uint8 [frames, height, width, 3], or "moving" if nothing is."""
    import numpy as np

    if frames.max() <= BLACK:
        return "black"
    if max(float(frame.std(axis=(0, 1)).max()) for frame in frames) <= PLAIN:
        return "plain: every frame has one colour"
    changes = [float(np.abs(after.astype(np.int16) - before).mean()) for before, after in itertools.pairwise(frames)]
    return "frozen" if changes and max(changes) <= FROZEN else "moving"
