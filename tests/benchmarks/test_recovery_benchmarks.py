"""What benchmarks of recovery and return make of a run, without one."""

import numpy as np
import pytest
from absl import flags

from benchmarks import bench_recovery, bench_rejoin, rank_cycles
from benchmarks.bench_sources import PlainSocket, _sized
from benchmarks.rank_cycles import Measured, Unfit, _judge
from configs import small_moe_h100x1, tiny_cpu
from eep_jax.config import RunConfig

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
    measured = Measured(tiny_cpu.get_config(), [13.0, 14.0, 15.0], [a_cycle(), a_cycle()])
    records = bench.rows(measured).records
    assert len(records) % 3 == 0
    by_metric = {(r.bench, r.metric): r for r in records}
    pause = by_metric["recovery" if bench is bench_recovery else "rejoin", "pause_s p50"]
    assert pause.baseline == 14.0 and pause.ratio == pytest.approx(pause.value / 14.0)
    assert ("restart", "first_token_s max") in by_metric
    if bench is bench_rejoin:
        share = by_metric["rejoin", "survivors_share p50"].value
        assert share == pytest.approx(0.5, rel=0.1)


def test_on_paper_at_most_two_percent_of_slots_move_before_resuming():
    shares = bench_recovery.paper_shares()
    assert len(shares) == 32 and max(shares) <= bench_recovery.PAPER_SHARE


@pytest.mark.parametrize("config", [tiny_cpu, small_moe_h100x1], ids=["tiny", "small"])
def test_sources_are_measured_with_experts_that_make_a_rate(config):
    sized: RunConfig = _sized(config.get_config())
    assert sized.model.expert_elements * 2 >= 4 << 20
    assert 2 <= sized.model.experts <= 8


def test_a_plain_socket_sends_the_same_bytes():
    data = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)
    plain = PlainSocket(data)
    np.testing.assert_array_equal(plain.receive(), data)
    plain.close()
