"""The layers that the transformer is made of, for XLA: each takes the parameters and the name of its module there.

They compute in float32, whatever the dtype of the parameters.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

QK_NORM_EPS = 1e-6  # CogVideoXBlock passes this to Attention; no config contains it


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


def moments(x: jax.Array, eps: float, axis: int = -1) -> tuple[jax.Array, jax.Array]:
    """Compute mean and 1 / standard deviation over an axis of float32 `x`, reading it once; also inside kernels."""
    mean = x.mean(axis, keepdims=True)
    variance = jnp.square(x).mean(axis, keepdims=True) - jnp.square(mean)
    return mean, jax.lax.rsqrt(jnp.maximum(variance, 0.0) + eps)


def affine(x: jax.Array, parameters: Mapping, name: str, part: slice = slice(None)) -> jax.Array:
    """Compute x * weight + bias with `part` of the parameters of the norm `name`, if it has any."""
    if f"{name}.weight" not in parameters:
        return x
    weight, bias = (parameters[f"{name}.{kind}"][part].astype(jnp.float32) for kind in ("weight", "bias"))
    return x * weight + bias


def project_heads(x: jax.Array, parameters: Mapping, name: str, heads: int) -> jax.Array:
    """Project x [batch, sequence, embed] to float32 [batch, heads, sequence, head_dim], the order for attention."""
    weight = parameters[f"{name}.weight"].reshape(heads, -1, x.shape[-1])
    y = jnp.einsum("bsi,nhi->bnsh", x, weight, preferred_element_type=jnp.float32)
    if f"{name}.bias" in parameters:
        y = y + parameters[f"{name}.bias"].astype(jnp.float32).reshape(heads, 1, -1)
    return y
