"""Promises of configurations: one that is inconsistent cannot be made, and says both numbers."""

import dataclasses
import subprocess
import sys

import jax
import pytest
from flax import nnx

from configs import tiny_cpu
from eep_jax.config import ClusterConfig, EngineConfig, RunConfig
from eep_jax.models.decoder import DenseModel
from tests.support.models import a_model, a_run


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden": 0}, "ModelConfig.hidden=0 must be positive"),
        ({"query_heads": 3, "kv_heads": 2}, "query_heads=3 must be a multiple of self.kv_heads=2"),
        ({"experts": 1}, "experts_per_token=2 must be between 1 and self.experts=1"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
    ],
)
def test_a_model_of_sizes_that_contradict_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        a_model(**changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ranks": 0}, "ClusterConfig.ranks=0 must be positive"),
        ({"policy": "hope"}, "policy='hope' must be one of"),
        ({"redundancy": 3}, "redundancy=3 replicas need as many ranks, there are self.ranks=2"),
        ({"lease_ms": 599}, "lease_ms=599 must be at least 3 x self.heartbeat_ms=200"),
    ],
)
def test_a_cluster_that_cannot_work_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        ClusterConfig(**{"ranks": 2, "slots_per_rank": 4} | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"context_tokens": 0}, "EngineConfig.context_tokens=0 must be positive"),
        ({"combine": "sum"}, "combine='sum' must be one of"),
        ({"batch_slots": 12}, "batch_slots=12 must be a multiple of self.row_tile=8"),
        ({"prefill_tokens": 20}, "prefill_tokens=20 must be a multiple of self.row_tile=8"),
    ],
)
def test_an_engine_of_shapes_that_do_not_tile_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        EngineConfig(**changes)


def test_a_run_without_room_for_its_experts_says_what_to_raise():
    with pytest.raises(ValueError, match=r"2 ranks x 3 slots = 6 .* need 8; raise slots_per_rank"):
        RunConfig(name="r", model=a_model(), cluster=ClusterConfig(ranks=2, slots_per_rank=3))


def test_the_widest_step_has_all_decode_and_all_prefill_rows():
    assert EngineConfig(batch_slots=16, prefill_tokens=24).tokens_max == 40


def test_configurations_are_values():
    assert a_run() == a_run() and hash(a_run()) == hash(a_run())
    with pytest.raises(dataclasses.FrozenInstanceError):
        a_run().name = "other"


def test_the_number_of_parameters_is_that_of_the_model():
    for model in (a_model(), tiny_cpu.get_config().model):
        abstract = nnx.eval_shape(lambda model=model: DenseModel(model, rngs=nnx.Rngs(0)))
        sizes = [leaf.size for leaf in jax.tree.leaves(nnx.state(abstract, nnx.Param))]
        assert model.parameters == sum(sizes)


def test_configurations_load_without_jax():
    check = "import sys, configs.tiny_cpu as c; c.get_config(); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=30).returncode == 0
