"""What the transformer computes only where it is tapped: as diffusers' modules return it, not as our blocks have it."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from cogvideox.defaults import SOME_QUERIES
from cogvideox.models.shared import tap
from cogvideox.models.shared.sharding import HIDDEN_STATES, activation_spec
from cogvideox.models.transformer.kernels import Weight
from cogvideox.models.transformer.layers import QK_NORM_EPS, affine, moments, project_heads


def tap_vector(name: str, x: jax.Array) -> None:
    """Tap a vector that is the same on all chips, as one row."""
    tap.tap(name, lambda: x[None], PartitionSpec(None, None))


def tap_heads(
    x: jax.Array, parameters: Mapping, heads: int, bounds: tap.Bounds, summed: Mapping[str, jax.Array] | None = None
) -> None:
    """Tap queries, keys and values as they are projected, and queries and keys as they are normalised.

    Arrays are computed for the tap: a kernel that projects keeps them in VMEM, and with XLA they are computed once.

    Args:
        x: what is projected, [batch, sequence / sp, embed].
        parameters: of the block.
        heads: to which this chip projects.
        bounds: of the tokens that are not padding.
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

    def output_of_linear(letter: str) -> jax.Array:  # [batch, tokens, heads * head_dim]
        x = project(letter)
        x = x if letter == "v" else interleaved(x)
        return jnp.swapaxes(x, 1, 2).reshape(x.shape[0], x.shape[2], -1)

    def output_of_norm(letter: str) -> jax.Array:
        return interleaved(normalized(letter))

    for letter in "qkv":
        array, same_values = functools.partial(output_of_linear, letter), functools.partial(project, letter)
        name, spec = f"to_{letter}", activation_spec("gathered heads")
        tap.tap(name, array, spec, bounds, same_values, summed.get(name))
    for letter in "qk":
        array, same_values = functools.partial(output_of_norm, letter), functools.partial(normalized, letter)
        name, spec = f"norm_{letter}", activation_spec("projected heads")
        tap.tap(name, array, spec, bounds, same_values, summed.get(name))


def tap_weights(
    queries_and_keys: Callable[[], tuple[jax.Array, jax.Array]], length: int, heads: int, query_parts: int
) -> None:
    """Tap the attention weights of the queries and heads that are wanted, over all keys, float32.

    They are computed for the tap, exactly: a kernel keeps no weights. They come out as [batch, heads, queries, keys].

    Args:
        queries_and_keys: computes what the kernel takes, [batch / dp, heads of this chip, tokens, head_dim] each, the
            queries of this chip's part and all keys.
        length: tokens that are not padding; they are the first.
        heads: of the model.
        query_parts: see `Parallelism`.
    """

    def weights() -> jax.Array:
        wanted = tap.wanted()
        query, key = (x.astype(jnp.float32) for x in queries_and_keys())
        group, member = jnp.divmod(jax.lax.axis_index("sp"), jax.lax.axis_size("sp") // query_parts)
        queries = jnp.asarray(wanted.queries if wanted.queries is not None else some_queries(length))
        query, has_query = chosen(query, queries - group * query.shape[2], axis=2)
        precision = jax.lax.Precision.HIGHEST
        scores = jnp.einsum("bnqh,bnkh->bnqk", query, key[:, :, :length], precision=precision) * key.shape[-1] ** -0.5
        own = jax.nn.softmax(scores, axis=-1)
        # The chip's heads are neighbours; of the axes that split them, tp is the outer and sp the inner one. Each chip
        # has zeros in the place of heads and queries that are not its own.
        first = (jax.lax.axis_index("tp") * (jax.lax.axis_size("sp") // query_parts) + member) * own.shape[1]
        own, has_head = chosen(own, jnp.asarray(range(heads) if wanted.heads is None else wanted.heads) - first, axis=1)
        return jax.lax.psum(jnp.where(has_head[:, None, None] & has_query[:, None], own, 0.0), ("sp", "tp"))

    tap.tap("weights", weights, activation_spec("attention weights"))


def chosen(x: jax.Array, places: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Take what `x` has at places along an axis; returns it, and which of the places are in `x`."""
    return jnp.take(x, places, axis=axis, mode="clip"), (places >= 0) & (places < x.shape[axis])


def tap_online_heads(which: Callable[[], jax.Array], query_parts: int) -> None:
    """Tap which heads take the slower of the attention's two kernels; a head does if it does for any of its queries.

    Args:
        which: computes it for the heads and the queries of this chip, bool [batch / dp, heads of this chip].
        query_parts: see `Parallelism`.
    """

    def of_all_groups() -> jax.Array:  # [batch / dp, heads / tp]
        found = jax.lax.all_gather(which(), "sp")
        found = found.reshape(query_parts, -1, *found.shape[1:]).any(0)
        return jnp.swapaxes(found, 0, 1).reshape(found.shape[1], -1)

    if query_parts == 1:
        tap.tap("online_heads", which, activation_spec("attended heads"))
    else:
        tap.tap("online_heads", of_all_groups, activation_spec("heads of all groups"))


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
