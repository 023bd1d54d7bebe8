"""Promises of several engines: ranks die and return, and no client sees another token for it."""

import functools

import numpy as np
import pytest

from eep_jax.placement.planner import plan_admission, plan_repair
from tests.support.engines import EngineCluster, a_request, compiling_nothing
from tests.support.loopback import dying_at_post, waits_that_know
from tests.support.models import a_run

RANKS = 3


@functools.cache
def compiled_cluster() -> EngineCluster:
    return EngineCluster(a_run(RANKS, slots_per_rank=6))


def a_cluster() -> EngineCluster:
    """Three ranks, eight experts on eighteen slots, two replicas each; nothing to do yet."""
    return compiled_cluster().begin()


def some_requests(count: int = 2 * RANKS) -> dict:
    """Greedy and sampled ones of several lengths, by name."""
    random, requests = np.random.default_rng(5), {}
    for n in range(count):
        prompt = random.integers(0, 64, 1 + 4 * n % 11)
        how = {"temperature": n % 2 * 0.9, "seed": n}
        requests[f"r{n}"] = a_request(f"r{n}", prompt.tolist(), 10 + n, **how)
    return requests


def submit(cluster: EngineCluster, requests: dict) -> None:
    for n, request in enumerate(requests.values()):
        cluster.engines[n % RANKS].add(request)


@functools.cache
def unharmed() -> dict:
    """The tokens of `some_requests` where nothing goes wrong."""
    cluster = a_cluster()
    submit(cluster, some_requests())
    return cluster.serve()


def repair(cluster: EngineCluster, dead: int) -> None:
    """What the coordinator and the survivors do once a rank is known dead."""
    survivors = [r for r in cluster.ranks if r != dead]
    cluster.change(survivors, plan_repair(cluster.placement, survivors).placement)
    cluster.requeue(dead, survivors[0], some_requests())


def admit(cluster: EngineCluster, rank: int) -> None:
    active = [r for r in cluster.ranks if r != rank]
    plan = plan_admission(cluster.placement, active, [rank], redundancy=2)
    cluster.change(cluster.ranks, plan.placement)


def test_every_request_gets_its_tokens_whichever_rank_it_is_given_to():
    cluster, requests = a_cluster(), some_requests()
    for n, request in enumerate(requests.values()):
        cluster.engines[(n + 1) % RANKS].add(request)
    assert cluster.serve() == unharmed()
    assert {name: len(t) for name, t in unharmed().items()} == {
        name: request.max_tokens for name, request in requests.items()
    }


def test_one_rank_alone_gives_the_same_tokens_as_three():
    cluster = a_cluster()
    alone = EngineCluster(a_run(1)).begin()
    for request in some_requests().values():
        alone.engines[0].add(request)
    submit(cluster, some_requests())
    assert alone.serve() == cluster.serve() == unharmed()


@pytest.mark.parametrize("dead", range(RANKS))
def test_a_rank_that_goes_away_is_accused_and_its_requests_go_on_elsewhere(dead):
    cluster = a_cluster()
    survivors = [r for r in cluster.ranks if r != dead]
    submit(cluster, some_requests())
    with compiling_nothing(cluster.engines):
        cluster.step(cluster.ranks, 6)
        with waits_that_know({dead}):
            accused = cluster.step_until_discarded(survivors)
        assert all(who in ((dead,), ()) for who in accused.values()) and (dead,) in accused.values()
        repair(cluster, dead)
        assert cluster.serve(survivors) == unharmed()


@pytest.mark.parametrize("wanting", [(0,), (1, 2), (0, 1, 2)])
def test_a_planned_change_loses_no_step(wanting):
    cluster = a_cluster()
    submit(cluster, some_requests())
    discarded = [engine.discarded for engine in cluster.engines]
    with compiling_nothing(cluster.engines):
        for _ in range(3):
            cluster.step(cluster.ranks, 2)
            cluster.hold(wanting)
            cluster.change(cluster.ranks)
        assert cluster.serve() == unharmed()
    assert [engine.discarded for engine in cluster.engines] == discarded


def test_ranks_that_are_idle_hold_too():
    cluster = a_cluster()
    submit(cluster, some_requests())
    assert cluster.serve() == unharmed()
    cluster.hold((1,))
    cluster.change(cluster.ranks)
    cluster.engines[0].add(a_request("late", (1, 2, 3), 5))
    assert len(cluster.serve()["late"]) == 5


def test_a_drained_rank_comes_back_with_the_executables_it_had():
    cluster, drained, stay = a_cluster(), 1, (0, 2)
    submit(cluster, some_requests())
    with compiling_nothing(cluster.engines):
        cluster.step(cluster.ranks, 5)
        cluster.hold((drained,))
        requests = some_requests()
        left = sorted(cluster.engines[drained].scheduler.ids())
        cluster.change(stay, plan_repair(cluster.placement, stay).placement)
        cluster.requeue(drained, stay[0], requests)
        for request_id in left:
            cluster.engines[drained].scheduler.cancel(request_id)
        cluster.step(stay, 4)
        cluster.hold((0,), stay)
        admit(cluster, drained)
        assert cluster.serve() == unharmed()


def test_choices_are_counted_once_for_every_token():
    cluster = a_cluster()
    for engine in cluster.engines:
        engine.take_chosen()
    submit(cluster, some_requests())
    cluster.serve()
    model = cluster.config.model
    fed = sum(len(r.prompt) + r.max_tokens - 1 for r in some_requests().values())
    chosen = np.sum([engine.take_chosen() for engine in cluster.engines], axis=0)
    assert chosen.sum() == fed * model.layers * model.experts_per_token
    assert all(not any(engine.take_chosen()) for engine in cluster.engines)


def test_a_rank_returns_as_a_new_process_while_the_others_serve():
    cluster, dead, survivors = a_cluster(), 1, (0, 2)
    submit(cluster, some_requests())
    with compiling_nothing([cluster.engines[r] for r in survivors]):
        cluster.step(cluster.ranks, 5)
        with waits_that_know({dead}):
            cluster.step_until_discarded(survivors)
        repair(cluster, dead)
        cluster.step(survivors, 4)
    cluster.restart(dead)
    with compiling_nothing(cluster.engines):
        admit(cluster, dead)
        cluster.engines[dead].add(a_request("late", (1, 2, 3), 5))
        tokens = dict(cluster.serve())
        assert len(tokens.pop("late")) == 5
    assert tokens == unharmed()


@pytest.mark.parametrize("seed", range(10))
def test_death_anywhere_in_a_step_changes_no_token(seed):
    random, dead = np.random.default_rng(seed), set()
    cluster = a_cluster()
    victim, post = int(random.integers(RANKS)), int(random.integers(100))
    survivors = [r for r in cluster.ranks if r != victim]
    submit(cluster, some_requests())
    with waits_that_know(dead), dying_at_post({victim: post}, cluster, dead):
        cluster.step_until_discarded(cluster.ranks)
    assert dead == {victim}
    repair(cluster, victim)
    with compiling_nothing(cluster.engines):
        cluster.step(survivors, 2)
        cluster.renew(victim)
        admit(cluster, victim)
        assert cluster.serve() == unharmed()


def test_changes_of_membership_while_all_are_well_change_no_token():
    cluster = a_cluster()
    submit(cluster, some_requests())
    with compiling_nothing(cluster.engines):
        for _ in range(4):
            cluster.step(cluster.ranks, 3)
            cluster.change(cluster.ranks)
        assert cluster.serve() == unharmed()


def test_idle_ranks_pause_together_and_wait_for_nobody():
    cluster = a_cluster()
    cluster.serve()
    steps = [engine.steps for engine in cluster.engines]
    assert all(engine.paused and not engine.try_wake() for engine in cluster.engines)
    cluster.serve()
    assert [engine.steps for engine in cluster.engines] == steps, "nobody steps while all pause"


@pytest.mark.parametrize("finder", range(RANKS))
def test_a_request_on_one_rank_wakes_all_in_the_same_round(finder):
    cluster = a_cluster()
    cluster.serve()
    others = [e for e in cluster.engines if e.rank != finder]
    doorbells = {e.rank: e.lockstep.doorbell() for e in others}
    assert not any(engine.try_wake() for engine in others)
    cluster.engines[finder].add(a_request("a", (1, 2, 3), 4))
    assert not any(engine.try_wake() for engine in others), "it has not looked yet"
    assert cluster.engines[finder].try_wake()
    assert all(e.lockstep.doorbell() != doorbells[e.rank] for e in others), "sleepers hear it"
    assert all(engine.try_wake() for engine in others)
    assert len({int(engine._round) for engine in cluster.engines}) == 1
    assert len(cluster.serve()["a"]) == 4


def test_a_rank_may_find_work_while_another_already_did():
    cluster = a_cluster()
    cluster.serve()
    for rank in (0, 2):
        cluster.engines[rank].add(a_request(f"r{rank}", (1, rank), 3))
    assert [engine.try_wake() for engine in cluster.engines] == [True] * RANKS
    cluster.serve()
    # The wake words of this pause are still there, and must not end the next one.
    assert not any(engine.try_wake() for engine in cluster.engines)


def test_a_change_ends_a_pause_and_leaves_the_idle_pausing_again():
    cluster = a_cluster()
    cluster.serve()
    cluster.change(cluster.ranks)
    assert not any(engine.paused for engine in cluster.engines)
    cluster.serve()
    assert all(engine.paused for engine in cluster.engines)


def test_an_expert_without_a_replica_is_counted_on_the_requests_it_touches():
    cluster = a_cluster()
    slots = cluster.placement.slots
    lost = [(r, s) for r in cluster.ranks for s, expert in enumerate(slots[r]) if expert < 4]
    cluster.change(cluster.ranks, cluster.placement.without(lost))
    cluster.engines[0].add(a_request("a", (1, 2, 3, 4), 6))
    cluster.engines[0].try_wake()
    assert len(cluster.serve()["a"]) == 6
    assert cluster.book.dropped["a"] > 0
