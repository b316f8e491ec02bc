"""A seam for looking inside a compiled program: named arrays that it returns beside its result.

The model calls `tap(name, array)` at its modules' outputs. While nothing collects, that does nothing, and the compiled
program is the same as without it. `collecting(function, patterns)` makes a function that also returns the tapped arrays
whose names match. Names are those of diffusers' modules, such as "transformer_blocks.7.attn1.to_q"; `scope` builds them
up and gives the same names to the operations in profiles (`jax.named_scope`).

Arrays that appear inside `lax.scan` or `shard_map` have to leave through them. `scan` and `shard_map` here do that.
"""

import contextlib
import contextvars
import dataclasses
import fnmatch
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tapped:
    """A tapped array, or one chip's share of it, and how the whole array is split over the mesh."""

    array: jax.Array
    spec: PartitionSpec = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass
class _Collector:
    """What the trace that is under way collects: arrays by name, and the names that are wanted."""

    patterns: Sequence[str]
    tapped: dict[str, Tapped]

    def wants(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.patterns)


_collector: contextvars.ContextVar[_Collector | None] = contextvars.ContextVar("collector", default=None)
_path: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("path", default=())


def tap(name: str, array: jax.Array | Callable[[], jax.Array], spec: PartitionSpec) -> None:
    """Hand an array to whoever collects; does nothing, and calls nothing, while nobody does.

    Args:
        name: of the module whose output it is, below the scopes around this call; "" for that of the scopes alone.
        array: the array, or a function that makes it, for one that only a collector needs.
        spec: how the whole array is split, where this is called inside `shard_map`.
    """
    collector = _collector.get()
    if collector is None:
        return
    name = ".".join([*_path.get(), *([name] if name else [])])
    if any(collector.wants(each) for each in _names(name)):
        collector.tapped[name] = Tapped(array() if callable(array) else array, spec)


@contextlib.contextmanager
def scope(name: str) -> Iterator[None]:
    """Put `name` in front of the names tapped inside, and of the operations in profiles."""
    token = _path.set((*_path.get(), name))
    try:
        with jax.named_scope(name):
            yield
    finally:
        _path.reset(token)


def collecting(function: Callable, patterns: Sequence[str]) -> Callable:
    """A function that returns `function`'s result and what it tapped, name -> array.

    Args:
        function: to be traced, for example the argument of `jax.jit`.
        patterns: shell patterns of the names to collect, such as "transformer_blocks.*.ff.*".
    """

    def collected(*args, **kwargs):
        token = _collector.set(_Collector(patterns, {}))
        try:
            result, tapped = _collected(function, *args, **kwargs)
        finally:
            _collector.reset(token)
        return result, {name: each.array for name, each in tapped.items()}

    return collected


def scan(name: str, function: Callable, carry: Any, xs: Any) -> Any:
    """The carry after `carry = function(carry, x)` for each x; iterations are modules `name`.0, `name`.1, ..."""
    length = len(jax.tree.leaves(xs)[0])

    def body(carry, x):
        with scope(f"{name}.{{{length}}}"):  # which iteration it is, one program for all cannot say
            return _collected(function, carry, x)

    carry, stacked = jax.lax.scan(body, carry, xs)
    collector = _collector.get()
    for pattern, tapped in stacked.items():
        for i, each in enumerate(_names(pattern)):
            if collector.wants(each):
                collector.tapped[each] = Tapped(tapped.array[i], tapped.spec)
    return carry


def shard_map(function: Callable, *, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """`jax.shard_map`, from which tapped arrays leave by the `spec` that they were tapped with."""

    def mapped(*args):
        specs = {}

        def body(*args):
            result, tapped = _collected(function, *args)
            specs.update({name: each.spec for name, each in tapped.items()})
            return result, {name: each.array for name, each in tapped.items()}

        def run(out_specs):
            return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

        jax.eval_shape(run((out_specs, PartitionSpec())), *args)  # only to see what is tapped, and how it is split
        result, arrays = run((out_specs, dict(specs)))(*args)
        _collector.get().tapped.update({name: Tapped(array, specs[name]) for name, array in arrays.items()})
        return result

    if _collector.get() is None:
        return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return mapped


def pieces(function: Callable, arguments: Sequence[tuple], axis: int) -> list:
    """The results of `function(*each)` for each of `arguments`, pieces of one input along `axis`.

    What it taps is joined along that axis again.
    """
    results, taps = zip(*(_collected(function, *each) for each in arguments), strict=True)
    collector = _collector.get()
    for name in taps[0]:
        joined = jax.numpy.concatenate([tapped[name].array for tapped in taps], axis=axis)
        collector.tapped[name] = Tapped(joined, taps[0][name].spec)
    return list(results)


def _collected(function: Callable, *args, **kwargs) -> tuple[Any, dict[str, Tapped]]:
    """`function`'s result, and what it taps; nothing while nothing collects."""
    collector = _collector.get()
    if collector is None:
        return function(*args, **kwargs), {}
    inner = dataclasses.replace(collector, tapped={})
    token = _collector.set(inner)
    try:
        return function(*args, **kwargs), inner.tapped
    finally:
        _collector.reset(token)


def _names(name: str) -> list[str]:
    """The names that a name stands for: "blocks.{3}.norm" is blocks.0.norm to blocks.2.norm."""
    before, brace, rest = name.partition("{")
    if not brace:
        return [name]
    length, _, after = rest.partition("}")
    return [f"{before}{i}{after}" for i in range(int(length))]
