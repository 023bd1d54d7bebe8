"""Qwen3-30B-A3B on four H200: every expert twice, and room to restore what one death takes.

Of each rank's GPU, as `eep_jax.models.memory` works it out:

    experts      40.5 GiB  heap  96 slots x 0.4 GiB
    window        0.4 GiB  heap
    embeddings    1.2 GiB  JAX   with the head
    attention     1.7 GiB  JAX
    routers       0.0 GiB  JAX
    shared        0.0 GiB  JAX   shared experts, dense layers
    KV cache     63.3 GiB  JAX   10800 pages x 64 positions = 675 Ki
    step          1.6 GiB  JAX   estimated
    unused        2.5 GiB  JAX   takes 0.5 of a GPU; room for 419 pages more
    context       0.6 GiB  CUDA
    in all      111.7 GiB  x 1 of 140.4 GiB
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
            batch_rows=256,
            prefill_tokens=1024,
            step_rows=(16, 64, 256, 512),
            context_tokens=40_960,  # the model's own
            kv_pages=10_800,
            gap_ms=60,
            row_tile=16,
            step_deadline_ms=10_000,
            dtype="bfloat16",
        ),
        device=DeviceConfig(memory_fraction=0.5),
    )
