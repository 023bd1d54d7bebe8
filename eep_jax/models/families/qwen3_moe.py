"""Qwen3-MoE (arXiv 2505.09388): norms of each query and key head, softmax over all experts."""

import functools

from eep_jax.model_config import ModelConfig
from eep_jax.models.families.config_json import Fields
from eep_jax.models.families.layers_json import excepted_plain_layers
from eep_jax.models.families.rope_json import read_rope
from eep_jax.models.families.tensors import Family, decoder_tensors, fused_experts, per_expert

NAMES = ("gate_proj", "up_proj", "down_proj")
PATTERN = "model.layers.{layer}.mlp.experts.{expert}.{name}.weight"


DEFAULTS = {
    "attention_bias": False,
    "bos_token_id": None,
    "head_dim": None,
    "mlp_only_layers": None,
    "norm_topk_prob": False,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
# Without windows, which are refused, no field of them has an effect.
WITHOUT_EFFECT = frozenset({"max_window_layers", "sliding_window"})


def config(fields: Fields, name: str, ignored: tuple[str, ...] = ()) -> ModelConfig:
    """Raises CheckpointError for sliding windows, and for plain layers behind others.

    `ignored` are keys of RoPE without effect, see `read_rope`.
    """
    fields.require("use_sliding_window", False)
    bias = fields.take("attention_bias", bool)
    common, heads = fields.common(name), fields.heads()
    return ModelConfig(
        **common,
        **heads,
        **read_rope(fields, heads["head_dim"], ignored=ignored),
        **excepted_plain_layers(fields, common["layers"]),
        expert_hidden=fields.take("moe_intermediate_size"),
        norm_topk_prob=fields.take("norm_topk_prob", bool),
        qkv_bias=bias,
        output_bias=bias,
    )


FAMILY = Family(
    architectures=("Qwen3MoeForCausalLM",),
    config=config,
    dense=decoder_tensors,
    expert=functools.partial(per_expert, pattern=PATTERN, names=NAMES),
    fused=(functools.partial(fused_experts, pattern=PATTERN),),
    defaults=DEFAULTS,
    without_effect=WITHOUT_EFFECT,
)
