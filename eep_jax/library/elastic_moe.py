"""An expert layer for any Flax NNX model: whole in one process, or spread over ranks.

Without an ExpertRouting it computes all experts itself and is differentiable. With one it sends
each token to wherever its experts live now; what changes with the cluster is in the ExpertRouting,
a jit argument.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32, UInt8

from eep_jax.library.config import MoEConfig
from eep_jax.models.moe_block import (
    ExpertSpread,
    dense_experts,
    elastic_experts,
    expert_mlp,
    shared_elastic_experts,
)
from eep_jax.models.router import choose
from eep_jax.models.weights import expert_name
from eep_jax.tables import Tables
from pallas_kernels.device import platform
from pallas_kernels.exchange.call import Call


@jax.tree_util.register_dataclass
@typing.no_type_check  # leaves may be abstract under tree.map
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertRouting:
    """Where experts are, as one step sees it; each expert layer returns it for the next one.

    `call` carries suspicion, vote and round onwards, `dropped` counts choices that had no live
    replica. Values never recompile; `spread` is static and belongs to the process.
    """

    tables: Tables
    call: Call
    heap: UInt8[Array, "N B"]
    bank: Float[Array, "S L 3 F D"]
    dropped: Int32[Array, ""]
    spread: ExpertSpread = dataclasses.field(metadata={"static": True})


class Correction(nnx.Variable):
    """A bias of the router that balances load; it is set, not learned by gradients."""


class ElasticMoE(nnx.Module):
    """Router and experts of one layer: `y[t] = sum_k w[t, k] * expert[ids[t, k]](x[t])`.

    `layer` is its place in the bank: the ElasticMoE modules of a model are numbered 0..L-1, and are
    of one MoEConfig but for the router. `param_dtype` is that of the router's kernel and of the
    experts `[E 3 F D]` (gate, up, and down transposed).
    """

    def __init__(self, config: MoEConfig, layer: int, *, param_dtype=jnp.float32, rngs: nnx.Rngs):
        if layer < 0:
            raise ValueError(f"{layer=} must be the module's number among the expert layers, 0..")
        self.config, self.layer = config, layer
        self.router = nnx.Linear(
            config.hidden,
            config.experts,
            use_bias=config.router_bias,
            param_dtype=param_dtype,
            preferred_element_type=jnp.float32,
            rngs=rngs,
        )
        if config.router_correction:
            self.correction = Correction(jnp.zeros(config.experts, jnp.float32))
        scale = jnp.array([config.hidden, config.hidden, config.expert_hidden]) ** -0.5
        normal = jax.random.normal(rngs.params(), config.weights_shape, jnp.float32)
        is_bias = jnp.arange(config.weights_shape[2])[:, None] >= config.expert_hidden
        drawn = jnp.where(is_bias, 0, normal * scale[None, :, None, None])
        self.experts = nnx.Param(drawn.astype(param_dtype))

    def __call__(
        self, x: Float[Array, "*T D"], place: ExpertRouting | None = None
    ) -> tuple[Float[Array, "*T D"], ExpertRouting | None]:
        """Returns y in the dtype of x, and the place for the next expert layer (None for None).

        With a place, all leading axes of x together are the rows of the exchange: the same number
        in every rank's step. Raises ValueError for x of other channels, more rows than the window
        holds, a layer that the bank does not have, and without a place where `without_experts` has
        taken the experts away.
        """
        config = self.config
        if x.shape[-1] != config.hidden:
            raise ValueError(f"x is {x.shape}, expected {config.hidden} channels in its last axis")
        correction = self.correction[...] if config.router_correction else None
        ids, weights = choose(self.router(x), config.model(), correction)
        if place is None:
            return self._all_here(x, ids, weights), None
        return self._spread(x, ids, weights, place)

    def _all_here(self, x, ids, weights):
        if not hasattr(self, "experts"):
            raise ValueError(
                f"expert layer {self.layer} has no experts (see without_experts) and was called "
                "without a place; pass the place that the step was given"
            )
        stacked = self.experts[...][:, None]
        mlp = expert_mlp(self.config.model())
        return dense_experts(stacked, 0, x, ids, weights, mlp).astype(x.dtype)

    def _spread(self, x, ids, weights, place: ExpertRouting):
        config, bank = self.config, place.bank
        # The bank's F may be padded; D and L are what the run was configured with.
        if self.layer >= bank.shape[1] or bank.shape[-1] != config.hidden:
            raise ValueError(
                f"layer {self.layer} with {config.hidden=} does not fit a bank [S L 3 F D] of "
                f"{bank.shape}; run_config needs the layers and the MoEConfig of this model"
            )
        on_gpu = platform() == "gpu"
        run = shared_elastic_experts if on_gpu else elastic_experts
        layer = jnp.int32(self.layer) if on_gpu else self.layer
        rows, choices = x.reshape(-1, config.hidden), config.experts_per_token
        routes = ids.reshape(-1, choices), weights.reshape(-1, choices)
        parts = bank, place.heap, place.tables, place.call
        y, dropped, call = run(place.spread, layer, rows.astype(bank.dtype), *routes, *parts)
        after = dataclasses.replace(place, call=call, dropped=place.dropped + jnp.sum(dropped))
        return y.reshape(x.shape).astype(x.dtype), after


def expert_layers(model: nnx.Module) -> list[ElasticMoE]:
    """The model's ElasticMoE modules in the order of `layer`.

    Raises ValueError unless they are numbered 0..L-1, each once, and are of the same sizes.
    """
    found = [m for _, m in nnx.iter_modules(model) if isinstance(m, ElasticMoE)]
    found.sort(key=lambda module: module.layer)
    numbers = [module.layer for module in found]
    if not found or numbers != list(range(len(found))):
        raise ValueError(
            f"the expert layers of {type(model).__name__} are numbered {numbers}, expected "
            "0, 1, 2, ... each once; give every ElasticMoE its own layer="
        )
    sizes = {(*m.config.weights_shape, m.config.experts_per_token) for m in found}
    if len({expert_mlp(m.config.model()) for m in found}) != 1:
        raise ValueError("expert layers have different activations or biases; one bank has one")
    if len(sizes) != 1:
        raise ValueError(
            f"expert layers have different (E, 3, F, D, K): {sorted(sizes)}; the layers of one "
            "bank are of one size"
        )
    return found


def expert_arrays(model: nnx.Module) -> dict[str, np.ndarray]:
    """All experts by name (`e007`), each over all layers `[L 3 F D]`, in host memory."""
    stacked = np.stack([np.asarray(m.experts[...]) for m in expert_layers(model)], axis=1)
    return {expert_name(expert): stacked[expert] for expert in range(len(stacked))}


def without_experts(model: nnx.Module) -> nnx.Module:
    """A copy of the model (arrays shared) that has no experts: they are read from the bank.

    The model may be abstract, as `nnx.eval_shape` gives it.
    """
    rest = nnx.clone(model)
    for module in expert_layers(rest):
        del module.experts
    return rest
