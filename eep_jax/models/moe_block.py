"""The expert layer of a decoder: all in one process, or spread over ranks that come and go."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32, UInt8

from eep_jax.config import ModelConfig
from eep_jax.tables import NO_SLOT, Tables, assign
from pallas_kernels.combine.api import combine
from pallas_kernels.dispatch.api import dispatch
from pallas_kernels.exchange.call import Call, Choices, ExchangeSpec
from pallas_kernels.expert_gemm.api import expert_gemm
from pallas_kernels.expert_gemm.mlp import SWIGLU, ExpertMlp


class DenseExperts(nnx.Module):
    """The weights of all experts of all layers: one array `[E L 3 F D]`.

    The 3 are gate, up, and down transposed.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        shape = (config.experts, *config.expert_shape)
        scale = jnp.array([config.hidden, config.hidden, config.expert_hidden]) ** -0.5
        normal = jax.random.normal(rngs.params(), shape, jnp.float32)
        self.weights = nnx.Param(normal * scale[None, None, :, None, None])


def dense_experts(
    stacked: Float[Array, "E L 3 F D"],
    layer: int | Int32[Array, ""],
    x: Float[Array, "*T D"],
    expert_ids: Int32[Array, "*T K"],
    weights: Float32[Array, "*T K"],
    mlp: ExpertMlp = SWIGLU,
) -> Float[Array, "*T D"]:
    """Computes all experts for all tokens and weights them: wasteful, differentiable, simple.

    `y[t] = sum_k weights[t, k] * expert[expert_ids[t, k]](x[t])`.
    """
    matrices, biases = mlp.split(stacked[:, layer])
    gate_bias, up_bias, down_bias = biases or (0, 0, None)
    gate, up, down = jnp.moveaxis(matrices, 1, 0)
    one_hot = jax.nn.one_hot(expert_ids, gate.shape[0], dtype=x.dtype)
    share = jnp.einsum("...ke,...k->...e", one_hot, weights.astype(x.dtype))
    gated = jnp.einsum("...d,efd->...ef", x, gate) + gate_bias
    hidden = mlp.activate(gated, jnp.einsum("...d,efd->...ef", x, up) + up_bias)
    y = jnp.einsum("...ef,efd->...d", hidden * share[..., None], down)
    return y if down_bias is None else y + share @ down_bias


def expert_mlp(config: ModelConfig) -> ExpertMlp:
    """Function of one routed expert of a model."""
    return ExpertMlp(
        activation=config.activation,
        limit=config.activation_limit,
        slope=config.activation_slope,
        bias_width=config.expert_hidden if config.expert_biases else 0,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertSpread:
    """Compile-time part of an expert layer. The part that changes is in Tables and Call."""

    exchange: ExchangeSpec
    tile_rows: int = 8
    mlp: ExpertMlp = SWIGLU


def elastic_experts(
    spread: ExpertSpread,
    layer,
    x: Float[Array, "T D"],
    expert_ids: Int32[Array, "T K"],
    weights: Float32[Array, "T K"],
    bank: Float[Array, "S L 3 F D"],
    heap: UInt8[Array, "N B"],
    tables: Tables,
    call: Call,
) -> tuple[Float[Array, "T D"], Int32[Array, "T"], Call]:
    """Runs each token through its experts, wherever they are now: assign, dispatch, GEMM, combine.

    `y[t] = sum_k weights[t, k] * expert[expert_ids[t, k]](x[t])`. Returns y, how many choices of
    each token had no live replica (they add nothing, and the weights are not renormalised), and the
    call for the next layer, its vote raised to the largest heard. `layer` is an int or
    an int32 scalar.
    """
    choices = Choices(assign(expert_ids, tables), weights)
    rows, received, suspicion, vote = dispatch(x, choices, heap, call, spread.exchange)
    call = call.after(suspicion)
    options = {"layer": layer, "tile_rows": spread.tile_rows, "mlp": spread.mlp}
    results = expert_gemm(rows, received.slots, bank, **options, send_home=True)
    y, suspicion = combine(results, received, choices, heap, call, spread.exchange)
    dropped = jnp.sum(choices.slots == NO_SLOT, axis=1, dtype=jnp.int32)
    return y, dropped, dataclasses.replace(call.after(suspicion).next(), vote=vote)


# For programs with many layers on a GPU: they share one trace, one lowering and one compilation of
# the kernels, since the layer is data.
shared_elastic_experts = jax.jit(elastic_experts, static_argnums=0)
