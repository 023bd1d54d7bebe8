"""Qwen3-30B-A3B on four H200: every expert twice, and room to restore what one death takes.

Of each rank's GPU, as `eep_jax.models.memory` works it out:

    experts      40.5 GiB  heap  96 slots x 0.4 GiB
    window        0.3 GiB  heap
    embeddings    1.2 GiB  JAX   with the head
    attention     1.7 GiB  JAX
    routers       0.0 GiB  JAX
    shared        0.0 GiB  JAX   shared experts, dense layers
    KV cache     24.0 GiB  JAX   64 sequences x 4096 positions
    step          1.6 GiB  JAX   estimated
    unused       41.7 GiB  JAX   takes 0.5 of a GPU
    context       0.6 GiB  CUDA
    in all      111.6 GiB  x 1 of 140.4 GiB
    128 experts on 4 ranks: up to 2 may die, up to 1 with nothing to load
"""

from eep_jax.config import ClusterConfig, DeviceConfig, EngineConfig, RunConfig
from eep_jax.models.families.published import published


def get_config() -> RunConfig:
    """Needs `--checkpoint=DIR` of launch.convert or of Hugging Face, or `--random_weights`."""
    return RunConfig(
        name="qwen3_30b_a3b_h200x4",
        platform="gpu",
        model=published("Qwen3-30B-A3B"),
        cluster=ClusterConfig(
            ranks=4,
            slots_per_rank=96,
            redundancy=2,
            stall_ms=45_000,
            formation_ms=900_000,
        ),
        engine=EngineConfig(
            batch_rows=64,
            prefill_tokens=1024,
            prompt_shapes=(64, 256),
            context_tokens=4096,
            row_tile=64,  # a decode step is one tile, without a loop
            step_deadline_ms=10_000,
            dtype="bfloat16",
        ),
        device=DeviceConfig(memory_fraction=0.5),
    )
