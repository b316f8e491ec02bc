"""One denoising step of CogVideoX 1.5 as one jitted function: guidance, transformer and scheduler update."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed

from models.torch_function import jax_function


def xla_attention(query: jax.Array, key: jax.Array, value: jax.Array, **_) -> jax.Array:
    """Plain softmax attention, left to XLA; [batch, heads, sequence, head_dim] in and out."""
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    return jnp.swapaxes(jax.nn.dot_product_attention(query, key, value), 1, 2)


# The one place where attention is chosen: name on the command line -> function(query, key, value).
ATTENTION = {"xla": xla_attention}


def build_transformer(config: Mapping) -> CogVideoXTransformer3DModel:
    """The diffusers module for a `transformer/config.json`, without memory for its weights."""
    with torch.device("meta"):
        return CogVideoXTransformer3DModel.from_config(config).eval()


def rotary_embedding(config: Mapping, latent_shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of the 3D rotary embedding, float32 [video tokens, attention_head_dim] each.

    Args:
        config: `transformer/config.json`.
        latent_shape: [batch, frames, channels, height, width], frames a multiple of patch_size_t.

    Source: `CogVideoXPipeline._prepare_rotary_positional_embeddings`, the branch of CogVideoX 1.5.
    """
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
    return cos.numpy(), sin.numpy()


def make_denoise_step(module: CogVideoXTransformer3DModel, attention: str):
    """A jitted denoising step, `latents` and `old_pred_original_sample` donated.

    `step(weights, latents, old_pred_original_sample, prompt_embeds, rotary, timestep, coefficients, noise,
    guidance_scale)` returns the next `latents` and `pred_original_sample`:
        weights: name -> array, as in `module.state_dict()`.
        latents: [batch, frames, channels, height, width], the model's dtype.
        old_pred_original_sample: the second result of the step before, float32 of the same shape (zeros at first).
        prompt_embeds: [batch, text tokens, text width], or, for classifier-free guidance, [2 * batch, ...] with the
            negative prompts first.
        rotary: see `rotary_embedding`.
        timestep: int scalar; coefficients: [2, 3]; noise: like `latents`, or None. See `AffineScheduler`.
        guidance_scale: float scalar, read only with guidance.

    Source: the loop body of `CogVideoXPipeline.__call__`.
    """
    transformer = jax_function(module, {torch.nn.functional.scaled_dot_product_attention: ATTENTION[attention]})

    def step(
        weights,
        latents,
        old_pred_original_sample,
        prompt_embeds,
        rotary,
        timestep,
        coefficients,
        noise,
        guidance_scale,
    ):
        copies = prompt_embeds.shape[0] // latents.shape[0]
        (model_output,) = transformer(
            weights,
            hidden_states=jnp.tile(latents, (copies, 1, 1, 1, 1)),
            encoder_hidden_states=prompt_embeds,
            timestep=jnp.full(prompt_embeds.shape[0], timestep),
            image_rotary_emb=rotary,
            return_dict=False,
        )
        model_output = model_output.astype(jnp.float32)
        if copies == 2:
            negative, positive = jnp.split(model_output, 2)
            model_output = negative + guidance_scale * (positive - negative)

        arrays = jnp.stack([latents.astype(jnp.float32), model_output, old_pred_original_sample])
        prev_sample, pred_original_sample = jnp.tensordot(
            coefficients, arrays, axes=1, precision=jax.lax.Precision.HIGHEST
        )
        if noise is not None:
            prev_sample = prev_sample + noise
        return prev_sample.astype(latents.dtype), pred_original_sample

    return jax.jit(step, donate_argnums=(1, 2))
