"""HunYuan v3 (Hy3): norms of each head, sigmoid scores with a correction, shared experts, and plain
layers from a list.
"""

import functools

from eep_jax.model_config import ModelConfig, RouterConfig
from eep_jax.models.families.config_json import Fields
from eep_jax.models.families.layers_json import listed_plain_layers
from eep_jax.models.families.qwen3_moe import NAMES, PATTERN
from eep_jax.models.families.rope_json import read_rope
from eep_jax.models.families.tensors import Family, decoder_tensors, fused_experts, per_expert

DEFAULTS = {
    "attention_bias": False,
    "bos_token_id": None,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "num_shared_experts": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 11_158_840.0,
    "router_scaling_factor": 2.826,
    "tie_word_embeddings": False,
}


def config(fields: Fields, name: str) -> ModelConfig:
    """Raises CheckpointError for biases of MLPs, and for plain layers behind others."""
    fields.require("mlp_bias", False)
    for name in (
        "qk_norm",
        "route_norm",
        "moe_router_use_sigmoid",
        "moe_router_enable_expert_bias",
    ):
        fields.require(name, True)
    bias = fields.take("attention_bias", bool)
    common, heads = fields.common(name), fields.heads()
    width = fields.take("moe_intermediate_size")
    return ModelConfig(
        **common,
        **heads,
        **read_rope(fields, heads["head_dim"]),
        expert_hidden=width,
        qkv_bias=bias,
        output_bias=bias,
        router=RouterConfig(
            score="sigmoid",
            correction=True,
            scaling=fields.take("router_scaling_factor", float),
        ),
        dense_layers=listed_plain_layers(fields, common["layers"]),
        dense_hidden=fields.take("intermediate_size"),
        shared_hidden=fields.take("num_shared_experts") * width,
    )


FAMILY = Family(
    architectures=("HYV3ForCausalLM",),
    config=config,
    dense=functools.partial(
        decoder_tensors, router="router.gate", shared="shared_mlp", correction="expert_bias"
    ),
    expert=functools.partial(per_expert, pattern=PATTERN, names=NAMES),
    fused=(functools.partial(fused_experts, pattern=PATTERN),),
    renamed=(
        (".mlp.router.gate.", ".mlp.gate."),
        (".mlp.expert_bias", ".mlp.e_score_correction_bias"),
        (".mlp.shared_mlp.", ".mlp.shared_experts."),
    ),
    defaults=DEFAULTS,
    without_effect=frozenset({"enable_moe_fp32_combine"}),  # sums of experts are float32 here
)
