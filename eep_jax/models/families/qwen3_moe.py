"""Qwen3-MoE (arXiv 2505.09388): norms of each query and key head, softmax over all experts."""

import functools

from eep_jax.errors import CheckpointError
from eep_jax.model_config import ModelConfig
from eep_jax.models.families.config_json import Fields
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
        **plain_layers(fields, common["layers"]),
        expert_hidden=fields.take("moe_intermediate_size"),
        norm_topk_prob=fields.take("norm_topk_prob", bool),
        qkv_bias=bias,
        output_bias=bias,
    )


def plain_layers(fields: Fields, layers: int) -> dict:
    """The ModelConfig fields of the first layers, where they have an MLP instead of experts."""
    fields.require("decoder_sparse_step", 1)
    fields.read.add("intermediate_size")  # without effect if there are none
    listed = fields.take("mlp_only_layers", list, null=[])
    if not all(isinstance(layer, int) for layer in listed):
        raise CheckpointError(f"{fields.path}: mlp_only_layers={listed} must be numbers of layers")
    count = fields.first_layers("mlp_only_layers", [layer in listed for layer in range(layers)])
    width = fields.take("intermediate_size") if count else 0
    return {"dense_layers": count, "dense_hidden": width}


FAMILY = Family(
    architectures=("Qwen3MoeForCausalLM",),
    config=config,
    dense=decoder_tensors,
    expert=functools.partial(per_expert, pattern=PATTERN, names=NAMES),
    fused=(functools.partial(fused_experts, pattern=PATTERN),),
    defaults=DEFAULTS,
    without_effect=WITHOUT_EFFECT,
)
