"""Results that benchmarks of recovery and return make of a run, without one."""

import numpy as np
import pytest
from absl import flags

from benchmarks import bench_recovery, bench_rejoin, rank_cycles
from benchmarks.harness import Unfit
from benchmarks.plain_copies import PlainSocket
from benchmarks.rank_cycles import Answers, Measured, _judge, judge_answers
from benchmarks.sources import sized
from configs import small_moe_h100x1, tiny_cpu
from launch.load import Sample

VICTIM, KILL_S, START_S = 1, 100.0, 104.0
REPAIR = {
    "change": "repair",
    "bytes": {},
    "seconds": {"detect": 0.01, "fetch": 0.0, "first_step": None, "load": 0.0, "total": 0.01},
}
ADMISSION = {
    "change": "admission",
    "bytes": {"peer": 800},
    "seconds": {"load": 0.25},
    "starts": {"1": {"seconds": {"imports": 1.5}, "executables": {}, "compilations": 0}},
}


def event(kind, at_s, **facts):
    return {"kind": kind, "at_s": at_s, **facts}


EVENTS = [
    event("dead", 100.02, rank=VICTIM),
    event("prepare", 100.03),
    event("commit", 100.06, members={"0": 1, "2": 1}),
    event("incarnation", 104.5, rank=VICTIM),
    event("offered", 107.0, rank=VICTIM),
    event("prepare", 107.5),
    event("commit", 107.55, members={"0": 1, "1": 2, "2": 1}),
]


def a_cycle(events=EVENTS):
    """100 tokens a second; none from 100.0 to 100.1, half as many while the rank prepares."""
    times = np.concatenate(
        [
            np.arange(97.0, 100.0, 0.01),
            np.arange(100.1, 104.0, 0.01),
            np.arange(104.0, 107.5, 0.02),
            np.arange(107.6, 109.0, 0.01),
        ]
    )
    return _judge(times.tolist(), events, VICTIM, KILL_S, START_S, REPAIR, ADMISSION)


def test_a_cycle_is_split_at_its_marks():
    cycle = a_cycle()
    assert cycle.detection == pytest.approx(0.02)
    assert cycle.pause == pytest.approx(0.1, abs=0.02)
    assert cycle.return_pause == pytest.approx(0.1, abs=0.03)
    assert cycle.rate_reduced == pytest.approx(100, rel=0.05)
    assert cycle.rate_preparing == pytest.approx(50, rel=0.05)
    assert cycle.phases["start_imports_s"] == 1.5 and cycle.phases["load_s"] == 0.25
    assert cycle.phases["total_s"] == pytest.approx(3.55)


def test_a_cycle_without_its_marks_means_nothing():
    with pytest.raises(Unfit, match="no event 'offered'"):
        a_cycle([e for e in EVENTS if e["kind"] != "offered"])


@pytest.fixture
def flag_values(monkeypatch):
    values = flags.FlagValues()
    flags.DEFINE_integer("concurrency", 12, "", flag_values=values)
    values(["test"])
    monkeypatch.setattr(rank_cycles.absl_flags, "FLAGS", values)


@pytest.mark.parametrize("bench", [bench_recovery, bench_rejoin])
def test_every_row_has_its_three_values(flag_values, bench):
    answers = Answers(9, 0, 0)
    measured = Measured(tiny_cpu.get_config(), [13.0, 14.0, 15.0], [a_cycle(), a_cycle()], answers)
    records = bench.rows(measured).records
    assert len(records) % 3 == 0
    by_metric = {(r.bench, r.metric): r for r in records}
    pause = by_metric["recovery" if bench is bench_recovery else "rejoin", "pause_s p50"]
    assert pause.baseline == 14.0 and pause.ratio == pytest.approx(pause.value / 14.0)
    assert ("restart", "first_token_s max") in by_metric
    if bench is bench_rejoin:
        share = by_metric["rejoin", "survivors_share p50"].value
        assert share == pytest.approx(0.5, rel=0.1)


def a_result(text, start_s=90.0, end_s=110.0, **facts):
    """Half of its tokens came before the kill."""
    before = (start_s + 0.1,) * (len(text) // 2)
    times = before + (end_s,) * (len(text) - len(before))
    values = {"job": 0, "finish_reason": "length", "error": None, "refused": False} | facts
    values |= {"prompt_tokens": 1, "output_tokens": len(text)}
    pieces = tuple((at_s, 1) for at_s in times)
    return Sample(text=text, start_s=start_s, end_s=end_s, pieces=pieces, **values)


def test_completions_are_those_of_the_unharmed_run():
    truth, config = [a_result("abcdefgh")], tiny_cpu.get_config()
    assert judge_answers([truth[0], truth[0]], truth, [KILL_S], config) == Answers(2, 0, 0)
    with pytest.raises(Unfit, match="another text"):
        judge_answers([a_result("abcdefgX")], truth, [KILL_S], config)
    with pytest.raises(Unfit, match="lost"):
        judge_answers([a_result("abcdefgh", error="gone")], truth, [KILL_S], config)


def test_with_drawn_weights_on_a_gpu_what_was_read_again_may_differ_and_is_counted():
    truth, config = [a_result("abcdefgh")], small_moe_h100x1.get_config()
    judge = lambda *results: judge_answers(list(results), truth, [KILL_S], config)
    assert judge(truth[0], a_result("abcdefXX")) == Answers(2, 1, 0)
    assert judge(a_result("aXcdefgh")) == Answers(1, 1, 1), "before the kill"
    assert judge(a_result("abcdefXX", 101.0, 110.0)) == Answers(1, 1, 1), "after it"
    with pytest.raises(Unfit, match="ended by stop"):
        judge(a_result("abcd", finish_reason="stop"))
    with pytest.raises(Unfit, match="lost"):
        judge(a_result("abcdefgh", error="gone"))


def test_on_paper_at_most_two_percent_of_slots_move_before_resuming():
    shares = bench_recovery.paper_shares()
    assert len(shares) == 32 and max(shares) <= bench_recovery.PAPER_SHARE


@pytest.mark.parametrize("config", [tiny_cpu, small_moe_h100x1], ids=["tiny", "small"])
def test_sources_are_measured_with_experts_that_make_a_rate(config):
    model = sized(config.get_config()).model
    assert model.expert_elements * 2 >= 4 << 20
    assert 2 <= model.experts <= 8


def test_a_plain_socket_sends_the_same_bytes():
    data = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)
    plain = PlainSocket(data)
    np.testing.assert_array_equal(plain.receive(), data)
    plain.close()
