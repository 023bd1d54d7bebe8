"""Four CPU ranks on one machine, serving the small trained byte-level MoE of this repository."""

import pathlib

from eep_jax.config import ClusterConfig, EngineConfig, ModelConfig, RunConfig


def get_config() -> RunConfig:
    """2.6 M parameters, 16 experts with two replicas each on 4 x 8 slots."""
    return RunConfig(
        name="tiny_cpu",
        model=ModelConfig(
            name="tiny-moe-kjv",
            vocab_size=256,
            hidden=128,
            layers=4,
            query_heads=4,
            kv_heads=2,
            head_dim=32,
            experts=16,
            experts_per_token=4,
            expert_hidden=96,
        ),
        cluster=ClusterConfig(
            ranks=4,
            slots_per_rank=8,
            redundancy=2,
            backup_bytes=8 << 20,  # all experts, 288 KiB each plus overhead of a shard
        ),
        engine=EngineConfig(batch_rows=8, prefill_tokens=32, context_tokens=512),
        checkpoint=str(pathlib.Path(__file__).parent / "tiny_checkpoint"),
    )
