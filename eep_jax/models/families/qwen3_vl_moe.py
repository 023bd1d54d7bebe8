"""The text part of Qwen3-VL-MoE: Qwen3-MoE whose experts are fused, with inputs first.

A text's positions are equal on all axes of its multimodal RoPE, which then is the plain one.
"""

import functools

from eep_jax.model_config import ModelConfig
from eep_jax.models.families import qwen3_moe
from eep_jax.models.families.config_json import Fields
from eep_jax.models.families.tensors import Family, decoder_tensors, fused_experts, per_expert

DEFAULTS = qwen3_moe.DEFAULTS | {
    "norm_topk_prob": True,
    "num_key_value_heads": 16,
    "rope_theta": 500_000.0,
}


def config(fields: Fields, name: str) -> ModelConfig:
    """Raises CheckpointError for plain layers behind others, and for weights without a norm."""
    # Releases have true; transformers and other implementations differ on false.
    fields.require("norm_topk_prob", True)
    return qwen3_moe.config(fields, name, ignored=("mrope_interleaved", "mrope_section"))


FAMILY = Family(
    architectures=("Qwen3VLMoeForConditionalGeneration",),
    config=config,
    dense=decoder_tensors,
    expert=functools.partial(per_expert, pattern=qwen3_moe.PATTERN, names=qwen3_moe.NAMES),
    # transformers 5 writes the first form, releases have the second.
    fused=(
        functools.partial(fused_experts, pattern=qwen3_moe.PATTERN),
        functools.partial(fused_experts, pattern=qwen3_moe.PATTERN, inputs_first=True),
    ),
    defaults=DEFAULTS,
    without_effect=qwen3_moe.WITHOUT_EFFECT,
)
