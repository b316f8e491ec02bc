"""What the transformer computes only where it is tapped: as diffusers' modules return it, not as our blocks have it."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from cogvideox.defaults import SOME_QUERIES
from cogvideox.models.shared import tap
from cogvideox.models.shared.sharding import HIDDEN_STATES, activation_spec
from cogvideox.models.transformer.kernels import Weight
from cogvideox.models.transformer.layers import QK_NORM_EPS, affine, moments, project_heads
from cogvideox.models.transformer.sparse import search
from cogvideox.models.transformer.sparse.heads import HeadPatterns
from cogvideox.models.transformer.sparse.layout import AlignedLayout
from cogvideox.models.transformer.token_order import TokenOrder
from custom_splash_attention import to_tiles


def tap_vector(name: str, x: jax.Array) -> None:
    """Tap a vector that is the same on all chips, as one row."""
    tap.tap(name, lambda: x[None], PartitionSpec(None, None))


def tap_heads(
    x: jax.Array,
    parameters: Mapping,
    heads: int,
    bounds: tap.Bounds,
    patterns: HeadPatterns | None,
    summed: Mapping[str, jax.Array] | None = None,
) -> None:
    """Tap queries, keys and values as they are projected, and queries and keys as they are normalised.

    Arrays are computed for the tap: a kernel that projects keeps them in VMEM, and with XLA they are computed once.

    Args:
        x: what is projected, [batch, sequence / sp, embed].
        parameters: of the block.
        heads: to which this chip projects.
        bounds: of the tokens that are not padding.
        patterns: of the layer's heads, which have them in another order than the model's; None for the model's.
        summed: their `tap.sums`, by name, where a kernel has computed them.
    """
    summed = summed or {}

    @functools.cache
    def project(letter: str) -> jax.Array:
        name = f"attn1.to_{letter}"
        weight = parameters[f"{name}.weight"]
        if isinstance(weight, Weight):
            weight = weight.stack[weight.layer]
        return project_heads(x, {**parameters, f"{name}.weight": weight}, name, heads)

    def normalized(letter: str) -> jax.Array:  # but not rotated
        x = project(letter)
        mean, scale = moments(x, QK_NORM_EPS)
        return affine((x - mean) * scale, parameters, f"attn1.norm_{letter}")

    def of_model(x: jax.Array) -> jax.Array:  # the heads of this chip in the model's order, of those in ours
        if patterns is None:
            return x
        x = patterns.in_model_order(jax.lax.all_gather(x, "tp", axis=1, tiled=True), axis=1)
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index("tp") * heads, heads, axis=1)

    def output_of_linear(letter: str) -> jax.Array:  # [batch, tokens, heads * head_dim]
        x = of_model(project(letter))
        x = x if letter == "v" else interleaved(x)
        return jnp.swapaxes(x, 1, 2).reshape(x.shape[0], x.shape[2], -1)

    def output_of_norm(letter: str) -> jax.Array:
        return interleaved(of_model(normalized(letter)))

    for letter in "qkv":
        array, same_values = functools.partial(output_of_linear, letter), functools.partial(project, letter)
        name, spec = f"to_{letter}", activation_spec("gathered heads")
        tap.tap(name, array, spec, bounds, same_values, summed.get(name))
    for letter in "qk":
        array, same_values = functools.partial(output_of_norm, letter), functools.partial(normalized, letter)
        name, spec = f"norm_{letter}", activation_spec("projected heads")
        tap.tap(name, array, spec, bounds, same_values, summed.get(name))


def tap_weights(
    arrays: Callable[[], tuple[jax.Array, jax.Array, jax.Array]],
    order: TokenOrder,
    heads: int,
    query_parts: int,
    patterns: HeadPatterns | None,
) -> None:
    """Tap the attention weights of the queries and heads that are wanted, over all keys, float32.

    They are computed for the tap, exactly: a kernel keeps no weights. They come out as [batch, heads, queries, keys],
    of heads and tokens in the model's order. Keys that a head's pattern does not name have no weight.

    Args:
        arrays: computes what the kernel takes, [batch / dp, heads of this chip, tokens, head_dim] each, the queries of
            this chip's part and all keys and values.
        order: of the tokens.
        heads: of the model.
        query_parts: see `Parallelism`.
        patterns: of the layer's heads; None where all are dense, and in the model's order.
    """

    def weights() -> jax.Array:
        wanted = tap.wanted()
        query, key, _ = (x.astype(jnp.float32) for x in arrays())
        group, member = jnp.divmod(jax.lax.axis_index("sp"), jax.lax.axis_size("sp") // query_parts)
        numbers = np.asarray(wanted.queries if wanted.queries is not None else some_queries(order.real_tokens))
        query, has_query = chosen(query, order.positions()[numbers] - group * query.shape[2], axis=2)
        precision = jax.lax.Precision.HIGHEST
        scores = jnp.einsum("bnqh,bnkh->bnqk", query, order.to_packed(key, 2), precision=precision)
        scores = scores * key.shape[-1] ** -0.5
        # The chip's heads are neighbours; of the axes that split them, tp is the outer and sp the inner one. Each chip
        # has zeros in the place of heads and queries that are not its own.
        first = (jax.lax.axis_index("tp") * (jax.lax.axis_size("sp") // query_parts) + member) * scores.shape[1]
        places = jnp.asarray(range(heads) if wanted.heads is None else wanted.heads)
        if patterns is not None:
            assert isinstance(order, AlignedLayout)
            own = patterns.part(first, scores.shape[1])
            scores = jnp.where(own.mask(order, numbers), scores, -jnp.inf)
            places = jnp.argsort(patterns.order)[places]
        own_weights, has_head = chosen(jax.nn.softmax(scores, axis=-1), places - first, axis=1)
        own_weights = jnp.where(has_head[:, None, None] & has_query[:, None], own_weights, 0.0)
        return jax.lax.psum(own_weights, ("sp", "tp"))

    tap.tap("weights", weights, activation_spec("attention weights"))


def chosen(x: jax.Array, places: jax.typing.ArrayLike, axis: int) -> tuple[jax.Array, jax.Array]:
    """Take what `x` has at places along an axis; returns it, and which of the places are in `x`."""
    places = jnp.asarray(places)
    return jnp.take(x, places, axis=axis, mode="clip"), (places >= 0) & (places < x.shape[axis])


def tap_patterns(patterns: HeadPatterns) -> None:
    """Tap which pattern each head of a layer has, int32 [heads, 2]: its kind's place in KINDS, and its window."""
    of_heads = functools.partial(jnp.stack, [patterns.kinds, patterns.windows], axis=1)
    tap.tap("patterns", lambda: patterns.in_model_order(of_heads(), axis=0), PartitionSpec(None, None))


def tap_pattern_errors(
    arrays: Callable[[], tuple[jax.Array, jax.Array, jax.Array]],
    layout: AlignedLayout,
    first_tile: Callable[[int], jax.Array | None],
    query_parts: int,
    patterns: HeadPatterns,
) -> None:
    """Tap the relative error of each head's attention under each of `search.candidates`, [batch, heads, candidates].

    It is that of the tiles of queries that `search.sampled_tiles` takes, beside exact attention; float32.

    Args:
        arrays, query_parts, patterns: see `tap_weights`.
        layout: of the tokens.
        first_tile: tells with which tile of the sequence queries of so many tiles begin; see `BaseBlock.first_tile`.
    """

    def squares() -> jax.Array:  # of the errors, and then of the outputs
        query, key, value = arrays()
        queries, keys, values = map(to_tiles, (query, key, value))
        found = search.pattern_errors(
            *(queries, keys, values, layout, search.sampled_tiles(layout), search.candidates(layout)),
            first_tile=first_tile(len(queries)),
        )
        return jnp.concatenate([found[0], found[1][:, None]], axis=1).reshape(*query.shape[:2], -1)

    def errors() -> jax.Array:
        found = of_all_heads(squares, query_parts, patterns).sum(0)
        return jnp.sqrt(found[..., :-1] / found[..., -1:])

    tap.tap("pattern_errors", errors, activation_spec("pattern errors"))


def tap_online_heads(which: Callable[[], jax.Array], query_parts: int, patterns: HeadPatterns | None = None) -> None:
    """Tap which heads take the slower of the attention's two kernels; a head does if it does for any of its queries.

    Args:
        which: computes it for the heads and the queries of this chip, bool [batch / dp, heads of this chip].
        query_parts: see `Parallelism`.
        patterns: see `tap_weights`.
    """
    if query_parts == 1 and patterns is None:
        tap.tap("online_heads", which, activation_spec("attended heads"))
    else:
        found = functools.partial(of_all_heads, which, query_parts, patterns)
        tap.tap("online_heads", lambda: found().any(0), activation_spec("all heads"))


def of_all_heads(own: Callable[[], jax.Array], query_parts: int, patterns: HeadPatterns | None) -> jax.Array:
    """Gather what each chip has of its heads and queries.

    Args:
        own: computes it, [batch / dp, heads of this chip, ...].
        query_parts, patterns: see `tap_weights`.

    Returns:
        [query_parts, batch / dp, heads, ...], of the heads in the model's order.
    """
    found = jax.lax.all_gather(own(), ("tp", "sp"))
    found = found.reshape(jax.lax.axis_size("tp"), query_parts, -1, *found.shape[1:])
    found = jnp.moveaxis(found, (0, 2), (2, 3))  # [parts, batch, tp, chips, heads of a chip, ...]
    found = found.reshape(*found.shape[:2], -1, *found.shape[5:])
    return found if patterns is None else patterns.in_model_order(found, axis=2)


def some_queries(length: int) -> list[int]:
    """Return a few of so many tokens, evenly spread."""
    count = min(SOME_QUERIES, length)
    return [i * (length - 1) // max(count - 1, 1) for i in range(count)]


def tap_mlp(x: jax.Array, bounds: tap.Bounds, summed: jax.Array | None = None) -> None:
    """Tap what lies between the two products of the MLP, x [batch, tokens gathered over tp, mlp / tp].

    `summed` is its `tap.sums` where a kernel has computed them.
    """
    own_tokens = functools.partial(jax.lax.all_to_all, x, "tp", split_axis=1, concat_axis=2, tiled=True)
    tap.tap("net.0", own_tokens, HIDDEN_STATES, bounds, summed=summed)


def interleaved(x: jax.Array) -> jax.Array:
    """Reorder [..., head_dim] from rotary pairs in two halves to interleaved pairs, as in diffusers."""
    halves = x.reshape(*x.shape[:-1], 2, -1)
    return jnp.swapaxes(halves, -1, -2).reshape(x.shape)
