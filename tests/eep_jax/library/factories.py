"""A small model with two ElasticMoE layers, and its ranks as steppers over loopback heaps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from eep_jax.heap.loopback import open_all
from eep_jax.library.config import ROUTERS, MoEConfig, run_config
from eep_jax.library.elastic_moe import ElasticMoE, expert_arrays, without_experts
from eep_jax.library.step_engine import StepEngine
from eep_jax.models.expert_bank import slab_layout
from eep_jax.models.weights import expert_name
from eep_jax.placement.placement import Placement
from eep_jax.tables import build_tables
from tests.support.factories import a_view
from tests.support.loopback import DEADLINE_MS, in_threads
from tests.support.models import fill_bank, placed

LAYERS, TOKENS = 2, 8


def a_moe(**changes) -> MoEConfig:
    sizes = {"hidden": 16, "expert_hidden": 12, "experts": 8, "experts_per_token": 2}
    return MoEConfig(**sizes | changes)


# Layers as families of models have them; a plain name of a router is a kind, too.
KINDS = {name: {"router": name} for name in ROUTERS} | {
    "deepseek": {
        "router": "sigmoid_topk",
        "router_correction": True,
        "router_groups": 4,
        "router_groups_kept": 2,
        "router_group_score": "top2",
        "router_scaling": 2.5,
    },
    "gpt_oss": {
        "router": "softmax_of_topk",
        "router_bias": True,
        "activation": "clamped_swiglu",
        "expert_biases": True,
    },
}


def filled(moe: ElasticMoE, seed: int = 0) -> ElasticMoE:
    """With biases and corrections that are not zero."""
    random = np.random.default_rng(seed)
    drawn = lambda value: jnp.asarray(random.standard_normal(value.shape) * 0.3, value.dtype)
    width = moe.config.expert_hidden
    moe.experts[...] = moe.experts[...].at[:, :, width:].set(drawn(moe.experts[:, :, width:]))
    if moe.config.router_bias:
        moe.router.bias[...] = drawn(moe.router.bias[...])
    if moe.config.router_correction:
        moe.correction[...] = drawn(moe.correction[...])
    return moe


class TwoLayers(nnx.Module):
    """`x + moe(norm(x))`, twice; x is `[*T D]`."""

    def __init__(self, moe: MoEConfig, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.RMSNorm(moe.hidden, rngs=rngs) for _ in range(LAYERS)])
        self.experts = nnx.List([ElasticMoE(moe, layer, rngs=rngs) for layer in range(LAYERS)])

    def __call__(self, x, routing=None):
        for norm, moe in zip(self.norms, self.experts, strict=True):
            y, routing = moe(norm(x), routing)
            x = x + y
        return x, routing


@functools.cache
def a_model(kind: str = "softmax_topk") -> TwoLayers:
    model = TwoLayers(a_moe(**KINDS[kind]), nnx.Rngs(0))
    for layer, moe in enumerate(model.experts):
        filled(moe, layer)
    return model


def some_rows(seed: int = 0, shape=(TOKENS,)) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (*shape, a_moe().hidden), jnp.float32)


class StepperCluster:
    """R ranks that run one model's step in lockstep, all within this process."""

    def __init__(self, ranks: int, kind: str = "softmax_topk", model=None, **cluster):
        """`model` may have other layers than `a_model(kind)`, of the same MoEConfig."""
        model = model or a_model(kind)
        arrays = expert_arrays(model)
        options = {"slots_per_rank": 8, "step_deadline_ms": DEADLINE_MS} | cluster
        config = run_config(
            a_moe(**KINDS[kind]),
            layers=len(arrays["e000"]),
            ranks=ranks,
            tokens_max=TOKENS,
            **options,
        )
        layout = slab_layout(config.model, config.engine, ranks, config.cluster.slots_per_rank)
        self.heaps = open_all(ranks, layout.slab_bytes)
        graph, self.weights = nnx.split(without_experts(model))
        self.experts = np.stack([arrays[expert_name(e)] for e in range(len(arrays))])
        self.traced = 0

        def step(routing, weights, x):
            self.traced += 1
            return nnx.merge(graph, weights)(x, routing)

        example = (self.weights, np.zeros((TOKENS, a_moe().hidden), np.float32))
        self.steppers = [
            StepEngine(config, rank, heap, layout, step, example)
            for rank, heap in enumerate(self.heaps)
        ]
        for stepper in self.steppers:
            stepper.warm_up()
        self.epoch, self.whole = 0, placed(config)

    @property
    def ranks(self) -> range:
        return range(len(self.steppers))

    def change(self, members, placement: Placement) -> None:
        """What survivors do in a change: detach, attach, load experts, clear flags, resume."""
        self.epoch += 1
        words = ["active" if rank in members else "absent" for rank in self.ranks]
        view = a_view(" ".join(words), epoch=self.epoch)
        for rank in members:
            for peer in set(self.ranks) - {rank}:
                if peer in members:
                    self.heaps[rank].attach(peer, self.heaps[peer].export())
                else:
                    self.heaps[rank].detach(peer)
            fill_bank(self.steppers[rank].bank, placement.slots[rank], self.experts)
            self.steppers[rank].lockstep.clear_flags()
        for rank in members:
            self.steppers[rank].resume(build_tables(view, placement, rank))

    def submit(self, rows: dict) -> dict:
        """A call of each of these ranks with its rows; returns the futures."""
        return {r: self.steppers[r].submit((self.weights, x)) for r, x in rows.items()}

    def advance(self, members) -> dict:
        """One step of these ranks at once; returns the outcomes. Nothing may be traced in it."""

        def guarded(rank):
            with jax.no_tracing():
                return self.steppers[rank].advance()

        return in_threads({rank: functools.partial(guarded, rank) for rank in members})

    def call(self, rows: dict) -> dict:
        """Runs a call of each of these ranks in one step that all commit; returns the results."""
        futures = self.submit(rows)
        outcomes = self.advance(rows)
        assert all(outcome.committed for outcome in outcomes.values()), outcomes
        return {rank: np.asarray(future.result(0)) for rank, future in futures.items()}
