"""Grouped-query attention with q/k norm and RoPE: projections, and the two ways to attend."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from eep_jax.config import ModelConfig
from eep_jax.models.attention_cudnn import attend_cudnn, fits_cudnn


def rope(
    x: Float[Array, "*T H C"], positions: Int32[Array, "*T"], theta: float
) -> Float[Array, "*T H C"]:
    """Rotates channel pairs (c, c + C/2) by `position * theta ** (-2c / C)`, in float32.

    This is RoFormer's, in NeoX order. Returns the dtype of x.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    low, high = x[..., :half], x[..., half:]
    turned = jnp.concatenate([low * cosine - high * sine, high * cosine + low * sine], axis=-1)
    return turned.astype(x.dtype)


class Attention(nnx.Module):
    """The weights of one attention layer, and what is done before and after attending."""

    def __init__(self, config: ModelConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        options = {"param_dtype": dtype, "rngs": rngs}
        linear = lambda i, o: nnx.Linear(i, o, use_bias=False, **options)
        norm = lambda: nnx.RMSNorm(config.head_dim, epsilon=config.norm_eps, **options)
        self.q_proj = linear(config.hidden, config.query_heads * config.head_dim)
        self.k_proj = linear(config.hidden, config.kv_heads * config.head_dim)
        self.v_proj = linear(config.hidden, config.kv_heads * config.head_dim)
        self.o_proj = linear(config.query_heads * config.head_dim, config.hidden)
        self.q_norm, self.k_norm = norm(), norm()

    def project(self, x: Float[Array, "*T D"], positions: Int32[Array, "*T"]):
        """Returns q `[*T Hq C]`, k and v `[*T Hkv C]`; q and k are normed and rotated."""
        heads = lambda y: y.reshape(*y.shape[:-1], -1, self.config.head_dim)
        q = rope(self.q_norm(heads(self.q_proj(x))), positions, self.config.rope_theta)
        k = rope(self.k_norm(heads(self.k_proj(x))), positions, self.config.rope_theta)
        return q, k, heads(self.v_proj(x))

    def output(self, context: Float[Array, "*T Hq C"]) -> Float[Array, "*T D"]:
        return self.o_proj(context.reshape(*context.shape[:-2], -1))


def attend_causal(
    q: Float[Array, "N T Hq C"], k: Float[Array, "N T Hkv C"], v: Float[Array, "N T Hkv C"]
) -> Float[Array, "N T Hq C"]:
    """Attention of N whole sequences to themselves; for training and for the reference."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def attend_cached(
    q: Float[Array, "T Hq C"],
    k: Float[Array, "T Hkv P C"],
    v: Float[Array, "T Hkv P C"],
    positions: Int32[Array, "T"],
) -> Float[Array, "T Hq C"]:
    """Attention of T tokens, each to its own P cached positions; it sees those `<= positions[t]`.

    Every token is an own batch entry of the matrix products, so its result has the same bits
    whichever other tokens stand beside it. Scores and softmax are float32, the result is of q's
    dtype. On a GPU cuDNN does it where it can, XLA elsewhere.
    """
    if fits_cudnn(q, k):
        return attend_cudnn(q, k, v, positions)
    tokens, query_heads, channels = q.shape
    kv_heads = k.shape[1]
    grouped = q.reshape(tokens, kv_heads, query_heads // kv_heads, channels)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = product("thgc,thpc->thgp", grouped, k) * (channels**-0.5)
    visible = jnp.arange(k.shape[2])[None, :] <= positions[:, None]
    scores = jnp.where(visible[:, None, None, :], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    context = product("thgp,thpc->thgc", weights, v).astype(q.dtype)
    return context.reshape(tokens, query_heads, channels)
