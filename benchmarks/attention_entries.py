"""The attention kernels, dense and block-sparse: checks beside float32, and measurements of one chip."""

import functools
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.entries import Entry, durations, judged, measured, relative_error
from benchmarks.machine import PROMPT_SEED, Machine, Size
from benchmarks.measuring import MemoryUse, compiled, of_report

if TYPE_CHECKING:
    import jax
    import numpy as np

    from cogvideox.models.transformer.sparse.layout import AlignedLayout
    from cogvideox.models.transformer.sparse.patterns import Pattern

# --- The entries -------------------------------------------------------------------------------------------------


def forced_online(machine: Machine, inputs: str, length: int, quick: bool = False) -> Iterator[Entry]:
    """Yield the check of a kernel that has an online variant, on inputs that need it; nothing on a GPU."""
    if machine.attention == "splash_exp2":
        yield kernel_check(machine, machine.attention, inputs, length, quick)


def kernel_check(machine: Machine, attention: str, inputs: str, length: int, quick: bool = False) -> Entry:
    """Return the check of an attention implementation at a length."""
    which = "online kernel" if inputs in ONLINE else "fast kernel"
    which = f", {which}" if attention == "splash_exp2" else ""
    name = f"attention {attention}{which}, {inputs.replace('_', ' ')}, {length:,} tokens"
    return Entry(name, "check", functools.partial(check_kernel, machine, attention, inputs, length), 0.5, quick)


def kernel_row(machine: Machine, length: int) -> Entry:
    """Return the measurement of the attention of one chip."""
    name = f"attention {machine.attention}, {machine.scale.heads} heads, {length:,} tokens, one device"
    return Entry(name, "row", functools.partial(measure_kernel, machine, length), 0.3, quick=True)


def has_patterns_kernel(machine: Machine) -> bool:
    """Tell whether the devices have the kernels of block-sparse attention.

    Without them, as on a GPU, XLA computes all scores, and masks them: that is checked, but not worth measuring.
    """
    from cogvideox.models.transformer.attention import Attention, is_tiled

    return is_tiled(Attention(machine.attention, machine.platform))


def patterns_checks(machine: Machine) -> list[Entry]:
    """Return the checks of attention whose heads have patterns: of the fast kernels and of the online ones, or of XLA.

    They are for the size of the first step.
    """
    layout = machine.layout(machine.steps[0][0])
    kernels = {"layer_normed": ", fast kernels", "mixed_heads": ", online kernels"}
    return [
        Entry(
            f"attention with patterns{which}, {inputs.replace('_', ' ')}, {layout.real_tokens:,} tokens",
            "check",
            functools.partial(check_patterns, machine, inputs, layout),
            1.0,
        )
        for inputs, which in (kernels if has_patterns_kernel(machine) else {"layer_normed": " by XLA"}).items()
    ]


def patterns_row(machine: Machine) -> Iterator[Entry]:
    """Yield the measurement of the attention of one chip whose heads have a pattern; nothing without kernels."""
    if has_patterns_kernel(machine):
        layout = machine.layout(guided_size(machine))
        name = f"attention with {WINDOW}, {machine.scale.heads} heads, {layout.real_tokens:,} tokens, one device"
        yield Entry(name, "row", functools.partial(measure_patterns, machine, layout), 0.6)


def guided_size(machine: Machine) -> Size:
    """Return the size of the first step with guidance."""
    return next(size for size, guided, _ in machine.steps if guided)


# --- Checks ------------------------------------------------------------------------------------------------------

KERNEL_TOLERANCE = 5e-3  # of bfloat16 results, as in tests/test_splash_attention.py
REFERENCE_QUERIES = 512  # of which the reference holds the scores at a time


def layer_normed(query: "np.ndarray", key: "np.ndarray") -> "tuple[np.ndarray, np.ndarray]":
    """Return queries and keys as the model has them: layer-normed, with the keys off centre."""
    normed = [(x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) for x in (query, key)]
    return 2.5 * normed[0], 2.5 * normed[1] + 1


def mixed_heads(query: "np.ndarray", key: "np.ndarray") -> "tuple[np.ndarray, np.ndarray]":
    """Return every other head with scores too large for the fast kernel."""
    query[:, 1::2] *= 40
    key[:, 1::2] *= 40
    return query, key


def huge_norms(query: "np.ndarray", key: "np.ndarray") -> "tuple[np.ndarray, np.ndarray]":
    """Return scores so large that nearly all of a row's weight is on one key."""
    return 1000 * query, 1000 * key


def far_bound(query: "np.ndarray", key: "np.ndarray") -> "tuple[np.ndarray, np.ndarray]":
    """Return rows whose bound is hundreds above their maximum: one long key is orthogonal to every query."""
    middle = key.shape[2] // 2
    query[..., 0] = 0
    key[:, :, middle] = 0
    key[:, :, middle, 0] = 2000
    return query, key


def negative_scores(query: "np.ndarray", key: "np.ndarray") -> "tuple[np.ndarray, np.ndarray]":
    """Return scores hundreds below 0, where a padded key that is not masked would win."""
    query[..., 0], key[..., 0] = 20, -60
    return query, key


# What is made of normal queries and keys, [batch, heads, length, head_dim].
INPUTS = {f.__name__: f for f in (layer_normed, mixed_heads, huge_norms, far_bound, negative_scores)}
# The share of the heads that the inputs send to the online kernel; those that are not named send none.
ONLINE = {"mixed_heads": 0.5, "huge_norms": 1.0, "far_bound": 1.0}


def kernel_arrays(machine: Machine, inputs: str, length: int) -> "list[jax.Array]":
    """Return query, key and value on one device, bfloat16 [1, heads, length and padding, head_dim].

    The padding, whose keys do not count, holds the largest values of keys and values.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    shape = (1, machine.scale.heads, length, machine.transformer["attention_head_dim"])
    generator = np.random.default_rng(PROMPT_SEED)
    query, key, value = (generator.standard_normal(shape, np.float32) for _ in range(3))
    query, key = INPUTS[inputs](query, key)
    padding = ((0, 0), (0, 0), (0, 16 + -length % 16), (0, 0))
    arrays = [np.pad(query, padding, "edge")]
    arrays += [np.pad(x, padding, constant_values=x.max()) for x in (key, value)]
    return [jax.device_put(x.astype(jnp.bfloat16), machine.devices[0]) for x in arrays]


def attention_function(machine: Machine, name: str, length: int) -> Callable:
    """Return an implementation of attention as the model calls it, for jax to compile."""
    from cogvideox.models.transformer.attention import Attention

    head_dim = machine.transformer["attention_head_dim"]
    chosen = Attention.choose(name, machine.platform, None, None, head_dim, "bfloat16")
    return functools.partial(chosen, kv_length=length)


def reference_attention(
    query: "jax.Array", key: "jax.Array", value: "jax.Array", near: "Callable[[jax.Array], jax.Array] | None" = None
) -> "jax.Array":
    """Compute softmax attention in float32 on [batch, heads, length, head_dim], some queries at a time.

    `near` tells which keys each head attends from queries of these numbers, bool [heads, queries, keys]; without it a
    head attends all.
    """
    import jax
    import jax.numpy as jnp

    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    length, head_dim = query.shape[2:]
    blocks = -(-length // REFERENCE_QUERIES)
    numbers = jnp.minimum(jnp.arange(blocks * REFERENCE_QUERIES), length - 1).reshape(blocks, -1)

    def attend(numbers: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            scores = jnp.einsum("bhqd,bhkd->bhqk", query[:, :, numbers], key) * head_dim**-0.5
            scores = scores if near is None else jnp.where(near(numbers), scores, -jnp.inf)
            return jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(scores), value)

    out = jnp.moveaxis(jax.lax.map(attend, numbers), 0, 2)
    return out.reshape(*out.shape[:2], -1, head_dim)[:, :, :length]


def worst_head(output: "jax.Array", expected: "jax.Array") -> tuple[float, int, str]:
    """Return the relative error of the head that has the largest, its number, and both in words; [1, heads, ...]."""
    import numpy as np

    errors = [relative_error(*pair) for pair in zip(np.asarray(output[0]), np.asarray(expected[0]), strict=True)]
    worst = int(np.argmax(np.nan_to_num(errors, nan=np.inf)))
    return errors[worst], worst, f"relative error of head {worst} of {len(errors)}, the worst"


def online_share(inputs: str, taken: float) -> tuple[str, str | None]:
    """Say which share of the heads took the online kernel, and what is wrong if it is not that of the inputs."""
    wanted = ONLINE.get(inputs, 0.0)
    unmet = f"{wanted:.0%} of the heads should have taken the online kernel" if taken != wanted else None
    return f"; {taken:.0%} of the heads took the online kernel", unmet


def check_kernel(machine: Machine, name: str, inputs: str, length: int) -> dict:
    """Compare an attention implementation with the reference, head by head, on inputs that both hold exactly."""
    import jax

    from cogvideox.models.transformer.attention import IMPLEMENTATIONS

    arrays = kernel_arrays(machine, inputs, length)
    output = jax.jit(attention_function(machine, name, length))(*arrays)[:, :, :length]
    expected = jax.jit(reference_attention)(*(x[:, :, :length] for x in arrays))
    (error, _, note), unmet = worst_head(output, expected), None
    if online_heads := IMPLEMENTATIONS[name].online_heads:
        taken = float(jax.jit(functools.partial(online_heads, kv_length=length))(*arrays).mean())
        share, unmet = online_share(inputs, taken)
        note += share
    return judged(error, KERNEL_TOLERANCE, note, unmet)


PATTERNS = ("dense", "frames:1", "positions:2")  # that heads of a check have in turn
WINDOW = "frames:1"  # the pattern that is measured


def patterns_function(machine: Machine, layout: "AlignedLayout", patterns: "Sequence[Pattern]") -> Callable:
    """Return block-sparse attention as the model calls it, with heads of any windows of the patterns' kinds.

    It is a function of the table of heads and of aligned tiles. It returns tiles, and of each head the share of the
    queries that took the online kernel, or 0 where there are no kernels.
    """
    from cogvideox.models.transformer.sparse.attention import sparse_attention
    from cogvideox.models.transformer.sparse.xla import xla_attention

    if has_patterns_kernel(machine):
        kinds = {pattern.kind for pattern in patterns}
        return lambda table, *qkv: sparse_attention(qkv[0], qkv[1], qkv[2], table, layout=layout, kinds=kinds)
    return lambda table, *qkv: (xla_attention(qkv[0], qkv[1], qkv[2], table, layout=layout), 0.0)


def aligned_tiles(machine: Machine, inputs: str, layout: "AlignedLayout") -> "tuple[list[jax.Array], list[jax.Array]]":
    """Return query, key and value, [1, heads, tokens, head_dim], and the same as aligned tiles.

    The padding of the tiles, whose keys do not count, holds the largest value.
    """
    import jax
    import jax.numpy as jnp

    def to_tiles(x: jax.Array) -> jax.Array:
        real = jnp.asarray(layout.is_real())[:, None]
        aligned = jnp.where(real, layout.from_packed(x, axis=2), x.max())
        return aligned.reshape(x.shape[1], layout.tiles, -1, x.shape[3]).transpose(1, 0, 3, 2)

    arrays = [x[:, :, : layout.real_tokens] for x in kernel_arrays(machine, inputs, layout.real_tokens)]
    return arrays, [jax.jit(to_tiles)(x) for x in arrays]


def check_patterns(machine: Machine, inputs: str, layout: "AlignedLayout") -> dict:
    """Compare attention whose heads have patterns with the reference, whose scores are masked token by token."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from cogvideox.models.transformer.sparse.layout import LANES
    from cogvideox.models.transformer.sparse.patterns import Pattern
    from cogvideox.models.transformer.sparse.table import HeadTable

    arrays, tiles = aligned_tiles(machine, inputs, layout)
    patterns = [Pattern.parse(text) for text in itertools.islice(itertools.cycle(PATTERNS), machine.scale.heads)]
    output, online = jax.jit(patterns_function(machine, layout, patterns))(HeadTable.of(patterns), *tiles)
    heads, head_dim = output.shape[1:3]
    output = layout.to_packed(output.transpose(1, 0, 3, 2).reshape(1, heads, -1, head_dim), axis=2)

    masks = jnp.asarray(np.stack([pattern.tile_mask(layout) for pattern in patterns]))
    tile = jnp.asarray(layout.positions() // LANES)
    near = lambda numbers: masks[:, tile[numbers]][:, :, tile]  # noqa: E731
    expected = jax.jit(functools.partial(reference_attention, near=near))(*arrays)
    (error, worst, note), unmet = worst_head(output, expected), None
    note += f", {patterns[worst]}"
    if has_patterns_kernel(machine):
        share, unmet = online_share(inputs, float((online > 0).mean()))
        note += share
    return judged(error, KERNEL_TOLERANCE, note, unmet)


# --- Measurements ------------------------------------------------------------------------------------------------


def measure_kernel(machine: Machine, length: int) -> dict:
    """Time the attention of one chip without the rest of the model."""
    import jax

    memory = MemoryUse(machine.devices[:1])
    arrays = [x[:, :, :length] for x in kernel_arrays(machine, "layer_normed", length)]
    programs, seconds = compiled([jax.jit(attention_function(machine, machine.attention, length)).trace(*arrays)])
    each = seconds_of_calls(machine, programs[0], *arrays)
    return measured(each, seconds, memory.so_far(programs), of_kernel_report(machine, [str(length)]))


def seconds_of_calls(machine: Machine, program: "jax.stages.Compiled", *arguments: Any) -> list[float]:
    """Return the seconds of a call of a program, of several that start together, so that starting is not counted."""
    import jax

    calls = 10

    def run_all() -> Iterator[None]:
        for _ in range(1 + machine.scale.repetitions):
            yield jax.block_until_ready([program(*arguments) for _ in range(calls)][-1])

    return [total / calls for total in durations(run_all())]


def of_kernel_report(machine: Machine, labels: Sequence[str]) -> dict:
    """Return what `of_report` does for a kernel on one chip of this kind."""
    return of_report("kernel", machine.topology and f"{machine.topology.split('-')[0]}-1", labels)


def measure_patterns(machine: Machine, layout: "AlignedLayout") -> dict:
    """Time the attention of one chip whose heads all have a window, beside dense heads in the same program.

    Their ratio is predicted for a TPU, from the kernels' schedules on v6e.
    """
    import jax

    from cogvideox.models.transformer.sparse.geometry import predicted_cycles
    from cogvideox.models.transformer.sparse.patterns import Pattern
    from cogvideox.models.transformer.sparse.table import HeadTable

    memory = MemoryUse(machine.devices[:1])
    _, tiles = aligned_tiles(machine, "layer_normed", layout)
    patterns = Pattern.parse(WINDOW), Pattern()
    tables = [jax.device_put(HeadTable.of([pattern] * machine.scale.heads), machine.devices[0]) for pattern in patterns]
    programs, seconds = compiled([jax.jit(patterns_function(machine, layout, patterns)).trace(tables[0], *tiles)])
    each, dense = (seconds_of_calls(machine, programs[0], table, *tiles) for table in tables)
    note = f"{statistics.median(each) / statistics.median(dense):.3f} of the seconds of dense heads"
    if machine.topology:
        fewer, cycles = (predicted_cycles(pattern, layout) for pattern in patterns)
        note += f", predicted {fewer / cycles:.3f}"
    expected = of_kernel_report(machine, [str(layout.real_tokens), WINDOW.replace(":", "")])
    return measured(each, seconds, memory.so_far(programs), expected) | {"note": note}
