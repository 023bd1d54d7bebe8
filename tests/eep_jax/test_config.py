"""Promises of configurations: one that is inconsistent cannot be made, and says both numbers."""

import dataclasses
import importlib
import pkgutil
import re
import subprocess
import sys

import jax
import pytest
from flax import nnx

import configs
from configs import tiny_cpu
from eep_jax.config import ClusterConfig, DeviceConfig, EngineConfig, RunConfig
from eep_jax.engine.step import attends_by_items
from eep_jax.models.decoder import DenseModel
from eep_jax.models.families.published import PUBLISHED
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
        ({"backup_bytes": -1}, "backup_bytes=-1 must not be negative"),
        ({"fetch_deadline_ms": 0}, "fetch_deadline_ms=0 must be positive"),
        ({"sources": ()}, r"sources=\(\) must name some of"),
        ({"sources": ("peer", "moon")}, "'moon'.* must name some of"),
        ({"source_order": "luck"}, "source_order='luck' must be one of"),
        ({"lease_ms": 599}, "lease_ms=599 must be at least 3 x self.heartbeat_ms=200"),
        (
            {"lease_ms": 1_000, "accused_lease_ms": 1_001},
            "accused_lease_ms=1001 must be in",
        ),
        ({"accused_lease_ms": 0}, "accused_lease_ms=0 must be in 1"),
        ({"joining_lease_ms": 2_999}, "joining_lease_ms=2999 must be at least self.lease_ms=3000"),
        ({"channel_grace_ms": 0}, "channel_grace_ms=0 must be positive"),
        ({"stall_ms": -1}, "stall_ms=-1 must be positive"),
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
        ({"batch_rows": 12}, "batch_rows=12 must be a multiple of self.row_tile=8"),
        ({"prefill_tokens": 20}, "prefill_tokens=20 must be a multiple of self.row_tile=8"),
        ({"step_rows": (8, 12)}, "step_rows=(8, 12) must be at most 11 numbers below"),
        ({"step_rows": (16, 8)}, "ascending"),
        ({"step_rows": (40,)}, "below batch_rows + prefill_tokens = 40"),
        ({"page_tokens": 0}, "page_tokens=0 must be positive"),
        ({"kv_pages": 7}, "kv_pages=7 of 64 positions cannot hold one context"),
        ({"gap_ms": -1}, "gap_ms=-1 must not be negative"),
        ({"dtype": "float16"}, "dtype='float16' must be one of"),
        ({"dispatch_dtype": "int8"}, "dispatch_dtype='int8' must be one of"),
    ],
)
def test_an_engine_of_shapes_that_do_not_tile_is_refused(changes, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        EngineConfig(**changes)


def test_a_run_without_room_for_its_experts_says_what_to_raise():
    with pytest.raises(ValueError, match=r"2 ranks x 3 slots = 6 .* need 8; raise slots_per_rank"):
        RunConfig(name="r", model=a_model(), cluster=ClusterConfig(ranks=2, slots_per_rank=3))


def a_gpu_run(hidden: int = 256, **engine) -> RunConfig:
    values = {"platform": "gpu", "engine": EngineConfig(**{"dtype": "bfloat16"} | engine)}
    return dataclasses.replace(a_run(model=a_model(hidden=hidden)), **values)


def test_a_platform_computes_in_its_own_dtype():
    assert a_gpu_run().platform == "gpu" and a_run().platform == "cpu"
    with pytest.raises(ValueError, match=r"platform='gpu' computes in bfloat16, not in .*float32"):
        a_gpu_run(dtype="float32")
    with pytest.raises(ValueError, match=r"platform='cpu' computes in float32, not in .*bfloat16"):
        a_run(dtype="bfloat16")
    with pytest.raises(ValueError, match=r"platform='tpu' must be one of"):
        dataclasses.replace(a_run(), platform="tpu")


def test_rows_are_narrowed_from_bfloat16_by_whole_groups_of_channels():
    narrow = {"dispatch_dtype": "float8_e4m3fn"}
    assert a_gpu_run(**narrow).engine.dispatch_dtype == "float8_e4m3fn"
    with pytest.raises(
        ValueError, match=r"hidden=192 must be a multiple of it; else set engine.dispatch_dtype="
    ):
        a_gpu_run(hidden=192, **narrow)
    with pytest.raises(ValueError, match=r"narrows bfloat16 rows, but engine.dtype='float32'"):
        a_run(model=a_model(hidden=128), **narrow)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, float("nan")])
def test_jax_takes_a_part_of_the_memory_of_a_gpu(fraction):
    assert DeviceConfig().memory_fraction == 0.6
    with pytest.raises(ValueError, match=r"memory_fraction=.* must be between 0 and 1"):
        DeviceConfig(memory_fraction=fraction)


def test_a_seed_of_weights_is_not_negative():
    with pytest.raises(ValueError, match="random_weights=-1 is a seed"):
        dataclasses.replace(a_run(), random_weights=-1)
    with pytest.raises(ValueError, match=r"must be in 0\.\.4294967295"):
        dataclasses.replace(a_run(), random_weights=1 << 32)


def configurations() -> dict[str, RunConfig]:
    """All there are, by name."""
    modules = [m.name for m in pkgutil.iter_modules(configs.__path__) if m.name[0] != "_"]
    return {name: importlib.import_module(f"configs.{name}").get_config() for name in modules}


@pytest.mark.parametrize("name", sorted(configurations()))
def test_every_configuration_names_itself_and_its_weights(name):
    config = configurations()[name]
    assert config.name == name
    # Those of published models are told at the start which weights to take.
    told = config.model.name in PUBLISHED
    assert bool(config.checkpoint) + (config.random_weights is not None) == (not told)
    # An engine that waits for a peer until the deadline, and then once more, is not stuck.
    assert config.cluster.stall_ms > 2 * config.engine.step_deadline_ms
    if config.platform == "gpu" and not attends_by_items(config):
        assert config.engine.row_tile == config.engine.batch_rows, "a decode step is one tile"


def test_the_small_moe_fits_one_h100_four_times():
    config = configurations()["small_moe_h100x1"]
    model, engine, cluster = config.model, config.engine, config.cluster
    width, gib = 2, 2**30
    bank = cluster.slots_per_rank * model.expert_elements * width
    dense = (model.parameters - model.experts * model.expert_elements) * width
    positions = engine.batch_rows * engine.context_tokens
    cache = 2 * model.layers * positions * model.kv_heads * model.head_dim * width
    assert (bank / gib, cache / gib) == (4.5, 2.0) and round(dense / gib, 2) == 0.57
    jax_share = 79.6 * config.device.memory_fraction / cluster.ranks
    assert (dense + cache) / gib < jax_share / 2
    assert cluster.ranks * (jax_share + 2 * (bank / gib + 0.1) + 0.6) < 78


def test_the_widest_step_has_all_decode_and_all_prefill_rows():
    assert EngineConfig(batch_rows=16, prefill_tokens=24).tokens_max == 40


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
    names = ", ".join(f"configs.{name} as {name}" for name in configurations())
    made = "; ".join(f"{name}.get_config()" for name in configurations())
    check = f"import sys, {names}; {made}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=30).returncode == 0
