"""Mixtral-8x7B on four H100: every expert twice.

Of each rank's GPU, as `eep_jax.models.memory` works it out:

    experts      42.0 GiB  heap  4 slots x 10.5 GiB
    window        0.0 GiB  heap
    embeddings    0.5 GiB  JAX   with the head
    attention     2.5 GiB  JAX
    routers       0.0 GiB  JAX
    shared        0.0 GiB  JAX   shared experts, dense layers
    KV cache     16.0 GiB  JAX   2048 pages x 64 positions = 128 Ki
    step          0.2 GiB  JAX   estimated
    unused       11.0 GiB  JAX   takes 0.38 of a GPU; room for 1413 pages more
    context       0.6 GiB  CUDA
    in all       72.9 GiB  x 1 of 79.6 GiB
    8 experts on 4 ranks: up to 2 may die, up to 1 with nothing to load
"""

from eep_jax.config import ClusterConfig, DeviceConfig, EngineConfig, RunConfig
from eep_jax.models.families.published import published


def get_config() -> RunConfig:
    """Needs `--checkpoint=DIR` of launch.convert or of Hugging Face, or `--random_weights`."""
    return RunConfig(
        name="mixtral_8x7b_h100x4",
        platform="gpu",
        model=published("Mixtral-8x7B"),
        cluster=ClusterConfig(
            ranks=4,
            slots_per_rank=4,
            redundancy=2,
            stall_ms=45_000,
            formation_ms=900_000,
            fetch_deadline_ms=120_000,
        ),
        engine=EngineConfig(
            batch_rows=32,
            prefill_tokens=64,
            context_tokens=4096,
            row_tile=32,  # a decode step is one tile, without a loop
            step_deadline_ms=10_000,
            dtype="bfloat16",
        ),
        device=DeviceConfig(memory_fraction=0.38),
    )
