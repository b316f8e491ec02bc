"""A video in chunks of frames: their sizes, and the programs that run one chunk after the other, split in space."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from cogvideox.models.shared import tap
from cogvideox.models.vae.spatial_split import Split


def sizes(frames: int, per_chunk: int) -> list[int]:
    """Return the frames of each chunk; what `per_chunk` leaves joins the first one, or is the only one."""
    chunks, rest = divmod(frames, per_chunk)
    if chunks == 0:
        return [rest]
    return [per_chunk + rest] + [per_chunk] * (chunks - 1)


def on_devices(weights: Any, dtype: jax.typing.DTypeLike, split: Split) -> Any:
    """Return the shapes of a tree of weights on the devices, each of which has all of them, in one dtype."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=split.replicated), weights)


def abstract_weights(
    shapes: Mapping[str, tuple[int, ...]], convert: Callable, dtype: jax.typing.DTypeLike, split: Split
) -> Any:
    """Return the weights of a decoder or an encoder as shapes on the devices, to compile without the weights.

    `shapes` and `convert` are its `weight_shapes` and `convert_weights`.
    """
    stored = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
    return on_devices(jax.eval_shape(convert, stored), dtype, split)


def trace(
    run_chunk: Callable,
    weights: Any,
    shapes: Sequence[tuple[int, ...]],
    split: Split,
    wanted: tap.Wanted | None = None,
) -> list[jax.stages.Traced]:
    """Trace the programs of the first chunk and of any later one.

    Args:
        run_chunk: `run_chunk(weights, tiles, cache)`, to be run on each chip of the split, without a cache for the
            first chunk. Returns the chip's part of the result, [frames, channels, height, width], and the next cache.
        weights: the tree that it takes; shapes are enough to compile without data. Its dtype is that of the tiles.
        shapes: of the tiles (see `Split.tiles_shape`) of the first chunk, and of a later one if there is one.
        split: of a frame over chips and strips.
        wanted: if anything, a program returns its result and what is `tap.Collected`: the outputs of modules as
            [frames, channels, height, width].

    Returns:
        One or two programs that map weights, tiles and cache to the result and the next cache. The first program takes
        no cache; the second one donates its cache.
    """
    dtype = jax.tree.leaves(weights)[0].dtype

    def program(*arguments):
        specs = PartitionSpec(), *[split.latents.spec] * (len(arguments) - 1)

        def run(*arguments):
            out_specs = split.pixels.spec, split.latents.spec
            return tap.shard_map(run_chunk, mesh=split.mesh, in_specs=specs, out_specs=out_specs)(*arguments)

        function = tap.collecting(run, wanted, split.mesh) if wanted else run
        return jax.jit(function, donate_argnums=tuple(range(2, len(arguments)))).trace(*arguments)

    tiles = [jax.ShapeDtypeStruct(shape, dtype, sharding=split.latents) for shape in shapes]
    first = program(weights, tiles[0])
    if len(tiles) == 1:
        return [first]
    _, cache = first.out_info[0] if wanted else first.out_info
    cache = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split.latents), cache)
    return [first, program(weights, tiles[1], cache)]


def to_host(result: jax.Array, split: Split) -> jax.Array:
    """Begin to copy the result of a program to this host, all of it if other hosts have a part."""
    if not result.is_fully_addressable:
        result = jax.jit(_whole, out_shardings=split.replicated)(result)
    result.copy_to_host_async()
    return result


def _whole(result: jax.Array) -> jax.Array:
    """Return the result, to be compiled so that each chip has all of it."""
    return result
