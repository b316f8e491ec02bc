"""Take the map of sparse attention that the options name, check that it is for the run, and report it."""

import argparse
import collections
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogvideox.cli.report import Report
from cogvideox.defaults import DENSE_STEPS
from cogvideox.errors import UserError
from cogvideox.files import sparse_map
from cogvideox.files.lora import Lora

if TYPE_CHECKING:
    from cogvideox.models.transformer.plan import DenoisingPlan
    from cogvideox.models.transformer.sparse.heads import SparseAttention

SIZE = ("height", "width", "frames")
KIND_IN_WORDS = {"frames": "in frames", "positions": "in positions", "dense": "dense"}


def sparse_attention(
    arguments: argparse.Namespace, model_id: str, transformer: Mapping[str, Any]
) -> "SparseAttention | None":
    """Return the patterns of the heads that --sparse_attention names, and the share of --dense_steps; None without it.

    The option is what `sparse_map.find` takes, or a text of `sparse_map.made_up`, as the compile tool has it.

    Raises:
        UserError: there is no map, or it is not for a transformer of this config and for videos of the size of the
            options, or another option does not go with it.
    """
    from cogvideox.models.transformer.sparse.heads import SparseAttention
    from cogvideox.models.transformer.sparse.patterns import Pattern

    where = arguments.sparse_attention
    if where is None:
        if arguments.dense_steps is not None:
            raise UserError("--dense_steps belongs to --sparse_attention, which says how the other steps attend")
        return None
    if arguments.attention == "splash":
        raise UserError("--attention splash has no --sparse_attention; use splash_exp2 or xla")
    if arguments.block_sizes:
        raise UserError("--block_sizes are of dense attention, and --sparse_attention has its own; drop one of them")
    if isinstance(where, str) and where != sparse_map.AUTO:
        texts = sparse_map.made_up(where, transformer["num_layers"], transformer["num_attention_heads"])
    else:
        path = sparse_map.find(where, model_id)
        found = sparse_map.read(path)
        sparse_map.check_size(found, path, transformer, {name: getattr(arguments, name) for name in SIZE})
        texts = found.patterns
    patterns = tuple(tuple(Pattern.parse(text) for text in of_layer) for of_layer in texts)
    return SparseAttention(patterns, DENSE_STEPS if arguments.dense_steps is None else arguments.dense_steps)


def file_of(arguments: argparse.Namespace, model_id: str) -> Path | None:
    """Return the file of the map that the options of stage 2 name, or None; see `sparse_map.find`."""
    return sparse_map.find(arguments.sparse_attention, model_id) if arguments.sparse_attention else None


def check_weights(
    path: Path | None, model_id: str, loras: Sequence[Lora], variant: str | None, warn: Callable[[str], None]
) -> None:
    """Check that the map in a file, if there is one, was found with the weights of a run.

    `warn` is told of other LoRAs.

    Raises:
        UserError: it was found with another transformer.
    """
    if path:
        weights, known = sparse_map.weights_of(model_id, variant), sparse_map.known_loras(loras)
        sparse_map.check_weights(sparse_map.read(path), path, weights, known, warn)


def heads_in_words(sparse: "SparseAttention") -> str:
    """Say how many of all layers' heads attend how."""
    counts = collections.Counter[str](pattern.kind for of_layer in sparse.patterns for pattern in of_layer)
    return ", ".join(f"{counts[kind]:,} {words}" for kind, words in KIND_IN_WORDS.items() if counts[kind])


def density(plan: "DenoisingPlan") -> float:
    """Return the share of all heads' scores, those of padding left out, that the patterns of a plan compute."""
    from cogvideox.models.transformer.sparse.layout import AlignedLayout

    layout = plan.order
    assert plan.sparse and isinstance(layout, AlignedLayout)
    counts = collections.Counter(pattern for of_layer in plan.sparse.patterns for pattern in of_layer)
    return sum(pattern.density(layout) * n for pattern, n in counts.items()) / counts.total()


def report_map(plan: "DenoisingPlan", path: Path, report: Report) -> None:
    """Report where the map of a run comes from, how many heads it leaves dense, and in which steps it is used."""
    assert plan.sparse
    found, share = sparse_map.read(path), density(plan)
    heads = sum(map(len, plan.sparse.patterns))
    budget = "" if found.error_budget is None else f" and a relative error of {found.error_budget:g}"
    size = f"{found.height} x {found.width} x {found.frames}"
    report.say(
        f"sparse attention: of {heads:,} heads {heads_in_words(plan.sparse)}, {share:.1%} of the scores; from {path}, "
        f"found for {size}{budget}; dense steps at the beginning: {plan.dense_steps} of {plan.steps}"
    )
    report.add("sparse attention", f"{share:.1%} of the scores, after {plan.dense_steps} dense steps of {plan.steps}")
