"""Grouped-query attention: projections, norms, RoPE, attention to whole texts and to pages."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from eep_jax.config import ModelConfig
from eep_jax.models.linear import linear, project_together
from eep_jax.models.paged_attention import attend_pages, seen
from eep_jax.models.rope import rope as rope  # re-exported
from pallas_kernels.attention.api import attend


class Attention(nnx.Module):
    """One attention layer: its weights, projections, and options of attention.

    Queries and keys are normed per head, over all channels, or not at all; biases, a window of
    positions and sinks are optional: see ModelConfig.
    """

    def __init__(self, config: ModelConfig, layer: int = 0, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.window = config.windows[layer] if config.windows else 0
        options = {"param_dtype": dtype, "rngs": rngs}
        project = lambda i, o: linear(i, o, use_bias=config.qkv_bias, **options)
        query, key = config.query_heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj, self.k_proj = project(config.hidden, query), project(config.hidden, key)
        self.v_proj = project(config.hidden, key)
        self.o_proj = linear(query, config.hidden, use_bias=config.output_bias, **options)
        norm = lambda width: nnx.RMSNorm(width, epsilon=config.norm_eps, **options)
        if config.qk_norm == "head":
            self.q_norm, self.k_norm = norm(config.head_dim), norm(config.head_dim)
        elif config.qk_norm == "full":
            self.q_norm, self.k_norm = norm(query), norm(key)
        if config.sinks:
            self.sinks = nnx.Param(jnp.zeros(config.query_heads, dtype))

    def project(
        self, x: Float[Array, "*T D"], positions: Int32[Array, "*T"]
    ) -> tuple[Float[Array, "*T Hq C"], Float[Array, "*T Hkv C"], Float[Array, "*T Hkv C"]]:
        """Returns q, k and v; q and k are normed and rotated."""
        config = self.config
        q, k, v = project_together(x, self.q_proj, self.k_proj, self.v_proj)
        heads = lambda y: y.reshape(*y.shape[:-1], -1, config.head_dim)
        if config.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = heads(q), heads(k)
        if config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        turn = lambda y: rope(y, positions, config.rope_theta, config.rope)
        return turn(q), turn(k), heads(v)

    def attend(
        self,
        q: Float[Array, "T Hq C"],
        keys: Float[Array, "N Hkv G C"],
        values: Float[Array, "N Hkv G C"],
        table: Int32[Array, "B J"],
        batch_rows: Int32[Array, "T"],
        positions: Int32[Array, "T"],
    ) -> Float[Array, "T Hq C"]:
        """`attend_pages` with the scale, window and sinks of this layer."""
        return attend_pages(q, keys, values, table[batch_rows], positions, **self._options())

    def attend_items(
        self,
        q: Float[Array, "T Hq C"],
        keys: Float[Array, "N Hkv G C"],
        values: Float[Array, "N Hkv G C"],
        table: Int32[Array, "B J"],
        positions: Int32[Array, "T"],
        items: Int32[Array, "W 5"],
        count: Int32[Array, "1"],
    ) -> Float[Array, "T Hq C"]:
        """`pallas_kernels.attention.api.attend` with the scale, window and sinks of this layer."""
        return attend(q, keys, values, table, positions, items, count, **self._options())

    def attend_whole(
        self,
        q: Float[Array, "N T Hq C"],
        k: Float[Array, "N T Hkv C"],
        v: Float[Array, "N T Hkv C"],
    ) -> Float[Array, "N T Hq C"]:
        """`attend_causal` with the scale, window and sinks of this layer."""
        return attend_causal(q, k, v, **self._options())

    def output(self, context: Float[Array, "*T Hq C"]) -> Float[Array, "*T D"]:
        return self.o_proj(context.reshape(*context.shape[:-2], -1))

    def _options(self) -> dict:
        config, options = self.config, {}
        if config.rope.score_factor != 1:
            options["scale"] = config.head_dim**-0.5 * config.rope.score_factor
        if self.window:
            options["window"] = self.window
        if config.sinks:
            options["sinks"] = self.sinks[...]
        return options


def attend_causal(
    q: Float[Array, "N T Hq C"],
    k: Float[Array, "N T Hkv C"],
    v: Float[Array, "N T Hkv C"],
    **options,
) -> Float[Array, "N T Hq C"]:
    """Causal attention of N whole sequences; for training and for the reference.

    With `options` it is computed by `attend_xla`, one sequence after the other.
    """
    if not options:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return each_sequence(lambda *parts: attend_xla(*parts, **options), q, k, v)


def each_sequence(
    attend: Callable[..., jax.Array],
    q: Float[Array, "N T Hq Cq"],
    k: Float[Array, "N T Hk Ck"],
    v: Float[Array, "N T Hv Cv"],
) -> Float[Array, "N T Hq _"]:
    """`attend(q, keys, values, positions)` of N sequences, each with one cache for its tokens."""

    def one(parts: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, k, v = parts
        beside_all = lambda y: jnp.broadcast_to(y.swapaxes(0, 1), (len(q), *y.swapaxes(0, 1).shape))
        return attend(q, beside_all(k), beside_all(v), jnp.arange(len(q)))

    return jax.lax.map(one, (q, k, v))


def attend_xla(
    q: Float[Array, "T Hq C"],
    k: Float[Array, "T Hkv P C"],
    v: Float[Array, "T Hkv P C"],
    positions: Int32[Array, "T"],
    *,
    scale: float | None = None,
    window: int = 0,
    sinks: Float[Array, "Hq"] | None = None,
) -> Float[Array, "T Hq C"]:
    """Attention of T tokens, each to P positions of its own, restricted to `<= positions[t]`.

    It materializes all scores. Scores and softmax are float32, the result has q's dtype. `scale` of
    the scores defaults to `C ** -0.5`. A `window` restricts attention to so many last positions.
    `sinks` are scores in the softmax without a value.
    """
    tokens, query_heads, channels = q.shape
    kv_heads = k.shape[1]
    grouped = q.reshape(tokens, kv_heads, query_heads // kv_heads, channels)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = product("thgc,thpc->thgp", grouped, k) * (scale or channels**-0.5)
    visible = seen(jnp.arange(k.shape[2]), positions, window)
    scores = jnp.where(visible[:, None, None, :], scores, -jnp.inf)
    if sinks is None:
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    else:
        by_head = sinks.astype(jnp.float32).reshape(1, kv_heads, -1, 1)
        weights = softmax_with_sinks(scores, by_head).astype(v.dtype)
    # What an earlier sequence left there may be NaN, and 0 x NaN is NaN.
    v = jnp.where(visible[:, None, :, None], v, 0)
    context = product("thgp,thpc->thgc", weights, v).astype(q.dtype)
    return context.reshape(tokens, query_heads, channels)


def softmax_with_sinks(
    scores: Float32[Array, "*T P"], sinks: Float32[Array, "..."]
) -> Float32[Array, "*T P"]:
    """`exp(score) / (exp(sink) + sum of exp(scores))` over the last axis."""
    top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sinks)
    shares = jnp.exp(scores - top)
    return shares / (jnp.sum(shares, axis=-1, keepdims=True) + jnp.exp(sinks - top))
