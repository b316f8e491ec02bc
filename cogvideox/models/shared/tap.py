"""A way to look inside a compiled program: it can return named arrays, or their statistics, beside its result.

The model calls `tap(name, array)` on the outputs of its modules. Usually that does nothing, and the compiled program is
the same as without the call. `collecting(function, wanted)` makes a function that also returns what is wanted of the
tapped arrays. Names are those of diffusers' modules, such as "transformer_blocks.7.attn1.to_q"; `scope` builds the
names, and gives them to the operations in profiles too (`jax.named_scope`).

Arrays that are computed inside `lax.scan` or `shard_map` have to be returned from there. `scan` and `shard_map` of this
module do that.
"""

import contextlib
import contextvars
import dataclasses
import difflib
import fnmatch
import functools
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cogvideox.models.shared.sharding import mesh_axes

Runs = tuple[tuple[int, int], ...]  # first and last index of each run along an axis, in the model's order
Bounds = Mapping[int, Runs]
LEAST, MOST, CHECKSUMS = 3, 4, slice(5, None)  # places in what `sums` returns
MOST_NAMED = 12  # modules inside another one, in a message
# Last parts of names that a pattern has to spell: "*" does not mean what costs so much, or is no tensor of diffusers.
COSTLY = {"weights", "patterns", "pattern_errors"}


class NoSuchNameError(ValueError):
    """A pattern matches no name that is tapped; the message is what `no_such_name` says."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a program returns beside its result.

    Attributes:
        arrays: shell patterns of the names whose arrays are returned, such as "transformer_blocks.*.ff.*".
        statistics: patterns of the names of which the `sums` of each chip are returned.
        checksums: whether the `sums` have checksums, by which copies on several chips can be compared.
        queries, heads: of which attention weights are returned, where they are asked for: numbers of tokens and of
            heads; None for some tokens and for all heads.
    """

    arrays: Sequence[str] = ()
    statistics: Sequence[str] = ()
    checksums: bool = False
    queries: Sequence[int] | None = None
    heads: Sequence[int] | None = None

    def __bool__(self) -> bool:
        return bool(self.arrays or self.statistics)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tapped:
    """A tapped array, or its sums, and where it lives.

    Attributes:
        array: whole, or one chip's share while the program is traced.
        spec: how `array` is split over the mesh.
        bounds: the runs, by axis, of what the model means, in the model's order; everything else is padding.
        tapped_spec: how the array is split over the mesh of which `array` has the sums.
    """

    array: jax.Array
    spec: PartitionSpec = dataclasses.field(metadata={"static": True})
    bounds: tuple[tuple[int, Runs], ...] = dataclasses.field(default=(), metadata={"static": True})
    tapped_spec: PartitionSpec | None = dataclasses.field(default=None, metadata={"static": True})

    def without_padding(self) -> np.ndarray:
        """Fetch the array without its padding."""
        array = np.asarray(self.array)
        for axis, runs in self.bounds:
            if runs != ((0, array.shape[axis]),):
                array = np.take(array, np.concatenate([np.arange(*run) for run in runs]), axis)
        return array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
    """What a program returns for the points of which statistics are wanted, in few arrays, which all chips have whole.

    A step of the 5B model has 600 points, and to fetch an array takes its time however small it is.

    Attributes:
        stacked: arrays of one shape and dtype each, stacked.
        places: of each point, in the order of execution, its name, its array's place in `stacked` and in the stack, and
            `Tapped.tapped_spec`.
    """

    stacked: list[jax.Array]
    places: tuple[tuple[str, int, int, PartitionSpec | None], ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, found: "Mapping[str, Tapped]", mesh: Mesh) -> "Statistics":
        """Stack what was tapped, by name."""
        groups: dict[tuple, list[jax.Array]] = {}
        members = {}
        for name, tapped in found.items():
            group = groups.setdefault((tapped.array.shape, tapped.array.dtype), [])
            members[name] = group, len(group)
            group.append(tapped.array)
        whole = NamedSharding(mesh, PartitionSpec())
        stacked = [jax.lax.with_sharding_constraint(jnp.stack(group), whole) for group in groups.values()]
        numbers = {id(group): number for number, group in enumerate(groups.values())}
        places = [(name, numbers[id(group)], i, found[name].tapped_spec) for name, (group, i) in members.items()]
        return cls(stacked, tuple(places))

    def fetched(self) -> "dict[str, tuple[np.ndarray, PartitionSpec | None]]":
        """Fetch all points: of each its `sums` of all chips, or else its array, and its `Tapped.tapped_spec`."""
        stacked = jax.device_get(self.stacked)
        return {name: (stacked[number][i], spec) for name, number, i, spec in self.places}


class Collected(NamedTuple):
    """What a program returns beside its result: arrays by name, in the order of execution, and statistics."""

    arrays: "OrderedDict[str, Tapped]"
    statistics: Statistics


@dataclasses.dataclass
class _Collector:
    """What the current trace collects: `found` has the arrays so far, by ("arrays" or "statistics", name)."""

    wanted: Wanted
    mesh: Mesh
    found: "OrderedDict[tuple[str, str], Tapped]" = dataclasses.field(default_factory=OrderedDict)
    in_shard_map: bool = False
    piece: tuple[int, int] | None = None  # first index of the current piece of an array, and the array's length
    matched: set[str] = dataclasses.field(default_factory=set)
    names: set[str] = dataclasses.field(default_factory=set)

    def wants(self, kind: str, name: str) -> bool:
        self.names.add(name)
        matching = {pattern for pattern in getattr(self.wanted, kind) if matches(name, pattern)}
        self.matched.update(matching)
        return bool(matching)

    def check(self) -> None:
        """Raise NoSuchNameError if a pattern has matched nothing."""
        for pattern in (*self.wanted.arrays, *self.wanted.statistics):
            if pattern not in self.matched:
                raise NoSuchNameError(no_such_name(pattern, self.names))


def matches(name: str, pattern: str) -> bool:
    """Return whether a shell pattern means a name."""
    last = name.rpartition(".")[2]
    return fnmatch.fnmatchcase(name, pattern) and (last not in COSTLY or pattern.rpartition(".")[2] == last)


def no_such_name(pattern: str, names: Iterable[str]) -> str:
    """Say that a pattern means none of the names: what is inside the module that it names, or else what is nearest."""
    general = sorted({re.sub(r"\b\d+\b", "*", name) for name in names})
    inside = {}
    for name in names:
        parts = name.split(".")
        for i in range(1, len(parts)):
            if fnmatch.fnmatchcase(".".join(parts[:i]), pattern):
                inside[re.sub(r"\b\d+\b", "*", ".".join(parts[i:]))] = name
    if inside:
        some = ", ".join(sorted(inside)[:MOST_NAMED]) + ", ..." * (len(inside) > MOST_NAMED)
        return f"{pattern} has no output of its own; name what is inside it, '{pattern}.*' or one of {some}"
    near = ", ".join(difflib.get_close_matches(pattern, general, n=3, cutoff=0.0))
    return f"no module is called {pattern}; the nearest: {near}"


_collector: contextvars.ContextVar[_Collector | None] = contextvars.ContextVar("collector", default=None)
_path: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("path", default=())


def wanted() -> Wanted:
    """Return what the current trace is to collect."""
    collector = _collector.get()
    return collector.wanted if collector else Wanted()


def tap(
    name: str,
    array: jax.Array | Callable[[], jax.Array],
    spec: PartitionSpec,
    bounds: Bounds | None = None,
    same_values: jax.Array | Callable[[], jax.Array] | None = None,
    summed: jax.Array | None = None,
) -> None:
    """Let `collecting` return an array; does nothing, and does not call `array`, unless `collecting` is used.

    Args:
        name: of the module whose output the array is, relative to the scopes around this call; "" for the module that
            the scopes name.
        array: the array, or a function that computes it, for an array that is needed only here.
        spec: how the whole array is split over the mesh, an entry for each axis.
        bounds: the runs of what is not padding in the whole array, by axis, counted from the end (-1, -2).
        same_values: the same values, or a function that computes them, in an order that costs less, for statistics;
            the last two axes have the same bounds.
        summed: the `sums` of the chip's share, without checksums, where a kernel has computed them: inside `shard_map`,
            of an array of which no two chips have the same share.
    """
    collector = _collector.get()
    if collector is None:
        return
    name = _full_name(name)
    wants = {kind: any([collector.wants(kind, n) for n in _names(name)]) for kind in ("arrays", "statistics")}
    if wants["arrays"]:
        collector.found["arrays", name] = Tapped(_computed(array), spec, tuple((bounds or {}).items()))
    if wants["statistics"] and summed is not None:
        chips = PartitionSpec(tuple(collector.mesh.axis_names))
        found = jnp.pad(summed, ((0, 0), (0, 2))) if collector.wanted.checksums else summed
        collector.found["statistics", name] = Tapped(found, chips, tapped_spec=spec)
    elif wants["statistics"]:
        values = _computed(array if same_values is None else same_values)
        if values.dtype == jnp.bool_:  # few, and each of them tells something
            collector.found["statistics", name] = Tapped(values, spec)
            return
        reduce = _reducer(spec, bounds or {}, collector)
        chips = PartitionSpec(tuple(collector.mesh.axis_names))
        if not collector.in_shard_map:
            reduce = jax.shard_map(reduce, mesh=collector.mesh, in_specs=spec, out_specs=chips, check_vma=False)
        collector.found["statistics", name] = Tapped(reduce(values), chips, tapped_spec=spec)


def wants_statistics(name: str) -> bool:
    """Return whether `collecting` is used and wants statistics of a module, named as in `tap`."""
    collector = _collector.get()
    return collector is not None and any([collector.wants("statistics", n) for n in _names(_full_name(name))])


def _full_name(name: str) -> str:
    """Return the name of a module with the scopes around it."""
    return ".".join([*_path.get(), *([name] if name else [])])


def _computed(array: jax.Array | Callable[[], jax.Array]) -> jax.Array:
    return array() if callable(array) else array


def _reducer(spec: PartitionSpec, bounds: Bounds, collector: _Collector) -> Callable[[jax.Array], jax.Array]:
    """Return a function that computes the `sums` of one chip's share of an array, padding left out."""
    split_over = mesh_axes(spec)
    copies = math.prod(size for axis, size in collector.mesh.shape.items() if not any(axis in a for a in split_over))

    def reduce(share: jax.Array) -> jax.Array:
        real = jnp.ones((), bool)
        for axis, runs in bounds.items():
            first, length = collector.piece or (0, share.shape[axis])
            index = jax.lax.axis_index(split_over[axis]) if split_over[axis] else 0
            shape = [1] * share.ndim
            shape[axis] = share.shape[axis]
            position = index * length + first + jnp.arange(share.shape[axis]).reshape(shape)
            real = real & functools.reduce(
                jnp.logical_or, [(position >= start) & (position < stop) for start, stop in runs]
            )
        return sums(share, real, copies, collector.wanted.checksums)

    return reduce


def sums(share: jax.Array, real: jax.Array, copies: int, checksum: bool = False) -> jax.Array:
    """Compute what the statistics of an array are made of, for one chip.

    Args:
        share: the chip's share of the array.
        real: which of its values are not padding, bool of a shape that broadcasts.
        copies: how many chips have the same share; counts are divided by it, so that the sum over all chips is right.
        checksum: whether to add two checksums of the bits.

    Returns:
        float32 [1, 5 or 7]: count, sum, sum of squares, least and largest value, and the checksums. What is not finite
        shows in all but the count.

    Padding counts as zero for the least and the largest value: one operation on each value instead of three. The whole
    is to cost a few percent of the program, as compile_for_tpu predicts.
    """
    x = jnp.where(real, share.astype(jnp.float32), 0.0)
    count = real.sum() * (x.size // real.size)
    found = [count.astype(jnp.float32) / copies, x.sum() / copies, jnp.square(x).sum() / copies, x.min(), x.max()]
    if checksum:
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32).sum(dtype=jnp.uint32)
        found += [(bits & 0xFFFF).astype(jnp.float32), (bits >> 16).astype(jnp.float32)]
    return jnp.stack(found)[None]


def added(parts: Sequence[jax.Array]) -> jax.Array:
    """Return the `sums` of an array from those of its pieces."""
    stacked = jnp.stack(parts)
    total = stacked.sum(0)
    total = total.at[:, LEAST].set(stacked[:, :, LEAST].min(0))
    return total.at[:, MOST].set(stacked[:, :, MOST].max(0))


@contextlib.contextmanager
def scope(name: str) -> Iterator[None]:
    """Put `name` in front of the names that are tapped inside, and of the operations' names in profiles."""
    token = _path.set((*_path.get(), name))
    try:
        with jax.named_scope(name):
            yield
    finally:
        _path.reset(token)


def collecting(function: Callable, wanted: Wanted, mesh: Mesh) -> Callable:
    """Make a function that returns `function`'s result and what is `Collected`.

    Args:
        function: will be traced, for example by `jax.jit`.
        wanted: see `Wanted`.
        mesh: the devices.

    Raises:
        NoSuchNameError: while it is traced, for a pattern that matches no name.
    """

    def collected(*args, **kwargs):
        collector = _Collector(wanted, mesh)
        token = _collector.set(collector)
        try:
            result, found = _collected(function, *args, **kwargs)
        finally:
            _collector.reset(token)
        collector.check()
        arrays, statistics = (
            OrderedDict((name, tapped) for (kind, name), tapped in found.items() if kind == one)
            for one in ("arrays", "statistics")
        )
        return result, Collected(arrays, Statistics.of(statistics, mesh))

    return collected


def scan(name: str, function: Callable, carry: Any, xs: Any) -> Any:
    """Return the carry after `carry = function(carry, x)` for each x; iterations are modules `name`.0, `name`.1, ..."""
    length = len(jax.tree.leaves(xs)[0])

    def body(carry, x):
        with scope(f"{name}.{{{length}}}"):  # one name for all iterations, which are the same program; see _names
            return _collected(function, carry, x)

    collector = _collector.get()
    if collector is None:
        return jax.lax.scan(body, carry, xs)[0]

    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), xs)
    _, example = jax.eval_shape(body, carry, one)
    # Each iteration writes what it taps to its own slot of a buffer, or, where it is not wanted, to a last slot that is
    # not read: only what is wanted takes memory.
    wanted = {key: [collector.wants(key[0], full_name) for full_name in _names(key[1])] for key in example}
    slots = {key: np.where(wanted[key], np.cumsum(wanted[key]) - 1, sum(wanted[key])) for key in example}
    buffers = {key: jnp.zeros((slots[key].max() + 1, *t.array.shape), t.array.dtype) for key, t in example.items()}

    def step(state, x_and_slots):
        (carry, buffers), (x, slot) = state, x_and_slots
        carry, found = body(carry, x)
        return (carry, {key: buffers[key].at[slot[key]].set(found[key].array) for key in found}), None

    (carry, buffers), _ = jax.lax.scan(step, (carry, buffers), (xs, {k: jnp.asarray(s) for k, s in slots.items()}))
    for i in range(length):
        for key, tapped in example.items():
            if wanted[key][i]:
                array = buffers[key][slots[key][i]]
                collector.found[key[0], _names(key[1])[i]] = dataclasses.replace(tapped, array=array)
    return carry


def shard_map(function: Callable, *, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """Do what `jax.shard_map` does, and return tapped arrays from it, split by the `spec` that `tap` was given."""
    collector = _collector.get()
    if collector is None:
        return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def mapped(*args):
        tapped: OrderedDict[tuple[str, str], Tapped] = OrderedDict()

        def body(*args):
            collector.in_shard_map = True
            try:
                result, found = _collected(function, *args)
            finally:
                collector.in_shard_map = False
            tapped.update(found)
            return result, {key: found[key].array for key in found}

        def run(out_specs: Any) -> Callable:
            return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

        jax.eval_shape(run((out_specs, PartitionSpec())), *args)  # only to learn what is tapped, and how it is split
        result, arrays = run((out_specs, {key: tapped[key].spec for key in tapped}))(*args)
        collector.found.update((key, dataclasses.replace(tapped[key], array=arrays[key])) for key in tapped)
        return result

    return mapped


def pieces(function: Callable, arguments: Sequence[tuple], axis: int) -> list:
    """Return the results of `function(*piece)` for each of `arguments`, which are pieces of one input along `axis`.

    The arrays that `function` taps are concatenated along that axis again, if the mesh splits them there; others do not
    belong to a piece, and are the same for all.
    """
    collector = _collector.get()
    if collector is None:
        return [function(*piece) for piece in arguments]
    lengths = [piece[0].shape[axis] for piece in arguments]
    results, taps = [], []
    for i, piece in enumerate(arguments):
        collector.piece = sum(lengths[:i]), sum(lengths)
        result, found = _collected(function, *piece)
        results.append(result)
        taps.append(found)
    collector.piece = None
    for key, first in taps[0].items():
        if (first.tapped_spec or first.spec)[axis] is None:
            collector.found[key] = first
            continue
        arrays = [found[key].array for found in taps]
        joined = jnp.concatenate(arrays, axis=axis) if key[0] == "arrays" else added(arrays)
        collector.found[key] = dataclasses.replace(first, array=joined)
    return results


def _collected(function: Callable, *args: Any, **kwargs: Any) -> "tuple[Any, OrderedDict[tuple[str, str], Tapped]]":
    """Return `function`'s result, and what it taps: nothing unless `collecting` is used."""
    collector = _collector.get()
    if collector is None:
        return function(*args, **kwargs), OrderedDict()
    inner = dataclasses.replace(collector, found=OrderedDict())
    token = _collector.set(inner)
    try:
        return function(*args, **kwargs), inner.found
    finally:
        _collector.reset(token)


def _names(name: str) -> list[str]:
    """Return the names that a name stands for: for "blocks.{3}.norm" those from blocks.0.norm to blocks.2.norm."""
    before, brace, rest = name.partition("{")
    if not brace:
        return [name]
    length, _, after = rest.partition("}")
    return [f"{before}{i}{after}" for i in range(int(length))]
