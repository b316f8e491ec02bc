"""Predict the seconds of a step, up to a factor, to choose between plans."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from cogvideox.models.shared.sharding import Parallelism
from cogvideox.models.transformer.token_order import TokenOrder
from cogvideox.models.transformer.transformer import hidden_states_shape

# Figures of a v6e chip. Only their ratio counts here, and other chips have a similar one.
FLOPS = 0.35 * 918e12  # a second: the peak, times the share of it that a step reaches in the compiler's schedule
BANDWIDTH = 100e9  # bytes a second of a link between chips, one way


def step_seconds(
    samples: int,
    order: TokenOrder,
    config: Mapping,
    parallelism: Parallelism,
    attention: Callable,
    dtype: jax.typing.DTypeLike,
) -> float:
    """Predict the seconds of a full step, up to a factor: of its products, and of its exchanges.

    In each block the chips that share a sample exchange query, key, value and output: over sp from shares of the
    sequence to shares of the heads and back, over tp twice a gather and twice a sum of the hidden states, of which the
    TPU compiler makes an all-reduce. Where sp splits the queries into parts, it also gathers the keys and values of the
    other parts.

    Args:
        samples: that the step has, with guidance two for each video.
        order: of a sample's tokens.
        config, parallelism, attention: see `transformer`.
        dtype: of the hidden states.
    """
    heads, tp, chips = parallelism.head_parts, parallelism.tp, parallelism.mesh.size
    _, padded, width = hidden_states_shape(samples, order, config, parallelism, attention)
    weights = 12 * width**2  # of the products of a block: four in attention, the MLP has four times the width
    products = samples * config["num_layers"] * (2 * weights * padded + 4 * width * padded * order.real_tokens)
    share = samples * padded * width * jnp.dtype(dtype).itemsize / chips  # bytes of a chip's hidden states
    moved = 4 * (heads - 1) / heads + 6 * (tp - 1) + 2 * (parallelism.query_parts - 1)  # shares of a chip in a block
    return products / chips / FLOPS + config["num_layers"] * share * moved / BANDWIDTH
