"""OLMoE (arXiv 2409.02060): norms over all query and key channels, unnormalised routing weights."""

import functools

from eep_jax.model_config import ModelConfig
from eep_jax.models.families.config_json import Fields
from eep_jax.models.families.qwen3_moe import NAMES, PATTERN
from eep_jax.models.families.rope_json import read_rope
from eep_jax.models.families.tensors import Family, decoder_tensors, fused_experts, per_expert

DEFAULTS = {
    "attention_bias": False,
    "bos_token_id": None,
    "eos_token_id": 50279,
    "head_dim": None,
    "norm_topk_prob": False,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}


def config(fields: Fields, name: str) -> ModelConfig:
    """Raises CheckpointError for clipped projections (`clip_qkv`), which no release has."""
    fields.require("clip_qkv", None)
    bias = fields.take("attention_bias", bool)
    heads = fields.heads()
    return ModelConfig(
        **fields.common(name),
        **heads,
        **read_rope(fields, heads["head_dim"]),
        expert_hidden=fields.take("intermediate_size"),
        norm_topk_prob=fields.take("norm_topk_prob", bool),
        qk_norm="full",
        qkv_bias=bias,
        output_bias=bias,
    )


FAMILY = Family(
    architectures=("OlmoeForCausalLM",),
    config=config,
    dense=decoder_tensors,
    expert=functools.partial(per_expert, pattern=PATTERN, names=NAMES),
    fused=(functools.partial(fused_experts, pattern=PATTERN),),
    defaults=DEFAULTS,
)
