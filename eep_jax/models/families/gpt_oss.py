"""gpt-oss (arXiv 2508.10925): experts fused in one tensor per layer, biases everywhere, sinks, and
a clamped activation. Layers alternate between a sliding window and full attention.
"""

import functools
from collections.abc import Iterator

from eep_jax.model_config import ModelConfig, RouterConfig
from eep_jax.models.families.config_json import Fields
from eep_jax.models.families.layers_json import windows
from eep_jax.models.families.rope_json import read_rope
from eep_jax.models.families.tensors import (
    DOWN,
    GATE,
    UP,
    ExpertPart,
    Family,
    Stored,
    decoder_tensors,
)

DEFAULTS = {
    "attention_bias": True,
    "bos_token_id": None,
    "head_dim": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "rope_theta": 150_000.0,
    "sliding_window": 128,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
}


def config(fields: Fields, name: str) -> ModelConfig:
    """Raises CheckpointError if `layer_types` has unknown names or another length."""
    common, heads = fields.common(name), fields.heads()
    bias = fields.take("attention_bias", bool)
    return ModelConfig(
        **common,
        **heads,
        **read_rope(fields, heads["head_dim"]),
        expert_hidden=fields.take("intermediate_size"),
        qk_norm="none",
        qkv_bias=bias,
        output_bias=bias,
        windows=windows(fields, common["layers"], lambda layer: layer % 2 == 0),
        sinks=True,
        router=RouterConfig(score="softmax_of_chosen", bias=True),
        activation="clamped_swiglu",
        activation_limit=fields.take("swiglu_limit", float),
        activation_slope=fields.take("swiglu_alpha", float),
        expert_biases=True,
    )


def expert_tensors(model: ModelConfig, expert: int) -> Iterator[ExpertPart]:
    """The parts of an expert; `gate_up_proj` interleaves the channels of gate and up."""
    experts, wide, narrow = model.experts, model.expert_hidden, model.hidden
    for layer in range(model.moe_layers):
        prefix = f"model.layers.{layer + model.dense_layers}.mlp.experts"
        both, down = f"{prefix}.gate_up_proj", f"{prefix}.down_proj"
        for matrix, form in ((GATE, _gate), (UP, _up)):
            stored = Stored(both, (experts, narrow, 2 * wide), form, expert)
            yield ExpertPart(layer, matrix, stored)
            bias = Stored(f"{both}_bias", (experts, 2 * wide), form, expert)
            yield ExpertPart(layer, matrix, bias, bias=True)
        yield ExpertPart(layer, DOWN, Stored(down, (experts, wide, narrow), index=expert))
        bias = Stored(f"{down}_bias", (experts, narrow), index=expert)
        yield ExpertPart(layer, DOWN, bias, bias=True)


def _gate(array):
    return array[..., 0::2].T


def _up(array):
    return array[..., 1::2].T


FAMILY = Family(
    architectures=("GptOssForCausalLM",),
    config=config,
    dense=functools.partial(decoder_tensors, router="router"),
    expert=expert_tensors,
    defaults=DEFAULTS,
    without_effect=frozenset({"initial_context_length"}),  # said in rope_parameters as well
)
