"""Mixtral (arXiv 2401.04088): softmax over the chosen experts."""

import functools

from eep_jax.model_config import ModelConfig, RouterConfig
from eep_jax.models.families.config_json import Fields
from eep_jax.models.families.tensors import Family, decoder_tensors, per_expert


def config(fields: Fields, name: str) -> ModelConfig:
    """All layers share one sliding window, if there is one."""
    heads = fields.heads()
    common = fields.common(name)
    window = fields.take("sliding_window", default=0)
    return ModelConfig(
        **common,
        **heads,
        experts=fields.experts(),
        expert_hidden=fields.take("intermediate_size"),
        rope=fields.rope(heads["head_dim"]),
        qk_norm="none",
        windows=(window,) * common["layers"] if window else (),
        router=RouterConfig(score="softmax_of_chosen"),
    )


FAMILY = Family(
    architectures=("MixtralForCausalLM",),
    config=config,
    dense=functools.partial(decoder_tensors, block="block_sparse_moe"),
    expert=functools.partial(
        per_expert,
        pattern="model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight",
        names=("w1", "w3", "w2"),
    ),
)
