"""The expert layer of a decoder: all experts in one process."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from eep_jax.models.model_config import ModelConfig


class DenseExperts(nnx.Module):
    """The weights of every expert of every layer in one array `[E L 3 F D]` (gate, up, down transposed)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        shape = (config.experts, *config.expert_shape)
        scale = jnp.array([config.hidden, config.hidden, config.expert_hidden]) ** -0.5
        normal = jax.random.normal(rngs.params(), shape, jnp.float32)
        self.weights = nnx.Param(normal * scale[None, None, :, None, None])


def dense_experts(
    stacked: Float[Array, "E L 3 F D"],
    layer: int,
    x: Float[Array, "*T D"],
    expert_ids: Int32[Array, "*T K"],
    weights: Float32[Array, "*T K"],
) -> Float[Array, "*T D"]:
    """Computes all experts for all tokens and weighs them: wasteful, differentiable, plainly right.

    `y[t] = sum_k weights[t, k] * expert[expert_ids[t, k]](x[t])`.
    """
    gate, up, down = jnp.moveaxis(stacked[:, layer], 1, 0)
    one_hot = jax.nn.one_hot(expert_ids, gate.shape[0], dtype=x.dtype)
    share = jnp.einsum("...ke,...k->...e", one_hot, weights.astype(x.dtype))
    hidden = jax.nn.silu(jnp.einsum("...d,efd->...ef", x, gate))
    hidden = hidden * jnp.einsum("...d,efd->...ef", x, up)
    return jnp.einsum("...ef,efd->...d", hidden * share[..., None], down)
