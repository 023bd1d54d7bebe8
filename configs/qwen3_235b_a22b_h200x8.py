"""Qwen3-235B-A22B on eight H200: every expert once, six slots of a rank free.

Of each rank's GPU, as `eep_jax.models.memory` works it out:

    experts      72.7 GiB  heap  22 slots x 3.3 GiB
    window        0.2 GiB  heap
    embeddings    2.3 GiB  JAX   with the head
    attention    12.5 GiB  JAX
    routers       0.1 GiB  JAX
    shared        0.0 GiB  JAX   shared experts, dense layers
    KV cache     23.5 GiB  JAX   2048 pages x 64 positions = 128 Ki
    step          0.5 GiB  JAX   estimated
    unused       20.1 GiB  JAX   takes 0.42 of a GPU; room for 1748 pages more
    context       0.6 GiB  CUDA
    in all      132.5 GiB  x 1 of 140.4 GiB
    128 experts on 8 ranks: up to 2 may die, up to 0 with nothing to load
"""

from eep_jax.config import ClusterConfig, DeviceConfig, EngineConfig, RunConfig
from eep_jax.models.families.published import published


def get_config() -> RunConfig:
    """Needs `--checkpoint=DIR` of launch.convert or of Hugging Face, or `--random_weights`."""
    return RunConfig(
        name="qwen3_235b_a22b_h200x8",
        platform="gpu",
        model=published("Qwen3-235B-A22B"),
        cluster=ClusterConfig(
            ranks=8,
            slots_per_rank=22,
            backup_bytes=64 << 30,
            stall_ms=60_000,
            formation_ms=1_800_000,
            fetch_deadline_ms=120_000,
        ),
        engine=EngineConfig(
            batch_rows=64,
            prefill_tokens=64,
            context_tokens=2048,
            row_tile=64,  # a decode step is one tile, without a loop
            step_deadline_ms=10_000,
            dtype="bfloat16",
        ),
        device=DeviceConfig(memory_fraction=0.42),
    )
