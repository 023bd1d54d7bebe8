"""DeepSeek-V3 in bfloat16 on 32 H200 of four hosts: every expert once; backups in host memory.

Of each rank's GPU, as `eep_jax.models.memory` works it out:

    experts      47.6 GiB  heap  10 slots x 4.8 GiB
    window        2.0 GiB  heap
    embeddings    3.5 GiB  JAX   with the head
    attention    21.3 GiB  JAX
    routers       0.2 GiB  JAX
    shared        7.0 GiB  JAX   shared experts, dense layers
    KV cache     34.3 GiB  JAX   8192 pages x 64 positions = 512 Ki
    step          2.3 GiB  JAX   estimated
    unused        8.7 GiB  JAX   takes 0.55 of a GPU; room for 2072 pages more
    context       0.6 GiB  CUDA
    in all      127.4 GiB  x 1 of 140.4 GiB
    256 experts on 32 ranks: up to 6 may die, up to 0 with nothing to load
"""

from eep_jax.config import ClusterConfig, DeviceConfig, EngineConfig, RunConfig
from eep_jax.models.families.published import published


def get_config() -> RunConfig:
    """Needs `--checkpoint=DIR` of launch.convert or of Hugging Face, or `--random_weights`."""
    return RunConfig(
        name="deepseek_v3_h200x32",
        platform="gpu",
        model=published("DeepSeek-V3"),
        cluster=ClusterConfig(
            ranks=32,
            slots_per_rank=10,
            backup_bytes=48 << 30,
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
        device=DeviceConfig(memory_fraction=0.55),
    )
