"""Look at the tensors and videos of a run, or compare those of two runs.

    python inspect_tensors.py stage_outputs
    python inspect_tensors.py stage_outputs --compare other_outputs --tolerance 1e-3

A path is a safetensors file, a video, or a folder of them (a stage's outputs, a model). One tensor is in memory at a
time, when runs are compared one of each.
"""

import argparse
import functools
import hashlib
import itertools
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import timings
import utils
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

# The axis along which a tensor goes on, and what a step of it is called.
PROGRESS = {
    "prompt_embeds": (1, "token"),
    "negative_prompt_embeds": (1, "token"),
    "latents": (2, "latent frame"),
    "frames": (0, "frame"),
}


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
    return parser.parse_args()


def main() -> None:
    """Print what is asked for; end with status 1 if two runs differ."""
    arguments = parse_arguments()
    if arguments.compare is None:
        if arguments.noise is not None or arguments.tolerance is not None:
            raise UserError("--noise and --tolerance belong to --compare")
        found = [describe(item) for path in arguments.paths for item in items(path).values()]
        print(json.dumps(found, indent=2) if arguments.json else table(found))
        for line in itertools.chain(*map(timings.lines, [] if arguments.json else arguments.paths)):
            print(line)
        return
    if len(arguments.paths) != 1:
        raise UserError(f"--compare takes one path to compare with, not {len(arguments.paths)}")
    rows, conclusion = compare_runs(arguments)
    if arguments.json:
        print(json.dumps({"tensors": rows, "conclusion": conclusion}, indent=2))
    else:
        print(comparison_table(rows))
        for line in timings.lines(arguments.paths[0], arguments.compare):
            print(line)
        print(conclusion)
    sys.exit(any(row["differs"] for row in rows))


# --- What there is -----------------------------------------------------------------------------------------------


class Item(NamedTuple):
    """One tensor of a safetensors file, or, where `tensor` is None, a video."""

    file: Path
    tensor: str | None

    def load(self) -> "torch.Tensor":
        """Read the tensor, or the video's frames as uint8 [frames, height, width, 3]."""
        import torch

        if self.tensor is None:
            return torch.from_numpy(read_video(self.file))
        return opened(self.file).get_tensor(self.tensor)


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

    The name of a tensor is its own, below the folder of its file, so that files may be split in other places.

    Raises:
        UserError: there is nothing to look at, or a file is not what its name says.
    """
    suffixes = {".safetensors", *utils.VIDEO_SUFFIXES}
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes)
    if not files:
        raise UserError(f"{path} has no safetensors file and no video" if path.is_dir() else f"{path} does not exist")
    found = {}
    for file in files:
        folder = "" if file == path else "".join(f"{part}/" for part in file.relative_to(path).parts[:-1])
        if file.suffix.lower() != ".safetensors":
            found[folder + file.name] = Item(file, None)
            continue
        found |= {folder + name: Item(file, name) for name in opened(file).keys()}  # noqa: SIM118  no mapping
    return dict(sorted(found.items(), key=lambda pair: execution_order(*pair)))


def execution_order(name: str, item: Item) -> tuple:
    """Return a key that sorts by stage, then by the names in which numbers count as numbers."""
    stages = [*(key for key in PROGRESS if key != "frames"), "frames"]
    stage = stages.index(item.tensor) if item.tensor in stages else len(stages) if item.tensor is None else -1
    return stage, [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def describe(item: Item) -> dict:
    """Return all that the table has of a tensor or a video."""
    if item.tensor is None:
        return {"file": str(item.file)} | describe_video(item.file)
    tensor = item.load()
    shape, dtype = list(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    found = {"file": str(item.file), "tensor": item.tensor, "shape": shape, "dtype": dtype}
    return found | statistics(tensor) | {"made_from": utils.read_made_from(opened(item.file).metadata())}


def statistics(tensor: "torch.Tensor") -> dict:
    """Return minimum, maximum, mean and deviation of the finite values, the zeros, what is not finite, a digest.

    The digest is the beginning of the SHA-256 of the values' bytes.
    """
    import torch

    flat = tensor.contiguous().flatten()
    with ThreadPoolExecutor(1) as pool:  # beside the rest, for hashing takes as long
        digest = pool.submit(lambda: hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()[:16])
        least, most, total, squares, zeros, counts, first = math.inf, -math.inf, 0.0, 0.0, 0, [0, 0], None
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
            total += float(chunk.sum(dtype=torch.float64))
            squares += float(torch.linalg.vector_norm(chunk, dtype=torch.float64)) ** 2
        count = len(flat) - sum(counts)
        mean = total / count if count else math.nan
        found = {
            "min": least if count else None,
            "max": most if count else None,
            "mean": mean if count else None,
            "std": math.sqrt(max(squares / count - mean * mean, 0.0)) if count else None,
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


def compare_runs(arguments: argparse.Namespace) -> tuple[list[dict], str]:
    """Compare two runs tensor by tensor, in the order of execution; return the rows and a sentence about the first."""
    ours, theirs = items(arguments.paths[0]), items(arguments.compare)
    if len(ours) == len(theirs) == 1:  # two files: their only tensors, whatever they are called
        theirs = dict(zip(ours, theirs.values(), strict=True))
    noise = items(arguments.noise) if arguments.noise else None
    rows = []
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        if name not in ours or name not in theirs:
            where = arguments.compare if name in ours else arguments.paths[0]
            rows.append({"name": name, "differs": True, "what": f"is not in {where}"})
            continue
        row = {"name": name} | difference(ours[name], theirs[name])
        allowed = arguments.tolerance or 0.0
        if noise is not None:
            if name not in noise:
                raise UserError(f"{name} is not in {arguments.noise}")
            row["noise"] = difference(noise[name], theirs[name])["relative"]
            allowed = (3.0 if arguments.tolerance is None else arguments.tolerance) * (row["noise"] or 0.0)
        relative = row["relative"]
        rows.append(row | {"differs": relative is None or not relative <= allowed})
    return rows, conclusion_of(rows)


def difference(ours: Item, theirs: Item) -> dict:
    """Return how two tensors differ: largest and normwise relative difference, cosine, worst place, first step."""
    import torch

    a, b = ours.load(), theirs.load()
    if a.shape != b.shape:
        return {"relative": None, "what": f"has shape {list(a.shape)}, not {list(b.shape)}"}
    a, b = a.double(), b.double()
    if not (a.isfinite().all() and b.isfinite().all()):
        bad = ~(a.isfinite() & b.isfinite())
        place = coordinate(int(bad.flatten().nonzero()[0]), a.shape)
        return {"relative": None, "what": f"is not finite at {place}: {a[tuple(place)]:g} and {b[tuple(place)]:g}"}
    gap = (a - b).abs()
    norm, other = float(torch.linalg.vector_norm(a)), float(torch.linalg.vector_norm(b))
    error = float(torch.linalg.vector_norm(gap))
    worst = coordinate(int(gap.argmax()), a.shape) if gap.numel() else []
    found: dict[str, Any] = {
        "max": float(gap.max()) if gap.numel() else 0.0,
        "relative": error / other if other else (0.0 if error == 0 else math.inf),
        "cosine": float((a * b).sum()) / (norm * other) if norm and other else None,
        "worst": {"place": worst, "values": [float(a[tuple(worst)]), float(b[tuple(worst)])]} if worst else None,
    }
    axis, step = PROGRESS.get(ours.tensor or "frames", (None, ""))
    if axis is not None and gap.ndim > axis and found["max"]:
        steps = gap.movedim(axis, 0).flatten(1).amax(1)
        found["first"] = f"{step} {int(steps.nonzero()[0])}"
    if ours.tensor is None:
        errors = gap.square().flatten(1).mean(1)
        found["psnr"] = [round(10 * math.log10(255**2 / e), 2) if (e := float(error)) else None for error in errors]
    return found


def conclusion_of(rows: Sequence[dict]) -> str:
    """Say in one sentence whether two runs differ, and where first."""
    different = [row for row in rows if row["differs"]]
    if not different:
        return f"nothing differs: {len(rows)} compared"
    first = different[0]
    if "what" in first:
        said = f"{first['name']} {first['what']}"
    else:
        place = f", from {first['first']} on" if "first" in first else ""
        beside = f" ({first['noise']:.2g} for the noise)" if "noise" in first else ""
        said = f"{first['name']} differs by {first['relative']:.2g} of its norm{beside}{place}"
    return f"first in the order of execution: {said}; {len(different)} of {len(rows)} differ"


# --- Tables ------------------------------------------------------------------------------------------------------


def table(found: Sequence[dict]) -> str:
    """Return tensors and videos as lines for people."""
    lines, file = [], None
    width = max((len(one["tensor"]) for one in found if "tensor" in one), default=0)
    for one in found:
        if one["file"] != file:
            file = one["file"]
            lines.append(file)
            made_from = one.get("made_from") or {}
            lines += [f"  made from {name}: {value}" for name, value in made_from.items()]
        lines += list(tensor_lines(one, width) if "tensor" in one else video_lines(one))
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


def video_lines(one: dict) -> Iterator[str]:
    """Yield the lines of a video."""
    size = f"{one['frames']} frames, {one['width']} x {one['height']}, {one['fps']:g} frames per second"
    yield f"  {size}: {one['looks']}"
    yield "  brightness of 255: " + " ".join(f"{value:.0f}" for value in one["brightness"])


def comparison_table(rows: Sequence[dict]) -> str:
    """Return a comparison as lines for people, a mark before what differs."""
    width = max(len(row["name"]) for row in rows)
    lines = []
    for row in rows:
        mark = "!" if row["differs"] else " "
        if "what" in row:
            lines.append(f"{mark} {row['name']:<{width}}  {row['what']}")
            continue
        cosine = "-" if row["cosine"] is None else f"{row['cosine']:.6f}"
        line = f"{mark} {row['name']:<{width}}  max {row['max']:<10.3g} relative {row['relative']:<10.3g}"
        line += f" cosine {cosine}"
        if "noise" in row:
            line += f" noise {row['noise']:.3g}"
        if row["worst"] and row["max"]:
            ours, theirs = row["worst"]["values"]
            line += f"  worst at {row['worst']['place']}: {ours:.6g} and {theirs:.6g}"
        lines.append(line)
        if "psnr" in row:
            lines.append("    PSNR in dB: " + " ".join("equal" if p is None else f"{p:.1f}" for p in row["psnr"]))
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
