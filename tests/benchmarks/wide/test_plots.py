"""Pictures of runs on several GPUs, from records alone; and when throughput is back."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg

from benchmarks import plot
from benchmarks.harness import Record, Sheet
from benchmarks.processes import Machine
from benchmarks.serving.recovered import recovered_after
from benchmarks.serving.series import add_timeline, identity
from benchmarks.wide import plans
from benchmarks.wide.exchange import FP8, Family
from benchmarks.wide.exchange_report import Found, add_records, published

TOLD = {"commit": "c", "time": "2026-01-01T00:00:00"}
FAMILIES = (
    Family(ranks=2, tokens=(16, 128), choices=8, hidden=7168, experts=256),
    Family(
        ranks=2,
        tokens=(16, 128),
        choices=8,
        hidden=7168,
        experts=256,
        combine="per_rank",
        dispatch_dtype=FP8,
    ),
)


def found(ranks=(0, 1)) -> Found:
    lines = [
        (rank, {"kind": "link", "way": way, "bytes_per_s": (400 - 10 * rank) * 1e9})
        for rank in ranks
        for way in ("all_at_once", "alone")
    ]
    for family in range(2):
        for name in ("dispatch", "combine") + ("combine_home",) * (family == 0):
            for tokens in (16, 128):
                for rank in ranks:
                    samples = [8.0 + rank + tokens / 16, 7.0 + tokens / 16]
                    fields = {"name": name, "tokens": tokens, "family": f"family{family}"}
                    line = {"kind": "time", "samples_us": samples, "bytes": tokens * 14336}
                    lines.append((rank, line | fields))
    for name in ("all_to_all", "ragged_all_to_all"):
        line = {"kind": "collective", "name": name, "tokens": 128, "samples_us": [30.0], "bytes": 1}
        lines.append((-1, line))
    return Found(tuple(lines))


TWO = Machine("gpu", 2, ("0", "1"))


def wide_records(machine: Machine = TWO, ranks=(0, 1)) -> list[Record]:
    sheet = Sheet("wide", machine.device, machine.ranks, machine.facts, **TOLD)
    add_records(sheet, found(ranks), FAMILIES)
    return sheet.records


def test_a_sample_is_the_slowest_ranks_and_bounds_are_of_the_links_rate():
    named = {
        (r.bench, r.metric, r.shape["tokens"], r.shape["dtype"]): r for r in wide_records()[2:]
    }
    dispatch = named["wide_dispatch", "time p50", 128, "bfloat16"]
    assert dispatch.value == 15.0 and dispatch.shape["samples"] == 2
    assert named["wide_dispatch", "time p99", 128, "bfloat16"].value == 17.0
    assert dispatch.bound == pytest.approx(128 * 14336 / 390e9 * 1e6)
    assert dispatch.baseline == 30.0 and dispatch.ratio == 0.5, "the dense collective's"
    assert named["wide_dispatch", "time p50", 16, "bfloat16"].baseline is None


def test_what_not_all_ranks_timed_is_left_out():
    records = wide_records(TWO, ranks=(0,))
    assert {r.bench for r in records} == {"wide_link", "wide_collective"}


def test_the_curve_is_drawn_with_its_bound_nccl_and_what_others_published():
    figure = plot.wide(wide_records())
    FigureCanvasAgg(figure).draw()
    dispatch, combine = figure.axes
    labels = [line.get_label() for line in dispatch.lines]
    assert {"bf16", "fp8", "bf16: link", "NCCL all_to_all", "ragged_all_to_all"} <= set(labels)
    assert any("DeepEP" in label for label in labels)
    assert "per_choice, sent by the GEMM" in [line.get_label() for line in combine.lines]
    assert published("dispatch", 128).startswith("DeepEP 75, ")
    assert published("combine", 3) == ""


def test_ranks_that_share_a_gpu_are_not_drawn():
    assert plot.wide(wide_records(Machine("gpu", 2, ("0",)))) is None


def a_plan(plan: str) -> Record:
    times = [(n / 100, 1) for n in range(500)]
    sheet = Sheet("serve", "8 x X", 8, {"fault_plan": plan}, **TOLD)
    return add_timeline(sheet, "elastic", times, {"kill": 2.0})


def test_plans_are_drawn_with_the_ranks_that_each_leaves():
    chain = "[[0,1,2],[0,-1,2],[0,2],[-0,2],[2],[0,1,2]]"
    assert plans.sizes_of(chain) == "3->2->1->3"
    figure = plot.plans([a_plan(chain), a_plan("[[0,1],[0,-1],[0]]")])
    FigureCanvasAgg(figure).draw()
    assert [axes.get_title(loc="left")[:7] for axes in figure.axes] == ["3->2->1", "2->1:  "]
    assert plot.plans([]) is None


def test_curves_of_one_picture_are_of_one_machine():
    def curve(device, system, link="peer", time="2026-01-01", redundancy=2):
        shape = {"config": "c", "redundancy": redundancy, "link": link}
        sheet = Sheet("faults", device, 2, shape, commit="", time=time)
        return add_timeline(sheet, system, [(0.0, 1), (1.0, 1)], {})

    cpu = [curve("cpu", system, "cpu", "2026-03-01") for system in plot.SYSTEMS]
    gpus = [curve("2 x H200", system) for system in plot.SYSTEMS]
    orphans = curve("2 x H200", "elastic", redundancy=1, time="2026-02-01")
    assert plot.of_one_run([*cpu, *gpus, orphans]) == gpus
    assert identity(orphans) != identity(gpus[0])
    assert plot.of_one_run([]) == []


class TestRecovered:
    STEADY = tuple((n / 100, 1) for n in range(1000))  # 100 tokens/s until 10 s

    @pytest.mark.parametrize("pause_s", [0.02, 0.5, 3.0])
    def test_throughput_is_back_with_the_first_token_of_a_full_window(self, pause_s):
        after = tuple((10 + pause_s + n / 100, 1) for n in range(500))
        assert recovered_after(self.STEADY + after, 10.0) == pytest.approx(pause_s, abs=0.011)

    def test_tokens_that_were_under_way_do_not_count(self):
        late = ((10.01, 1),)
        after = tuple((10.04 + n / 100, 1) for n in range(500))
        times = self.STEADY + late + after
        assert recovered_after(times, 10.0) == pytest.approx(0.01)
        assert recovered_after(times, 10.0, resumed_s=10.03) == pytest.approx(0.04)

    def test_a_rate_of_90_percent_is_not_enough(self):
        after = tuple((10 + n / 90, 1) for n in range(450))
        assert recovered_after(self.STEADY + after, 10.0) is None
        later = tuple((15 + n / 98, 1) for n in range(490))
        # A window may begin in the slow part and end in the fast one.
        assert 4.0 < recovered_after(self.STEADY + after + later, 10.0) <= 5.0

    @given(st.integers(1, 50), st.floats(0.1, 2))
    def test_bursts_count_as_the_tokens_in_them(self, burst, period):
        steps = int(20 / period)
        times = [(n * period, burst) for n in range(steps)]
        found = recovered_after(times, steps / 2 * period, window_s=4 * period)
        assert found is None or found <= 2 * period

    def test_without_a_token_before_the_kill_there_is_nothing_to_compare_with(self):
        with pytest.raises(ValueError, match="no token came before the kill"):
            recovered_after([(2.0, 1)], 1.0)


def test_a_table_row_names_the_machine():
    from benchmarks.table import render

    text = render(wide_records(Machine("gpu", 2, ("0",))))
    assert "shared by 2 ranks" in text
    assert dataclasses.asdict(wide_records()[0])["shape"]["link"] == "peer"
