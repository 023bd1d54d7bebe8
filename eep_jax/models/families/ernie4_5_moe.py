"""ERNIE 4.5: neighbouring channels rotate in pairs, and the router has softmax scores with a
correction.
"""

import dataclasses
import functools

from eep_jax.errors import CheckpointError
from eep_jax.model_config import ModelConfig, RouterConfig
from eep_jax.models.families.config_json import Fields
from eep_jax.models.families.qwen3_moe import NAMES, PATTERN
from eep_jax.models.families.rope_json import read_rope
from eep_jax.models.families.tensors import (
    Family,
    Stored,
    decoder_tensors,
    fused_experts,
    per_expert,
)

DEFAULTS = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": None,
    "moe_layer_end_index": -1,
    "moe_layer_start_index": 1,
    "moe_norm_min": 1e-12,
    "moe_num_shared_experts": 2,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": True,
}


def config(fields: Fields, name: str) -> ModelConfig:
    """Raises CheckpointError for biases, and for layers without experts behind others."""
    fields.require("use_bias", False)
    common, heads = fields.common(name), fields.heads()
    width = fields.take("moe_intermediate_size")
    return ModelConfig(
        **common,
        **heads,
        **read_rope(fields, heads["head_dim"], interleaved=True),
        expert_hidden=width,
        qk_norm="none",
        router=RouterConfig(correction=True, sum_min=fields.take("moe_norm_min", float)),
        dense_layers=_plain_layers(fields, common["layers"]),
        dense_hidden=fields.take("intermediate_size"),
        shared_hidden=fields.take("moe_num_shared_experts") * width,
    )


def _plain_layers(fields: Fields, layers: int) -> int:
    fields.require("moe_layer_interval", 1)
    last = fields.take("moe_layer_end_index")
    if last not in (-1, layers - 1):
        raise CheckpointError(
            f"{fields.path}: moe_layer_end_index={last} must be -1 or the last layer of "
            f"num_hidden_layers={layers}"
        )
    return fields.take("moe_layer_start_index")


def _tensors(model: ModelConfig) -> dict[str, Stored]:
    """The correction has an axis for groups of experts, of which there is one."""
    found = decoder_tensors(
        model, shared="shared_experts", correction="moe_statics.e_score_correction_bias"
    )
    for name, stored in found.items():
        if name.endswith("router_correction"):
            shape = (1, *stored.shape)
            found[name] = dataclasses.replace(stored, shape=shape, form=lambda array: array[0])
    return found


FAMILY = Family(
    architectures=("Ernie4_5_MoeForCausalLM",),
    config=config,
    dense=_tensors,
    expert=functools.partial(per_expert, pattern=PATTERN, names=NAMES),
    fused=(functools.partial(fused_experts, pattern=PATTERN),),
    renamed=((".mlp.moe_statics.", ".mlp.gate.moe_statics."),),
    defaults=DEFAULTS,
)
