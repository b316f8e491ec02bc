"""Fit for stage 2's step cache how much a model's output changes if the time embedding changes.

Stage 2 writes both:

    python stage2_transformer.py --dump dumps/1 --dump_names noise_pred time_embedding.linear_2
    python -m tools.fit_step_cache dumps/1 --model_id MODEL

Several runs, with other prompts, seeds and numbers of steps, make a better fit. The polynomial goes into
transformer/step_cache.json in the model's folder, where --cache_threshold finds it. For a model with an ofs embedding,
such as CogVideoX1.5-5B-I2V, dump ofs_embedding.linear_2 too: a step has the sum of both.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from cogvideox.cli.parser import ArgumentParser
from cogvideox.cli.program import run
from cogvideox.cli.types import file_path, number
from cogvideox.errors import UserError, first_line
from cogvideox.features import features_of
from cogvideox.files import checkpoint, writing
from cogvideox.files.step_polynomial import FILE
from cogvideox.files.tensors import mapped_tensors
from cogvideox.models.transformer import step_cache

DUMP = "stage2_tensors.safetensors"
EMBEDDING, OFS, OUTPUT = "time_embedding.linear_2", "ofs_embedding.linear_2", "noise_pred"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(__doc__.splitlines()[0], prog="python -m tools.fit_step_cache")
    parser.add_argument("dumps", type=file_path, nargs="+", help="folders of --dump")
    parser.add_argument("--model_id", required=True, help="the model that made them, a folder")
    parser.add_argument("--degree", type=number(int, 1, 8), default=4, help="of the polynomial")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Fit the polynomial, write it, and say how well it fits."""
    arguments = parse_arguments(argv)
    path = checkpoint.model_folder(arguments.model_id, []) / "transformer" / FILE
    writing.check_writable(path)
    has_ofs = features_of(checkpoint.read_config(arguments.model_id, "transformer")).ofs
    embeddings = (EMBEDDING, OFS) if has_ofs else (EMBEDDING,)
    pairs = np.concatenate([changes(folder / DUMP, embeddings) for folder in arguments.dumps], axis=1)
    if pairs.shape[1] <= arguments.degree:
        raise UserError(f"{pairs.shape[1]} pairs of steps are too few for --degree {arguments.degree}; add runs")
    polynomial = np.polyfit(pairs[0], pairs[1], arguments.degree)
    with writing.replacing(path) as temporary:
        fitted_on = f"{pairs.shape[1]} pairs of steps of {len(arguments.dumps)} runs"
        entries = {"polynomial": polynomial.tolist(), "fitted_on": fitted_on}
        Path(temporary).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    left = np.var(pairs[1] - np.polyval(polynomial, pairs[0])) / np.var(pairs[1])
    print(f"{fitted_on}; the polynomial explains {1 - left:.1%} of the variance\nwrote {path}")


def changes(path: Path, embeddings: Sequence[str] = (EMBEDDING,)) -> np.ndarray:
    """Return how far embeddings and outputs of each two neighbouring steps are apart, float64 [2, steps - 1].

    The embedding of a step is the sum of those that `embeddings` names.

    Raises:
        UserError: the dump lacks one of them.
    """
    try:
        tensors = mapped_tensors(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is no file of --dump: {first_line(error)}") from error
    found = {}
    for name in (*embeddings, OUTPUT):
        of_steps = [tensors[key] for key in sorted(tensors) if key.endswith(f"/{name}")]
        arrays = [tensor.astype(np.float64) for tensor in of_steps if not isinstance(tensor, str)]
        if len(arrays) < max(2, len(of_steps)):
            names = " ".join((OUTPUT, *embeddings))
            raise UserError(f"{path} has {name} of {len(of_steps)} steps; use --dump_names {names}")
        found[name] = arrays
    if len({len(arrays) for arrays in found.values()}) > 1:
        raise UserError(f"{path} has {EMBEDDING} and {OUTPUT} of different steps; use one run of stage 2")
    steps = [sum(of_step) for of_step in zip(*(found[name] for name in embeddings), strict=True)]
    return np.array([distances(steps), distances(found[OUTPUT])])


def distances(arrays: Sequence[np.ndarray]) -> list[float]:
    """Return how far each two neighbours are apart; see `step_cache.distance`."""
    return [step_cache.distance(new, old) for old, new in itertools.pairwise(arrays)]


if __name__ == "__main__":
    run(main)
