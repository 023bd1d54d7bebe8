"""Four CPU ranks on one machine serving the small trained byte-level MoE of this repository."""

from eep_jax.models.model_config import ModelConfig
import types  # temporary
def get_config():
    return types.SimpleNamespace(model=ModelConfig(name="tiny-moe-kjv", vocab_size=256, hidden=128, layers=4, query_heads=4, kv_heads=2, head_dim=32, experts=16, experts_per_token=4, expert_hidden=96))
