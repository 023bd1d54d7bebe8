"""Kimi K2 in bfloat16 on 32 H200 of four hosts: every expert once, two slots of a rank free.

Of each rank's GPU, as `eep_jax.models.memory` works it out:

    experts      68.9 GiB  heap  14 slots x 4.9 GiB
    window        2.0 GiB  heap
    embeddings    4.4 GiB  JAX   with the head
    attention    11.5 GiB  JAX
    routers       0.3 GiB  JAX
    shared        5.7 GiB  JAX   shared experts, dense layers
    KV cache     34.3 GiB  JAX   8192 pages x 64 positions = 512 Ki
    step          2.4 GiB  JAX   estimated
    unused        4.6 GiB  JAX   takes 0.45 of a GPU; room for 1107 pages more
    context       0.6 GiB  CUDA
    in all      134.7 GiB  x 1 of 140.4 GiB
    384 experts on 32 ranks: up to 4 may die, up to 0 with nothing to load
"""

from eep_jax.config import ClusterConfig, DeviceConfig, EngineConfig, RunConfig
from eep_jax.models.families.published import published


def get_config() -> RunConfig:
    """Needs `--checkpoint=DIR` of launch.convert or of Hugging Face, or `--random_weights`."""
    return RunConfig(
        name="kimi_k2_h200x32",
        platform="gpu",
        model=published("Kimi-K2"),
        cluster=ClusterConfig(
            ranks=32,
            slots_per_rank=14,
            backup_bytes=64 << 30,
            stall_ms=60_000,
            formation_ms=3_600_000,
            fetch_deadline_ms=120_000,
        ),
        engine=EngineConfig(
            batch_rows=128,
            prefill_tokens=128,
            context_tokens=4096,
            row_tile=128,  # a decode step is one tile, without a loop
            step_deadline_ms=10_000,
            dtype="bfloat16",
        ),
        device=DeviceConfig(memory_fraction=0.45),
    )
