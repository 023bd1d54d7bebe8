"""The stack of decoder layers: tokens in, logits out.

Callers provide the attention context and run the experts. Weights and activations have `dtype`;
norm statistics, rotations, softmax, router logits and token logits are float32.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from eep_jax.config import ModelConfig
from eep_jax.models.attention import Attention
from eep_jax.models.latent_attention import LatentAttention
from eep_jax.models.linear import linear
from eep_jax.models.moe_block import DenseExperts, dense_experts, expert_mlp
from eep_jax.models.router import choose
from pallas_kernels.product.api import product


class Mlp(nnx.Module):
    """SwiGLU of all tokens: the MLP of a layer without experts, or the shared expert."""

    def __init__(self, hidden: int, width: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        project = lambda i, o: linear(i, o, use_bias=False, param_dtype=dtype, rngs=rngs)
        self.gate, self.up, self.down = (
            project(hidden, width),
            project(hidden, width),
            project(width, hidden),
        )

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class DecoderLayer(nnx.Module):
    """One layer, split where it needs other tokens (attention) or other ranks (experts).

    `routed` layers have experts and use `after_attention`, the others `finish`. `index` counts the
    layers with experts.
    """

    def __init__(self, config: ModelConfig, layer: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.index, self.routed = layer - config.dense_layers, layer >= config.dense_layers
        options = {"param_dtype": dtype, "rngs": rngs}
        attention = LatentAttention if config.latent else Attention
        self.attention_norm = nnx.RMSNorm(config.hidden, epsilon=config.norm_eps, **options)
        self.attention = attention(config, layer, dtype=dtype, rngs=rngs)
        self.moe_norm = nnx.RMSNorm(config.hidden, epsilon=config.norm_eps, **options)
        if not self.routed:
            self.mlp = Mlp(config.hidden, config.dense_hidden, dtype=dtype, rngs=rngs)
            return
        bias = config.router.bias
        self.router = _to_float32(config.hidden, config.experts, use_bias=bias, **options)
        if config.router.correction:
            # Scores differ by less than bfloat16 resolves.
            self.router_correction = nnx.Param(jnp.zeros(config.experts, jnp.float32))
        if config.shared_hidden:
            self.shared = Mlp(config.hidden, config.shared_hidden, dtype=dtype, rngs=rngs)
        if config.shared_gate:
            self.shared_gate = linear(config.hidden, 1, use_bias=False, **options)

    def before_attention(
        self, x: Float[Array, "*T D"], positions: Int32[Array, "*T"]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns q, k, v of these tokens."""
        return self.attention.project(self.attention_norm(x), positions)

    def after_attention(
        self, x: Float[Array, "*T D"], context: Float[Array, "*T Hq C"]
    ) -> tuple[
        Float[Array, "*T D"], Float[Array, "*T D"], Int32[Array, "*T K"], Float32[Array, "*T K"]
    ]:
        """Returns residual, experts' input, expert ids and weights.

        The residual includes the shared expert's output.
        """
        x = x + self.attention.output(context)
        normed, config = self.moe_norm(x), self.config
        correction = self.router_correction[...] if config.router.correction else None
        ids, weights = choose(self.router(normed), config, correction)
        if config.shared_hidden:
            shared = self.shared(normed)
            if config.shared_gate:
                shared = shared * jax.nn.sigmoid(self.shared_gate(normed))
            x = x + shared
        return x, normed, ids, weights

    def finish(
        self, x: Float[Array, "*T D"], context: Float[Array, "*T Hq C"]
    ) -> Float[Array, "*T D"]:
        """Output of a layer without experts."""
        x = x + self.attention.output(context)
        return x + self.mlp(self.moe_norm(x))


class Decoder(nnx.Module):
    """The weights outside the experts: embedding, layers, final norm and head."""

    def __init__(self, config: ModelConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        options = {"param_dtype": dtype, "rngs": rngs}
        self.embed = nnx.Embed(config.vocab_size, config.hidden, **options)
        layer = lambda number: DecoderLayer(config, number, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([layer(number) for number in range(config.layers)])
        self.final_norm = nnx.RMSNorm(config.hidden, epsilon=config.norm_eps, **options)
        if not config.tied_embeddings:
            self.head = _to_float32(config.hidden, config.vocab_size, use_bias=False, **options)

    def logits(self, x: Float[Array, "*T D"]) -> Float32[Array, "*T V"]:
        normed = self.final_norm(x)
        if not self.config.tied_embeddings:
            return self.head(normed)
        table = self.embed.embedding[...]
        return product(normed, table, out_dtype=jnp.float32, transposed=True)


class DenseModel(nnx.Module):
    """The decoder with all experts in one process: for training, and the tests' oracle.

    `dtype` is the decoder's; `build_dense_model` casts the experts to it as well.
    """

    def __init__(self, config: ModelConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)
        self.experts = DenseExperts(config, rngs=rngs)

    def __call__(
        self, tokens: Int32[Array, "N T"], experts: Callable[..., jax.Array] | None = None
    ) -> tuple[Float32[Array, "N T V"], list[tuple[jax.Array, jax.Array]]]:
        """Returns logits; per layer the expert ids `[N T K]` and router logits `[N T E]`.

        `experts` replaces `dense_experts`, with its arguments, by a cheaper one for training.
        """
        decoder, routes = self.decoder, []
        run = experts or functools.partial(dense_experts, mlp=expert_mlp(decoder.config))
        stacked = self.experts.weights[...]
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = decoder.embed(tokens)
        for layer in decoder.layers:
            context = layer.attention.attend_whole(*layer.before_attention(x, positions))
            if not layer.routed:
                x = layer.finish(x, context)
                continue
            x, normed, ids, weights = layer.after_attention(x, context)
            x = add(x, run(stacked, layer.index, normed, ids, weights))
            routes.append((ids, layer.router(normed)))
        return decoder.logits(x), routes


def add(x: Float[Array, "*T D"], y: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
    """`x + y` rounded once to the dtype of x: the experts' sum y may be float32."""
    return (x + y).astype(x.dtype)


def _to_float32(inputs: int, outputs: int, **options) -> nnx.Linear:
    """A projection whose output is the float32 of its accumulator."""
    return linear(inputs, outputs, preferred_element_type=jnp.float32, **options)
