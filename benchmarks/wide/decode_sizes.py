"""Sizes of a decoding stack: layers that fit, bytes to read, and systems to compare."""

import dataclasses

from benchmarks.static.exchanges import EXCHANGES, GPU_ONLY
from benchmarks.world import with_layers
from eep_jax.config import RunConfig
from eep_jax.models.memory import CONTEXT_BYTES, RESERVE_BYTES, expert_bytes, memory_per_rank

ELASTIC = ("live", "fixed")
STEP_DEADLINE_MS = 60_000  # for a peer's part of a step: no rank is killed here
# Of what is worked out, and beyond it: for what XLA takes besides, and for drawing weights.
JAX_SLACK, JAX_SLACK_BYTES = 1.2, 4 << 30


def systems_of(platform: str, link: str, ranks: int) -> tuple[str, ...]:
    """Systems to compare: NCCL needs a GPU of its own for every rank; XLA:CPU lacks ragged."""
    if link == "shared_gpu" or ranks == 1:
        return ELASTIC
    return ELASTIC + tuple(e for e in EXCHANGES if platform == "gpu" or e not in GPU_ONLY)


def with_sizes(
    config: RunConfig, *, ranks: int, batch: int, layers: int, context_tokens: int
) -> RunConfig:
    """Each expert once on so many ranks, and `layers` layers, of which at most one is dense."""
    config = with_layers(config, layers)
    engine = dataclasses.replace(
        config.engine,
        batch_rows=batch,
        prefill_tokens=batch,
        step_rows=(),
        kv_pages=0,
        row_tile=batch,
        context_tokens=context_tokens,
        step_deadline_ms=STEP_DEADLINE_MS,
    )
    cluster = dataclasses.replace(
        config.cluster, ranks=ranks, slots_per_rank=-(-config.model.experts // ranks), redundancy=1
    )
    return dataclasses.replace(config, engine=engine, cluster=cluster)


def with_few_experts(config: RunConfig, ranks: int, bytes_max: int) -> RunConfig:
    """The model with as many experts, halved, as fit into so many bytes with all of its layers."""
    model, router, experts = config.model, config.model.router, config.model.experts

    def enough(count: int) -> bool:
        in_group, rest = divmod(count, router.groups)
        chosen_from = in_group * router.groups_kept
        few = chosen_from < model.experts_per_token or count < ranks
        return not rest and not few and (in_group > 1 or router.groups == 1)

    while experts * expert_bytes(config) > bytes_max and enough(experts // 2):
        experts //= 2
    cluster = dataclasses.replace(config.cluster, slots_per_rank=-(-experts // ranks))
    model = dataclasses.replace(model, experts=experts)
    return dataclasses.replace(config, model=model, cluster=cluster)


def share_of(config: RunConfig, gpu_bytes: int, sharing: int) -> float | None:
    """The part of a GPU's memory that JAX may take in each of `sharing` ranks, None if too little.

    With an 80 GiB GPU and a heap of 30 GiB it is a little less than 5/8.
    """
    needed = memory_per_rank(config)
    left = gpu_bytes / sharing - needed.heap - CONTEXT_BYTES - RESERVE_BYTES
    return left / gpu_bytes if left > JAX_SLACK * needed.jax + JAX_SLACK_BYTES else None


def layers_that_fit(config: RunConfig, gpu_bytes: int, sharing: int, sizes: dict) -> int:
    """The most layers of the model with which a rank fits. Raises ValueError if not even two do."""
    for layers in range(config.model.layers, 1, -1):
        if share_of(with_sizes(config, **sizes, layers=layers), gpu_bytes, sharing) is not None:
            return layers
    raise ValueError(
        f"two layers of {config.model.name} do not fit {gpu_bytes >> 30} GiB with {sizes}; take "
        "more GPUs, or a smaller --batches or --context_tokens"
    )


def step_bytes(config: RunConfig) -> int:
    """Bytes that a rank must read in a decode step, if experts are chosen evenly: the weights of
    those of its slots that some row of all ranks chose, the dense weights, and the cached tokens.
    """
    model, cluster, engine = config.model, config.cluster, config.engine
    needed = memory_per_rank(config)
    rows = cluster.ranks * engine.batch_rows
    touched = 1 - (1 - model.experts_per_token / model.experts) ** rows
    embedding = needed.embeddings // (1 if model.tied_embeddings else 2)
    cached = needed.cache * (engine.context_tokens // 2) // engine.context_tokens
    return int(needed.experts * touched) + needed.dense - embedding + cached
