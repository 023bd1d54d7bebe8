"""The stack of decoder layers: tokens in, logits out.

Where attention looks and where experts run is given. `dtype` is that of weights and activations;
statistics of norms, rotations, softmax, the router's logits and the tokens' are float32.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from eep_jax.config import ModelConfig
from eep_jax.models.attention import Attention, attend_causal
from eep_jax.models.moe_block import DenseExperts, dense_experts
from eep_jax.models.router import route


class DecoderLayer(nnx.Module):
    """One layer, cut where other tokens (attention) or other ranks (experts) come in."""

    def __init__(self, config: ModelConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        options = {"param_dtype": dtype, "rngs": rngs}
        self.attention_norm = nnx.RMSNorm(config.hidden, epsilon=config.norm_eps, **options)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.moe_norm = nnx.RMSNorm(config.hidden, epsilon=config.norm_eps, **options)
        self.router = _to_float32(config.hidden, config.experts, **options)

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

    def __init__(self, config: ModelConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        options = {"param_dtype": dtype, "rngs": rngs}
        self.embed = nnx.Embed(config.vocab_size, config.hidden, **options)
        layer = lambda: DecoderLayer(config, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([layer() for _ in range(config.layers)])
        self.final_norm = nnx.RMSNorm(config.hidden, epsilon=config.norm_eps, **options)
        self.head = _to_float32(config.hidden, config.vocab_size, **options)

    def logits(self, x: Float[Array, "*T D"]) -> Float32[Array, "*T V"]:
        return self.head(self.final_norm(x))


class DenseModel(nnx.Module):
    """The decoder with all experts in one process: what is trained, and the tests' oracle.

    `dtype` is the decoder's; `build_dense_model` gives the experts the same.
    """

    def __init__(self, config: ModelConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)
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
            x = add(x, (experts or dense_experts)(stacked, index, normed, ids, weights))
            routes.append((ids, layer.router(normed)))
        return decoder.logits(x), routes


def add(x: Float[Array, "*T D"], y: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
    """`x + y` in the dtype of x, rounded once: the experts' sum y may be float32."""
    return (x + y).astype(x.dtype)


def _to_float32(inputs: int, outputs: int, **options) -> nnx.Linear:
    """A projection that keeps the float32 in which its products are summed."""
    return nnx.Linear(
        inputs, outputs, use_bias=False, preferred_element_type=jnp.float32, **options
    )
