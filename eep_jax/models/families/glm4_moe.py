"""GLM-4.5 to 4.7 (arXiv 2508.06471): half of each head rotates, norms of heads are optional, and
routers, shared experts and plain first layers are DeepSeek-V3's. Of GLM-4.5V it is the text part.
"""

import dataclasses
import functools

from eep_jax.model_config import ModelConfig
from eep_jax.models.families.config_json import Fields
from eep_jax.models.families.layers_json import counted_plain_layers
from eep_jax.models.families.qwen3_moe import NAMES, PATTERN
from eep_jax.models.families.rope_json import read_rope
from eep_jax.models.families.sigmoid_router import grouped_router
from eep_jax.models.families.tensors import Family, decoder_tensors, fused_experts, per_expert

DEFAULTS = {
    "attention_bias": False,
    "bos_token_id": None,
    "first_k_dense_replace": 1,
    "head_dim": None,
    "n_group": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_key_value_heads": 8,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "use_qk_norm": False,
}
DEFAULTS_V = DEFAULTS | {"attention_bias": True}


def config_v(fields: Fields, name: str) -> ModelConfig:
    """A text's positions are equal on all axes of the multimodal RoPE."""
    fields.require("use_qk_norm", False)
    return config(fields, name, ignored=("mrope_section",))


def config(fields: Fields, name: str, ignored: tuple[str, ...] = ()) -> ModelConfig:
    """Biases are those of q, k and v alone; `ignored` are keys of RoPE, see `read_rope`."""
    common, heads = fields.common(name), fields.heads()
    width = fields.take("moe_intermediate_size")
    return ModelConfig(
        **common,
        **heads,
        **read_rope(fields, heads["head_dim"], partial=True, ignored=ignored),
        expert_hidden=width,
        norm_topk_prob=fields.take("norm_topk_prob", bool),
        qk_norm="head" if fields.take("use_qk_norm", bool) else "none",
        qkv_bias=fields.take("attention_bias", bool),
        router=grouped_router(fields),
        dense_layers=counted_plain_layers(fields, common["layers"]),
        dense_hidden=fields.take("intermediate_size"),
        shared_hidden=fields.take("n_shared_experts") * width,
    )


_glm = Family(
    architectures=("Glm4MoeForCausalLM",),
    config=config,
    dense=functools.partial(decoder_tensors, shared="shared_experts"),
    expert=functools.partial(per_expert, pattern=PATTERN, names=NAMES),
    fused=(functools.partial(fused_experts, pattern=PATTERN),),
    defaults=DEFAULTS,
)
FAMILIES = (
    _glm,
    dataclasses.replace(
        _glm,
        architectures=("Glm4vMoeForConditionalGeneration",),
        config=config_v,
        defaults=DEFAULTS_V,
    ),
)
