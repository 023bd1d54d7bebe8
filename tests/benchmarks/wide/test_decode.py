"""Decode steps of a rank among others: what is compiled lowers for an H100, and what fits fits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gpu_timing import shapes_of
from benchmarks.harness import Sheet
from benchmarks.processes import Machine
from benchmarks.static.exchanges import AXIS, EXCHANGES, no_call
from benchmarks.wide import decode, decode_report, decode_sizes
from benchmarks.wide.decode_sizes import layers_that_fit, share_of, systems_of, with_sizes
from benchmarks.wide.exchange_report import Found
from benchmarks.world import World
from eep_jax.models.memory import memory_per_rank
from eep_jax.tables import solo_tables
from launch.flags import load_config
from tests.support.lowering import H100, kernels, like, on_h100

H200 = 143_771 << 20
COLLECTIVES = {"psum": "all_reduce", "ring": "reduce_scatter"}
COLLECTIVES |= {name: name for name in EXCHANGES if name.endswith("all_to_all")}
SIZES = {"ranks": 8, "batch": 64, "context_tokens": 1024}


def a_world(name="tiny_gpu", ranks=2, batch=8, layers=3) -> World:
    config = load_config(name)
    sizes = {"ranks": ranks, "batch": batch, "context_tokens": 32}
    return World(with_sizes(config, layers=layers, **sizes), 1)


def arguments_of(world: World) -> tuple:
    return world.arguments(world.together(1), like((1, 4096), np.uint8))


class TestLowering:
    def test_live_and_compiled_in_membership_run_the_same_kernels(self):
        world = a_world()
        arguments = arguments_of(world)
        programs = {
            "live": world.live(arguments, 1 << 24),
            "fixed": world.fixed(arguments, world.call(world.together(2), 1 << 40), 1 << 24),
        }
        with on_h100():
            found = {
                name: kernels(program.trace().lower(lowering_platforms=("cuda",)).as_text())
                for name, program in programs.items()
            }
        assert len(found["live"]) == len(found["fixed"]) > 0

    def test_plain_experts_need_no_exchange(self):
        world = a_world()
        dense, _, cache, *_, batch, _ = arguments_of(world)
        experts = jax.eval_shape(lambda: world.draw_experts(range(16)))
        alone = solo_tables(1, 16, 16, 0)
        arguments = (dense, experts, cache, None, alone, batch, shapes_of(no_call()))
        with on_h100():
            program = world.reference(arguments)
            text = program.trace().lower(lowering_platforms=("cuda",)).as_text()
        assert not any("dispatch" in kernel for kernel in kernels(text))

    @pytest.mark.parametrize("exchange", EXCHANGES)
    def test_static_steps_lower_with_the_experts_kernels_for_a_mesh_of_h100s(self, exchange):
        world = a_world()
        mesh = jax.sharding.AbstractMesh((2,), (AXIS,), abstract_device=H100.abstract_device)
        split = jax.sharding.NamedSharding(mesh, jax.P(AXIS))
        whole = lambda leaf: jax.ShapeDtypeStruct(
            (2 * leaf.shape[0], *leaf.shape[1:]), leaf.dtype, sharding=split
        )
        with jax.sharding.use_abstract_mesh(mesh):
            dense, bank, cache, _, _, batch, _ = arguments_of(world)
            parts = [jax.tree.map(whole, part) for part in (bank, cache, batch)]
            traced = decode.static_step(world, exchange, mesh).trace(dense, *parts)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        # Gate and up, and down, of each layer with experts.
        # Two of each layer; query, key and value, output, router, and head are the same for all.
        assert len(kernels(text)) == 2 * world.config.model.moe_layers + 4
        assert COLLECTIVES[exchange] in text


class TestSizes:
    @pytest.mark.parametrize("name", ["deepseek_v3_h200x32", "qwen3_235b_a22b_h200x8"])
    def test_as_many_layers_as_fit_are_taken(self, name):
        config = load_config(name)
        layers = layers_that_fit(config, H200, 1, SIZES)
        assert 2 < layers <= config.model.layers
        sized = with_sizes(config, layers=layers, **SIZES)
        needed, share = memory_per_rank(sized), share_of(sized, H200, 1)
        assert needed.jax < share * H200 and share * H200 + needed.heap < H200
        if layers < config.model.layers:
            assert share_of(with_sizes(config, layers=layers + 1, **SIZES), H200, 1) is None

    def test_what_does_not_fit_at_all_is_refused(self):
        with pytest.raises(ValueError, match="two layers of DeepSeek-V3 do not fit 16 GiB"):
            layers_that_fit(load_config("deepseek_v3_h200x32"), 16 << 30, 4, SIZES)

    def test_a_stack_of_few_layers_has_experts_in_all_but_one(self):
        config = with_sizes(load_config("deepseek_v3_h200x32"), layers=4, **SIZES)
        assert (config.model.layers, config.model.dense_layers) == (4, 1)
        assert config.cluster.slots_per_rank == 32 and config.cluster.redundancy == 1

    @pytest.mark.parametrize(
        ("name", "experts"),
        [("deepseek_v3_h200x32", 16), ("qwen3_235b_a22b_h200x8", 32), ("tiny_gpu", 16)],
    )
    def test_plain_experts_of_the_check_fit_one_rank(self, name, experts):
        config = with_sizes(load_config(name), layers=3, **SIZES)
        few = decode_sizes.with_few_experts(config, 8, 4 << 30)
        assert few.model.experts == experts
        assert experts * decode_sizes.expert_bytes(few) < 4 << 30
        assert few.cluster.slots_per_rank == experts // 8
        assert few.model.experts_per_token == config.model.experts_per_token

    def test_every_expert_is_where_static_sharding_has_it(self):
        tables = World(with_sizes(load_config("tiny_gpu"), layers=0, **SIZES)).together(3)
        assert tables.expert_slots[:, 0].tolist() == list(range(16))
        assert tables.replicas.tolist() == [1] * 16

    def test_nccl_needs_a_gpu_of_its_own_for_every_rank(self):
        assert (
            systems_of("gpu", "shared_gpu", 2)
            == systems_of("gpu", "peer", 1)
            == decode_sizes.ELASTIC
        )
        assert "ragged_all_to_all" in systems_of("gpu", "peer", 2)
        assert "ragged_all_to_all" not in systems_of("cpu", "cpu", 2)

    def test_a_rank_draws_the_same_expert_as_any_other(self):
        first, second = a_world(), dataclasses.replace(a_world(), rank=0)
        drawn, other = first.draw_experts([3, 4])
        assert jnp.array_equal(drawn, second.draw_experts([3])[0])
        assert not jnp.array_equal(drawn, other)
        assert not np.asarray(drawn, np.float32)[:, :, 96:].any(), "padding is zero"


def test_records_compare_with_the_best_static_system_and_live_with_compiled_in():
    config = with_sizes(load_config("tiny_gpu"), ranks=2, batch=8, layers=3, context_tokens=32)
    times = {"live": [110.0, 100.0], "fixed": [100.0, 90.0], "psum": [400.0], "ring": [200.0]}
    common = {"kind": "step", "family": "size0", "agreeing": 0.75}
    step = lambda name, us: common | {"name": name, "samples_us": us}
    lines = [(rank, step(name, us)) for name, us in times.items() for rank in (0, 1)]
    lines.append((0, step("all_to_all", [1.0])))  # of one rank only: not counted
    lines.append((1, {"kind": "read", "bytes_per_s": 1e12}))
    lines.append((0, {"kind": "profile", "family": "size0", "shares": {"experts": 0.7}}))
    machine = Machine("gpu", 2, ("0",))
    sheet = Sheet("wide_decode", machine.device, machine.ranks, machine.facts)
    decode_report.add_records(sheet, Found(tuple(lines)), [config])
    records = sheet.records
    rates = {r.shape["system"]: r for r in records if r.metric == "tokens_per_s"}
    assert set(rates) == {"live", "fixed", "psum", "ring"}
    assert rates["live"].shape["against"] == "ring" and rates["live"].ratio == pytest.approx(2.0)
    assert rates["live"].value == pytest.approx(16 / 100e-6) and rates["live"].bound
    member = next(r for r in records if r.metric == "membership p50")
    assert [r.value for r in records if r.metric == "share_experts"] == [0.7]
    assert {r.value for r in records if r.metric == "tokens_agreeing"} == {0.75}
    assert member.ratio == pytest.approx(100 / 90)
    assert member.shape["link"] == "shared_gpu" and "shared by 2 ranks" in member.device
