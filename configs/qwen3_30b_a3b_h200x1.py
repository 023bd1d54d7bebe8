"""Qwen3-30B-A3B whole on one H200: for decoding as fast as one GPU can. Nothing may die.

Of each rank's GPU, as `eep_jax.models.memory` works it out:

    experts      54.0 GiB  heap  128 slots x 0.4 GiB
    window        0.3 GiB  heap
    embeddings    1.2 GiB  JAX   with the head
    attention     1.7 GiB  JAX
    routers       0.0 GiB  JAX
    shared        0.0 GiB  JAX   shared experts, dense layers
    KV cache     70.3 GiB  JAX   12000 pages x 64 positions = 750 Ki
    step          2.3 GiB  JAX   estimated
    unused        1.7 GiB  JAX   takes 0.55 of a GPU; room for 295 pages more
    context       0.6 GiB  CUDA
    in all      132.2 GiB  x 1 of 140.4 GiB
    128 experts on 1 ranks: up to 0 may die, up to 0 with nothing to load
"""

from eep_jax.config import ClusterConfig, DeviceConfig, EngineConfig, RunConfig
from eep_jax.models.families.published import published


def get_config() -> RunConfig:
    """Needs `--checkpoint=DIR` of launch.convert or of Hugging Face, or `--random_weights`."""
    return RunConfig(
        name="qwen3_30b_a3b_h200x1",
        platform="gpu",
        model=published("Qwen3-30B-A3B"),
        cluster=ClusterConfig(
            ranks=1,
            slots_per_rank=128,
            stall_ms=45_000,
            formation_ms=900_000,
        ),
        engine=EngineConfig(
            batch_rows=256,
            prefill_tokens=3840,
            step_rows=(16, 64, 256, 1024, 2048),
            context_tokens=40_960,  # the model's own
            kv_pages=12_000,
            gap_ms=60,
            row_tile=16,
            step_deadline_ms=10_000,
            dtype="bfloat16",
        ),
        device=DeviceConfig(memory_fraction=0.55),
    )
