"""A way to look inside a compiled program: it can return named arrays beside its result.

The model calls `tap(name, array)` on the outputs of its modules. Usually that does nothing, and the compiled program is
the same as without the call. `collecting(function, patterns)` makes a function that also returns the tapped arrays
whose names match. Names are those of diffusers' modules, such as "transformer_blocks.7.attn1.to_q"; `scope` builds
the names, and gives them to the operations in profiles too (`jax.named_scope`).

Arrays that are computed inside `lax.scan` or `shard_map` have to be returned from there. `scan` and `shard_map` of this
module do that.
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
    """What the current trace collects: the patterns of the wanted names, and the arrays found so far, by name."""

    patterns: Sequence[str]
    tapped: dict[str, Tapped]
    matched: set[str] = dataclasses.field(default_factory=set)

    def wants(self, name: str) -> bool:
        matching = {pattern for pattern in self.patterns if fnmatch.fnmatchcase(name, pattern)}
        self.matched.update(matching)
        return bool(matching)


_collector: contextvars.ContextVar[_Collector | None] = contextvars.ContextVar("collector", default=None)
_path: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("path", default=())


def tap(name: str, array: jax.Array | Callable[[], jax.Array], spec: PartitionSpec) -> None:
    """Let `collecting` return an array; does nothing, and does not call `array`, unless `collecting` is used.

    Args:
        name: of the module whose output the array is, relative to the scopes around this call; "" for the module that
            the scopes name.
        array: the array, or a function that computes it, for an array that is needed only here.
        spec: how the whole array is split over the mesh, if this is called inside `shard_map`.
    """
    collector = _collector.get()
    if collector is None:
        return
    name = ".".join([*_path.get(), *([name] if name else [])])
    if any(collector.wants(full_name) for full_name in _names(name)):
        collector.tapped[name] = Tapped(array() if callable(array) else array, spec)


@contextlib.contextmanager
def scope(name: str) -> Iterator[None]:
    """Put `name` in front of the names that are tapped inside, and of the operations' names in profiles."""
    token = _path.set((*_path.get(), name))
    try:
        with jax.named_scope(name):
            yield
    finally:
        _path.reset(token)


def collecting(function: Callable, patterns: Sequence[str]) -> Callable:
    """Make a function that returns `function`'s result and a dict of the arrays that it tapped, by name.

    Args:
        function: will be traced, for example by `jax.jit`.
        patterns: shell patterns of the names to collect, such as "transformer_blocks.*.ff.*".

    Raises:
        ValueError: while it is traced, a pattern that matches no name.
    """

    def collected(*args, **kwargs):
        collector = _Collector(patterns, {})
        token = _collector.set(collector)
        try:
            result, tapped = _collected(function, *args, **kwargs)
        finally:
            _collector.reset(token)
        if missing := sorted(set(patterns) - collector.matched):
            raise ValueError(f"no module is called {' or '.join(missing)}")
        return result, {name: tapped_array.array for name, tapped_array in tapped.items()}

    return collected


def scan(name: str, function: Callable, carry: Any, xs: Any) -> Any:
    """Return the carry after `carry = function(carry, x)` for each x; iterations are modules `name`.0, `name`.1, ..."""
    length = len(jax.tree.leaves(xs)[0])

    def body(carry, x):
        with scope(f"{name}.{{{length}}}"):  # one name for all iterations, which are the same program; see _names
            return _collected(function, carry, x)

    carry, stacked = jax.lax.scan(body, carry, xs)
    collector = _collector.get()
    if collector is not None:
        for pattern, tapped in stacked.items():
            for i, full_name in enumerate(_names(pattern)):
                if collector.wants(full_name):
                    collector.tapped[full_name] = Tapped(tapped.array[i], tapped.spec)
    return carry


def shard_map(function: Callable, *, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """Do what `jax.shard_map` does, and return tapped arrays from it, split by the `spec` that `tap` was given."""
    if _collector.get() is None:
        return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def mapped(*args):
        specs = {}

        def body(*args):
            result, tapped = _collected(function, *args)
            specs.update({name: tapped_array.spec for name, tapped_array in tapped.items()})
            return result, {name: tapped_array.array for name, tapped_array in tapped.items()}

        def run(out_specs: Any) -> Callable:
            return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

        jax.eval_shape(run((out_specs, PartitionSpec())), *args)  # only to learn what is tapped, and how it is split
        result, arrays = run((out_specs, dict(specs)))(*args)
        collector = _collector.get()
        if collector is not None:
            collector.tapped.update({name: Tapped(array, specs[name]) for name, array in arrays.items()})
        return result

    return mapped


def pieces(function: Callable, arguments: Sequence[tuple], axis: int) -> list:
    """Return the results of `function(*piece)` for each of `arguments`, which are pieces of one input along `axis`.

    The arrays that `function` taps are concatenated along that axis again.
    """
    results, taps = zip(*(_collected(function, *piece) for piece in arguments), strict=True)
    collector = _collector.get()
    if collector is not None:
        for name in taps[0]:
            joined = jax.numpy.concatenate([tapped[name].array for tapped in taps], axis=axis)
            collector.tapped[name] = Tapped(joined, taps[0][name].spec)
    return list(results)


def _collected(function: Callable, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tapped]]:
    """Return `function`'s result, and what it taps: nothing unless `collecting` is used."""
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
    """Return the names that a name stands for: for "blocks.{3}.norm" those from blocks.0.norm to blocks.2.norm."""
    before, brace, rest = name.partition("{")
    if not brace:
        return [name]
    length, _, after = rest.partition("}")
    return [f"{before}{i}{after}" for i in range(int(length))]
