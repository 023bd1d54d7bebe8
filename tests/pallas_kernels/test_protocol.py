"""Promises of dispatch and combine when ranks die, stall or come back late.

Every exchange starts in windows full of NaN rows with real slot ids, as an earlier round may have
left them, so one stale row in a sum shows in the result.
"""

import contextlib
import threading

import numpy as np
import pytest

from eep_jax.engine.lockstep import Lockstep
from pallas_kernels.exchange.signals import first_round, parity
from tests.support.kernels import an_exchange, naive_combine, some_results
from tests.support.loopback import (
    JOIN_S,
    dying_at_post,
    naive_chain,
    some_ranks,
    waits_that_know,
)

MODES = pytest.mark.parametrize("mode", ["per_choice", "per_rank"])
# A chain of float32 exchanges against float64; some thirty roundings of 2**-24 each.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def without_results_of(dead, results):
    left = results.copy()
    left[list(dead)] = np.nan  # so that reading one of them shows
    return left


@MODES
@pytest.mark.parametrize("absent", [{0}, {3}, {1, 2}, {0, 1, 3}])
def test_absent_ranks_and_only_they_are_suspected_and_left_out(mode, absent):
    work, cluster = an_exchange(sum(absent)), some_ranks(mode=mode)
    results = some_results(1, work)
    with waits_that_know(set(absent)):
        outcome = cluster.exchange(work, without_results_of(absent, results), absent=absent)
    survivors = [r for r in range(4) if r not in absent]
    wanted = naive_combine(work.among(survivors), results)
    for rank in survivors:
        assert outcome.accused_by(rank) == sorted(absent)
        unheard = outcome.rows[rank, list(absent)], outcome.here[rank, list(absent)] + 1
        assert not any(part.any() for part in unheard) and outcome.vote[rank] == 1
        np.testing.assert_allclose(outcome.y[rank], wanted[rank], **CLOSE)


def test_a_real_deadline_ends_the_wait_for_a_rank_that_never_came():
    work = an_exchange(2)
    outcome = some_ranks().exchange(work, some_results(1, work), absent={2}, deadline_ms=700)
    assert [outcome.accused_by(rank) for rank in (0, 1, 3)] == [[2]] * 3


@pytest.mark.parametrize("layers", [1, 3])
def test_a_step_times_out_once_however_many_layers_it_has(layers):
    work, cluster = an_exchange(3), some_ranks()
    with waits_that_know({1}) as log:
        outcome = cluster.chain(work, layers, absent={1})
    wanted = naive_chain(work.among([0, 2, 3]), layers)
    for rank in (0, 2, 3):
        np.testing.assert_allclose(outcome[rank][0], wanted[rank], **CLOSE)
        assert np.flatnonzero(outcome[rank][1]).tolist() == [1]
        waits = [(asked, missing) for who, asked, missing in log if who == rank]
        assert waits[0] == ((0, 1, 2, 3), (1,))
        assert waits[1:] == [((0, 2, 3), ())] * (2 * layers - 1)


def test_a_step_under_the_next_epoch_waits_for_nobody_who_left():
    work, cluster = an_exchange(3).among([0, 2, 3]), some_ranks()
    with waits_that_know({1}) as log:
        outcome = cluster.chain(work, 2)
    assert not any(suspicion.any() for _, suspicion in outcome.values())
    assert all(asked == (0, 2, 3) and not missing for _, asked, missing in log)


@MODES
@pytest.mark.parametrize("seed", range(20))
def test_a_rank_that_dies_anywhere_in_a_step_hangs_nobody_and_adds_no_stale_row(mode, seed):
    random = np.random.default_rng(seed)
    layers, work, cluster, dead = 2, an_exchange(seed), some_ranks(mode=mode), set()
    victim, post = int(random.integers(4)), int(random.integers(4 * 2 * layers))
    with waits_that_know(dead), dying_at_post({victim: post}, cluster, dead):
        outcome = cluster.chain(work, layers)
    assert sorted(outcome) == [r for r in range(4) if r != victim]
    unharmed = naive_chain(work, layers)
    for rank, (x, suspicion) in outcome.items():
        accused = np.flatnonzero(suspicion).tolist()
        assert accused in ([], [victim]), f"rank {rank} blames {accused}, rank {victim} died"
        assert np.isfinite(x).all()
        if not accused:
            np.testing.assert_allclose(x, unharmed[rank], **CLOSE)


@MODES
@pytest.mark.parametrize("post", range(8))
def test_each_survivor_counts_a_dying_rank_fully_or_not_at_all(mode, post):
    work, cluster, dead = an_exchange(4, none_share=0.0), some_ranks(mode=mode), set()
    results = some_results(5, work)
    with waits_that_know(dead), dying_at_post({1: post}, cluster, dead):
        outcome = cluster.exchange(work, results)
    for rank in (0, 2, 3):
        members = [0, 2, 3] if outcome.accused_by(rank) else [0, 1, 2, 3]
        wanted = naive_combine(work.among(members), results)
        np.testing.assert_allclose(outcome.y[rank], wanted[rank], **CLOSE)
        # Four flags of dispatch, then four of combine, each in the order of the ranks.
        was_told_everything = post > 4 + rank
        assert outcome.accused_by(rank) == ([] if was_told_everything else [1])


@MODES
@pytest.mark.parametrize("seed", range(6))
def test_three_ranks_that_fail_at_three_points_leave_the_fourth_well(mode, seed):
    points = np.random.default_rng(seed).integers(0, 16, 3).tolist()
    work, cluster, dead = an_exchange(seed), some_ranks(mode=mode), set()
    survivor = seed % 4
    victims = dict(zip([r for r in range(4) if r != survivor], points, strict=True))
    with waits_that_know(dead), dying_at_post(victims, cluster, dead):
        outcome = cluster.chain(work, 2)
    x, suspicion = outcome[survivor]
    assert np.isfinite(x).all() and not suspicion[survivor]
    if not suspicion.any():
        np.testing.assert_allclose(x, naive_chain(work, 2)[survivor], **CLOSE)


@contextlib.contextmanager
def a_late_writer(cluster, rank: int):
    """An evicted rank that still lives: writes all it can reach, with flags of every old round."""
    stop = threading.Event()

    def write():
        step = 0
        while not stop.is_set():
            step += 1
            for window in cluster.windows:
                for name in ("rows", "returns", "weights"):
                    window[name][:, rank] = np.nan
                window["slots"][:, rank] = step % cluster.spec.slots_per_rank
                window["votes"][:, rank] = 1000
                old = first_round(step % (cluster.epoch - 1) + 1) + step % 7
                window["sent"][:, rank] = window["returned"][:, rank] = old
                window["wake"][rank] = old

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(JOIN_S)
    assert not thread.is_alive()


@MODES
def test_late_writes_of_an_evicted_rank_change_nothing(mode):
    cluster, survivors = some_ranks(mode=mode), [0, 1, 3]
    cluster.epoch = max(cluster.epoch, 3)
    for seed in range(5):
        work = an_exchange(seed).among(survivors)
        results = without_results_of([2], some_results(6, work))
        with a_late_writer(cluster, 2):
            outcome = cluster.exchange(work, results)
        assert outcome.vote[survivors].tolist() == [1, 1, 1]
        assert not any(outcome.accused_by(rank) for rank in survivors)
        np.testing.assert_allclose(outcome.y, naive_combine(work, results), **CLOSE)


@MODES
def test_a_rank_that_was_evicted_can_take_part_again(mode):
    cluster, everyone = some_ranks(mode=mode), [0, 1, 2, 3]
    cluster.epoch = max(cluster.epoch, 3)
    for members in (everyone, [0, 1, 3], everyone):
        work = an_exchange(7).among(members)
        results = some_results(8, work)
        outcome = cluster.exchange(work, results)
        np.testing.assert_allclose(outcome.y, naive_combine(work, results), **CLOSE)


def test_a_flag_of_another_epoch_satisfies_no_wait():
    work, cluster = an_exchange(9), some_ranks()
    cluster.start_epoch()
    next_one = cluster.epoch + 1
    # Rank 2 never comes; its flags show the right count within epochs before and after.
    for window in cluster.windows:
        for epoch in (next_one - 1, next_one + 1, next_one + 2048):
            flags = [first_round(epoch), first_round(epoch) + 1]
            window["sent"][:, 2] = window["returned"][:, 2] = flags[next_one % 2]
    with waits_that_know({2}):
        outcome = cluster.exchange(work, some_results(1, work), absent={2})
    assert [outcome.accused_by(rank) for rank in (0, 1, 3)] == [[2]] * 3


def abort_once_waiting(cluster, rank: int, flag: str, work, layers: int):
    """Runs `rank` alone among absent peers; aborts it when it has posted its own `flag`."""
    cluster.start_epoch()
    cluster.poison()
    current = cluster.round
    window, half = cluster.windows[rank], parity(current)
    if flag == "returned":
        # Its peers came to dispatch, without rows for it, and not to combine.
        for peer in set(range(4)) - {rank}:
            window["slots"][half, peer] = -1
            window["sent"][half, peer] = current
    lockstep = Lockstep(cluster.spec.layout, cluster.heaps[rank])

    def abort():
        while window[flag][half, rank] != current:
            stop.wait(0.001)
        lockstep.abort(cluster.epoch + 1)

    stop = threading.Event()
    thread = threading.Thread(target=abort, daemon=True)
    thread.start()
    arguments = (work.x[rank], work.slots[rank], work.weights[rank], cluster.arrays[rank])
    out = cluster.chain_program(rank, layers)(*arguments, cluster.call(rank, work.active))
    thread.join(JOIN_S)
    window["abort"][...] = 0
    return np.asarray(out[0]), np.asarray(out[1])


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("flag", ["sent", "returned"])
@pytest.mark.timeout(40)  # less than the deadline of the step: the abort must end it
def test_an_abort_ends_the_wait_and_the_rest_of_the_step(flag, layers):
    work, cluster = an_exchange(10), some_ranks()
    with waits_that_know(set()) as log:
        y, suspicion = abort_once_waiting(cluster, 1, flag, work, layers)
    assert suspicion.tolist() == [0, 1, 0, 0], "its own entry says that the step was aborted"
    everyone, before = (0, 1, 2, 3), [()] * (flag == "returned")
    ended = [(1, everyone, missing) for missing in (*before, None)]
    assert log == ended, "after the abort no exchange waits"
    assert not y.any()


def test_an_abort_of_the_running_epoch_or_before_changes_nothing():
    work, cluster = an_exchange(11), some_ranks()
    results = some_results(12, work)
    for window in cluster.windows:
        window["abort"][...] = cluster.epoch + 1
    outcome = cluster.exchange(work, results)
    assert not any(outcome.accused_by(rank) for rank in range(4))
    for window in cluster.windows:
        window["abort"][...] = 0
