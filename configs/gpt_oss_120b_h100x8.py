"""gpt-oss-120b, unpacked to bfloat16, on eight H100: every expert twice.

Of each rank's GPU, as `eep_jax.models.memory` works it out:

    experts      58.0 GiB  heap  34 slots x 1.7 GiB
    window        0.1 GiB  heap
    embeddings    2.2 GiB  JAX   with the head
    attention     1.8 GiB  JAX
    routers       0.0 GiB  JAX
    shared        0.0 GiB  JAX   shared experts, dense layers
    KV cache      9.0 GiB  JAX   2048 pages x 64 positions = 128 Ki
    step          0.3 GiB  JAX   estimated
    unused        2.7 GiB  JAX   takes 0.2 of a GPU; room for 609 pages more
    context       0.6 GiB  CUDA
    in all       74.6 GiB  x 1 of 79.6 GiB
    128 experts on 8 ranks: up to 4 may die, up to 1 with nothing to load
"""

from eep_jax.config import ClusterConfig, DeviceConfig, EngineConfig, RunConfig
from eep_jax.models.families.published import published


def get_config() -> RunConfig:
    """Needs `--checkpoint=DIR` of launch.convert or of Hugging Face, or `--random_weights`."""
    return RunConfig(
        name="gpt_oss_120b_h100x8",
        platform="gpu",
        model=published("gpt-oss-120b"),
        cluster=ClusterConfig(
            ranks=8,
            slots_per_rank=34,
            redundancy=2,
            stall_ms=45_000,
            formation_ms=1_800_000,
        ),
        engine=EngineConfig(
            batch_rows=32,
            prefill_tokens=64,
            context_tokens=4096,
            row_tile=32,  # a decode step is one tile, without a loop
            step_deadline_ms=10_000,
            dtype="bfloat16",
        ),
        device=DeviceConfig(memory_fraction=0.2),
    )
