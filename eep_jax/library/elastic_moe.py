"""An expert layer for any Flax NNX model: whole in one process, or spread over ranks."""

import dataclasses
import math
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
    """Where the experts of a run are, as one step sees it: a pytree that `join` makes.

    A step passes it to its first expert layer, and what each layer returns to the next one. Values
    never recompile the step. It may be carried through `nnx.scan`.

    Example:
        >>> import jax.numpy as jnp
        >>> from eep_jax import ExpertRouting
        >>> def step(routing: ExpertRouting, model, x: jnp.ndarray):
        ...     y, routing = model(x, routing)
        ...     return y, routing
    """

    tables: Tables  # the replicas of each expert, in this epoch
    call: Call  # suspicion, vote and round, carried through the layers
    heap: UInt8[Array, "N B"]
    bank: Float[Array, "S L 3 F D"]  # the experts of this rank
    dropped: Int32[Array, ""]  # choices without a live replica, so far in this step
    spread: ExpertSpread = dataclasses.field(metadata={"static": True})


class Correction(nnx.Variable):
    """A bias of the router that balances load; it is set, not learned by gradients."""


class LayerNumber(nnx.Variable):
    """The number of an ElasticMoE that is data, because one module stands for a stack of layers."""


class ElasticMoE(nnx.Module):
    """Router and experts of one layer: `y[t] = sum_k w[t, k] * expert[ids[t, k]](x[t])`.

    Without a routing the layer computes all experts in this process, differentiably. With one,
    it sends each token to the ranks that have its experts.

    The modules of a model are numbered 0..L-1 and have one MoEConfig but for the router. In a stack
    made by `nnx.vmap` or `nnx.scan`, a module stands for several layers: map its number, too.

    Attributes:
        router: `nnx.Linear` from D to E, with float32 logits.
        experts: `nnx.Param` `[E 3 F D]`, of gate, up, and down transposed.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from eep_jax import ElasticMoE, MoEConfig
        >>> config = MoEConfig(hidden=8, expert_hidden=4, experts=4, experts_per_token=2)
        >>> y, routing = ElasticMoE(config, 0, rngs=nnx.Rngs(0))(jnp.ones((5, 8)))
        >>> y.shape, routing
        ((5, 8), None)
        >>> make = lambda layer, rngs: ElasticMoE(config, layer, rngs=rngs)
        >>> stack = nnx.split_rngs(splits=3)(nnx.vmap(make))(jnp.arange(3), nnx.Rngs(0))
        >>> axes = {"in_axes": (0, nnx.Carry), "out_axes": nnx.Carry}
        >>> run = nnx.scan(lambda layer, carry: layer(*carry), **axes)
        >>> y, routing = run(stack, (jnp.ones((5, 8)), None))
        >>> y.shape
        (5, 8)
    """

    def __init__(
        self,
        config: MoEConfig,
        layer: int | Int32[Array, ""],
        *,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Draws router and experts.

        Args:
            config: Sizes, router and activation.
            layer: Number of this module among the expert layers of the model, 0..L-1. An int; or
                an int32 scalar where the module is made under `nnx.vmap` or `nnx.scan`.
            param_dtype: Dtype of the router's kernel and of the experts.
            rngs: Source of the stream `params`.

        Raises:
            ValueError: `layer` is negative.
        """
        if isinstance(layer, int | np.integer):
            if layer < 0:
                raise ValueError(f"{layer=} must be the number of this expert layer, 0..L-1")
            self.layer = int(layer)
        else:
            self.layer = LayerNumber(jnp.asarray(layer, jnp.int32))
        self.config = config
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
        self, x: Float[Array, "*T D"], routing: ExpertRouting | None = None
    ) -> tuple[Float[Array, "*T D"], ExpertRouting | None]:
        """Sends each row of `x` through its K experts.

        Args:
            x: `[*T D]`. With a routing, all leading axes together are the rows of the exchange: as
                many in every rank's step, at most `tokens_max` of `run_config`.
            routing: What the step was given, or the previous expert layer returned. None computes
                all experts here.

        Returns:
            (y, routing): y with the shape and dtype of x; the routing for the next expert layer.

        Raises:
            ValueError: x has other channels or too many rows; the run has no such layer; the module
                is a whole stack; or there is no routing, and `without_experts` removed the experts.
        """
        config = self.config
        if stack := self.stack:
            raise ValueError(
                f"this ElasticMoE is a stack {list(stack)} of layers; call it inside nnx.scan over "
                "its first axis, which hands one layer at a time to the function"
            )
        if x.shape[-1] != config.hidden:
            raise ValueError(f"x is {x.shape}, expected {config.hidden} channels in its last axis")
        correction = self.correction[...] if config.router_correction else None
        ids, weights = choose(self.router(x), config.model(), correction)
        if routing is None:
            return self._all_here(x, ids, weights), None
        return self._spread(x, ids, weights, routing)

    @property
    def stack(self) -> tuple[int, ...]:
        """Axes by which `nnx.vmap` or `nnx.scan` stacked this module; () for one layer."""
        return tuple(self.router.kernel.shape[:-2])

    def _all_here(self, x: Array, ids: Array, weights: Array) -> Array:
        if not hasattr(self, "experts"):
            raise ValueError(
                f"expert layer {self.layer} has no experts (see without_experts) and was called "
                "without a routing; pass the routing that the step was given"
            )
        stacked = self.experts[...][:, None]
        mlp = expert_mlp(self.config.model())
        return dense_experts(stacked, 0, x, ids, weights, mlp).astype(x.dtype)

    def _spread(
        self, x: Array, ids: Array, weights: Array, routing: ExpertRouting
    ) -> tuple[Array, ExpertRouting]:
        config, bank = self.config, routing.bank
        layer = self.layer if isinstance(self.layer, int) else self.layer[...]
        # The bank's F may be padded; D and L are what the run was configured with.
        is_beyond = isinstance(layer, int) and layer >= bank.shape[1]
        if is_beyond or bank.shape[-1] != config.hidden:
            raise ValueError(
                f"layer {layer} with {config.hidden=} does not fit a bank [S L 3 F D] of "
                f"{bank.shape}; run_config needs the layers and the MoEConfig of this model"
            )
        on_gpu = platform() == "gpu"
        run = shared_elastic_experts if on_gpu else elastic_experts
        layer = jnp.int32(layer) if on_gpu else layer
        rows, choices = x.reshape(-1, config.hidden), config.experts_per_token
        routes = ids.reshape(-1, choices), weights.reshape(-1, choices)
        parts = bank, routing.heap, routing.tables, routing.call
        y, dropped, call = run(routing.spread, layer, rows.astype(bank.dtype), *routes, *parts)
        after = dataclasses.replace(routing, call=call, dropped=routing.dropped + jnp.sum(dropped))
        return y.reshape(x.shape).astype(x.dtype), after


def expert_layers(model: nnx.Module) -> list[ElasticMoE]:
    """The ElasticMoE modules of a model by their (lowest) number; a stack is one of several layers.

    Raises:
        ValueError: The layers are not numbered 0..L-1, each once; they differ in their sizes; or a
            stack has one number, or another axis than its first ones.
    """
    found = [m for _, m in nnx.iter_modules(model) if isinstance(m, ElasticMoE)]
    numbers = [number for module in found for number in _numbers(module)]
    if not found or (None not in numbers and sorted(numbers) != list(range(len(numbers)))):
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
    return found if None in numbers else sorted(found, key=lambda module: min(_numbers(module)))


def _numbers(module: ElasticMoE) -> list[int | None]:
    """The numbers of the layers of one module, in the order of the stack; None if abstract."""
    stack, config = module.stack, module.config
    found, wanted = module.router.kernel.shape, (*stack, config.hidden, config.experts)
    if found == wanted and hasattr(module, "experts"):
        found, wanted = module.experts.shape, (*stack, *config.weights_shape)
    if found != wanted:
        raise ValueError(
            f"a weight of an ElasticMoE is {found}, expected {wanted}; stack modules by their "
            "first axis: nnx.vmap(..., out_axes=0)"
        )
    if isinstance(module.layer, int):
        if stack:
            raise ValueError(
                f"an ElasticMoE is a stack {list(stack)} of layers, all with layer={module.layer}; "
                "map the number, too: nnx.split_rngs(splits=L)(nnx.vmap(make))(jnp.arange(L), rngs)"
                ", where make(layer, rngs) gives it to the ElasticMoE"
            )
        return [module.layer]
    number = module.layer.get_value()
    if isinstance(number, jax.ShapeDtypeStruct):
        return [None] * math.prod(stack)
    if number.shape != stack:
        raise ValueError(f"the layer numbers of an ElasticMoE are {number.shape}, expected {stack}")
    return np.asarray(number).reshape(-1).tolist()


def expert_arrays(model: nnx.Module) -> dict[str, np.ndarray]:
    """All experts of a model, as `join` takes them.

    Args:
        model: Holds ElasticMoE modules; stacks are split into their layers.

    Returns:
        `[L 3 F D]` for each expert by its name, in host memory.

    Raises:
        ValueError: The layers are not numbered 0..L-1, or of different sizes.

    Example:
        >>> from flax import nnx
        >>> from eep_jax import ElasticMoE, MoEConfig, expert_arrays
        >>> config = MoEConfig(hidden=8, expert_hidden=4, experts=4, experts_per_token=2)
        >>> model = nnx.List([ElasticMoE(config, layer, rngs=nnx.Rngs(0)) for layer in range(2)])
        >>> {name: array.shape for name, array in expert_arrays(model).items()}["e003"]
        (2, 3, 4, 8)
    """
    by_layer = {}
    for module in expert_layers(model):
        layers = np.asarray(module.experts[...]).reshape(-1, *module.config.weights_shape)
        by_layer |= dict(zip(_numbers(module), layers, strict=True))
    stacked = np.stack([by_layer[layer] for layer in range(len(by_layer))], axis=1)
    return {expert_name(expert): stacked[expert] for expert in range(len(stacked))}


def without_experts(model: nnx.Module) -> nnx.Module:
    """A copy of a model whose expert layers have no experts: they are read from the bank.

    Args:
        model: May be abstract, as `nnx.eval_shape` returns it. It is left as it is.

    Returns:
        The copy, which shares all other arrays with `model`.

    Raises:
        ValueError: The layers are not numbered 0..L-1, or of different sizes.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from eep_jax import ElasticMoE, MoEConfig, without_experts
        >>> config = MoEConfig(hidden=8, expert_hidden=4, experts=4, experts_per_token=2)
        >>> rest = without_experts(ElasticMoE(config, 0, rngs=nnx.Rngs(0)))
        >>> [leaf.shape for leaf in jax.tree.leaves(nnx.state(rest))]
        [(8, 4)]
    """
    rest = nnx.clone(model)
    for module in expert_layers(rest):
        del module.experts
    return rest
