"""Small models, their weights and placements, for tests of models and of the engine."""

import functools

import ml_dtypes
import numpy as np
from flax import nnx

from eep_jax.config import ClusterConfig, EngineConfig, ModelConfig, RunConfig
from eep_jax.models.decoder import DenseModel
from eep_jax.models.weights import expert_name, split_model
from eep_jax.placement.placement import EMPTY, Placement
from eep_jax.placement.planner import initial_placement


def a_model(**changes) -> ModelConfig:
    """Two layers, eight experts, two of them for each token; no token ends the text."""
    sizes = {
        "name": "test-moe",
        "vocab_size": 64,
        "hidden": 32,
        "layers": 2,
        "query_heads": 2,
        "kv_heads": 1,
        "head_dim": 8,
        "experts": 8,
        "experts_per_token": 2,
        "expert_hidden": 16,
        "eos_token": -1,
    }
    return ModelConfig(**sizes | changes)


def a_run(ranks: int = 1, slots_per_rank: int | None = None, model=None, **engine) -> RunConfig:
    """A run of `a_model`; a rank has room for every expert unless told otherwise."""
    model = model or a_model()
    sizes = {"batch_rows": 4, "prefill_tokens": 4, "row_tile": 4, "context_tokens": 48}
    sizes |= {"page_tokens": 8}
    return RunConfig(
        name="test",
        model=model,
        cluster=ClusterConfig(ranks=ranks, slots_per_rank=slots_per_rank or model.experts),
        engine=EngineConfig(**sizes | {"step_deadline_ms": 60_000} | engine),
    )


@functools.cache
def some_weights(model: ModelConfig, seed: int = 0) -> tuple[dict, np.ndarray]:
    """Random weights: (outside the experts by name, experts `[E L 3 F D]`)."""
    dense, experts = split_model(DenseModel(model, rngs=nnx.Rngs(seed)), model)
    return dense, np.stack([experts[expert_name(e)] for e in range(model.experts)])


def placed(config: RunConfig, redundancy: int = 2) -> Placement:
    """The placement of a whole cluster with the redundancy that there is room for."""
    cluster, experts = config.cluster, config.model.experts
    room = cluster.ranks * cluster.slots_per_rank // experts
    redundancy = min(redundancy, room, cluster.ranks)
    return initial_placement(experts, cluster.ranks, cluster.slots_per_rank, redundancy)


def fill_bank(bank, slots, experts: np.ndarray) -> None:
    """Writes the experts that `slots` names."""
    for slot, expert in enumerate(slots):
        if expert != EMPTY:
            bank.write(slot, expert, experts[expert])


@functools.cache
def rounded_weights(model: ModelConfig) -> tuple[dict, np.ndarray]:
    """`some_weights` as a checkpoint stores them: bfloat16."""
    dense, experts = some_weights(model)
    narrow = {name: weights.astype(ml_dtypes.bfloat16) for name, weights in dense.items()}
    return narrow, experts.astype(ml_dtypes.bfloat16)
