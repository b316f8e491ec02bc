"""One denoising step as a jitted function, and its arguments."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from cogvideox.models.shared import tap
from cogvideox.models.shared.sharding import HIDDEN_STATES
from cogvideox.models.transformer.embeddings import time_embedding
from cogvideox.models.transformer.parameters import abstract_parameters, parameter_shapes
from cogvideox.models.transformer.plan import DenoisingPlan, StepKind
from cogvideox.models.transformer.sparse.heads import HeadPatterns
from cogvideox.models.transformer.transformer import hidden_states_shape, transformer

# By platform. On a TPU the exchange of tokens for heads then goes on beside other work.
COMPILER_OPTIONS = {"tpu": {"xla_tpu_enable_async_all_to_all": True}}
WHOLE_LATENTS = PartitionSpec(*[None] * 5)  # every chip has all of them


class State(NamedTuple):
    """What a step passes on to the next step. A step donates the state that it takes: its memory is used again.

    Attributes:
        latents: [batch, frames, channels, height, width], the model's dtype.
        pred_original_sample: the step's estimate of the noise-free latents, float32 of the same shape; zeros before the
            first step.
        finite_steps: int32 scalar, the steps whose latents were finite. What is not finite stays so in all later steps.
        residual: what the blocks have added in the last full step (`Prediction`); None without the step cache.
        online_heads: float32 [2], the sum over all steps (`Prediction`).
    """

    latents: jax.Array
    pred_original_sample: jax.Array
    finite_steps: jax.Array
    residual: jax.Array | None
    online_heads: jax.Array


class Condition(NamedTuple):
    """What stays the same in all steps.

    Attributes:
        prompt_embeds: [batch, text tokens, text width], or, for classifier-free guidance, [2 * batch, ...] with the
            negative prompts first.
        rotary: see `rotary_embedding`.
        positions: see `sine_cosine_positions`; None where the model has none, or has them among its parameters.
        image_latents: of the image that each video begins with, scaled, zeros in all frames but one, shape and dtype of
            the latents; None for a model that takes no image.
    """

    prompt_embeds: jax.Array
    rotary: tuple[jax.Array, jax.Array]
    positions: jax.Array | None = None
    image_latents: jax.Array | None = None


class StepInputs(NamedTuple):
    """What changes from step to step.

    Attributes:
        timestep: int32 scalar.
        coefficients: float32 [2, 3]; see `AffineScheduler`.
        noise: shape and dtype of the latents; None with a scheduler that adds no noise.
        guidance_scale: float32 scalar; read only with guidance.
        patterns: of the heads, int32 [layers, heads] each; None with dense attention.
    """

    timestep: jax.Array
    coefficients: jax.Array
    noise: jax.Array | None
    guidance_scale: jax.Array
    patterns: HeadPatterns | None = None


class StepArguments(NamedTuple):
    """The arguments of a step, in the order in which it takes them.

    Shapes (`jax.ShapeDtypeStruct`) can stand in the place of all arrays, to compile without data.
    """

    parameters: Mapping[str, Any]
    state: State
    condition: Condition
    inputs: StepInputs


def make_step(
    plan: DenoisingPlan, wanted: tap.Wanted | None = None, kind: StepKind | None = None
) -> jax.stages.Wrapped:
    """Make a jitted denoising step, `step(parameters, state, condition, inputs)`, which returns the next `State`.

    The kind is one of `DenoisingPlan.kinds`, by default that of a full step, guided if the plan is.

    The step donates the state. If anything is `wanted`, it returns the state and what is `tap.Collected`; beside the
    transformer's modules there are "latents", from which the step starts, "noise_pred" after guidance,
    "pred_original_sample" and "prev_sample", all [batch, frames, channels, height, width].

    Source: the loop body of `CogVideoXPipeline.__call__`.
    """
    short, guided = kind or StepKind(short=False, guided=plan.guided)
    of_kind = slice(None if guided else -plan.batch, None)  # the samples: the negative prompts' are first

    def step(parameters: Mapping[str, jax.Array], state: State, condition: Condition, inputs: StepInputs) -> State:
        latents, residual = state.latents, state.residual
        tap.tap("latents", latents, WHOLE_LATENTS)
        # With float32 weights the products are float32 too; a TPU's default is bfloat16.
        with jax.default_matmul_precision("highest" if latents.dtype == jnp.float32 else "default"):
            prediction = transformer(
                parameters,
                jnp.tile(with_image(latents, condition), (2 if guided else 1, 1, 1, 1, 1)),
                condition.prompt_embeds[of_kind],
                inputs.timestep,
                condition.rotary,
                config=plan.transformer,
                parallelism=plan.parallelism,
                attention=plan.attention,
                positions=parameters["patch_embed.pos_embedding"][0]
                if plan.positions == "stored"
                else condition.positions,
                residual=residual[of_kind] if short and residual is not None else None,
                patterns=inputs.patterns,
            )
        model_output = prediction.output
        if guided:
            negative, positive = jnp.split(model_output, 2)
            model_output = negative + inputs.guidance_scale * (positive - negative)
        tap.tap("noise_pred", model_output, WHOLE_LATENTS)

        arrays = latents.astype(jnp.float32), model_output, state.pred_original_sample
        prev_sample, pred_original_sample = (
            sum(c * a for c, a in zip(row, arrays, strict=True)) for row in inputs.coefficients
        )
        if inputs.noise is not None:
            prev_sample = prev_sample + inputs.noise
        prev_sample = prev_sample.astype(latents.dtype)
        tap.tap("pred_original_sample", pred_original_sample, WHOLE_LATENTS)
        tap.tap("prev_sample", prev_sample, WHOLE_LATENTS)
        finite_steps = state.finite_steps + jnp.isfinite(prev_sample).all()
        if plan.step_cache and not short:
            # That of negative prompts, if missing, is not read before it is there: see `DenoisingPlan.always_full`.
            residual = jnp.tile(prediction.residual, (plan.batch * plan.prompts // len(prediction.residual), 1, 1))
        online_heads = state.online_heads + prediction.online_heads
        return State(prev_sample, pred_original_sample, finite_steps, residual, online_heads)

    shardings = state_shardings(plan)
    platform = plan.mesh.devices.flat[0].platform
    jit = functools.partial(jax.jit, donate_argnums=1, compiler_options=COMPILER_OPTIONS.get(platform))
    if wanted:
        collecting = tap.collecting(step, wanted, plan.mesh)
        return jit(collecting, out_shardings=(shardings, None))
    return jit(step, out_shardings=shardings)


def with_image(latents: jax.Array, condition: Condition) -> jax.Array:
    """Return what the transformer takes: the latents, and for some models those of the image after them in channels."""
    if condition.image_latents is None:
        return latents
    return jnp.concatenate([latents, condition.image_latents], axis=2)


def state_shardings(plan: DenoisingPlan) -> Any:
    """Return a `State` of shardings: each chip has its share of the residual, and all of the others."""
    sharding: Any = plan.parallelism.sharding
    residual = sharding(*HIDDEN_STATES) if plan.step_cache else None
    return State(sharding(), sharding(), sharding(), residual, sharding())


def abstract_arguments(plan: DenoisingPlan) -> StepArguments:
    """Return the arguments of a step as shapes, to compile without weights."""

    def array(shape: tuple[int, ...], dtype: jax.typing.DTypeLike = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=plan.parallelism.sharding())

    config = plan.transformer
    latents = array(plan.latent_shape, plan.dtype)
    text = plan.batch * plan.prompts, config["max_text_seq_length"], config["text_embed_dim"]
    rotary = array((plan.video_tokens, config["attention_head_dim"] // 2))
    positions: Any = None
    if plan.positions == "computed":
        positions = array((plan.tokens, config["num_attention_heads"] * config["attention_head_dim"]))
    residual: Any = None
    if plan.step_cache:
        prompts = plan.batch * plan.prompts
        shape = hidden_states_shape(prompts, plan.order, config, plan.parallelism, plan.attention)
        residual = jax.ShapeDtypeStruct(shape, plan.dtype, sharding=state_shardings(plan).residual)
    patterns: Any = None
    if plan.sparse is not None:
        patterns = HeadPatterns(*[array((config["num_layers"], config["num_attention_heads"]), jnp.int32)] * 3)
    return StepArguments(
        abstract_parameters(config, plan.dtype, plan.parallelism),
        State(latents, array(plan.latent_shape), array((), jnp.int32), residual, array((2,))),
        Condition(array(text, plan.dtype), (rotary, rotary), positions, latents if plan.features.image else None),
        StepInputs(
            *(array((), jnp.int32), array((2, 3)), latents if plan.sampler.adds_noise else None, array(()), patterns)
        ),
    )


def residual_bytes(plan: DenoisingPlan) -> int:
    """Return the bytes of a chip's share of the residual that the step cache keeps."""
    residual: Any = abstract_arguments(plan).state.residual
    return math.prod(residual.sharding.shard_shape(residual.shape)) * residual.dtype.itemsize


def time_embeddings(plan: DenoisingPlan, timesteps: np.ndarray, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """Return the time embedding of each timestep, float32 [steps, time_embed_dim].

    Args:
        plan: see `DenoisingPlan`.
        timesteps: [steps].
        read: `read(name)` returns a tensor of the checkpoint.
    """
    names = [
        name for name in parameter_shapes(plan.transformer) if name.startswith(("time_embedding.", "ofs_embedding."))
    ]
    parameters = {name: jnp.asarray(read(name), plan.dtype) for name in names}
    embed = functools.partial(time_embedding, parameters=parameters, config=plan.transformer, dtype=plan.dtype)
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(jax.vmap(embed))(jnp.asarray(timesteps)).astype(jnp.float32))
