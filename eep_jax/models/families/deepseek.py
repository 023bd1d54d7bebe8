"""DeepSeek-V2 and V3 (arXiv 2405.04434, 2412.19437), and GLM-4.7-Flash: latent attention, groups of
experts, shared experts, and first layers without experts.
"""

import dataclasses
import functools

from eep_jax.errors import CheckpointError
from eep_jax.model_config import LatentConfig, ModelConfig, RouterConfig
from eep_jax.models.families.config_json import Fields
from eep_jax.models.families.layers_json import counted_plain_layers, listed_plain_layers
from eep_jax.models.families.qwen3_moe import NAMES, PATTERN
from eep_jax.models.families.rope_json import read_rope
from eep_jax.models.families.sigmoid_router import grouped_router
from eep_jax.models.families.tensors import Family, decoder_tensors, fused_experts, per_expert

_DEFAULTS = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "v_head_dim": 128,
}
DEFAULTS_V2 = _DEFAULTS | {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "first_k_dense_replace": 0,
    "n_shared_experts": 2,
    "num_key_value_heads": None,
    "routed_scaling_factor": 1.0,
    "topk_method": "greedy",
}
DEFAULTS_V3 = _DEFAULTS | {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_key_value_heads": 128,
    "rope_interleave": True,
    "routed_scaling_factor": 2.5,
    "topk_group": 4,
}
DEFAULTS_GLM_LITE = DEFAULTS_V3 | {
    "n_group": 1,
    "num_key_value_heads": 20,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "rms_norm_eps": 1e-5,
    "routed_scaling_factor": 1.8,
    "topk_group": 1,
    "v_head_dim": 256,
}


def config_v2(fields: Fields, name: str) -> ModelConfig:
    """Raises CheckpointError for a `topk_method` other than greedy and group_limited_greedy."""
    # Released models have false; DeepSeek's and other implementations differ on true.
    fields.require("norm_topk_prob", False)
    fields.require("scoring_func", "softmax")
    fields.require("topk_method", "greedy", "group_limited_greedy")
    grouped = fields.take("topk_method", str) == "group_limited_greedy"
    fields.read.update(("n_group", "topk_group"))  # without effect where they are not taken
    router = RouterConfig(
        groups=fields.take("n_group") if grouped else 1,
        groups_kept=fields.take("topk_group") if grouped else 1,
        scaling=fields.take("routed_scaling_factor", float),
    )
    return _config(fields, name, router, norm_topk_prob=False, interleaved=True)


def config_v3(fields: Fields, name: str) -> ModelConfig:
    """Raises CheckpointError for values that occur in no release of V3 or R1."""
    interleaved = fields.take("rope_interleave", bool)
    normed = fields.take("norm_topk_prob", bool)
    router = grouped_router(fields)
    return _config(fields, name, router, norm_topk_prob=normed, interleaved=interleaved)


def config_glm_lite(fields: Fields, name: str) -> ModelConfig:
    """V3 with a list of which layers are plain."""
    layers = listed_plain_layers(fields, fields.take("num_hidden_layers"))
    fields.put("first_k_dense_replace", layers)
    return config_v3(fields, name)


def _config(fields: Fields, name: str, router: RouterConfig, *, norm_topk_prob, interleaved):
    fields.require("attention_bias", False)
    fields.require("mlp_bias", False)
    rotated, plain = fields.take("qk_rope_head_dim"), fields.take("qk_nope_head_dim")
    heads, width = fields.take("num_attention_heads"), fields.take("moe_intermediate_size")
    if (given := fields.take("num_key_value_heads", null=heads)) != heads:
        raise CheckpointError(
            f"{fields.path}: num_key_value_heads={given} must be num_attention_heads={heads}: in "
            "latent attention each head has its own key"
        )
    common = fields.common(name)
    return ModelConfig(
        **common,
        **read_rope(fields, rotated, interleaved=interleaved, latent=True),
        query_heads=heads,
        kv_heads=heads,
        head_dim=plain + rotated,
        expert_hidden=width,
        norm_topk_prob=norm_topk_prob,
        qk_norm="none",
        latent=LatentConfig(
            kv_rank=fields.take("kv_lora_rank"),
            rope_channels=rotated,
            plain_channels=plain,
            value_channels=fields.take("v_head_dim"),
            q_rank=fields.take("q_lora_rank", null=0),
        ),
        router=router,
        dense_layers=counted_plain_layers(fields, common["layers"]),
        dense_hidden=fields.take("intermediate_size"),
        shared_hidden=fields.take("n_shared_experts") * width,
    )


_v2 = Family(
    architectures=("DeepseekV2ForCausalLM",),
    config=config_v2,
    dense=functools.partial(decoder_tensors, shared="shared_experts"),
    expert=functools.partial(per_expert, pattern=PATTERN, names=NAMES),
    fused=(functools.partial(fused_experts, pattern=PATTERN),),
    defaults=DEFAULTS_V2,
    without_effect=frozenset({"head_dim", "qk_head_dim"}),  # from the parts of a head
)
FAMILIES = (
    _v2,
    dataclasses.replace(
        _v2, architectures=("DeepseekV3ForCausalLM",), config=config_v3, defaults=DEFAULTS_V3
    ),
    dataclasses.replace(
        _v2,
        architectures=("Glm4MoeLiteForCausalLM",),
        config=config_glm_lite,
        defaults=DEFAULTS_GLM_LITE,
    ),
)
