"""Two ranks that share one H100 (80 GB), each with a bank of 30 GB, for measuring returns.

Per rank, in bfloat16:

    experts   100 slots x 288 MiB         28.13 GiB   heap
    window    T = 32 rows, K = 4           0.01 GiB   heap
    dense     attention, router, head      0.57 GiB   JAX
    KV cache  16 rows x 512 positions      0.13 GiB   JAX

Reserved on the GPU: JAX 2 x 0.06 x 79.6 = 9.6 GiB, slabs 56.4 GiB, CUDA contexts
2 x 0.6 = 1.2 GiB: 67.2 of 78 GiB.
"""

from eep_jax.config import ClusterConfig, DeviceConfig, EngineConfig, ModelConfig, RunConfig


def get_config() -> RunConfig:
    """Each rank has all 100 experts, so a death orphans none and a return loads all 30 GB."""
    return RunConfig(
        name="bank_30gb_h100x1",
        platform="gpu",
        random_weights=0,
        model=ModelConfig(
            name="large-experts-random",
            vocab_size=256,
            hidden=4096,
            layers=8,
            query_heads=32,
            kv_heads=4,
            head_dim=128,
            experts=100,
            experts_per_token=4,
            expert_hidden=1536,
            rope_theta=1_000_000.0,
            eos_token=-1,  # random weights would end a text at random
        ),
        cluster=ClusterConfig(
            ranks=2,
            slots_per_rank=100,
            redundancy=2,
            stall_ms=45_000,
            formation_ms=600_000,
        ),
        engine=EngineConfig(
            batch_rows=16,
            prefill_tokens=16,
            context_tokens=512,
            row_tile=16,  # a decode step is one tile, without a loop
            step_deadline_ms=10_000,
            dtype="bfloat16",
        ),
        device=DeviceConfig(memory_fraction=0.12),
    )
