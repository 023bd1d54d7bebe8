"""Configurations of published models: their sizes, the memory of a rank, and what may die."""

import dataclasses
import importlib
import itertools
import pathlib
import re
import subprocess
import sys

import pytest

import configs
from eep_jax.errors import CoverageLost
from eep_jax.models.expert_bank import slab_layout
from eep_jax.models.families.published import PUBLISHED, published
from eep_jax.models.memory import (
    GPU_BYTES,
    check_fit,
    dense_elements,
    describe,
    losses_covered,
    memory_per_rank,
)
from eep_jax.placement.placement import missing_experts
from eep_jax.placement.planner import initial_placement, plan_repair

# What the configurations promise: ranks that may die, and those of them with nothing to load.
PROMISED = {
    "qwen3_30b_a3b_h100x1": (0, 0),
    "qwen3_30b_a3b_h200x1": (0, 0),
    "qwen3_30b_a3b_h100x4": (2, 1),
    "qwen3_30b_a3b_h200x2": (1, 1),
    "qwen3_30b_a3b_h200x4": (2, 1),
    "qwen3_235b_a22b_h200x8": (2, 0),
    "deepseek_v3_h200x32": (6, 0),
    "kimi_k2_h200x32": (4, 0),
    "glm_4_6_h200x16": (2, 0),
    "minimax_m2_h200x8": (2, 0),
    "gpt_oss_120b_h100x8": (4, 1),
    "mixtral_8x7b_h100x4": (2, 1),
}


@pytest.fixture(params=PROMISED)
def name(request) -> str:
    return request.param


def config_of(name: str):
    return importlib.import_module(f"configs.{name}").get_config()


def gpus_of(name: str) -> tuple[str, int]:
    kind, count = re.fullmatch(r".*_(h\d+)x(\d+)", name).groups()
    return kind, int(count)


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_parameters_are_those_that_were_published(model):
    _, parameters = PUBLISHED[model]
    assert published(model).parameters == pytest.approx(parameters, rel=0.01)
    assert sum(dense_elements(published(model)).values()) == published(model).dense_parameters


def test_every_model_has_a_configuration():
    assert {config_of(name).model.name for name in PROMISED} == set(PUBLISHED)


def test_a_rank_fits_its_gpu_as_its_file_says(name):
    file = pathlib.Path(configs.__path__[0]) / f"{name}.py"
    said = re.sub(r"^ {4}", "", file.read_text(), flags=re.MULTILINE)
    assert describe(config_of(name), *gpus_of(name)) in said


def test_bank_and_window_are_what_a_rank_allocates(name):
    config = config_of(name)
    cluster, needed = config.cluster, memory_per_rank(config)
    layout = slab_layout(config.model, config.engine, cluster.ranks, cluster.slots_per_rank)
    assert needed.experts == layout.bank.bytes
    assert needed.window == layout.window.window_bytes
    assert needed.heap >= layout.slab_bytes


def test_the_promised_losses_leave_every_expert_covered(name):
    config = config_of(name)
    cluster, experts = config.cluster, config.model.experts
    at_all, without_loading = PROMISED[name]
    assert losses_covered(config) == (without_loading, at_all)
    placement = initial_placement(
        experts, cluster.ranks, cluster.slots_per_rank, cluster.redundancy
    )
    everyone = range(cluster.ranks)
    for lost in itertools.combinations(everyone, without_loading):
        assert not missing_experts(placement, set(everyone) - set(lost))
    for lost in itertools.islice(itertools.combinations(everyone, at_all), 30):
        active = set(everyone) - set(lost)
        orphans = missing_experts(placement, active)
        plan = plan_repair(placement, active)
        assert len(plan.moves) == len(orphans)
        assert not missing_experts(plan.placement, active)
    with pytest.raises(CoverageLost):
        plan_repair(placement, range(cluster.ranks - at_all - 1))


def test_what_does_not_fit_is_refused_with_a_way_out():
    config = config_of("qwen3_30b_a3b_h100x4")
    wide = dataclasses.replace(config.cluster, slots_per_rank=120)
    with pytest.raises(ValueError, match=r"lower cluster\.slots_per_rank"):
        check_fit(dataclasses.replace(config, cluster=wide), "h100", 4)
    greedy = dataclasses.replace(config.engine, kv_pages=16_384)
    with pytest.raises(ValueError, match=r"set engine\.kv_pages to at most \d+, now 16384"):
        check_fit(dataclasses.replace(config, engine=greedy), "h100", 4)
    with pytest.raises(ValueError, match="must be one of"):
        check_fit(config, "abacus", 4)
    assert check_fit(config, "h200", 4).free > GPU_BYTES["h200"] - GPU_BYTES["h100"] - (40 << 30)


def test_the_table_is_printed_without_loading_jax():
    script = "import sys; from launch import memory; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    command = [sys.executable, "-m", "launch.memory", "--config=gpt_oss_120b_h100x8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert describe(config_of("gpt_oss_120b_h100x8"), "h100", 8) in done.stdout
    wrong = subprocess.run([*command, "--gpus_of_kind=h100x2"], capture_output=True, timeout=60)
    assert wrong.returncode == 2 and b"set engine.kv_pages to at most 0" in wrong.stderr
