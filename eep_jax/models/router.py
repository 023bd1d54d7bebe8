"""Router: the experts of each token, and their weights."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from eep_jax.model_config import ModelConfig, RouterConfig


def route(
    logits: Float[Array, "*T E"], experts_per_token: int, norm_topk_prob: bool
) -> tuple[Int32[Array, "*T K"], Float32[Array, "*T K"]]:
    """Softmax over all experts, then the top K: `p = softmax(logits)`, `weights = top_k(p)`.

    With `norm_topk_prob` the K weights are divided by their sum; `[.4 .2 | .3 .1]` and K=2
    gives ids `[0 2]` and weights `[.57 .43]`, without it `[.4 .3]`. Ties go to the lower id.
    Follows Qwen3MoeTopKRouter.
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, expert_ids = jax.lax.top_k(probabilities, experts_per_token)
    if norm_topk_prob:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return expert_ids.astype(jnp.int32), weights


def choose(
    logits: Float[Array, "*T E"],
    model: ModelConfig,
    correction: Float32[Array, "E"] | None = None,
) -> tuple[Int32[Array, "*T K"], Float32[Array, "*T K"]]:
    """Experts and weights according to `model.router`, in float32; ties go to the lower id.

    - score `softmax`: see `route`. Qwen, OLMoE; with groups DeepSeek-V2; with a correction, as
      below, ERNIE 4.5.
    - `softmax_of_chosen`: the best K logits, `weights = softmax` of these K. Mixtral, gpt-oss.
    - `sigmoid`: `s = sigmoid(logits)`; the best K of `s + correction`, `weights = s` of these,
      divided by their sum with `norm_topk_prob`. DeepSeek-V3, GLM, MiniMax, HunYuan, dots.

    With groups, only experts of the best groups are eligible; a group is ranked by its best expert
    (`max`) or the sum of its two best (`top2`). Finally weights are multiplied by `scaling`.
    """
    router, count = model.router, model.experts_per_token
    logits = logits.astype(jnp.float32)
    if router.score == "softmax_of_chosen":
        best, ids = jax.lax.top_k(_in_best_groups(logits, router), count)
        return ids.astype(jnp.int32), _scaled(jax.nn.softmax(best, axis=-1), router)
    if router.score == "softmax" and router.groups == 1 and correction is None:
        ids, weights = route(logits, count, model.norm_topk_prob)
        return ids, _scaled(weights, router)
    soft = router.score == "softmax"
    scores = jax.nn.softmax(logits, axis=-1) if soft else jax.nn.sigmoid(logits)
    wanted = scores if correction is None else scores + correction
    _, ids = jax.lax.top_k(_in_best_groups(wanted, router), count)
    weights = jnp.take_along_axis(scores, ids, axis=-1)
    if model.norm_topk_prob:
        total = jnp.sum(weights, axis=-1, keepdims=True) + 1e-20
        weights = weights / jnp.maximum(total, router.sum_min)
    return ids.astype(jnp.int32), _scaled(weights, router)


def _in_best_groups(scores: Float32[Array, "*T E"], router: RouterConfig) -> Float32[Array, "*T E"]:
    """The scores, -inf for experts outside the `groups_kept` best groups."""
    if router.groups == 1:
        return scores
    grouped = scores.reshape(*scores.shape[:-1], router.groups, -1)
    members = {"max": 1, "top2": min(2, grouped.shape[-1])}[router.group_score]
    worth = jnp.sum(jax.lax.top_k(grouped, members)[0], axis=-1)
    _, kept = jax.lax.top_k(worth, router.groups_kept)
    inside = jnp.any(jax.nn.one_hot(kept, router.groups, dtype=jnp.bool_), axis=-2)
    return jnp.where(inside[..., None], grouped, -jnp.inf).reshape(scores.shape)


def _scaled(weights: Float32[Array, "*T K"], router: RouterConfig) -> Float32[Array, "*T K"]:
    return weights if router.scaling == 1 else weights * router.scaling
