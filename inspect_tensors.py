"""Look at the tensors and videos of a run, or compare those of two runs.

    python inspect_tensors.py stage_outputs
    python inspect_tensors.py stage_outputs --compare other_outputs --tolerance 1e-3

A path is a safetensors file, a video, or a folder of them (a stage's outputs, a model, what --dump wrote). One tensor
is in memory at a time, when runs are compared one of each.
"""

import argparse
import functools
import hashlib
import itertools
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pictures
import tensor_dump
import timings
import utils
import writing
from console import ArgumentParser, UserError, number, run

if TYPE_CHECKING:
    import numpy as np
    import torch
    from safetensors import safe_open

CHUNK = 2**20  # elements that are looked at together: few enough to stay in a processor's cache
# What `sight` calls a video by, of 255.
BLACK = 8  # the brightest value is at most this
PLAIN = 2  # no frame's standard deviation is larger
FROZEN = 0.05  # no frame differs more from the one before, on average

SHOWN = 40  # lines of a comparison
WORST = 10  # of them where nothing differs

# Where a run's tensors and dumps come in the order of the stages; other tensors come before them, videos after them.
ORDER = {"prompt_embeds": 0, "negative_prompt_embeds": 1, "stage2": 2, "latents": 3, "stage3": 4, "frames": 5}

# The axis along which a tensor goes on, and what a step of it is called, by a pattern of its name and its dimensions.
PROGRESS = (
    (r"(negative_)?prompt_embeds", 3, 1, "token"),
    (r"latents", 5, 2, "latent frame"),
    (r"frames", 4, 0, "frame"),
    (r"step_\d+/(latents|noise_pred|pred_original_sample|prev_sample)", 5, 1, "latent frame"),
    (r"step_\d+/.*norm_[qk]", 4, 2, "token"),
    (r"step_\d+/.*", 3, 1, "token"),
    (r"chunk_\d+/decoder\..*", 4, 0, "frame"),
)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("paths", type=utils.path, nargs="+", help="safetensors files, videos, or folders of them")
    parser.add_argument("--compare", type=utils.path, help="compare the one path with this one; differences end with 1")
    parser.add_argument(
        "--noise",
        type=utils.path,
        help="the run of --compare in bfloat16: a difference counts where it exceeds --tolerance times this one's",
    )
    parser.add_argument(
        "--tolerance",
        type=number(float, 0),
        help="normwise relative difference that is allowed (default: 0); with --noise a multiple of it (default: 3)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--plot", type=pictures.png_path, help="also draw histograms and contact sheets to this PNG file"
    )
    return parser.parse_args()


def main() -> None:
    """Print what is asked for; end with status 1 if two runs differ."""
    arguments = parse_arguments()
    import torch

    torch.set_num_threads(1)  # a chunk is small, and its digest is computed beside it
    if arguments.plot:
        writing.check_writable(arguments.plot)
    if arguments.compare is None:
        if arguments.noise is not None or arguments.tolerance is not None:
            raise UserError("--noise and --tolerance belong to --compare")
        found = [entry for path in arguments.paths for entry in described(path)]
        print(json.dumps(found, indent=2) if arguments.json else table(found))
        for line in itertools.chain(*map(timings.lines, [] if arguments.json else arguments.paths)):
            print(line)
        if arguments.plot:
            pictures.plot(arguments.plot, [(path, items(path)) for path in arguments.paths])
        return
    if len(arguments.paths) != 1:
        raise UserError(f"--compare takes one path to compare with, not {len(arguments.paths)}")
    ours, theirs = items(arguments.paths[0]), items(arguments.compare)
    rows = compare_runs(arguments, ours, theirs)
    conclusion = conclusion_of(rows)
    if arguments.json:
        print(json.dumps({"tensors": rows, "conclusion": conclusion}, indent=2))
    else:
        print("\n".join([*provenance_lines(ours, theirs), comparison_table(rows)]))
        for line in timings.lines(arguments.paths[0], arguments.compare):
            print(line)
        print(conclusion)
    if arguments.plot:
        pictures.plot_comparison(arguments.plot, (arguments.paths[0], ours), (arguments.compare, theirs), rows)
    sys.exit(any(row["differs"] for row in rows))


# --- What there is -----------------------------------------------------------------------------------------------


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
        raise UserError(f"{path} is not a complete safetensors file ({error})") from error


def items(path: Path) -> dict[str, Item]:
    """Return the tensors and videos of a file or a folder by name, in the order of the stages and of numbers in names.

    The name of a tensor is its own, below the folder of its file, so that files may be split in other places. Rows of
    statistics are named as the tensors of a dump are; where a dump has both, there is the tensor.

    Raises:
        UserError: there is nothing to look at, or a file is not what its name says.
    """
    suffixes = {".safetensors", *utils.VIDEO_SUFFIXES}
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes)
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


def execution_order(name: str, item: Item, place: int) -> tuple:
    """Return a key that sorts by stage, then by the place in a dump, or by names in which numbers count as numbers."""
    if tensor_dump.in_order(item.metadata):
        return ORDER.get(item.file.name.partition("_")[0], -1), natural_order(str(item.file)), item.row or 0, place
    stage = len(ORDER) if item.tensor is None else ORDER.get(item.tensor, -1)
    return stage, natural_order(name), 0, place


def natural_order(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts by names in which numbers count as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


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
        "made_from": utils.read_made_from(file, metadata),
    }


def describe(item: Item) -> dict:
    """Return all that the table has of a tensor or a video."""
    if item.tensor is None:
        return {"file": str(item.file)} | describe_video(item.file)
    tensor = item.load()
    shape, dtype = list(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    found = {"file": str(item.file), "tensor": item.tensor, "shape": shape, "dtype": dtype}
    return found | statistics(tensor) | {"made_from": utils.read_made_from(item.file, opened(item.file).metadata())}


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


# --- Videos ------------------------------------------------------------------------------------------------------


def read_video(path: Path) -> "np.ndarray":
    """Read the frames of a video, uint8 [frames, height, width, 3]; raises UserError where it cannot be read."""
    import imageio.v3 as imageio

    try:
        return imageio.imread(path)
    except (OSError, ValueError, RuntimeError, StopIteration) as error:
        raise UserError(f"cannot read the video {path}: {str(error).strip().splitlines()[0]}") from error


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
        "looks": sight(frames),
    }


def sight(frames: "np.ndarray") -> str:
    """Say what is plainly wrong with frames, uint8 [frames, height, width, 3], or "moving" if nothing is."""
    import numpy as np

    if frames.max() <= BLACK:
        return "black"
    if max(float(frame.std(axis=(0, 1)).max()) for frame in frames) <= PLAIN:
        return "plain: every frame has one colour"
    changes = [float(np.abs(after.astype(np.int16) - before).mean()) for before, after in itertools.pairwise(frames)]
    return "frozen" if changes and max(changes) <= FROZEN else "moving"


# --- Comparison --------------------------------------------------------------------------------------------------


def compare_runs(arguments: argparse.Namespace, ours: Mapping[str, Item], theirs: Mapping[str, Item]) -> list[dict]:
    """Compare the tensors of two runs, by name, in the order of execution; return a row for each."""
    if len(ours) == len(theirs) == 1:  # two files: their only tensors, whatever they are called
        theirs = dict(zip(ours, theirs.values(), strict=True))
    noise = items(arguments.noise) if arguments.noise else None
    rows = []
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        if name not in ours or name not in theirs:
            where = arguments.compare if name in ours else arguments.paths[0]
            one = ours.get(name) or theirs[name]  # a dump has what was asked for, so what it lacks is no difference
            rows.append({"name": name, "differs": not tensor_dump.in_order(one.metadata), "what": f"is not in {where}"})
            continue
        pair = ours[name], theirs[name]
        beside: dict[str, Any] = {}
        allowed = arguments.tolerance or 0.0
        if noise is not None:
            if name not in noise:
                raise UserError(f"{name} is not in {arguments.noise}")
            beside["noise"] = difference(noise[name], theirs[name])["relative"]
            allowed = (3.0 if arguments.tolerance is None else arguments.tolerance) * (beside["noise"] or 0.0)
        row = {"name": name} | difference(*pair, allowed) | beside
        row["differs"] = row["relative"] is None or not row["relative"] <= allowed
        if row["differs"] and "what" not in row:
            row |= differing_shares(*pair, allowed)
        rows.append(row)
    return rows


def difference(ours: Item, theirs: Item, allowed: float = 0.0) -> dict:
    """Return how two tensors differ: largest and normwise relative difference, cosine, worst place, first step.

    The first step is that whose own normwise relative difference is above `allowed`.
    """
    import torch

    a, b = ours.load(), theirs.load()
    if (ours.row is None) != (theirs.row is None):  # one dump has the array, the other its statistics
        a, b = (
            x if item.row is not None else torch.from_numpy(tensor_dump.statistics_of(x.double().numpy()))
            for item, x in ((ours, a), (theirs, b))
        )
    if a.shape != b.shape:
        return {"relative": None, "what": f"has shape {list(a.shape)}, not {list(b.shape)}"}
    axis, step = progress(ours, a.ndim) if theirs.row is None else (None, "")
    # One row for each step along the axis: squares of the difference and of both, and their product.
    moved = [x.reshape(1) if not x.ndim else x.movedim(axis or 0, 0) for x in (a, b)]
    sums, most, worst = torch.zeros(4, len(moved[0]), dtype=torch.float64), -1.0, None
    rows = max(CHUNK // max(moved[0][:1].numel(), 1), 1)
    for start in range(0, len(moved[0]) if a.numel() else 0, rows):
        x, y = (each[start : start + rows].double().flatten(1 if each.ndim > 1 else 0) for each in moved)
        gap = (x - y).abs()
        if not gap.sum().isfinite():
            place = place_of(int((~(x.isfinite() & y.isfinite())).flatten().nonzero()[0]), start, a.shape, axis or 0)
            values = a[tuple(place)], b[tuple(place)]
            if all(not value.isfinite() for value in values) and torch.equal(a.isnan(), b.isnan()):
                return {"relative": None, "what": f"is not finite in both, first at {place}"}
            return {"relative": None, "what": f"is not finite at {place}: {values[0]:g} and {values[1]:g}"}
        for i, product in enumerate((gap * gap, x * x, y * y, x * y)):
            sums[i, start : start + rows] = product.reshape(len(x), -1).sum(1)
        if float(gap.max()) > most:
            most, worst = float(gap.max()), place_of(int(gap.argmax()), start, a.shape, axis or 0)
    error, norm, other, dot = (float(total) for total in sums.sum(1))
    found: dict[str, Any] = {
        "max": max(most, 0.0),
        "relative": math.sqrt(error / other) if other else (0.0 if error == 0 else math.inf),
        "cosine": dot / math.sqrt(norm * other) if norm and other else None,
        "worst": worst and {"place": worst, "values": [float(a[tuple(worst)]), float(b[tuple(worst)])]},
    }
    if worst and len(a) == len(tensor_dump.STATISTICS) and (ours.row is not None or theirs.row is not None):
        found["worst"]["place"] = tensor_dump.STATISTICS[worst[0]]
    if axis is not None and error:
        steps = (sums[0] > allowed**2 * sums[2]).nonzero()
        found |= {"first": f"{step} {int(steps[0])}"} if len(steps) else {}
    if ours.tensor is None:
        errors = sums[0] / max(a[0].numel(), 1)
        found["psnr"] = [round(10 * math.log10(255**2 / e), 2) if (e := float(error)) else None for error in errors]
    return found


def progress(item: Item, dimensions: int) -> tuple[int | None, str]:
    """Return the axis along which a tensor goes on and what a step of it is called; None where there is none."""
    name = item.tensor or "frames"
    if item.row is None:
        for pattern, ndim, axis, step in PROGRESS:
            if ndim == dimensions and re.fullmatch(pattern, name):
                return axis, step
    return None, ""


def place_of(place: int, start: int, shape: Sequence[int], axis: int) -> list[int]:
    """Return the indices of an element, by its place from index `start` on with `axis` moved to the front."""
    if not shape:
        return []
    moved = [shape[axis], *shape[:axis], *shape[axis + 1 :]]
    first, *others = coordinate(place + start * math.prod(moved[1:]), moved)
    return [*others[:axis], first, *others[axis:]]


def differing_shares(ours: Item, theirs: Item, allowed: float) -> dict:
    """Return which chips' shares differ by more than `allowed`, of a run on a mesh, unless all or none do."""
    if ours.row is not None or theirs.row is not None:
        return {}
    name = ours.tensor or ""
    shares = [*tensor_dump.shares(ours.metadata, name)] or [*tensor_dump.shares(theirs.metadata, name)]
    if not shares:
        return {}
    a, b = ours.load(), theirs.load()
    differing = []
    for chip, where in shares:
        x, y = a[where].double(), b[where].double()
        if float((x - y).norm()) > allowed * float(y.norm()):
            differing.append(chip)
    return {"shares": differing, "chips": len(shares)} if 0 < len(differing) < len(shares) else {}


def conclusion_of(rows: Sequence[dict]) -> str:
    """Say in one sentence whether two runs differ, and where first."""
    different = [row for row in rows if row["differs"]]
    alone = sum("is not in" in row.get("what", "") for row in rows if not row["differs"])
    left_out = f", {alone} are in one dump alone" if alone else ""
    if not different:
        return f"nothing differs: {len(rows) - alone} compared{left_out}"
    first = different[0]
    if "what" in first:
        said = f"{first['name']} {first['what']}"
    else:
        place = f", from {first['first']} on" if "first" in first else ""
        beside = f" ({first['noise']:.2g} for the noise)" if "noise" in first else ""
        said = f"{first['name']} differs by {first['relative']:.2g} of its norm{beside}{place}"
    if "shares" in first:
        said += f", only in {shares_text(first)}"
    return f"first in the order of execution: {said}; {len(different)} of {len(rows) - alone} differ{left_out}"


def shares_text(row: dict) -> str:
    """Say which chips' shares differ."""
    return f"the share of {len(row['shares'])} of {row['chips']} chips: {'; '.join(row['shares'])}"


def provenance_lines(one: Mapping[str, Item], other: Mapping[str, Item]) -> Iterator[str]:
    """Yield a line for each entry in which the files of two runs say that they were made from something else."""
    said = []
    for found in (one, other):
        files = {item.file: item.metadata for item in found.values()}
        said.append(
            {name: value for file, data in files.items() for name, value in utils.read_made_from(file, data).items()}
        )
    for name in said[0].keys() & said[1].keys():
        if said[0][name] != said[1][name]:
            yield f"made from {name}: {said[0][name]} and {said[1][name]}"


# --- Tables ------------------------------------------------------------------------------------------------------


def table(found: Sequence[dict]) -> str:
    """Return tensors and videos as lines for people."""
    lines: list[str] = []
    file, before = None, None
    width = max((len(one["tensor"]) for one in found if "tensor" in one), default=0)
    for one in found:
        if one["file"] != file:
            file = one["file"]
            lines.append(file)
            made_from = one.get("made_from") or {}
            if made_from and made_from == before:
                lines.append("  made from the same")
            else:
                lines += [f"  made from {name}: {value}" for name, value in made_from.items()]
            before = made_from
        lines += (
            statistics_lines(one)
            if "steps" in one
            else tensor_lines(one, width)
            if "tensor" in one
            else video_lines(one)
        )
    return "\n".join(lines)


def tensor_lines(one: dict, width: int) -> Iterator[str]:
    """Yield the lines of a tensor."""
    numbers = " ".join(
        f"{name} {'-' if one[name] is None else format(one[name], '.4g'):<10}" for name in ("min", "max", "mean", "std")
    )
    shape = "x".join(map(str, one["shape"])) or "scalar"
    yield f"  {one['tensor']:<{width}}  {shape} {one['dtype']}  {numbers} zeros {one['zeros']:.1%}  {one['digest']}"
    if one["first_not_finite"] is not None:
        yield f"    NOT FINITE: {one['nan']:,} NaN, {one['inf']:,} Inf, the first at {one['first_not_finite']}"


def statistics_lines(one: dict) -> Iterator[str]:
    """Yield the lines of a file of statistics: for each module its extremes over all steps, then what stands out."""
    width = max(map(len, one["statistics"]))
    yield f"  {one['steps'][0]} to {one['steps'][-1]}, in the order of execution; std of the first and of the last"
    for name, rows in one["statistics"].items():
        if isinstance(rows[0][0], list):
            share = [sum(map(sum, row)) / sum(map(len, row)) for row in rows]
            yield f"  {name:<{width}}  {sum(share) / len(share):.2%} of the heads"
            continue
        bad = [step for step, row in zip(one["steps"], rows, strict=True) if not all(map(math.isfinite, row))]
        columns = list(zip(*rows, strict=True))
        extremes = f"min {min(columns[0]):<10.4g} max {max(columns[1]):<10.4g} std {rows[0][3]:.4g} {rows[-1][3]:.4g}"
        yield f"  {name:<{width}}  " + (f"NOT FINITE from {bad[0]} on" if bad else extremes)
    if one["first_not_finite"]:
        yield f"  first not finite: {one['first_not_finite']}"
    if one["largest_growth"]:
        yield "  largest growth from a block to the next: {:.3g} times at {}".format(*one["largest_growth"])


def video_lines(one: dict) -> Iterator[str]:
    """Yield the lines of a video."""
    size = f"{one['frames']} frames, {one['width']} x {one['height']}, {one['fps']:g} frames per second"
    yield f"  {size}: {one['looks']}"
    yield "  brightness of 255: " + " ".join(f"{value:.0f}" for value in one["brightness"])


def comparison_table(rows: Sequence[dict]) -> str:
    """Return a comparison as lines for people, a mark before what differs; of many rows those that matter."""
    shown = [row for row in rows if row["differs"] or "is not in" not in row.get("what", "")]
    if len(shown) > SHOWN:
        different = [row for row in shown if row["differs"]]
        shown = different or sorted(shown, key=lambda row: -(row["relative"] or 0.0))[:WORST]
    width = max((len(row["name"]) for row in shown[:SHOWN]), default=0)
    lines = [line for row in shown[:SHOWN] for line in comparison_lines(row, width)]
    if len(rows) > SHOWN and shown:
        lines.append(
            f"  {len(rows):,} tensors; these are {'the first that differ' if shown[0]['differs'] else 'the worst'}"
        )
    return "\n".join(lines)


def comparison_lines(row: dict, width: int) -> Iterator[str]:
    """Yield the lines of one tensor of a comparison."""
    mark = "!" if row["differs"] else " "
    if "what" in row:
        yield f"{mark} {row['name']:<{width}}  {row['what']}"
        return
    cosine = "-" if row["cosine"] is None else f"{row['cosine']:.6f}"
    line = f"{mark} {row['name']:<{width}}  max {row['max']:<10.3g} relative {row['relative']:<10.3g} cosine {cosine}"
    if "noise" in row:
        line += f" noise {row['noise']:.3g}"
    if row["worst"] and row["max"]:
        ours, theirs = row["worst"]["values"]
        line += f"  worst at {row['worst']['place']}: {ours:.6g} and {theirs:.6g}"
    yield line
    if "shares" in row:
        yield f"    only in {shares_text(row)}"
    if "psnr" in row:
        yield "    PSNR in dB: " + " ".join("equal" if p is None else f"{p:.1f}" for p in row["psnr"])


if __name__ == "__main__":
    run(main)
