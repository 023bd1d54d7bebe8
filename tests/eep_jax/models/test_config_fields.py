"""Promise: every field of config.json is used, refused, or known to change no logit.

The fields and their defaults are those of transformers' configuration classes.
"""

import copy
import json
import logging
import re

import pytest

from eep_jax.errors import CheckpointError
from eep_jax.models.families.config_json import WITHOUT_EFFECT, Fields
from eep_jax.models.families.registry import FAMILIES, model_from_config_json
from tests.eep_jax.models.make_parity import FACTS
from tests.support.parity import ROOT

TRANSFORMERS = json.loads((ROOT / FACTS).read_text())
DEFAULTS: dict[str, dict] = TRANSFORMERS["defaults"]
# What a file must have beside the defaults for every field to matter.
DENSE_FIRST = {"mlp_only_layers": [0]}
CHANGES = {
    "Qwen3MoeForCausalLM": DENSE_FIRST,
    "Qwen2MoeForCausalLM": DENSE_FIRST,
    "Qwen3VLMoeForConditionalGeneration": DENSE_FIRST,
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 6, "topk_method": "group_limited_greedy"}
    | {"n_group": 8, "topk_group": 3, "first_k_dense_replace": 1},
    "Glm4MoeForCausalLM": {"head_dim": 128},
    "Glm4vMoeForConditionalGeneration": {"head_dim": 128},
    "Dots1ForCausalLM": {"n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 2}
    | {"max_window_layers": 40, "layer_types": None},
}


def read(values: dict):
    return model_from_config_json(copy.deepcopy(values), "any")


def whole(architecture: str) -> dict:
    return DEFAULTS[architecture] | CHANGES.get(architecture, {})


def changed(value):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 if value else 1
    if isinstance(value, str):
        return f"other {value}"
    if isinstance(value, list):
        return value[:-1] if value else [1]
    return {"rope_type": "linear", "factor": 2.0} if isinstance(value, dict) else 3


def outcome(values: dict):
    try:
        return read(values)
    except CheckpointError as error:
        return str(error)


@pytest.mark.parametrize("architecture", sorted(DEFAULTS))
def test_every_field_is_used_refused_or_listed_as_without_effect(architecture):
    values = whole(architecture)
    before, ignored = read(values), []
    for field in values:
        after = outcome(values | {field: changed(values[field])})
        if after == before:
            ignored.append(field)
        elif isinstance(after, str) and "inconsistent" not in after:
            assert field in after, "the refusal names the field"
    listed = WITHOUT_EFFECT | FAMILIES[architecture].without_effect
    assert set(ignored) <= listed
    assert not (listed & set(values)) - set(ignored), "listed, but with an effect"


@pytest.mark.parametrize("architecture", sorted(DEFAULTS))
def test_an_absent_field_has_the_familys_default_or_is_required(architecture):
    values = whole(architecture)
    for field in DEFAULTS[architecture]:
        without = {name: value for name, value in values.items() if name != field}
        if field in CHANGES.get(architecture, {}) or field == "architectures":
            continue
        after = outcome(without)
        assert after == read(values) or f"has no {field}" in after or "has no num_exp" in after, (
            field
        )


@pytest.mark.parametrize("architecture", sorted(DEFAULTS))
def test_the_defaults_alone_are_the_familys(architecture):
    """Sizes are required; of the rest nothing is."""
    values = whole(architecture)
    sizes = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"}
    sizes |= {"intermediate_size", "moe_intermediate_size", "num_experts", "num_local_experts"}
    sizes |= {"n_routed_experts", "num_experts_per_tok", "moe_num_experts", "moe_k"}
    sizes.add("architectures")
    kept = sizes | set(CHANGES.get(architecture, {}))
    assert read({name: v for name, v in values.items() if name in kept}) == read(values)


def test_a_null_where_it_has_no_meaning_is_refused():
    values = whole("MixtralForCausalLM")
    assert read(values | {"sliding_window": None}) == read(values)
    for field in ("rms_norm_eps", "hidden_size", "hidden_act"):
        with pytest.raises(CheckpointError, match=f"{field}=None"):
            read(values | {field: None})


def test_null_and_absent_are_not_the_same():
    gpt_oss = whole("GptOssForCausalLM")
    gpt_oss["hidden_size"] = 64 * 48
    assert (read(gpt_oss).head_dim, read(gpt_oss | {"head_dim": None}).head_dim) == (64, 48)
    deepseek = whole("DeepseekV3ForCausalLM")
    assert read(deepseek | {"q_lora_rank": None}).latent.q_rank == 0
    del deepseek["q_lora_rank"]
    assert read(deepseek).latent.q_rank == 1536


def test_weights_of_qwen3_vl_are_normed_where_the_file_does_not_say():
    values = whole("Qwen3VLMoeForConditionalGeneration")
    assert read(values).norm_topk_prob
    with pytest.raises(CheckpointError, match="norm_topk_prob=False is not supported"):
        read(values | {"norm_topk_prob": False})


def test_two_names_of_one_field_must_agree():
    values = whole("MixtralForCausalLM")
    assert read(values | {"num_experts": 8}) == read(values)
    assert read(values | {"num_experts": None}) == read(values)
    with pytest.raises(CheckpointError, match="num_experts=9 and num_local_experts=8"):
        read(values | {"num_experts": 9})


def test_a_window_of_no_positions_is_refused():
    for window in (0, -4):
        with pytest.raises(CheckpointError, match=f"sliding_window={window} must be positive"):
            read(whole("MixtralForCausalLM") | {"sliding_window": window})
    with pytest.raises(CheckpointError, match="sliding_window=None"):
        read(whole("GptOssForCausalLM") | {"sliding_window": None})


def test_plain_layers_must_be_the_first():
    values = whole("Qwen3MoeForCausalLM")
    assert read(values | {"mlp_only_layers": [1, 0]}).dense_layers == 2
    with pytest.raises(CheckpointError, match=r"leaves layers \[0, 2\] without experts"):
        read(values | {"mlp_only_layers": [0, 2]})


def test_a_count_and_a_list_of_plain_layers_must_agree():
    values = whole("Glm4MoeForCausalLM") | {"num_hidden_layers": 3}
    kinds = ["dense", "sparse", "sparse"]
    assert read(values | {"mlp_layer_types": kinds}) == read(values)
    with pytest.raises(CheckpointError, match="first_k_dense_replace=2 and mlp_layer_types="):
        read(values | {"mlp_layer_types": kinds, "first_k_dense_replace": 2})
    listed = whole("HYV3ForCausalLM") | {"num_hidden_layers": 3, "mlp_layer_types": kinds}
    assert read(listed | {"first_k_dense_replace": 1}) == read(listed)
    with pytest.raises(CheckpointError, match="first_k_dense_replace=2 is not supported"):
        read(listed | {"first_k_dense_replace": 2})
    with pytest.raises(CheckpointError, match=r"leaves layers \[1\] without experts"):
        read(listed | {"mlp_layer_types": ["sparse", "dense", "sparse"]})
    with pytest.raises(CheckpointError, match="moe_layer_freq=2 is not supported"):
        read(values | {"moe_layer_freq": 2})


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("rms_norm_eps", float("nan"), "rms_norm_eps=nan must be finite"),
        ("rms_norm_eps", -1e-6, "norm_eps=-1e-06 be at least 0"),
        ("rope_theta", float("inf"), "rope_theta=inf must be finite"),
        ("rope_theta", 1.0, "rope_theta=1.0 must exceed 1"),
        ("shared_expert_intermediate_size", -3, "shared_hidden=-3 must be at least 0"),
    ],
)
def test_a_number_that_no_model_has_is_named(field, value, said):
    values = whole("Qwen2MoeForCausalLM") | {"rope_parameters": None, field: value}
    with pytest.raises(CheckpointError, match=re.escape(said)):
        read(values)


def test_fields_that_nobody_knows_are_named_in_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        read(whole("OlmoeForCausalLM"))
        assert not caplog.records
        read(whole("OlmoeForCausalLM") | {"logit_scale": 2.0})
    assert "'logit_scale'" in caplog.text


def test_a_field_of_another_type_is_named():
    fields = Fields({"a": True, "b": "1"}, "config.json", {"c": 2})
    for name in "ab":
        with pytest.raises(CheckpointError, match=f"{name}=.* is not of type int"):
            fields.take(name)
    assert fields.take("c") == 2
