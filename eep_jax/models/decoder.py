"""The stack of decoder layers: tokens in, logits out.

Where attention looks and where experts run is given.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from eep_jax.config import ModelConfig
from eep_jax.models.attention import Attention, attend_causal
from eep_jax.models.moe_block import DenseExperts, dense_experts
from eep_jax.models.router import route


class DecoderLayer(nnx.Module):
    """One layer, cut where other tokens (attention) or other ranks (experts) come in."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.attention_norm = nnx.RMSNorm(config.hidden, epsilon=config.norm_eps, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.moe_norm = nnx.RMSNorm(config.hidden, epsilon=config.norm_eps, rngs=rngs)
        self.router = nnx.Linear(config.hidden, config.experts, use_bias=False, rngs=rngs)

    def before_attention(self, x: Float[Array, "*T D"], positions: Int32[Array, "*T"]):
        """Returns q, k, v of these tokens."""
        return self.attention.project(self.attention_norm(x), positions)

    def after_attention(self, x: Float[Array, "*T D"], context: Float[Array, "*T Hq C"]):
        """Returns residual and experts' input `[*T D]`, expert ids and weights `[*T K]`."""
        x = x + self.attention.output(context)
        normed = self.moe_norm(x)
        config = self.config
        ids, weights = route(self.router(normed), config.experts_per_token, config.norm_topk_prob)
        return x, normed, ids, weights


class Decoder(nnx.Module):
    """The weights outside the experts: embedding, layers, final norm and head."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Embed(config.vocab_size, config.hidden, rngs=rngs)
        self.layers = nnx.List([DecoderLayer(config, rngs=rngs) for _ in range(config.layers)])
        self.final_norm = nnx.RMSNorm(config.hidden, epsilon=config.norm_eps, rngs=rngs)
        self.head = nnx.Linear(config.hidden, config.vocab_size, use_bias=False, rngs=rngs)

    def logits(self, x: Float[Array, "*T D"]) -> Float[Array, "*T V"]:
        return self.head(self.final_norm(x))


class DenseModel(nnx.Module):
    """The decoder with all experts in one process: what is trained, and the tests' oracle."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.decoder = Decoder(config, rngs=rngs)
        self.experts = DenseExperts(config, rngs=rngs)

    def __call__(self, tokens: Int32[Array, "N T"], experts=None):
        """Returns logits `[N T V]`; per layer the expert ids `[N T K]`, router logits `[N T E]`.

        `experts` replaces `dense_experts`, same arguments, where training wants a cheaper one.
        """
        decoder, routes = self.decoder, []
        stacked = self.experts.weights[...]
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = decoder.embed(tokens)
        for index, layer in enumerate(decoder.layers):
            q, k, v = layer.before_attention(x, positions)
            x, normed, ids, weights = layer.after_attention(x, attend_causal(q, k, v))
            x = x + (experts or dense_experts)(stacked, index, normed, ids, weights)
            routes.append((ids, layer.router(normed)))
        return decoder.logits(x), routes
