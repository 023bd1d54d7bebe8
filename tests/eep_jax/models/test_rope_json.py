"""Promise: RoPE of config.json is what transformers makes of it, or it is refused."""

import numpy as np
import pytest

from eep_jax.config import ClusterConfig, EngineConfig, RunConfig
from eep_jax.errors import CheckpointError
from eep_jax.models.families.config_json import Fields
from eep_jax.models.families.rope_json import read_rope
from eep_jax.models.rope import frequencies
from tests.eep_jax.models.test_config_fields import DEFAULTS, TRANSFORMERS, read, whole
from tests.support.models import a_model

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def rope(values: dict, channels: int = 24, **options) -> dict:
    return read_rope(Fields(values, "config.json"), channels, **options)


@pytest.mark.parametrize("case", TRANSFORMERS["ropes"], ids=lambda case: str(case["amplitude"]))
def test_frequencies_are_those_of_transformers(case):
    found = rope(case, case["head_dim"], partial=True)
    config = found["rope"]
    channels = config.rotated_channels or case["head_dim"]
    ours = np.asarray(frequencies(channels, found["rope_theta"], config))
    np.testing.assert_allclose(ours, case["frequencies"], rtol=2e-6)
    assert config.amplitude == pytest.approx(case["amplitude"])


@pytest.mark.parametrize("architecture", sorted(DEFAULTS))
def test_two_forms_that_differ_are_refused_with_both(architecture):
    """As a file that transformers 5 saved, edited as model cards say for long contexts."""
    values = whole(architecture)
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    with pytest.raises(CheckpointError, match=r"rope_parameters=.*1000000.* and rope_scaling=.*ya"):
        read(values | {"rope_scaling": YARN})
    assert read(values | {"rope_scaling": None}) == read(values)
    assert read(values | {"rope_scaling": {}}) == read(values)


def test_two_forms_that_say_the_same_are_read():
    older = {"rope_scaling": {"type": "yarn"} | {k: v for k, v in YARN.items() if "type" not in k}}
    alone = rope(older | {"rope_theta": 7.0})
    assert alone["rope"].kind == "yarn" and alone["rope_theta"] == 7
    assert rope(older | {"rope_parameters": YARN | {"rope_theta": 7.0}}) == alone
    assert rope(older | {"rope_parameters": YARN, "rope_theta": 7.0}) == alone


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rope_parameters": {"rope_theta": 7.0}, "rope_theta": 8.0}, "rope_theta=7.0 and rope_th"),
        ({"rope_scaling": {"type": "default", "rope_type": "yarn"}}, "rope_type='yarn' and type="),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 64},
            "original_max_position_embeddings=32 and original_max_position_embeddings=64",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 5.0}, "sliding_attention": {}}},
            r"an object for each of \['full_attention', 'sliding_attention'\]",
        ),
        ({"rope_parameters": {"rope_thetta": 5.0}}, r"holds {'rope_thetta': 5.0}, which rope_type"),
        ({"rope_parameters": {"factor": 4.0}}, "which rope_type='default' does not use"),
        ({"rope_parameters": {"mscale_all_dim": 1.0}}, "which rope_type='default' does not use"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 3}}, "beta_fast"),
        ({"rope_scaling": {"type": "linear"}}, "has no factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, "has no max_position_embeddings"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_type='longrope' is not supported"),
        ({"rope_scaling": {"type": "yarn"}, "max_position_embeddings": 9}, "has no factor"),
        ({"rope_scaling": YARN | {"factor": "4"}}, "factor='4' is not of type float"),
        ({"rope_scaling": [4.0]}, r"rope_scaling=\[4.0\] must be an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported here"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    ],
)
def test_what_is_refused_is_named(values, said):
    with pytest.raises(CheckpointError, match=said):
        rope(values)


@pytest.mark.parametrize("part", [0.0, 1.5, -0.5])
def test_a_part_that_no_head_has_is_refused(part):
    with pytest.raises(CheckpointError, match=f"partial_rotary_factor={part} rotates"):
        rope({"partial_rotary_factor": part}, partial=True)


def test_a_part_of_each_head_rotates_where_the_family_can():
    assert rope({"partial_rotary_factor": 0.5}, partial=True)["rope"].rotated_channels == 12
    assert rope({"partial_rotary_factor": 1.0}, partial=True)["rope"].rotated_channels == 0


def test_scores_of_latent_attention_are_scaled_with_yarn_alone():
    values = {"rope_scaling": YARN | {"mscale_all_dim": 1.0}}
    assert rope(values, latent=True)["rope"].score_factor == pytest.approx(1.2964, rel=1e-4)
    assert rope(values)["rope"].score_factor == 1


def test_dynamic_rope_serves_contexts_that_it_does_not_stretch():
    values = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 64}
    model = a_model(**rope(values, 8))
    cluster = ClusterConfig(ranks=1, slots_per_rank=model.experts)
    run = lambda tokens: RunConfig(
        name="any", model=model, cluster=cluster, engine=EngineConfig(context_tokens=tokens)
    )
    assert run(64).model.rope.kind == "dynamic"
    with pytest.raises(ValueError, match=r"set engine.context_tokens <= 64"):
        run(65)
