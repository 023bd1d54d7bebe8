"""Qwen2-MoE (Qwen1.5-MoE-A2.7B): biases of q, k and v, and a shared expert behind a sigmoid."""

import functools

from eep_jax.model_config import ModelConfig
from eep_jax.models.families.config_json import Fields
from eep_jax.models.families.qwen3_moe import NAMES, PATTERN
from eep_jax.models.families.tensors import Family, decoder_tensors, per_expert


def config(fields: Fields, name: str) -> ModelConfig:
    """Raises CheckpointError for layers without experts or with sliding windows."""
    fields.require("decoder_sparse_step", 1)
    fields.require("mlp_only_layers", [])
    fields.require("use_sliding_window", False)
    heads = fields.heads()
    return ModelConfig(
        **fields.common(name),
        **heads,
        experts=fields.experts(),
        expert_hidden=fields.take("moe_intermediate_size"),
        norm_topk_prob=fields.take("norm_topk_prob", bool, False),
        rope=fields.rope(heads["head_dim"]),
        qk_norm="none",
        qkv_bias=fields.take("qkv_bias", bool, True),
        shared_hidden=fields.take("shared_expert_intermediate_size"),
        shared_gate=True,
    )


FAMILY = Family(
    architectures=("Qwen2MoeForCausalLM",),
    config=config,
    dense=decoder_tensors,
    expert=functools.partial(per_expert, pattern=PATTERN, names=NAMES),
)
