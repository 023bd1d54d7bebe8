"""Mixtral (arXiv 2401.04088): softmax over the chosen experts."""

import functools

from eep_jax.model_config import ModelConfig, RouterConfig
from eep_jax.models.families.config_json import Fields
from eep_jax.models.families.rope_json import read_rope
from eep_jax.models.families.tensors import Family, decoder_tensors, fused_experts, per_expert

NAMES = ("w1", "w3", "w2")
PATTERN = "model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight"
DEFAULTS = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": None,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
}


def config(fields: Fields, name: str) -> ModelConfig:
    """All layers share one sliding window, if there is one."""
    heads = fields.heads()
    common = fields.common(name)
    window = fields.window()
    return ModelConfig(
        **common,
        **heads,
        **read_rope(fields, heads["head_dim"]),
        expert_hidden=fields.take("intermediate_size"),
        qk_norm="none",
        windows=(window,) * common["layers"] if window else (),
        router=RouterConfig(score="softmax_of_chosen"),
    )


FAMILY = Family(
    architectures=("MixtralForCausalLM",),
    config=config,
    dense=functools.partial(decoder_tensors, block="block_sparse_moe"),
    expert=functools.partial(per_expert, pattern=PATTERN, names=NAMES),
    fused=(functools.partial(fused_experts, pattern=PATTERN),),
    renamed=((".block_sparse_moe.", ".mlp."),),
    defaults=DEFAULTS,
)
