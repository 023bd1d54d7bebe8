"""Which experts a token goes to, and with what weight."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32


def route(
    logits: Float[Array, "*T E"], experts_per_token: int, norm_topk_prob: bool
) -> tuple[Int32[Array, "*T K"], Float32[Array, "*T K"]]:
    """Softmax over all experts, then the best K: `p = softmax(logits)`, `weights = top_k(p)`.

    With `norm_topk_prob` the K weights are divided by their sum; `[.4 .2 | .3 .1]` and K=2
    gives ids `[0 2]` and weights `[.57 .43]`, without it `[.4 .3]`. Ties go to the lower id.
    Follows Qwen3MoeTopKRouter.
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, expert_ids = jax.lax.top_k(probabilities, experts_per_token)
    if norm_topk_prob:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return expert_ids.astype(jnp.int32), weights
