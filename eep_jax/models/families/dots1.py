"""dots.llm1 (arXiv 2506.05767): Qwen3's attention, optionally with windows in later layers, and
DeepSeek-V3's routers, shared experts and plain first layers.
"""

import functools

from eep_jax.model_config import ModelConfig
from eep_jax.models.families.config_json import Fields
from eep_jax.models.families.layers_json import counted_plain_layers, windows
from eep_jax.models.families.qwen3_moe import NAMES, PATTERN
from eep_jax.models.families.rope_json import read_rope
from eep_jax.models.families.sigmoid_router import grouped_router
from eep_jax.models.families.tensors import Family, decoder_tensors, fused_experts, per_expert

DEFAULTS = {
    "attention_bias": False,
    "bos_token_id": None,
    "first_k_dense_replace": 0,
    "head_dim": None,
    "max_window_layers": 62,
    "n_group": 1,
    "norm_topk_prob": False,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "routed_scaling_factor": 1.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "topk_group": 1,
}


def config(fields: Fields, name: str) -> ModelConfig:
    """Raises CheckpointError if `layer_types` has unknown names or another length."""
    bias = fields.take("attention_bias", bool)
    common, heads = fields.common(name), fields.heads()
    width = fields.take("moe_intermediate_size")
    first = fields.take("max_window_layers") if fields.window() else common["layers"]
    fields.read.add("max_window_layers")  # without effect if there is no window
    slides = lambda layer: layer >= first
    return ModelConfig(
        **common,
        **heads,
        **read_rope(fields, heads["head_dim"]),
        expert_hidden=width,
        norm_topk_prob=fields.take("norm_topk_prob", bool),
        qkv_bias=bias,
        output_bias=bias,
        windows=windows(fields, common["layers"], slides),
        router=grouped_router(fields),
        dense_layers=counted_plain_layers(fields, common["layers"]),
        dense_hidden=fields.take("intermediate_size"),
        shared_hidden=fields.take("n_shared_experts") * width,
    )


FAMILY = Family(
    architectures=("Dots1ForCausalLM",),
    config=config,
    dense=functools.partial(decoder_tensors, shared="shared_experts"),
    expert=functools.partial(per_expert, pattern=PATTERN, names=NAMES),
    fused=(functools.partial(fused_experts, pattern=PATTERN),),
    defaults=DEFAULTS,
)
