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


def tap_heads(x: jax.Array, parameters: Mapping, heads: int, bounds: tap.Bounds) -> None:
    """Tap queries, keys and values as they are projected, and queries and keys as they are normalised.

    They are computed for the tap: a kernel that projects keeps them in VMEM, and with XLA they are computed once.

    Args:
        x: what is projected, [batch, sequence / sp, embed].
        parameters: of the block.
        heads: to which this chip projects.
        bounds: of the tokens that are not padding.
    """

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
        tap.tap(f"to_{letter}", array, activation_spec("gathered heads"), bounds, same_values)
    for letter in "qk":
        array, same_values = functools.partial(output_of_norm, letter), functools.partial(normalized, letter)
        tap.tap(f"norm_{letter}", array, activation_spec("projected heads"), bounds, same_values)


def tap_weights(queries_and_keys: Callable[[], tuple[jax.Array, jax.Array]], length: int, heads: int) -> None:
    """Tap the attention weights of the queries and heads that are wanted, over all keys, float32.

    They are computed for the tap, exactly: a kernel keeps no weights. They come out as [batch, heads, queries, keys].

    Args:
        queries_and_keys: computes what the kernel takes, [batch / dp, heads of this chip, tokens, head_dim] each.
        length: tokens that are not padding; they are the first.
        heads: of the model.
    """

    def weights() -> jax.Array:
        wanted = tap.wanted()
        query, key = (x.astype(jnp.float32) for x in queries_and_keys())
        query = query[:, :, jnp.asarray(wanted.queries if wanted.queries is not None else some_queries(length))]
        precision = jax.lax.Precision.HIGHEST
        scores = jnp.einsum("bnqh,bnkh->bnqk", query, key[:, :, :length], precision=precision) * key.shape[-1] ** -0.5
        own = jax.nn.softmax(scores, axis=-1)
        # The chip's heads are neighbours; of the axes that split them, tp is the outer and sp the inner one. Each chip
        # has zeros in the place of those that are not its own.
        first = (jax.lax.axis_index("tp") * jax.lax.axis_size("sp") + jax.lax.axis_index("sp")) * own.shape[1]
        place = jnp.asarray(range(heads) if wanted.heads is None else wanted.heads) - first
        is_own = (place >= 0) & (place < own.shape[1])
        chosen = jnp.where(is_own[:, None, None], jnp.take(own, place, axis=1, mode="clip"), 0.0)
        return jax.lax.psum(chosen, ("sp", "tp"))

    tap.tap("weights", weights, activation_spec("attention weights"))


def some_queries(length: int) -> list[int]:
    """Return a few of so many tokens, evenly spread."""
    count = min(SOME_QUERIES, length)
    return [i * (length - 1) // max(count - 1, 1) for i in range(count)]


def tap_mlp(x: jax.Array, bounds: tap.Bounds) -> None:
    """Tap what lies between the two products of the MLP, x [batch, tokens gathered over tp, mlp / tp]."""
    own_tokens = functools.partial(jax.lax.all_to_all, x, "tp", split_axis=1, concat_axis=2, tiled=True)
    tap.tap("net.0", own_tokens, HIDDEN_STATES, bounds)


def interleaved(x: jax.Array) -> jax.Array:
    """Reorder [..., head_dim] from rotary pairs in two halves to interleaved pairs, as in diffusers."""
    halves = x.reshape(*x.shape[:-1], 2, -1)
    return jnp.swapaxes(halves, -1, -2).reshape(x.shape)
