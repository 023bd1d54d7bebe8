"""MiniMax-M2: norms over all query and key channels, a part of each head rotates, and the router
has sigmoid scores with a correction. Keys are Mixtral's.
"""

import functools

from eep_jax.errors import CheckpointError
from eep_jax.model_config import ModelConfig, RouterConfig
from eep_jax.models.families.config_json import Fields
from eep_jax.models.families.mixtral import NAMES, PATTERN
from eep_jax.models.families.rope_json import read_rope
from eep_jax.models.families.tensors import Family, decoder_tensors, fused_experts, per_expert

DEFAULTS = {
    "bos_token_id": 200034,
    "eos_token_id": 200020,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5_000_000.0,
    "tie_word_embeddings": False,
}
# The release's own fields, for code that came with it.
WITHOUT_EFFECT = frozenset(
    {
        "layernorm_full_attention_alpha",
        "layernorm_full_attention_beta",
        "layernorm_linear_attention_alpha",
        "layernorm_linear_attention_beta",
        "layernorm_mlp_alpha",
        "layernorm_mlp_beta",
        "max_model_len",
        "mlp_intermediate_size",
        "mtp_transformer_layers",
        "num_mtp_modules",
        "rotary_dim",  # read as a part of the head
        "shared_moe_mode",
        "use_mtp",
    }
)


def config(fields: Fields, name: str) -> ModelConfig:
    """Raises CheckpointError for windows, linear attention and shared experts, which M2 lacks."""
    fields.require("scoring_func", "sigmoid")
    fields.require("use_qk_norm", True)
    fields.require("qk_norm_type", "per_layer")
    fields.require("use_routing_bias", True)
    fields.require("shared_intermediate_size", 0)
    fields.require("sliding_window", None)
    common, heads = fields.common(name), fields.heads()
    fields.require("attn_type_list", None, [1] * common["layers"])
    _read_rotary_dim(fields, heads["head_dim"])
    return ModelConfig(
        **common,
        **heads,
        **read_rope(fields, heads["head_dim"], partial=True),
        expert_hidden=fields.take("intermediate_size"),
        qk_norm="full",
        router=RouterConfig(score="sigmoid", correction=True),
    )


def _read_rotary_dim(fields: Fields, head_dim: int) -> None:
    """`rotary_dim` is the older form of `partial_rotary_factor`."""
    if fields.values.get("rotary_dim") is None:
        return
    part = fields.take("rotary_dim") / head_dim
    given = fields.values.get("partial_rotary_factor")
    if given is not None and given != part:
        raise CheckpointError(
            f"{fields.path}: rotary_dim={fields.values['rotary_dim']} of {head_dim=} and "
            f"partial_rotary_factor={given} differ; keep one"
        )
    fields.put("partial_rotary_factor", part)


FAMILY = Family(
    architectures=("MiniMaxM2ForCausalLM",),
    config=config,
    dense=functools.partial(
        decoder_tensors, block="block_sparse_moe", correction="e_score_correction_bias"
    ),
    expert=functools.partial(per_expert, pattern=PATTERN, names=NAMES),
    fused=(functools.partial(fused_experts, pattern=PATTERN),),
    renamed=((".block_sparse_moe.", ".mlp."),),
    defaults=DEFAULTS,
    without_effect=WITHOUT_EFFECT,
)
