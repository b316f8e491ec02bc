"""CogVideoX 1.5's transformer in JAX.

It computes the same as diffusers' `CogVideoXTransformer3DModel`, with which the tests compare it, but is arranged for
TPUs. Text and video tokens are one sequence, padded once to what the mesh divides. The blocks are one `lax.scan` over
stacked weights, so that compile time does not grow with depth. Inside `shard_map` each chip holds whole rows of the
sequence between the matrix products and whole heads inside attention. Rotary pairs are stored as two halves instead of
interleaved: the rows of the q and k weights are permuted once, when they are loaded.

With an attention kernel that takes tiles, as the default on a TPU does, the norms and products of a block are the
kernels of models/block_kernels.py; otherwise XLA compiles them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from cogvideox.models.shared import tap
from cogvideox.models.shared.sharding import Parallelism, activation_spec, gather_at_use
from cogvideox.models.transformer import block_kernels
from cogvideox.models.transformer.attention import Attention, is_tiled
from cogvideox.models.transformer.block_kernels import moments
from cogvideox.models.transformer.parameters import BLOCK, parameter_spec

QK_NORM_EPS = 1e-6  # CogVideoXBlock passes this to Attention; no config contains it
FEED_FORWARD_TOKENS = 2048  # tokens of a chip that go through the MLP at a time
SEQUENCE_TILE = 16  # rows of a bfloat16 tile in a TPU's memory; each chip's share of the sequence is whole tiles
HIDDEN_STATES = activation_spec("hidden states")
PROJECTED_HEADS = activation_spec("projected heads")
GATHERED = activation_spec("gathered heads")
REPLICATED = PartitionSpec(None, None)
TOKENS = 1  # the axis of the hidden states


def rotary_embedding(config: Mapping, latent_shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return cosines and sines of the 3D rotary embedding, float32 [video tokens, attention_head_dim / 2] each.

    Args:
        config: `transformer/config.json`.
        latent_shape: [batch, frames, channels, height, width], frames a multiple of patch_size_t.

    Source: `CogVideoXPipeline._prepare_rotary_positional_embeddings`, the branch of CogVideoX 1.5.
    """
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    _, frames, _, height, width = latent_shape
    patch = config["patch_size"]
    cos, sin = get_3d_rotary_pos_embed(
        embed_dim=config["attention_head_dim"],
        crops_coords=None,
        grid_size=(height // patch, width // patch),
        temporal_size=frames // config["patch_size_t"],
        grid_type="slice",
        max_size=(config["sample_height"] // patch, config["sample_width"] // patch),
    )
    return cos[:, ::2].numpy(), sin[:, ::2].numpy()  # diffusers writes each value twice, once for each of a pair


# --- The model ---------------------------------------------------------------------------------------------------


def linear(x: jax.Array, parameters: Mapping, name: str) -> jax.Array:
    """Apply the linear layer `name` to x [..., in]; returns float32 [..., out]."""
    y = jnp.einsum("...i,oi->...o", x, parameters[f"{name}.weight"], preferred_element_type=jnp.float32)
    bias = parameters.get(f"{name}.bias")
    return y if bias is None else y + bias.astype(jnp.float32)


def layer_norm(x: jax.Array, parameters: Mapping, name: str, eps: float) -> jax.Array:
    """Apply the layer norm `name` over the last axis, in float32; returns float32."""
    x = x.astype(jnp.float32)
    mean, scale = moments(x, eps)
    return affine((x - mean) * scale, parameters, name)


def affine(x: jax.Array, parameters: Mapping, name: str, part: slice = slice(None)) -> jax.Array:
    """Compute x * weight + bias with `part` of the parameters of the norm `name`, if it has any."""
    if f"{name}.weight" not in parameters:
        return x
    weight, bias = (parameters[f"{name}.{kind}"][part].astype(jnp.float32) for kind in ("weight", "bias"))
    return x * weight + bias


def time_embedding(timestep: jax.Array, parameters: Mapping, config: Mapping, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Compute the time embedding, [time_embed_dim].

    Source: `Timesteps` and `TimestepEmbedding`.
    """
    width = config["num_attention_heads"] * config["attention_head_dim"]
    half = width // 2
    frequencies = np.exp(-math.log(10000) * np.arange(half) / (half - config["freq_shift"])).astype(np.float32)
    angles = timestep.astype(jnp.float32) * frequencies
    order = (jnp.cos, jnp.sin) if config["flip_sin_to_cos"] else (jnp.sin, jnp.cos)
    x = jnp.concatenate([function(angles) for function in order]).astype(dtype)
    x = jax.nn.silu(linear(x, parameters, "time_embedding.linear_1")).astype(dtype)
    x = linear(x, parameters, "time_embedding.linear_2").astype(dtype)
    tap.tap("linear_2", lambda: x[None], REPLICATED)
    return x


class Prediction(NamedTuple):
    """What the transformer predicts.

    Attributes:
        output: float32 [batch, frames, channels, height, width].
        residual: what the blocks have added to the hidden states; see `hidden_states_shape`.
    """

    output: jax.Array
    residual: jax.Array


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
    residual: jax.Array | None = None,
) -> Prediction:
    """Predict from noisy latents [batch, frames, channels, height, width] a float32 array of the same shape.

    Args:
        parameters: see `load_parameters`.
        latents: of any dtype.
        prompt_embeds: [batch, text tokens, text width], of the dtype of the hidden states.
        timestep: scalar.
        rotary: see `rotary_embedding`.
        config: `transformer/config.json`.
        parallelism: the mesh, and the layout of the parameters on it.
        attention: a function as in models/attention.py, which decides how the heads are laid out if it is an
            `Attention` that takes tiles.
        residual: if given, it takes the place of the blocks, which do not run.
    """
    text_length, length = prompt_embeds.shape[1], prompt_embeds.shape[1] + rotary[0].shape[0]
    bounds = {-2: (0, length)}
    with tap.scope("time_embedding"):
        # Every layer that uses the embedding begins with silu.
        time = jax.nn.silu(time_embedding(timestep, parameters, config, prompt_embeds.dtype))
    hidden = embed(parameters, latents, prompt_embeds, config, parallelism, is_tiled(attention), bounds)
    if residual is not None:
        output = predict_patches(parameters, hidden + residual, time, config, {-2: (text_length, length)})
        return Prediction(unpatchify(output[:, text_length:length], latents.shape, config), residual)
    # Text and padding are not rotated: their angle is 0.
    edges = ((text_length, hidden.shape[1] - length), (0, 0))
    cos, sin = jnp.pad(rotary[0], edges, constant_values=1.0), jnp.pad(rotary[1], edges)

    blocks = {name: array for name, array in parameters.items() if name.startswith("blocks.")}
    run = tap.shard_map(
        functools.partial(
            run_blocks,
            config=config,
            parallelism=parallelism,
            attention=attention,
            text_length=text_length,
            bounds=bounds,
        ),
        mesh=parallelism.mesh,
        in_specs=(
            {name: parameter_spec(name, parallelism.layout) for name in blocks},
            HIDDEN_STATES,
            activation_spec("time embedding"),
            (activation_spec("rotary embedding"),) * 2,
        ),
        out_specs=HIDDEN_STATES,
    )
    last = constrained(run(blocks, hidden, time, (cos, sin)), parallelism)
    output = predict_patches(parameters, last, time, config, {-2: (text_length, length)})
    return Prediction(unpatchify(output[:, text_length:length], latents.shape, config), last - hidden)


def hidden_states_shape(
    batch: int, tokens: int, config: Mapping, parallelism: Parallelism, tiled: bool
) -> tuple[int, int, int]:
    """Return [batch, tokens, embed] of the hidden states, whose tokens are padded to what the mesh divides.

    With `tiled`, each chip attends whole tiles of the attention kernel's own layout.
    """
    gathered = SEQUENCE_TILE * parallelism.tp
    padding = -tokens % (parallelism.sp * (math.lcm(gathered, block_kernels.LANES) if tiled else gathered))
    return batch, tokens + padding, config["num_attention_heads"] * config["attention_head_dim"]


def constrained(hidden: jax.Array, parallelism: Parallelism) -> jax.Array:
    """Constrain hidden states to be split over the mesh as ACTIVATION_AXES says."""
    return jax.lax.with_sharding_constraint(hidden, parallelism.sharding(*HIDDEN_STATES))


def embed(
    parameters: Mapping[str, jax.Array],
    latents: jax.Array,
    prompt_embeds: jax.Array,
    config: Mapping,
    parallelism: Parallelism,
    tiled: bool,
    bounds: tap.Bounds,
) -> jax.Array:
    """Embed text and video as one sequence [batch, tokens, embed], padded at the end to what the mesh divides.

    Text and patches are padded to the whole sequence before the mesh splits it, so that each chip embeds the patches of
    its own tokens; joining what is embedded would move it between the chips.
    """
    dtype = prompt_embeds.dtype
    with tap.scope("patch_embed"):
        patches = patchify(latents, config)
        text_length, length = prompt_embeds.shape[1], prompt_embeds.shape[1] + patches.shape[1]
        _, padded, _ = hidden_states_shape(len(latents), length, config, parallelism, tiled)

        def placed(x: jax.Array, first: int) -> jax.Array:
            x = jnp.pad(x, ((0, 0), (first, padded - first - x.shape[1]), (0, 0)))
            return constrained(x, parallelism)

        text = placed(linear(prompt_embeds, parameters, "patch_embed.text_proj").astype(dtype), 0)
        video = linear(placed(patches, text_length), parameters, "patch_embed.proj").astype(dtype)
        position = jnp.arange(padded)[:, None]
        hidden = constrained(jnp.where((text_length <= position) & (position < length), video, text), parallelism)
        tap.tap("", hidden, HIDDEN_STATES, bounds)
    return hidden


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
        tap.tap("linear", lambda: modulation[None], REPLICATED)
        shift, scale = jnp.split(modulation, 2)
        hidden = layer_norm(hidden, parameters, "norm_out.norm", config["norm_eps"]) * (1 + scale) + shift
        hidden = hidden.astype(dtype)
        tap.tap("", hidden, HIDDEN_STATES, video_bounds)
    with tap.scope("proj_out"):
        output = linear(hidden, parameters, "proj_out")
        tap.tap("", output, HIDDEN_STATES, video_bounds)
    return output


def run_blocks(
    blocks: Mapping[str, jax.Array],
    hidden: jax.Array,
    time: jax.Array,
    rotary: tuple[jax.Array, jax.Array],
    *,
    config: Mapping,
    parallelism: Parallelism,
    attention: Callable,
    text_length: int,
    bounds: tap.Bounds,
) -> jax.Array:
    """Run all blocks on one chip's share [batch / dp, sequence / (sp * tp), embed] of the hidden states."""
    share = hidden.shape[1]
    position = (jax.lax.axis_index("sp") * parallelism.tp + jax.lax.axis_index("tp")) * share + jnp.arange(share)
    is_text = (position < text_length)[:, None]

    blocks = {name.removeprefix("blocks."): array for name, array in blocks.items()}
    # Kernels read these in the stack of all blocks, unless the block has to gather them.
    kernels = is_tiled(attention)
    read = [name for name in blocks if kernels and BLOCK[name].read_in_stack and not gathered_axes(name, parallelism)]
    sliced = {name: array for name, array in blocks.items() if name not in read}

    def step(hidden, layer_and_parameters):
        layer, parameters = layer_and_parameters
        parameters = {name: gather_share(name, array, parallelism) for name, array in parameters.items()}
        stacks = {name: block_kernels.Weight(blocks[name], layer) for name in read}
        return Block(parameters, stacks, time, rotary, is_text, config, parallelism, attention, bounds)(hidden)

    layers = jnp.arange(config["num_layers"], dtype=jnp.int32)
    return tap.scan("transformer_blocks", step, hidden, (layers, sliced))


def gathered_axes(name: str, parallelism: Parallelism) -> tuple[int, tuple[str, ...]] | None:
    """Return over what a block gathers its parameter `name`; see `sharding.gather_at_use`."""
    return gather_at_use(BLOCK[name].axes, parallelism.layout)


def gather_share(name: str, array: jax.Array, parallelism: Parallelism) -> jax.Array:
    """Gather one block's parameter `name` over the mesh axes, other than tp, over which the layout splits it."""
    where = gathered_axes(name, parallelism)
    return array if where is None else jax.lax.all_gather(array, where[1], axis=where[0], tiled=True)


@dataclasses.dataclass(frozen=True)
class Block:
    """One transformer block on one chip; source: `CogVideoXBlock`.

    Attributes:
        parameters: of this block, by names without "blocks.", split over tp.
        stacks: those that kernels read in the stack of all blocks, in the place of their entries in `parameters`.
        time: silu of the time embedding, [time_embed_dim].
        rotary: cosines and sines of the chip's gathered tokens, [sequence / sp, head_dim / 2] each.
        is_text: which of the chip's own tokens are text, bool [sequence / (sp * tp), 1].
        config: `transformer/config.json`.
        parallelism: see `Parallelism`.
        attention: `attention(query, key, value, kv_length)`; see `transformer`.
        bounds: of the tokens that are not padding, for taps.
    """

    parameters: Mapping[str, jax.Array]
    stacks: Mapping[str, block_kernels.Weight]
    time: jax.Array
    rotary: tuple[jax.Array, jax.Array]
    is_text: jax.Array
    config: Mapping
    parallelism: Parallelism
    attention: Callable
    bounds: tap.Bounds

    def weight(self, name: str) -> block_kernels.Weight:
        """Return a weight as kernels take it."""
        return self.stacks.get(name) or block_kernels.Weight(self.parameters[name][None], jnp.int32(0))

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Apply the block to hidden states [batch / dp, sequence / (sp * tp), embed]."""
        hidden = self.self_attention(hidden)
        if is_tiled(self.attention):
            hidden = self.feed_forward_kernels(hidden, self.attention.interpret)
        else:
            # The MLP takes some of the tokens at a time, so that the array between its two products stays in VMEM.
            pieces = round(hidden.shape[1] * self.parallelism.tp / FEED_FORWARD_TOKENS)
            pieces = min(max(pieces, 1), hidden.shape[1] // SEQUENCE_TILE)
            bounds = [hidden.shape[1] * i // pieces // SEQUENCE_TILE * SEQUENCE_TILE for i in range(1, pieces)]
            tokens = zip(jnp.split(hidden, bounds, axis=1), jnp.split(self.is_text, bounds), strict=True)
            hidden = jnp.concatenate(tap.pieces(self.feed_forward, list(tokens), TOKENS), axis=TOKENS)
        tap.tap("", hidden, HIDDEN_STATES, self.bounds)
        return hidden

    def self_attention(self, hidden: jax.Array) -> jax.Array:
        """Apply the first half of the block: norm, attention, gated residual."""
        x, gates = self.modulated(hidden, self.is_text, "norm1")
        with tap.scope("attn1"):
            heads = self.config["num_attention_heads"] // self.parallelism.tp
            self.tap_heads(x, heads)
            if is_tiled(self.attention):
                return self.attended_tiles(hidden, x, gates, heads, self.attention)
            return self.residual(hidden, self.attended(x, heads), "attn1.to_out.0", gates, self.is_text)

    def attended(self, x: jax.Array, heads: int) -> jax.Array:
        """Attend x [batch, sequence / sp, embed]; returns this chip's part of the output projection, without bias."""
        query, key, value = (project_heads(x, self.parameters, f"attn1.to_{letter}", heads) for letter in "qkv")
        query, key = (
            normalized_and_rotated(y, self.parameters, f"attn1.norm_{letter}", self.rotary)
            for letter, y in (("q", query), ("k", key))
        )
        # From a share of the tokens with all heads of this chip to all tokens with a share of the heads, and back.
        exchange = functools.partial(jax.lax.all_to_all, axis_name="sp", tiled=True)
        query, key, value = (exchange(y.astype(x.dtype), split_axis=1, concat_axis=2) for y in (query, key, value))
        y = self.attention(query, key, value, kv_length=self.bounds[-2][1])
        y = exchange(y, split_axis=2, concat_axis=1)
        weight = self.parameters["attn1.to_out.0.weight"].reshape(x.shape[-1], heads, -1)
        return jnp.einsum("bnsh,onh->bso", y, weight, preferred_element_type=jnp.float32)

    def attended_tiles(
        self, hidden: jax.Array, x: jax.Array, gates: jax.Array, heads: int, attention: Attention
    ) -> jax.Array:
        """Do what `attended` does in tiles, and add the result to the hidden states; see models/block_kernels.py."""
        parameters, sp = self.parameters, self.parallelism.sp
        interpret = attention.interpret

        def exchanged(y: jax.Array) -> jax.Array:
            return jax.lax.all_to_all(y, "sp", split_axis=0, concat_axis=0, tiled=True)

        def projected(letter: str) -> jax.Array:
            weight, bias = self.weight(f"attn1.to_{letter}.weight"), parameters.get(f"attn1.to_{letter}.bias")
            norm = None
            if letter != "v":
                name = f"attn1.norm_{letter}"
                norm = block_kernels.QKNorm(
                    parameters[f"{name}.weight"], parameters[f"{name}.bias"], QK_NORM_EPS, *self.rotary
                )
            y = exchanged(block_kernels.to_heads(x, weight, bias, heads, sp, norm, interpret))
            return y.reshape(-1, *y.shape[2:])

        query, key, value = (projected(letter) for letter in "qkv")
        y = attention.tiled(query, key, value, self.bounds[-2][1])
        y = exchanged(y.reshape(sp, -1, *y.shape[1:]))
        name = "attn1.to_out.0"
        project = functools.partial(block_kernels.from_heads, y, self.weight(f"{name}.weight"), interpret=interpret)
        return self.added(project, hidden, name, gates)

    def added(self, project: Callable, hidden: jax.Array, name: str, gates: jax.Array) -> jax.Array:
        """Add what the kernel `project(residual)` multiplies by the weight of module `name` to the hidden states."""
        if self.parallelism.tp > 1:
            return self.residual(hidden, project(None), name, gates, self.is_text)
        tap.tap(name.partition(".")[2], lambda: self.with_bias(project(None), name), HIDDEN_STATES, self.bounds)
        bias = self.parameters.get(f"{name}.bias")
        return project(block_kernels.Residual(hidden, bias, gates, self.text_tokens))

    def tap_heads(self, x: jax.Array, heads: int) -> None:
        """Tap queries, keys and values as they are projected from x, and queries and keys as they are normalised.

        They are computed for the tap: a kernel that projects keeps them in VMEM, and with XLA they are computed once.
        """

        @functools.cache
        def project(letter: str) -> jax.Array:
            name = f"attn1.to_{letter}"
            parameters = self.parameters
            if stack := self.stacks.get(f"{name}.weight"):
                parameters = {**parameters, f"{name}.weight": stack.stack[stack.layer]}
            return project_heads(x, parameters, name, heads)

        for letter in "qkv":
            as_projected = functools.partial(lambda letter: self.as_projected(project(letter), letter), letter)
            same_values = functools.partial(project, letter)
            tap.tap(f"to_{letter}", as_projected, GATHERED, self.bounds, same_values)
        for letter in "qk":
            as_normalized = functools.partial(lambda letter: self.as_normalized(project(letter), letter), letter)
            same_values = functools.partial(lambda letter: self.normalized(project(letter), letter), letter)
            tap.tap(f"norm_{letter}", as_normalized, PROJECTED_HEADS, self.bounds, same_values)

    def feed_forward(self, hidden: jax.Array, is_text: jax.Array) -> jax.Array:
        """Apply the second half of the block to some of the tokens: norm, MLP, gated residual."""
        parameters, dtype = self.parameters, hidden.dtype
        x, gates = self.modulated(hidden, is_text, "norm2")
        with tap.scope("ff"):
            x = jax.nn.gelu(linear(x, parameters, "ff.net.0.proj"), approximate=True).astype(dtype)
            self.tap_activation(x)
            x = jnp.einsum(
                "bsi,oi->bso", materialized(x), parameters["ff.net.2.weight"], preferred_element_type=jnp.float32
            )
            return self.residual(hidden, x, "ff.net.2", gates, is_text)

    def feed_forward_kernels(self, hidden: jax.Array, interpret: bool) -> jax.Array:
        """Do what `feed_forward` does with all tokens of the chip, in kernels."""
        dense = functools.partial(block_kernels.dense, interpret=interpret)
        x, gates = self.modulated(hidden, self.is_text, "norm2")
        with tap.scope("ff"):
            activation = block_kernels.Gelu(self.parameters["ff.net.0.proj.bias"])
            x = dense(x, self.weight("ff.net.0.proj.weight"), activation)
            self.tap_activation(x)
            return self.added(functools.partial(dense, x, self.weight("ff.net.2.weight")), hidden, "ff.net.2", gates)

    def tap_activation(self, x: jax.Array) -> None:
        """Tap what lies between the two products of the MLP, x [batch, tokens gathered over tp, mlp / tp]."""
        own_tokens = functools.partial(jax.lax.all_to_all, x, "tp", split_axis=1, concat_axis=2, tiled=True)
        tap.tap("net.0", own_tokens, HIDDEN_STATES, self.bounds)

    def modulated(self, hidden: jax.Array, is_text: jax.Array, name: str) -> tuple[jax.Array, jax.Array]:
        """Normalise and modulate hidden states; returns them gathered over tp, and the gates [2, embed].

        The first row is for text, the second for video.
        """
        with tap.scope(name):
            modulation = linear(self.time, self.parameters, f"{name}.linear")
            tap.tap("linear", lambda: modulation[None], REPLICATED)
            shifts, scales, gates = jnp.flip(modulation.reshape(2, 3, -1), 0).swapaxes(0, 1)  # text first
            norm, eps = f"{name}.norm", self.config["norm_eps"]
            if is_tiled(self.attention):
                scales = 1 + scales
                if f"{norm}.weight" in self.parameters:
                    weight, bias = (self.parameters[f"{norm}.{k}"].astype(jnp.float32) for k in ("weight", "bias"))
                    scales, shifts = weight * scales, bias * scales + shifts
                changes = block_kernels.Modulation(scales, shifts, self.text_tokens)
                x = block_kernels.normalized(hidden, changes, eps, self.attention.interpret)
            else:
                x = layer_norm(hidden, self.parameters, norm, eps)
                x = x * (1 + jnp.where(is_text, scales[0], scales[1])) + jnp.where(is_text, shifts[0], shifts[1])
                x = x.astype(hidden.dtype)
            tap.tap("", x, HIDDEN_STATES, self.bounds)
            x = jax.lax.all_gather(x, "tp", axis=1, tiled=True)
            return x if is_tiled(self.attention) else materialized(x), gates  # no one computes again what a kernel does

    @property
    def text_tokens(self) -> jax.Array:
        """How many of the chip's own tokens are text: they are the first."""
        return self.is_text.sum(dtype=jnp.int32)

    def as_projected(self, x: jax.Array, letter: str) -> jax.Array:
        """Reorder a result of `project_heads` as in diffusers: [batch, tokens, heads * head_dim], pairs interleaved."""
        x = x if letter == "v" else interleaved(x)
        return jnp.swapaxes(x, 1, 2).reshape(x.shape[0], x.shape[2], -1)

    def as_normalized(self, x: jax.Array, letter: str) -> jax.Array:
        """Normalise projected queries or keys as in diffusers: without rotating them, pairs interleaved."""
        return interleaved(self.normalized(x, letter))

    def normalized(self, x: jax.Array, letter: str) -> jax.Array:
        """Normalise projected queries or keys without rotating them."""
        mean, scale = moments(x, QK_NORM_EPS)
        return affine((x - mean) * scale, self.parameters, f"attn1.norm_{letter}")

    def residual(
        self, hidden: jax.Array, partial_sum: jax.Array, name: str, gates: jax.Array, is_text: jax.Array
    ) -> jax.Array:
        """Compute hidden + gate * (sum of `partial_sum` over tp + bias of module `name`) for some of the tokens."""
        x = jax.lax.psum_scatter(partial_sum.astype(hidden.dtype), "tp", scatter_dimension=1, tiled=True)
        x = self.with_bias(x, name)
        tap.tap(name.partition(".")[2], x, HIDDEN_STATES, self.bounds)
        return (hidden.astype(jnp.float32) + jnp.where(is_text, gates[0], gates[1]) * x).astype(hidden.dtype)

    def with_bias(self, x: jax.Array, name: str) -> jax.Array:
        """Add the bias of module `name`, if it has one, in float32."""
        x = x.astype(jnp.float32)
        return x + self.parameters[f"{name}.bias"].astype(jnp.float32) if f"{name}.bias" in self.parameters else x


def materialized(x: jax.Array) -> jax.Array:
    """Prevent XLA from computing `x` again for every tile of a matrix product that reads it."""
    return jax.lax.optimization_barrier(x)


def project_heads(x: jax.Array, parameters: Mapping, name: str, heads: int) -> jax.Array:
    """Project x [batch, sequence, embed] to float32 [batch, heads, sequence, head_dim], the order for attention."""
    weight = parameters[f"{name}.weight"].reshape(heads, -1, x.shape[-1])
    y = jnp.einsum("bsi,nhi->bnsh", x, weight, preferred_element_type=jnp.float32)
    if f"{name}.bias" in parameters:
        y = y + parameters[f"{name}.bias"].astype(jnp.float32).reshape(heads, 1, -1)
    return y


def normalized_and_rotated(x: jax.Array, parameters: Mapping, name: str, rotary: tuple) -> jax.Array:
    """Apply layer norm and rotary embedding to float32 [batch, heads, sequence, head_dim], pairs in two halves.

    Both work on the halves, so that XLA does them in one pass over the array.
    """
    cos, sin = rotary
    half = x.shape[-1] // 2
    mean, scale = moments(x, QK_NORM_EPS)
    first, second = (
        affine((x[..., part] - mean) * scale, parameters, name, part) for part in (slice(half), slice(half, None))
    )
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def interleaved(x: jax.Array) -> jax.Array:
    """Reorder [..., head_dim] from rotary pairs in two halves to interleaved pairs, as in diffusers."""
    halves = x.reshape(*x.shape[:-1], 2, -1)
    return jnp.swapaxes(halves, -1, -2).reshape(x.shape)


def patchify(latents: jax.Array, config: Mapping) -> jax.Array:
    """Cut [batch, frames, channels, height, width] into [batch, video tokens, patch]; source: `CogVideoXPatchEmbed`."""
    batch, frames, channels, height, width = latents.shape
    p, pt = config["patch_size"], config["patch_size_t"]
    x = latents.reshape(batch, frames // pt, pt, channels, height // p, p, width // p, p)
    x = x.transpose(0, 1, 4, 6, 3, 2, 5, 7)
    return x.reshape(batch, -1, channels * pt * p * p)


def unpatchify(x: jax.Array, latent_shape: tuple[int, ...], config: Mapping) -> jax.Array:
    """Join patches [batch, video tokens, patch] to [batch, frames, channels, height, width]."""
    batch, frames, channels, height, width = latent_shape
    p, pt = config["patch_size"], config["patch_size_t"]
    x = x.reshape(batch, frames // pt, height // p, width // p, channels, pt, p, p)
    return x.transpose(0, 1, 5, 4, 2, 6, 3, 7).reshape(batch, frames, channels, height, width)
