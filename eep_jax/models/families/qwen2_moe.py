"""Qwen2-MoE (Qwen1.5-MoE-A2.7B): biases of q, k and v, and a shared expert behind a sigmoid."""

import functools

from eep_jax.model_config import ModelConfig
from eep_jax.models.families.config_json import Fields
from eep_jax.models.families.layers_json import excepted_plain_layers
from eep_jax.models.families.qwen3_moe import NAMES, PATTERN, WITHOUT_EFFECT
from eep_jax.models.families.rope_json import read_rope
from eep_jax.models.families.tensors import Family, decoder_tensors, fused_experts, per_expert

DEFAULTS = {
    "bos_token_id": None,
    "head_dim": None,
    "mlp_only_layers": None,
    "norm_topk_prob": False,
    "num_key_value_heads": 16,
    "qkv_bias": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "shared_expert_intermediate_size": 5632,
    "tie_word_embeddings": False,
}


def config(fields: Fields, name: str) -> ModelConfig:
    """Raises CheckpointError for sliding windows, and for plain layers behind others."""
    fields.require("use_sliding_window", False)
    common, heads = fields.common(name), fields.heads()
    fields.layer_kinds("layer_types", common["layers"], "full_attention")
    return ModelConfig(
        **common,
        **heads,
        **read_rope(fields, heads["head_dim"]),
        **excepted_plain_layers(fields, common["layers"]),
        expert_hidden=fields.take("moe_intermediate_size"),
        norm_topk_prob=fields.take("norm_topk_prob", bool),
        qk_norm="none",
        qkv_bias=fields.take("qkv_bias", bool),
        shared_hidden=fields.take("shared_expert_intermediate_size"),
        shared_gate=True,
    )


FAMILY = Family(
    architectures=("Qwen2MoeForCausalLM",),
    config=config,
    dense=decoder_tensors,
    expert=functools.partial(per_expert, pattern=PATTERN, names=NAMES),
    fused=(functools.partial(fused_experts, pattern=PATTERN),),
    defaults=DEFAULTS,
    without_effect=WITHOUT_EFFECT,
)
