"""Promises of a step over ranks: as the model in one process, whoever is in, never recompiled."""

import functools
import itertools

import jax
import numpy as np
import pytest

from eep_jax.engine.compilations import CompileCounter
from eep_jax.library.step_engine import CALLS_MAX
from eep_jax.placement.planner import plan_admission, plan_repair
from tests.eep_jax.library.factories import KINDS, StepperCluster, a_model, some_rows
from tests.support.loopback import in_threads, waits_that_know

RANKS = 4
# Sums of 16 and 12 float32 products in another order, through two layers.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@functools.cache
def compiled(ranks: int, kind: str = "softmax_topk") -> StepperCluster:
    return StepperCluster(ranks, kind, redundancy=min(2, ranks))


def a_cluster(ranks: int = RANKS, kind: str = "softmax_topk") -> StepperCluster:
    """All ranks serve the whole placement in a new epoch."""
    cluster = compiled(ranks, kind)
    cluster.change(cluster.ranks, cluster.whole)
    return cluster


def rows_of(ranks, seed: int = 0) -> dict:
    return {rank: some_rows(100 * seed + rank) for rank in ranks}


def assert_as_in_one_process(found: dict, rows: dict, kind: str = "softmax_topk") -> None:
    for rank, x in rows.items():
        np.testing.assert_allclose(found[rank], a_model(kind)(x)[0], **CLOSE)


@pytest.mark.parametrize(
    ("ranks", "kind"), [(1, "softmax_topk"), *((RANKS, kind) for kind in KINDS)]
)
def test_ranks_together_compute_what_one_process_computes(ranks, kind):
    cluster = a_cluster(ranks, kind)
    for seed in range(3):
        rows = rows_of(cluster.ranks, seed)
        assert_as_in_one_process(cluster.call(rows), rows, kind)


def test_no_membership_changes_a_bit_and_nothing_is_compiled():
    cluster = a_cluster()
    rows = rows_of(cluster.ranks)
    wanted, traced = cluster.call(rows), cluster.traced
    assert traced == RANKS, "each rank traced its step once"
    for size in (3, 2, 1):
        for members in itertools.combinations(cluster.ranks, size):
            cluster.change(members, plan_repair(cluster.whole, members).placement)
            found = cluster.call({rank: rows[rank] for rank in members})
            for rank in members:
                np.testing.assert_array_equal(found[rank], wanted[rank])
    assert cluster.traced == traced
    assert [s.compilations_since_start for s in cluster.steppers] == [0] * RANKS


@pytest.mark.parametrize("dead", range(RANKS))
def test_a_call_in_which_a_rank_died_is_run_again_with_the_same_result(dead):
    cluster = a_cluster()
    rows = rows_of(cluster.ranks)
    wanted = cluster.call(rows)
    survivors = [r for r in cluster.ranks if r != dead]
    futures = cluster.submit({rank: rows[rank] for rank in survivors})
    with waits_that_know({dead}):
        outcomes = cluster.advance(survivors)
    assert not any(outcome.committed for outcome in outcomes.values())
    assert {outcome.accused for outcome in outcomes.values()} == {(dead,)}
    assert not any(future.done() for future in futures.values())
    repaired = plan_repair(cluster.whole, survivors).placement
    cluster.change(survivors, repaired)
    assert all(outcome.committed for outcome in cluster.advance(survivors).values())
    for rank in survivors:
        np.testing.assert_array_equal(futures[rank].result(0), wanted[rank])
    back = plan_admission(repaired, survivors, [dead], redundancy=2).placement
    cluster.change(cluster.ranks, back)
    found = cluster.call(rows)
    for rank in cluster.ranks:
        np.testing.assert_array_equal(found[rank], wanted[rank])
    assert [s.compilations_since_start for s in cluster.steppers] == [0] * RANKS


def test_a_rank_without_a_call_computes_for_the_others():
    cluster = a_cluster()
    rows = rows_of([2])
    futures = cluster.submit(rows)
    cluster.advance(cluster.ranks)
    np.testing.assert_allclose(futures[2].result(0), a_model()(rows[2])[0], **CLOSE)


def test_without_calls_all_pause_and_a_call_wakes_all():
    cluster = a_cluster()
    cluster.advance(cluster.ranks)
    assert all(s.paused and not s.try_wake() for s in cluster.steppers)
    rows = rows_of(cluster.ranks)
    futures = cluster.submit({1: rows[1]})
    assert not cluster.steppers[0].try_wake(), "it was not told yet"
    assert cluster.steppers[1].try_wake() and all(s.try_wake() for s in cluster.steppers)
    cluster.advance(cluster.ranks)
    assert futures[1].done() and all(s.paused for s in cluster.steppers)


def test_calls_that_wait_keep_all_ranks_stepping():
    cluster = a_cluster()
    futures = [cluster.submit({0: some_rows(seed)})[0] for seed in range(3)]
    for count in range(3):
        assert not cluster.steppers[3].paused
        cluster.advance(cluster.ranks)
        assert [f.done() for f in futures] == [n <= count for n in range(3)], "in their order"
    assert all(s.paused for s in cluster.steppers)


def test_an_abort_ends_a_step_at_once_and_accuses_nobody():
    cluster = a_cluster()
    futures = cluster.submit({0: some_rows()})
    cluster.steppers[0].lockstep.abort(cluster.epoch + 1)
    outcome = in_threads({0: cluster.steppers[0].advance})[0]
    assert not outcome.committed and outcome.accused == ()
    assert not futures[0].done()
    cluster.change(cluster.ranks, cluster.whole)
    cluster.advance(cluster.ranks)
    assert futures[0].done()


def test_ranks_hold_together_for_a_planned_change():
    cluster = a_cluster()
    cluster.steppers[1].vote_hold()
    futures = cluster.submit(rows_of(cluster.ranks))
    cluster.advance(cluster.ranks)
    assert all(f.done() for f in futures.values()) and all(s.held for s in cluster.steppers)
    cluster.change(cluster.ranks, cluster.whole)
    assert not any(s.held for s in cluster.steppers)


def test_choices_without_a_live_expert_are_counted():
    cluster = a_cluster(1)
    lost = [(0, slot) for slot, expert in enumerate(cluster.whole.slots[0]) if expert < 4]
    cluster.change([0], cluster.whole.without(lost))
    before = cluster.steppers[0].dropped
    cluster.call(rows_of([0]))
    assert cluster.steppers[0].dropped > before


def test_a_call_of_other_shapes_is_refused_with_both():
    cluster = a_cluster()
    expected = r"compiled for .*float32\[8, 16\].* not for .*float32\[7, 16\].*pad"
    with pytest.raises(ValueError, match=expected):
        cluster.steppers[0].submit((cluster.weights, np.zeros((7, 16), np.float32)))
    futures = [cluster.submit({0: some_rows()})[0] for _ in range(CALLS_MAX)]
    with pytest.raises(ValueError, match=f"{CALLS_MAX} calls wait"):
        cluster.submit({0: some_rows()})
    for _ in range(CALLS_MAX):
        cluster.advance(cluster.ranks)
    assert all(f.done() for f in futures)


def test_only_compilations_of_steps_are_counted():
    counter, scale = CompileCounter(only_inside=True), np.float32(3)
    jax.jit(lambda x: x * scale)(np.ones(3))
    assert counter.total == 0
    with counter:
        jax.jit(lambda x: x + scale)(np.ones(3))
        in_threads({0: lambda: jax.block_until_ready(jax.jit(lambda x: x - scale)(np.ones(3)))})
    assert counter.total == 1, "the one of this thread"


def test_after_its_end_a_rank_takes_no_calls():
    cluster = StepperCluster(1)
    waiting = cluster.submit({0: some_rows()})[0]
    cluster.steppers[0].close(RuntimeError("over"))
    with pytest.raises(RuntimeError, match="over"):
        waiting.result(0)
    with pytest.raises(RuntimeError, match="over"):
        cluster.submit({0: some_rows()})
