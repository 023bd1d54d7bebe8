"""Four ranks that share one H100 (80 GB), serving a Qwen3-MoE of 5.1 G random parameters.

Per rank, in bfloat16:

    experts   32 slots x 144 MiB           4.50 GiB   heap
    window    T = 64 rows, K = 8           0.02 GiB   heap
    dense     attention, router, head      0.57 GiB   JAX
    KV cache  32 rows x 2048 positions     2.00 GiB   JAX
    steps     gathered keys, activations   0.3  GiB   JAX, estimated

Reserved on the GPU: JAX 4 x 0.1 x 79.6 = 31.8 GiB, slabs 18.1 GiB, CUDA contexts
4 x 0.6 = 2.4 GiB: 52.3 of 78 GiB. A rank's share of JAX, 8.0 GiB, is
more than twice the 2.9 GiB that it needs.
"""

from eep_jax.config import ClusterConfig, DeviceConfig, EngineConfig, ModelConfig, RunConfig


def get_config() -> RunConfig:
    """64 experts with two replicas each on 4 x 32 slots; one rank's death orphans none."""
    return RunConfig(
        name="small_moe_h100x1",
        platform="gpu",
        random_weights=0,
        model=ModelConfig(
            name="small-moe-random",
            vocab_size=256,
            hidden=2048,
            layers=16,
            query_heads=32,
            kv_heads=4,
            head_dim=128,
            experts=64,
            experts_per_token=8,
            expert_hidden=768,
            rope_theta=1_000_000.0,
            eos_token=-1,  # random weights would end a text at random
        ),
        cluster=ClusterConfig(
            ranks=4,
            slots_per_rank=32,
            redundancy=2,
            stall_ms=45_000,
            formation_ms=600_000,
        ),
        engine=EngineConfig(
            batch_rows=32,
            prefill_tokens=32,
            context_tokens=2048,
            row_tile=32,  # a decode step is one tile, without a loop
            step_deadline_ms=10_000,
            dtype="bfloat16",
        ),
        device=DeviceConfig(memory_fraction=0.4),
    )
