"""The benchmarks of the GPU's kernels: their arithmetic, and that all they time lowers for an H100.

What they measure can only be measured on a GPU.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import bench_attention as attention
from benchmarks import bench_dispatch_combine as exchanges
from benchmarks import bench_expert_gemm as gemm
from benchmarks import bench_step as steps
from benchmarks import gpu_rates, gpu_timing, gpu_trace
from benchmarks.attention_cudnn import fused
from benchmarks.bench_dispatch_combine import Bytes, bytes_of
from benchmarks.bench_expert_gemm import Case, Experts
from benchmarks.gpu_timing import Chained, Program, Timing, per_repetition_us
from benchmarks.harness import Sheet, Unfit, append, read
from benchmarks.table import render
from benchmarks.world import World, shape_of, touched_slots
from benchmarks.world import bytes_of as bytes_to_read
from configs.small_moe_h100x1 import get_config
from launch.errors import UsageError
from tests.support.lowering import a_call, kernels, on_h100

DEVICE = "NVIDIA H100 80GB HBM3"
SMALL = exchanges.family_of(256, (4, 16))
SMALL_FP8 = exchanges.family_of(256, (8,), exchanges.FP8, "per_rank")
FEW_EXPERTS = Experts(16, 256, 128, (16, 128))


def lowered(program: Program) -> str:
    with on_h100(), gpu_timing.kernels_shared():
        return program.trace().lower(lowering_platforms=("cuda",)).as_text()


def kernel_names(program: Program) -> list[str]:
    """The kernels that a program calls, sorted, each once for each place in the text."""
    return sorted(text.split("module @", 1)[1].split()[0] for text in kernels(lowered(program)))


class TestTrace:
    EVENTS = (
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "/device:GPU:0"}},
        {"ph": "M", "name": "process_name", "pid": 2, "args": {"name": "/host:CPU"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 7, "args": {"name": "Stream #7"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 8, "args": {"name": "XLA Ops"}},
        {"ph": "X", "name": "fusion", "pid": 1, "tid": 7, "ts": 30.0, "dur": 2.0},
        {"ph": "X", "name": "expert_gate_up", "pid": 1, "tid": 7, "ts": 10.0, "dur": 5.0},
        {"ph": "X", "name": "fusion", "pid": 1, "tid": 7, "ts": 20.0, "dur": 1.0},
        {"ph": "X", "name": "fusion", "pid": 1, "tid": 8, "ts": 20.0, "dur": 1.0},
        {"ph": "X", "name": "python", "pid": 2, "tid": 7, "ts": 0.0, "dur": 9.0},
    )

    def test_only_what_ran_on_a_stream_counts(self):
        kernels = gpu_trace.of_streams(self.EVENTS)
        assert kernels == [("expert_gate_up", 5.0), ("fusion", 1.0), ("fusion", 2.0)]
        first, second = gpu_trace.longest(kernels, 9).splitlines()
        assert " ".join(first.split()) == "5.0 us 5.00 x 1 expert_gate_up"
        assert " ".join(second.split()) == "3.0 us 1.50 x 2 fusion"

    def test_shares_of_parts_add_up(self):
        found = gpu_trace.shares(gpu_trace.of_streams(self.EVENTS))
        assert found["experts"] == 5 / 8 and found["rest"] == 3 / 8
        assert sum(found.values()) == 1


class TestAttention:
    def test_what_is_seen_counts_once(self):
        apart = attention.Case("apart", 2, 2, 4, 2, 8, length=64)
        # Positions 31 and 30, so 32 + 31 tokens of 2 heads, keys and values of 8 bfloat16.
        assert apart.seen_bytes == 63 * 2 * 2 * 8 * 2
        run = attention.Case("run", 8, 2, 4, 2, 8, length=64, prompts=2)
        assert run.positions.tolist() == [28, 29, 30, 31] * 2
        assert run.batch_rows.tolist() == [0] * 4 + [1] * 4
        assert run.seen_bytes == 64 * 2 * 2 * 8 * 2
        window = attention.Case("window", 2, 2, 4, 2, 8, length=64, window=5)
        assert window.seen_bytes == 10 * 2 * 2 * 8 * 2
        latents = attention.Case("latents", 2, 2, 4, 1, 8, length=64, latent=32)
        assert latents.seen_bytes == 63 * (32 + 8) * 2

    @pytest.mark.parametrize("case", attention.CASES, ids=lambda case: case.name)
    def test_its_kernels_lower(self, monkeypatch, case):
        monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91200)
        monkeypatch.setattr(fused, "check_compute_capability", lambda _: True)
        monkeypatch.setattr(attention, "REPETITIONS", 2)
        small = dataclasses.replace(case, length=256, tokens=16, sequences=16)
        found = attention.kernels_of(small)
        found.pop("tokamax", None)  # which may not be there, and asks the device
        for name, kernel in found.items():
            text = lowered(attention.program_of(small, kernel))
            assert ("__cudnn$fmhaSoftmax" in text) == name.startswith("cudnn")


class TestTiming:
    def test_is_what_the_second_run_adds_per_repetition(self):
        assert per_repetition_us(0.0015, 0.0025, 10) == pytest.approx(100.0)

    def test_percentiles_are_of_the_pairs(self):
        timing = Timing((4.0, 1.0, 3.0, 2.0))
        assert (timing.p50_us, timing.p99_us) == (2.0, 4.0)
        assert timing.part(8).samples_us == (0.5, 0.125, 0.375, 0.25)

    def test_doubts_a_run_that_the_host_could_not_feed(self):
        assert not Timing((1.0,), 0.5).note
        assert "host busy 95%" in Timing((1.0,), 0.95).note

    def test_a_run_goes_on_from_where_the_last_one_ended(self):
        step = gpu_timing.chain(lambda carry, by: carry + by, 5)
        run = Chained(_plus(step), 0, 5)
        run.go(3)
        assert int(run.carry) == 3 * 5 * 2

    def test_runs_that_take_turns_are_all_measured(self):
        runs = {
            name: Chained(_plus(gpu_timing.chain(lambda c, by: c + by, 5)), 0, 5) for name in "ab"
        }
        found = gpu_timing.measure(runs, 3)
        assert {name: len(timing.samples_us) for name, timing in found.items()} == {"a": 3, "b": 3}

    def test_records_hold_both_percentiles_and_what_they_are_compared_with(self):
        sheet = Sheet("b", DEVICE, 8, {"tokens": 4})
        timing, baseline = Timing((4.0, 6.0)), Timing((8.0,))
        gpu_timing.add_times(sheet, timing, baseline=baseline, bound=2.0)
        p50, p99 = sheet.records
        assert (p50.metric, p50.value, p50.baseline, p50.ratio) == ("time p50", 4.0, 8.0, 0.5)
        assert (p99.metric, p99.value, p99.unit) == ("time p99", 6.0, "us")
        assert p50.shape == {"tokens": 4, "samples": 2} and p50.bound == 2.0

    def test_programs_are_compiled_or_their_errors_are_kept(self):
        def refuses(x):
            raise ValueError("not here")

        good, bad = Program(lambda x: x + 1, (jnp.ones(2),)), Program(refuses, (jnp.ones(2),))
        failures: dict = {}
        found = gpu_timing.compile_all({"good": good, "bad": bad}, failures)
        assert float(found["good"](jnp.ones(2))[0]) == 2.0
        assert list(failures) == ["bad"]
        with pytest.raises(ValueError, match="not here"):
            gpu_timing.compile_all({"bad": bad})

    def test_a_machine_without_a_gpu_is_refused(self, monkeypatch):
        monkeypatch.setenv("XLA_FLAGS", "")
        with pytest.raises(UsageError, match="measures an NVIDIA GPU"):
            gpu_timing.open_gpu()


def _plus(step):
    return functools.partial(_call_with, jax.jit(step), 2)


def _call_with(step, by, carry):
    return step(jnp.asarray(carry), by)


class TestRates:
    def test_walks_go_around_as_many_buffers_as_there_is_room_for(self):
        assert gpu_rates.walk(20_000, 4).tolist() == [0, 3, 12]
        whole = gpu_rates.BUFFER_BYTES // gpu_rates.UNIT_BYTES
        assert gpu_rates.walk(gpu_rates.BUFFER_BYTES, 16).tolist() == [0, whole, whole]
        with pytest.raises(ValueError, match="do not fit"):
            gpu_rates.walk(gpu_rates.BUFFER_BYTES + 1, 1)

    @pytest.mark.parametrize("grid", gpu_rates.GRIDS)
    def test_kernels_lower_for_an_h100(self, grid):
        program = gpu_rates.copy_program(grid, 3)
        assert set(kernel_names(program)) == {"copy_units"}
        assert len(set(kernels(lowered(program)))) == 1
        assert kernel_names(gpu_rates.read_program(grid, 3)) == ["read_units"]

    def test_plain_programs_lower_for_an_h100(self):
        for program in (gpu_rates.xla_read_program(3), gpu_rates.xla_copy_program(3)):
            assert "stablehlo.while" in lowered(program)
        assert lowered(gpu_rates.matmul_program(3)).count("stablehlo.dot_general") == 2


class TestExchanges:
    def test_a_row_is_counted_once_for_each_rank_it_goes_to(self):
        layout = dataclasses.replace(SMALL_FP8, combine="per_choice").layout
        slots = np.full((8, 4, 8), -1)
        slots[0, 0, :3] = [0, 1, 40]  # two ranks
        slots[3, 2, :2] = [255, 254]  # one rank
        home = 5 * 256 * 2 / 8
        sums = 4 * layout.hidden * 4
        wanted = Bytes(3 * layout.row_bytes / 8, home, (home + sums) / 2)
        assert bytes_of(slots, layout) == wanted
        assert bytes_of(slots, SMALL_FP8.layout).combine == 3 * 256 * 2 / 8

    def test_the_aim_is_a_share_and_a_constant(self):
        assert exchanges.reached(18.0, 10.0) and not exchanges.reached(18.1, 10.0)

    def test_sizes_may_be_chosen(self):
        assert [f.tokens for f in exchanges.chosen((SMALL, SMALL_FP8), (32,))] == [(32,), (32,)]
        assert exchanges.chosen((SMALL,), None) == (SMALL,)

    @pytest.mark.parametrize("family", [SMALL, SMALL_FP8], ids=["bfloat16", "fp8"])
    @pytest.mark.parametrize("name", exchanges.TIMED)
    def test_all_programs_lower_for_an_h100(self, family, name):
        tokens = family.tokens[-1]
        loop, data = (
            exchanges.loopback_of(family, tokens),
            exchanges.abstract_data(tokens, family.layout),
        )
        call = a_call(exchanges.RANKS)
        wanted = {
            "dispatch": {"dispatch"},
            "combine": {"combine", "combine_send"},
            "combine_home": {"combine"},
        }[name]
        timed = exchanges.timed_program(name, loop, call, data, 3)
        assert set(kernel_names(timed)) == wanted
        fixed = exchanges.fixed_program(name, loop, call, data, 3)
        assert set(kernel_names(fixed)) == wanted
        if name not in exchanges.CHECKS:
            return
        shapes = (gpu_timing.shapes_of(call), data)
        found = set(kernel_names(Program(exchanges.CHECKS[name](loop), shapes)))
        assert found - {"read_rows", "read_weights", "dispatch_send"} == wanted

    def test_the_largest_sizes_lower_for_an_h100(self):
        family = exchanges.FAMILIES[0]
        data = exchanges.abstract_data(512, family.layout)
        program = exchanges.timed_program(
            "combine", exchanges.loopback_of(family, 512), a_call(exchanges.RANKS), data, 3
        )
        assert set(kernel_names(program)) == {"combine", "combine_send"}

    def test_data_have_the_shapes_that_are_compiled_for(self):
        heap = jnp.zeros((8, SMALL.layout.window_bytes), jnp.uint8)
        slots, data = exchanges.make_data(0, 4, SMALL.layout, heap)
        same = jax.tree.map(
            lambda a, b: a.shape == b.shape and a.dtype == b.dtype,
            data,
            exchanges.abstract_data(4, SMALL.layout),
        )
        assert all(jax.tree.leaves(same))
        received = np.stack(data.received)
        found = np.where(received >= 0, received + 32 * np.arange(8)[:, None, None, None], 0)
        np.testing.assert_array_equal(found.sum(0), slots)

    def test_lines_say_whether_the_aim_was_reached(self):
        line = exchanges.Line("dispatch", SMALL, 16, Timing((5.0, 6.0)), 4.0, 1e6)
        assert "reached" in str(line) and "n=2" in str(line)
        slow = dataclasses.replace(line, timing=Timing((50.0,)), fixed=Timing((40.0,)))
        assert "MISSED" in str(slow) and "ratio 1.2500" in str(slow)
        sheet = Sheet("", DEVICE, exchanges.RANKS, {})
        slow.add_to(sheet)
        assert [r.ratio for r in sheet.records] == [1.25, 1.25]
        assert sheet.records[0].shape["dtype"] == "bfloat16"
        assert {r.bench for r in sheet.records} == {"dispatch"}


class TestExpertGemm:
    def test_every_slot_has_as_many_rows(self):
        case = Case(FEW_EXPERTS, 16)
        slots = gemm.balanced(case)
        assert slots.shape == case.shape == (1, 32, 8)
        assert np.bincount(slots.reshape(-1)).tolist() == [16] * 16

    @pytest.mark.parametrize("routing", gemm.ROUTINGS)
    def test_no_token_has_a_slot_twice(self, routing):
        slots = gemm.ROUTINGS[routing](Case(FEW_EXPERTS, 16))[0]
        assert slots.dtype == np.int32
        assert all(len(set(row)) == 8 for row in slots.tolist())

    def test_the_bound_is_bytes_or_operations_whichever_takes_longer(self):
        case = Case(FEW_EXPERTS, 16)
        one = np.zeros(case.shape, np.int32)
        assert case.weight_bytes(one) == 3 * 128 * 256 * 2
        assert case.flop == 2 * 3 * 16 * 16 * 128 * 256
        assert case.bound_us(one, 1e6, 1e30) == pytest.approx(case.weight_bytes(one))
        assert case.bound_us(one, 1e30, 1e6) == pytest.approx(case.flop)

    def test_sizes_may_be_chosen(self):
        experts = (FEW_EXPERTS, dataclasses.replace(FEW_EXPERTS, rows=(128, 256)))
        assert [c.rows for c in gemm.cases_of(experts, None)] == [16, 128, 128, 256]
        assert [c.rows for c in gemm.cases_of(experts, (128, 64))] == [128, 64, 128]
        with pytest.raises(UsageError, match="multiple of 32"):
            gemm.cases_of(experts, (8,))

    def test_no_case_of_the_benchmark_is_refused(self):
        for experts in (gemm.EXPERTS, gemm.QUICK):
            for case in gemm.cases_of(experts, None):
                assert gemm.shared_bytes("gate_up", case.config) < gemm.SHARED_MEMORY_BYTES
                assert gemm.shared_bytes("down", case.config) < gemm.SHARED_MEMORY_BYTES

    @pytest.mark.parametrize("rows", FEW_EXPERTS.rows)
    def test_all_programs_lower_for_an_h100(self, rows):
        case = Case(FEW_EXPERTS, rows)
        assert kernel_names(gemm.timed_program(case, 3)) == ["expert_down", "expert_gate_up"]
        assert not kernel_names(gemm.lists_program(case))
        assert not kernel_names(gemm.reference_program(case.experts))
        for name, other in gemm.others(case).items():
            is_kernel = "custom_call @mosaic_gpu" in lowered(gemm.other_program(case, other, 2))
            assert is_kernel or name != "ragged_dot_mgpu"

    @pytest.mark.parametrize("part", ["gate_up", "down"])
    def test_all_variants_lower_for_an_h100(self, part):
        case = Case(FEW_EXPERTS, 16)
        found = gemm.variants(part, case)
        assert len({gemm.variant_name(part, config) for config in found}) == len(found) > 4
        for config in found[::3]:
            assert kernel_names(gemm.part_program(part, case, config, 2)) == [f"expert_{part}"]

    def test_an_answer_is_compared_as_a_whole(self):
        """On CPU, with the reference in the kernels' place."""
        case = Case(dataclasses.replace(FEW_EXPERTS, slots=16), 16)
        bank, rows = gemm.make_bank(case.experts, 0), gemm.make_rows(case)
        slots = jnp.asarray(gemm.at_random(case))
        program = gemm.reference_program(case.experts)
        reference = jax.jit(program.function)
        wide = (rows.astype(jnp.float32), slots, bank[:, 0].astype(jnp.float32))
        y = gemm.expert_gemm_reference(*wide).astype(jnp.bfloat16)
        gemm.require_right(reference, y, rows, slots, bank, "this")
        for wrong in (y.at[0, 5, 3, 7].add(1), y.at[0, 31, 7, 255].set(jnp.nan)):
            with pytest.raises(Unfit, match="times as far off"):
                gemm.require_right(reference, wrong, rows, slots, bank, "this")

    def test_others_get_the_same_rows_sorted_by_expert(self):
        """`jax.lax.ragged_dot` on CPU gives what the reference gives."""
        case = Case(FEW_EXPERTS, 16)
        bank, rows, slots = (
            gemm.make_bank(FEW_EXPERTS, 0),
            gemm.make_rows(case),
            gemm.at_random(case),
        )
        wide = (rows.astype(jnp.float32), jnp.asarray(slots), bank[:, 0].astype(jnp.float32))
        y = gemm.expert_gemm_reference(*wide).astype(jnp.bfloat16)
        found = {}

        def only_lax(case):
            return {
                "lax_ragged_dot": gemm.Other(gemm.plain_ragged_dot(jax.lax.ragged_dot), True, 2)
            }

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gemm, "others", only_lax)
            found = gemm.run_others(case, bank, rows, slots, y, 3)
        assert list(found) == ["lax_ragged_dot"]

    def test_rates_are_shares_of_what_was_measured(self):
        case, timing = Case(FEW_EXPERTS, 16), Timing((10.0,))
        rates = gemm.Rates(read_per_s=2e12, flop_per_s=4e14)
        sheet = Sheet("expert_gemm", DEVICE, 1, gemm.shape_of(case, "random"))
        weights, flop = gemm.add_rates(sheet, case, timing, 10_000_000, rates)
        assert (weights.value, weights.ratio) == (pytest.approx(1.0), pytest.approx(0.5))
        assert flop.value == pytest.approx(case.flop / 1e-5 / 1e12)
        assert "MISSED" in gemm.describe(case, "random", timing, 1.0, (weights, flop))


def a_world(layers: int = 2) -> World:
    config = get_config()
    model = dataclasses.replace(
        config.model, layers=layers, hidden=256, query_heads=4, kv_heads=2, expert_hidden=128
    )
    engine = dataclasses.replace(config.engine, context_tokens=64)
    return World(dataclasses.replace(config, model=model, engine=engine))


class TestStep:
    def test_all_programs_lower_for_an_h100(self):
        world = a_world()
        arguments = world.arguments(world.alone(0))
        live = set(kernel_names(world.live(arguments)))
        dense = {"product", "attention"}
        assert live == dense | {"dispatch", "expert_gate_up", "expert_down_home", "combine"}
        assert set(kernel_names(world.counting(arguments))) == live
        assert set(kernel_names(world.fixed(arguments, arguments[-1]))) == live
        assert set(kernel_names(world.reference(arguments))) == dense, "its experts are plain"

    def test_the_whole_model_lowers_for_an_h100(self):
        world = World(get_config())
        assert kernel_names(world.live(world.arguments(world.alone(0))))

    def test_bytes_are_weights_that_are_touched_and_tokens_that_are_seen(self):
        world = a_world()
        size, model = bytes_to_read(world, [3, 4], 10), world.config.model
        assert size.experts == 7 * 3 * 128 * 256 * 2
        assert size.cache == 32 * 10 * 2 * 2 * 2 * 128 * 2
        expert_parameters = model.experts * model.expert_elements
        embedding = model.vocab_size * model.hidden
        assert size.dense == 2 * (model.parameters - expert_parameters - embedding)
        assert size.total == size.experts + size.dense + size.cache

    def test_the_reference_runs_every_expert_on_its_own_rank(self):
        """On CPU; in the step that a GPU compiles, but with plain experts."""
        world = a_world()
        program = world.reference(world.arguments(world.alone(0)))
        heap = program.arguments[3]
        dense, cache, bank = world.dense(), world.cache(1), world.bank()
        assert jax.tree.map(jnp.shape, dense) == jax.tree.map(jnp.shape, program.arguments[0])
        assert jax.tree.map(jnp.shape, cache) == jax.tree.map(jnp.shape, program.arguments[2])
        arguments = (dense, bank, cache, jnp.zeros(heap.shape, heap.dtype), *program.arguments[4:])
        result = jax.jit(program.function)(*arguments)
        touched = touched_slots(world.alone(0), result.chosen)
        assert len(touched) == 2 and 0 < min(touched) <= max(touched) <= 32
        assert not np.asarray(result.suspicion).any() and not np.asarray(result.dropped).any()
        at = world.position
        assert not jnp.array_equal(result.cache.keys[1][:, :, at], cache.keys[1][:, :, at])
        assert jnp.array_equal(result.cache.keys[1][:, :, :at], cache.keys[1][:, :, :at])

    def test_an_epoch_may_have_a_silent_peer_and_experts_elsewhere(self):
        world = a_world()
        tables = world.alone(3, others=(1,), shift=1)
        assert tables.active.tolist() == [1, 1, 0, 0] and int(tables.epoch) == 3
        alone = world.alone(0)
        assert alone.active.tolist() == [1, 0, 0, 0]
        assert np.array_equal(tables.expert_slots[1:, 0], alone.expert_slots[:-1, 0])
        call = world.call(tables, 0, 20)
        assert int(call.round) >> 20 == 3 and int(call.deadline_ms) == 20

    def test_changes_are_timed_by_what_they_do_to_a_step(self):
        """A fake executable that suspects whoever is active but silent."""
        world = a_world()
        live = steps.Live(world, _fake_step, [], None, None, jnp.zeros(8, jnp.uint32))
        found, compiled = steps.measure_changes(live, world.batch(), 2)
        assert {name: len(timing.samples_us) for name, timing in found.items()} == {
            "usual": 2,
            "failing": 2,
            "first": 2,
        }
        assert compiled >= 0

    def test_records_compare_live_with_compiled_in(self):
        timings = {name: Timing((10.0,)) for name in ("live", "usual", "failing", "first")}
        timings["fixed"] = Timing((8.0,))
        sheet = Sheet("step", DEVICE, 1, shape_of(a_world()))
        steps.add_records(sheet, a_world(), timings, 5.0, 0)
        named = {record.metric: record for record in sheet.records}
        assert named["time p50"].ratio == 1.25
        assert named["tokens_per_s"].value == pytest.approx(32 / 10e-6)
        assert named["tokens_per_s"].bound == pytest.approx(32 / 5e-6)


@dataclasses.dataclass
class _FakeResult:
    cache: object
    suspicion: np.ndarray


def _fake_step(dense, bank, cache, heap, tables, batch, call):
    return _FakeResult(cache, np.asarray(call.active) * (np.arange(4) != 0))


def test_the_table_tells_sizes_apart_and_shows_bounds(tmp_path):
    line = exchanges.Line("dispatch", SMALL, 16, Timing((5.0, 6.0)), 4.0, 1e6)
    more = dataclasses.replace(line, tokens=4)
    case, rates = Case(FEW_EXPERTS, 16), gemm.Rates(2e12, 4e14)
    sheet = Sheet("expert_gemm", DEVICE, 1, {})
    line.add_to(sheet)
    more.add_to(sheet)
    gemm.add_rates(sheet.of(**gemm.shape_of(case, "random")), case, Timing((1.0,)), 10, rates)
    append(tmp_path / "r.jsonl", sheet.records)
    lines = render(read([tmp_path / "r.jsonl"])).splitlines()
    assert "| unit | bound | baseline |" in lines[2]
    assert [row.split(" | ")[1] for row in lines[4:]] == ["time tokens=16", "time tokens=4"]
    assert {row.count("|") for row in lines[2:]} == {12}


def test_what_a_loop_only_reads_is_not_copied():
    """Kernels write through windows that XLA takes for operands; a copy would be timed, too."""

    def kernel(word, window):
        callback = lambda word, window: np.asarray(word) + 1
        return jax.pure_callback(callback, jax.ShapeDtypeStruct((), jnp.int32), word, window)

    window = jax.ShapeDtypeStruct((1 << 20,), jnp.uint8)
    program = Program(gpu_timing.chain(kernel, 5), (jax.ShapeDtypeStruct((), jnp.int32), window))
    executable = gpu_timing.compile_all({"": program})[""]
    assert executable.memory_analysis().temp_size_in_bytes < 4096
