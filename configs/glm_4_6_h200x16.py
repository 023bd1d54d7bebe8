"""GLM-4.6 in bfloat16 on 16 H200 of two hosts: every expert once, two slots of a rank free.

Of each rank's GPU, as `eep_jax.models.memory` works it out:

    experts      46.9 GiB  heap  12 slots x 3.9 GiB
    window        0.4 GiB  heap
    embeddings    2.9 GiB  JAX   with the head
    attention    23.4 GiB  JAX
    routers       0.1 GiB  JAX
    shared        5.0 GiB  JAX   shared experts, dense layers
    KV cache     46.0 GiB  JAX   2048 pages x 64 positions = 128 Ki
    step          0.8 GiB  JAX   estimated
    unused        6.1 GiB  JAX   takes 0.6 of a GPU; room for 269 pages more
    context       0.6 GiB  CUDA
    in all      132.2 GiB  x 1 of 140.4 GiB
    160 experts on 16 ranks: up to 2 may die, up to 0 with nothing to load
"""

from eep_jax.config import ClusterConfig, DeviceConfig, EngineConfig, RunConfig
from eep_jax.models.families.published import published


def get_config() -> RunConfig:
    """Needs `--checkpoint=DIR` of launch.convert or of Hugging Face, or `--random_weights`."""
    return RunConfig(
        name="glm_4_6_h200x16",
        platform="gpu",
        model=published("GLM-4.6"),
        cluster=ClusterConfig(
            ranks=16,
            slots_per_rank=12,
            backup_bytes=48 << 30,
            stall_ms=60_000,
            formation_ms=3_600_000,
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
        device=DeviceConfig(memory_fraction=0.6),
    )
