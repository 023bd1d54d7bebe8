"""DeepSeek-V2 and V3 (arXiv 2405.04434, 2412.19437): latent attention, groups of experts, shared
experts, and first layers without experts.
"""

import dataclasses
import functools

from eep_jax.errors import CheckpointError
from eep_jax.model_config import LatentConfig, ModelConfig, RouterConfig
from eep_jax.models.families.config_json import Fields
from eep_jax.models.families.qwen3_moe import NAMES, PATTERN
from eep_jax.models.families.tensors import Family, decoder_tensors, per_expert


def config_v2(fields: Fields, name: str) -> ModelConfig:
    """Raises CheckpointError for a `topk_method` other than greedy and group_limited_greedy."""
    # Released models have false; DeepSeek's and other implementations differ on true.
    fields.require("norm_topk_prob", False)
    fields.require("scoring_func", "softmax")
    fields.require("topk_method", "greedy", "group_limited_greedy")
    grouped = fields.take("topk_method", str, "greedy") == "group_limited_greedy"
    router = RouterConfig(
        groups=fields.take("n_group") if grouped else 1,
        groups_kept=fields.take("topk_group") if grouped else 1,
        scaling=fields.take("routed_scaling_factor", float, 1.0),
    )
    return _config(fields, name, router, norm_topk_prob=False, interleaved=True)


def config_v3(fields: Fields, name: str) -> ModelConfig:
    """Raises CheckpointError for values that occur in no release of V3 or R1."""
    fields.require("scoring_func", "sigmoid")
    fields.require("topk_method", "noaux_tc")
    router = RouterConfig(
        score="sigmoid",
        correction=True,
        groups=fields.take("n_group", default=1),
        groups_kept=fields.take("topk_group", default=1),
        group_score="top2",
        scaling=fields.take("routed_scaling_factor", float, 1.0),
    )
    interleaved = fields.take("rope_interleave", bool, True)
    normed = fields.take("norm_topk_prob", bool, True)
    return _config(fields, name, router, norm_topk_prob=normed, interleaved=interleaved)


def _config(fields: Fields, name: str, router: RouterConfig, *, norm_topk_prob, interleaved):
    fields.require("attention_bias", False)
    fields.require("mlp_bias", False)
    fields.require("moe_layer_freq", 1)
    rotated = fields.take("qk_rope_head_dim")
    rope = fields.rope(rotated, interleaved=interleaved)
    if rope.rotated_channels:
        raise CheckpointError(f"{fields.path}: partial_rotary_factor must be 1 or absent")
    rope = dataclasses.replace(rope, score_factor=fields.yarn_score_factor())
    heads, width = fields.take("num_attention_heads"), fields.take("moe_intermediate_size")
    plain = fields.take("qk_nope_head_dim")
    return ModelConfig(
        **fields.common(name),
        query_heads=heads,
        kv_heads=heads,
        head_dim=plain + rotated,
        experts=fields.experts(),
        expert_hidden=width,
        norm_topk_prob=norm_topk_prob,
        rope=rope,
        qk_norm="none",
        latent=LatentConfig(
            kv_rank=fields.take("kv_lora_rank"),
            rope_channels=rotated,
            plain_channels=plain,
            value_channels=fields.take("v_head_dim"),
            q_rank=fields.take("q_lora_rank", default=0),
        ),
        router=router,
        dense_layers=fields.take("first_k_dense_replace", default=0),
        dense_hidden=fields.take("intermediate_size"),
        shared_hidden=fields.take("n_shared_experts", default=0) * width,
    )


_v2 = Family(
    architectures=("DeepseekV2ForCausalLM",),
    config=config_v2,
    dense=functools.partial(decoder_tensors, shared="shared_experts"),
    expert=functools.partial(per_expert, pattern=PATTERN, names=NAMES),
)
FAMILIES = (
    _v2,
    dataclasses.replace(_v2, architectures=("DeepseekV3ForCausalLM",), config=config_v3),
)
