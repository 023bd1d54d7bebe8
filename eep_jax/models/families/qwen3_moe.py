"""Qwen3-MoE (arXiv 2505.09388): norms of each query and key head, softmax over all experts."""

import functools

from eep_jax.model_config import ModelConfig
from eep_jax.models.families.config_json import Fields
from eep_jax.models.families.tensors import Family, decoder_tensors, per_expert

NAMES = ("gate_proj", "up_proj", "down_proj")
PATTERN = "model.layers.{layer}.mlp.experts.{expert}.{name}.weight"


def config(fields: Fields, name: str) -> ModelConfig:
    """Raises CheckpointError for layers without experts or with sliding windows."""
    fields.require("decoder_sparse_step", 1)
    fields.require("mlp_only_layers", [])
    fields.require("use_sliding_window", False)
    bias = fields.take("attention_bias", bool, False)
    heads = fields.heads()
    return ModelConfig(
        **fields.common(name),
        **heads,
        experts=fields.experts(),
        expert_hidden=fields.take("moe_intermediate_size"),
        norm_topk_prob=fields.take("norm_topk_prob", bool, False),
        rope=fields.rope(heads["head_dim"]),
        qkv_bias=bias,
        output_bias=bias,
    )


FAMILY = Family(
    architectures=("Qwen3MoeForCausalLM",),
    config=config,
    dense=decoder_tensors,
    expert=functools.partial(per_expert, pattern=PATTERN, names=NAMES),
)
