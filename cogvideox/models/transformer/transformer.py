"""The transformer of CogVideoX in JAX.

It computes the same as diffusers' `CogVideoXTransformer3DModel`, with which the tests compare it, but is arranged for
TPUs. Text and video tokens are one sequence, padded once to what the mesh divides. The blocks are one `lax.scan` over
stacked weights, so that compile time does not grow with depth. Inside `shard_map` each chip holds whole rows of the
sequence between the matrix products and whole heads inside attention. Rotary pairs are stored as two halves instead of
interleaved: the rows of the q and k weights are permuted once, when they are loaded.

There are two blocks, of which the attention decides: block.py, which XLA compiles, and tiled_block.py, whose norms and
products are Pallas kernels, for an attention kernel that takes tiles, as the default on a TPU does.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from cogvideox.models.shared import tap
from cogvideox.models.shared.sharding import HIDDEN_STATES, MESH_AXES, Parallelism, activation_spec, gather_at_use
from cogvideox.models.transformer import taps
from cogvideox.models.transformer.attention import is_tiled, pattern_kinds
from cogvideox.models.transformer.base_block import SEQUENCE_TILE, BaseBlock
from cogvideox.models.transformer.block import Block
from cogvideox.models.transformer.embeddings import patchify, time_embedding, token_grid, unpatchify
from cogvideox.models.transformer.kernels import Weight
from cogvideox.models.transformer.layers import layer_norm, linear
from cogvideox.models.transformer.parameters import BLOCK, parameter_spec
from cogvideox.models.transformer.sparse.heads import HeadPatterns
from cogvideox.models.transformer.tiled_block import TiledBlock
from cogvideox.models.transformer.token_order import TokenOrder, token_order


class Prediction(NamedTuple):
    """What the transformer predicts.

    Attributes:
        output: float32 [batch, frames, channels, height, width].
        residual: what the blocks have added to the hidden states; see `hidden_states_shape`.
        online_heads: how many heads took the slower of the attention's two kernels for some queries, of all samples,
            blocks and `Parallelism.query_parts`, and the sum of their shares of the queries; float32 [2].
    """

    output: jax.Array
    residual: jax.Array
    online_heads: jax.Array


def block_for(attention: Callable) -> type[BaseBlock]:
    """Choose the block: that of kernels if the attention takes tiles, or else that of XLA."""
    return TiledBlock if is_tiled(attention) else Block


def transformer(
    parameters: Mapping[str, jax.Array],
    latents: jax.Array,
    prompt_embeds: jax.Array,
    timestep: jax.Array,
    rotary: tuple[jax.Array, jax.Array],
    *,
    config: Mapping,
    parallelism: Parallelism,
    attention: Callable,
    positions: jax.Array | None = None,
    residual: jax.Array | None = None,
    patterns: HeadPatterns | None = None,
) -> Prediction:
    """Predict from noisy latents [batch, frames, in_channels, height, width] a float32 array with out_channels.

    Args:
        parameters: see `load_parameters`.
        latents: of any dtype; for a model that takes an image, the image's beside the noisy ones in channels.
        prompt_embeds: [batch, text tokens, text width], of the dtype of the hidden states.
        timestep: scalar.
        rotary: see `rotary_embedding`.
        config: `transformer/config.json`.
        parallelism: the mesh, and the layout of the parameters on it.
        attention: a function as in models/transformer/attention.py; it decides which block there is (`block_for`).
        positions: what is added to the embedded tokens, [text and video tokens, embed], for a model that has positions.
        residual: if given, it takes the place of the blocks, which do not run.
        patterns: of the heads, [layers, heads], in whose order the parameters have them; for an attention with
            patterns, see `Attention.kinds`.
    """
    is_aligned = bool(pattern_kinds(attention))
    order = token_order(token_grid(config, latents.shape), prompt_embeds.shape[1], is_aligned)
    # Every layer that uses the embedding begins with silu.
    time = jax.nn.silu(time_embedding(timestep, parameters, config, prompt_embeds.dtype))
    _, padded, _ = hidden_states_shape(len(latents), order, config, parallelism, attention)
    hidden = embed(parameters, latents, prompt_embeds, positions, order, padded, config, parallelism)
    if residual is None:
        # Text and padding are not rotated: their angle is 0.
        cos, sin = (order.place_video(array, 0, padded) for array in rotary)
        cos = jnp.where(is_video(order, padded), cos, 1.0)
        last, online_heads = run_blocks(
            parameters,
            hidden,
            time,
            (cos, sin),
            order=order,
            config=config,
            parallelism=parallelism,
            attention=attention,
            patterns=patterns,
        )
    else:
        last, online_heads = hidden + residual, jnp.zeros(2)
    output = predict_patches(parameters, last, time, config, {-2: order.video_runs})
    batch, frames, _, *size = latents.shape
    output = unpatchify(order.video(output, 1), (batch, frames, config["out_channels"], *size), config)
    return Prediction(output, last - hidden if residual is None else residual, online_heads)


def hidden_states_shape(
    batch: int, order: TokenOrder, config: Mapping, parallelism: Parallelism, attention: Callable
) -> tuple[int, int, int]:
    """Return [batch, tokens, embed] of the hidden states, whose tokens are padded to what mesh and block divide."""
    own = math.lcm(SEQUENCE_TILE, order.multiple)
    gathered = math.lcm(own * parallelism.tp, block_for(attention).gathered_multiple)
    padding = -order.tokens % (parallelism.sp * gathered)
    return batch, order.tokens + padding, config["num_attention_heads"] * config["attention_head_dim"]


def constrained(hidden: jax.Array, parallelism: Parallelism) -> jax.Array:
    """Constrain hidden states to be split over the mesh as ACTIVATION_AXES says."""
    return jax.lax.with_sharding_constraint(hidden, parallelism.sharding(*HIDDEN_STATES))


def embed(
    parameters: Mapping[str, jax.Array],
    latents: jax.Array,
    prompt_embeds: jax.Array,
    positions: jax.Array | None,
    order: TokenOrder,
    padded: int,
    config: Mapping,
    parallelism: Parallelism,
) -> jax.Array:
    """Embed text and video as one sequence [batch, padded, embed].

    Text and patches are padded to the whole sequence before the mesh splits it, so that each chip embeds the patches of
    its own tokens; joining what is embedded would move it between the chips.
    """
    dtype = prompt_embeds.dtype
    with tap.scope("patch_embed"):
        patches = patchify(latents, config)

        def placed(place: Callable, x: jax.Array) -> jax.Array:
            return constrained(place(x, 1, padded), parallelism)

        text = placed(order.place_text, linear(prompt_embeds, parameters, "patch_embed.text_proj").astype(dtype))
        video = linear(placed(order.place_video, patches), parameters, "patch_embed.proj").astype(dtype)
        hidden = constrained(jnp.where(is_video(order, padded), video, text), parallelism)
        if positions is not None:
            hidden = hidden + placed(order.from_packed, positions.astype(dtype)[None])
        tap.tap("", hidden, HIDDEN_STATES, {-2: order.runs})
    return hidden


def is_video(order: TokenOrder, tokens: int) -> jax.Array:
    """Tell which of so many tokens are of the video, bool [tokens, 1]."""
    found = np.zeros(tokens, bool)
    found[order.positions()[order.text_tokens :]] = True
    return jnp.asarray(found)[:, None]


def run_blocks(
    parameters: Mapping[str, jax.Array],
    hidden: jax.Array,
    time: jax.Array,
    rotary: tuple[jax.Array, jax.Array],
    *,
    order: TokenOrder,
    config: Mapping,
    parallelism: Parallelism,
    attention: Callable,
    patterns: HeadPatterns | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Run all blocks on the hidden states [batch, padded, embed], split over the mesh.

    Returns an array like them, and `Prediction.online_heads`.

    Args:
        parameters: of the whole model.
        hidden: tokens in their order.
        time: silu of the time embedding, [time_embed_dim].
        rotary: cosines and sines, [padded, head_dim / 2] each.
        order: of the tokens.
        config, parallelism, attention, patterns: see `transformer`.
    """
    blocks = {name.removeprefix("blocks."): array for name, array in parameters.items() if name.startswith("blocks.")}
    specs = {name: parameter_spec(f"blocks.{name}", parallelism.layout) for name in blocks}
    block = block_for(attention)
    # Kernels read these in the stack of all blocks, unless the block has to gather them.
    stacks = [
        name
        for name in blocks
        if block.reads_stacks and BLOCK[name].read_in_stack and not gathered_axes(name, parallelism)
    ]

    def on_chip(
        blocks: Mapping, hidden: jax.Array, time: jax.Array, rotary: tuple, patterns: HeadPatterns | None
    ) -> tuple[jax.Array, jax.Array]:
        """Run all blocks on one chip's share [batch / dp, sequence / (sp * tp), embed] of the hidden states."""
        share = hidden.shape[1]
        position = (jax.lax.axis_index("sp") * parallelism.tp + jax.lax.axis_index("tp")) * share + jnp.arange(share)
        is_first = (position < order.boundary)[:, None]

        def step(
            carry: tuple[jax.Array, jax.Array], of_layer: tuple[jax.Array, dict[str, jax.Array], HeadPatterns | None]
        ) -> tuple[jax.Array, jax.Array]:
            (hidden, online), (layer, parameters, patterns) = carry, of_layer
            weights: dict[str, Any] = {name: Weight(blocks[name], layer) for name in stacks}
            weights |= {name: gather_share(name, array, parallelism) for name, array in parameters.items()}
            hidden, more = block(
                parameters=weights,
                time=time,
                rotary=rotary,
                is_first=is_first,
                order=order,
                config=config,
                parallelism=parallelism,
                attention=attention,
                patterns=patterns,
            )(hidden)
            return hidden, online + more

        layers = jnp.arange(config["num_layers"], dtype=jnp.int32)
        sliced = {name: array for name, array in blocks.items() if name not in stacks}
        hidden, online = tap.scan("transformer_blocks", step, (hidden, jnp.zeros(2)), (layers, sliced, patterns))
        return hidden, jax.lax.psum(online, MESH_AXES)

    run = tap.shard_map(
        on_chip,
        mesh=parallelism.mesh,
        in_specs=(
            *(specs, HIDDEN_STATES, activation_spec("time embedding")),
            *((activation_spec("rotary embedding"),) * 2, PartitionSpec()),
        ),
        out_specs=(HIDDEN_STATES, PartitionSpec()),
    )
    hidden, online = run(blocks, hidden, time, rotary, patterns)
    return constrained(hidden, parallelism), online


def gathered_axes(name: str, parallelism: Parallelism) -> tuple[int, tuple[str, ...]] | None:
    """Return over what a block gathers its parameter `name`; see `gather_at_use`."""
    return gather_at_use(BLOCK[name].axes, parallelism.layout)


def gather_share(name: str, array: jax.Array, parallelism: Parallelism) -> jax.Array:
    """Gather one block's parameter `name` over the mesh axes, other than tp, over which the layout splits it."""
    where = gathered_axes(name, parallelism)
    return array if where is None else jax.lax.all_gather(array, where[1], axis=where[0], tiled=True)


def predict_patches(
    parameters: Mapping[str, jax.Array],
    hidden: jax.Array,
    time: jax.Array,
    config: Mapping,
    video_bounds: tap.Bounds,
) -> jax.Array:
    """Turn the last block's hidden states into predicted patches, float32 [batch, tokens, patch]."""
    dtype = hidden.dtype
    with tap.scope("norm_final"):
        hidden = layer_norm(hidden, parameters, "norm_final", config["norm_eps"]).astype(dtype)
        tap.tap("", hidden, HIDDEN_STATES, video_bounds)
    with tap.scope("norm_out"):
        modulation = linear(time, parameters, "norm_out.linear")
        taps.tap_vector("linear", modulation)
        shift, scale = jnp.split(modulation, 2)
        hidden = layer_norm(hidden, parameters, "norm_out.norm", config["norm_eps"]) * (1 + scale) + shift
        hidden = hidden.astype(dtype)
        tap.tap("", hidden, HIDDEN_STATES, video_bounds)
    with tap.scope("proj_out"):
        output = linear(hidden, parameters, "proj_out")
        tap.tap("", output, HIDDEN_STATES, video_bounds)
    return output
