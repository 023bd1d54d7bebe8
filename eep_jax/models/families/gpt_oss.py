"""gpt-oss (arXiv 2508.10925): experts fused in one tensor per layer, biases everywhere, sinks, and
a clamped activation. Layers alternate between a sliding window and full attention.
"""

import functools
from collections.abc import Iterator

from eep_jax.errors import CheckpointError
from eep_jax.model_config import ModelConfig, RouterConfig
from eep_jax.models.families.config_json import Fields
from eep_jax.models.families.tensors import (
    DOWN,
    GATE,
    UP,
    ExpertPart,
    Family,
    Stored,
    decoder_tensors,
)

WINDOW, WHOLE = "sliding_attention", "full_attention"


def config(fields: Fields, name: str) -> ModelConfig:
    """Raises CheckpointError if `layer_types` has unknown names or another length."""
    common, heads = fields.common(name), fields.heads()
    bias = fields.take("attention_bias", bool, True)
    return ModelConfig(
        **common,
        **heads,
        experts=fields.experts(),
        expert_hidden=fields.take("intermediate_size"),
        rope=fields.rope(heads["head_dim"]),
        qk_norm="none",
        qkv_bias=bias,
        output_bias=bias,
        windows=_windows(fields, common["layers"]),
        sinks=True,
        router=RouterConfig(score="softmax_of_chosen", bias=True),
        activation="clamped_swiglu",
        activation_limit=fields.take("swiglu_limit", float, 7.0),
        activation_slope=fields.take("swiglu_alpha", float, 1.702),
        expert_biases=True,
    )


def _windows(fields: Fields, layers: int) -> tuple[int, ...]:
    kinds = fields.take("layer_types", list, [(WINDOW, WHOLE)[i % 2] for i in range(layers)])
    if len(kinds) != layers or set(kinds) - {WINDOW, WHOLE}:
        raise CheckpointError(
            f"{fields.path}: layer_types={kinds} must list {WINDOW!r} or {WHOLE!r} for each of "
            f"{layers} layers"
        )
    window = fields.take("sliding_window", default=0)
    return tuple(window if kind == WINDOW else 0 for kind in kinds)


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
)
