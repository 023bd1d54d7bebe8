"""Ranks die in every way while clients stream; no completion is lost or changed; ranks return."""

import contextlib
import random
import signal
import time

import pytest

from eep_jax.runtime.rank.priority import nice_of
from tests.support.processes import RANKS, events_after, incarnation, is_out

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(400)]


@pytest.mark.parametrize("rank", range(RANKS))
def test_any_rank_may_be_killed_and_comes_back(cluster, rank):
    before = cluster.status()
    with cluster.load():
        cluster.signal(rank)
        cluster.wait(is_out(rank), f"the eviction of rank {rank}")
        after = cluster.wait_whole()
    assert incarnation(after, rank) == incarnation(before, rank) + 1
    assert after["requests"]["requeued"] > before["requests"]["requeued"]
    assert after["experts"]["replicas_min"] == 2
    came = lambda s: [e for e in s["events"] if e["kind"] == "repair" and str(rank) in e["starts"]]
    start = came(cluster.wait(came, "the record of the return"))[-1]["starts"][str(rank)]
    assert set(start["executables"].values()) == {"loaded"}, "an earlier incarnation compiled them"
    assert start["compilations"] == 0
    with contextlib.suppress(FileNotFoundError):  # of a kernel without autogroups
        assert nice_of(after["ranks"][rank]["pid"]) == 0, "it serves at full priority"


def test_kills_at_random_moments_change_nothing(cluster, seed):
    moments = random.Random(seed)
    for _ in range(3):
        rank = moments.randrange(RANKS)
        with cluster.load():
            time.sleep(moments.uniform(0.0, 0.4))
            cluster.signal(rank)
            cluster.wait(is_out(rank), f"the eviction of rank {rank}, seed {seed}")
        cluster.wait_whole()


def test_two_ranks_at_once_leave_all_experts_covered(cluster):
    started = time.time()
    with cluster.load():
        cluster.signal(1)
        cluster.signal(2)
        status = cluster.wait(
            lambda s: is_out(1)(s) and is_out(2)(s), "the eviction of ranks 1 and 2"
        )
        assert status["experts"]["missing"] == []
        cluster.wait_whole()
    commits = events_after(cluster.status(), started, "commit")
    repaired = [move for commit in commits for move in commit["moves"]]
    assert any("checkpoint" in move["sources"] for move in repaired), "nothing had to be loaded"


def test_a_rank_dies_while_a_repair_is_prepared(cluster):
    started = time.time()
    with cluster.load():
        cluster.signal(3, signal.SIGSTOP)  # it cannot prepare, so the change stays pending
        cluster.signal(0)
        cluster.wait(lambda s: s["state"] == "changing", "a pending change")
        cluster.signal(3)
        cluster.wait(lambda s: is_out(0)(s) and is_out(3)(s), "the eviction of ranks 0 and 3")
        cluster.wait_whole()
    status = cluster.status()
    prepared = {e["epoch"] for e in events_after(status, started, "prepare")}
    committed = {e["epoch"] for e in events_after(status, started, "commit")}
    assert prepared - committed, "no change was abandoned: the second death came too late"


def test_a_stopped_rank_is_evicted_and_replaced(cluster):
    before = cluster.status()
    with cluster.load():
        cluster.signal(1, signal.SIGSTOP)
        cluster.wait(is_out(1), "the eviction of the stopped rank")
        after = cluster.wait_whole()
    assert incarnation(after, 1) == incarnation(before, 1) + 1
    assert "silent" in events_after(after, 0, "dead")[-1]["reason"]


def test_a_rank_that_wakes_after_its_eviction_learns_of_it_and_returns(cluster):
    before = cluster.status()
    with cluster.load():
        cluster.signal(2, signal.SIGSTOP)
        cluster.wait(is_out(2), "the eviction of the stopped rank")
        cluster.signal(2, signal.SIGCONT)
        after = cluster.wait_whole()
    assert incarnation(after, 2) == incarnation(before, 2) + 1
    log = cluster.cluster.log_path("rank2").read_text()
    assert "ending: rank 2 was silent" in log


def test_a_returning_rank_may_die_on_its_way_and_return_again(cluster):
    with cluster.load():
        first = incarnation(cluster.status(), 1)
        cluster.signal(1)
        for dying, mode in ((first + 1, "alone"), (first + 2, "offered")):
            cluster.wait(
                lambda s, i=dying, m=mode: (
                    incarnation(s, 1) == i
                    and s["ranks"][1]["mode"] in (m, "offered", "preparing", "ready", "serving")
                ),
                f"incarnation {dying} to be {mode}",
            )
            cluster.signal(1)
        status = cluster.wait(
            lambda s: incarnation(s, 1) == first + 3 and s["ranks"][1]["mode"] == "serving",
            "the third return",
            120.0,
        )
    assert status["ranks"][1]["state"] == "active"


def test_a_successor_that_is_there_at_once_waits_its_turn(cluster):
    before = incarnation(cluster.status(), 2)
    with cluster.load():
        cluster.signal(2)
        cluster.cluster.start_rank(2)  # nobody has seen the death yet
        cluster.wait(is_out(2, before), "the eviction of rank 2")
        after = cluster.wait_whole()
    assert incarnation(after, 2) == before + 1


def test_too_few_ranks_block_and_a_return_goes_on(cluster):
    """One rank has 8 slots for 16 experts: nothing is served, and nothing is lost."""
    with cluster.load():
        for rank in (0, 2, 3):
            cluster.signal(rank)
        status = cluster.wait(
            lambda s: f"experts {s['experts']['missing']} have no live replica" in s["blocked"],
            "lost coverage",
        )
        assert status["state"] == "blocked"
        assert "16 slots are needed and ranks [1] have 8" in status["blocked"]
        assert "configure cluster.slots_per_rank=" in status["blocked"]
        code, answer = cluster.run(cluster.post({"model": "tiny-moe-kjv", "prompt": "x"}))
        assert code == 503
        assert "experts" in answer["error"]["message"]
        cluster.wait_whole()
