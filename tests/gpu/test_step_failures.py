"""Promises of dispatch and combine on a GPU when ranks die, stall or come back late.

Every epoch starts in windows full of NaN rows with real slots, so one stale row in a sum shows.

EEP_TEST_PLATFORM=gpu python -m pytest tests/gpu/test_step_failures.py
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from eep_jax.heap.cuda.loopback import CudaLoopbackHeap
from tests.gpu.exchanges import (
    DEADLINE_MS,
    Ranks,
    a_work,
    check_received,
    check_sums,
    some_loopback,
    some_results,
)

pytestmark = pytest.mark.gpu
WAIT_MS = 300  # the deadline where somebody does not come
SLACK_MS = 2_000  # what a busy machine may add to a wait
MODES = pytest.mark.parametrize(
    "layout", [(4, "per_choice", False), (4, "per_rank", True)], ids=["per_choice", "per_rank-fp8"]
)


def without_results_of(dead, results):
    left = results.copy()
    left[list(dead)] = np.nan  # so that reading one of them shows
    return left


def others(absent, ranks: int = 4) -> list[int]:
    return [r for r in range(ranks) if r not in absent]


@MODES
@pytest.mark.parametrize("absent", [{0}, {3}, {1, 2}, {0, 1, 3}], ids=str)
def test_absent_ranks_and_only_they_are_suspected_and_left_out(layout, absent):
    loopback, survivors = some_loopback(*layout), others(absent)
    ranks = Ranks(loopback, deadline_ms=WAIT_MS)
    work = a_work(sum(absent), loopback, none_share=0.1)
    results = without_results_of(absent, some_results(1, work))
    received, y = ranks.exchange(work, results, survivors)
    check_received(loopback, work, received, heard=survivors)
    check_sums(loopback, work, results, y, heard=survivors)
    for rank in survivors:
        assert ranks.accused_by(rank) == sorted(absent)
        assert 0.9 * WAIT_MS <= 1000 * ranks.seconds[rank] < WAIT_MS + SLACK_MS

    # The step runs again under the mask: nobody is waited for, and the sums are the same.
    ranks.poison()
    ranks.start(2, active=[int(r in survivors) for r in range(4)])
    work = work.among(survivors)
    received, again = ranks.exchange(work, results)
    check_received(loopback, work, received)
    for rank in survivors:
        assert ranks.accused_by(rank) == []
        np.testing.assert_array_equal(again[rank], y[rank])


@MODES
@pytest.mark.parametrize("dead", range(4))
def test_a_rank_that_dies_between_dispatch_and_combine_leaves_no_stale_row(layout, dead):
    loopback, survivors = some_loopback(*layout), others({dead})
    ranks = Ranks(loopback, deadline_ms=WAIT_MS)
    work = a_work(dead, loopback, "zipf")
    results = without_results_of({dead}, some_results(2, work))
    received = ranks.dispatch(work)
    check_received(loopback, work, received)
    del received[dead]
    y = ranks.combine(work, results, received)
    check_sums(loopback, work, results, y, heard=survivors)
    assert [ranks.accused_by(rank) for rank in survivors] == [[dead]] * 3


@MODES
def test_rows_of_the_round_before_the_last_are_not_summed_again(layout):
    """The half of the window that is used again holds real rows, not NaN."""
    loopback = some_loopback(*layout)
    ranks = Ranks(loopback, deadline_ms=WAIT_MS)
    for seed in range(2):
        ranks.exchange(a_work(seed, loopback), some_results(seed, a_work(seed, loopback)))
    work = a_work(7, loopback)
    results = some_results(8, work)
    received = ranks.dispatch(work, others({2}))
    check_received(loopback, work, received, heard=others({2}))
    y = ranks.combine(work, results, received)
    check_sums(loopback, work, results, y, heard=others({2}))


@MODES
def test_a_torn_answer_is_not_read(layout):
    """A rank dies while it writes: half of its rows are there, its flag is not."""
    loopback = some_loopback(*layout)
    ranks = Ranks(loopback, deadline_ms=WAIT_MS)
    work = a_work(9, loopback)
    results = some_results(10, work)
    received = ranks.dispatch(work)
    del received[1]
    heap = ranks.windows()
    for window in loopback.layout.views(heap):
        window["returns"][:, 1, ::2] = 1000.0
        window["returned"][:, 1] = ranks.calls[1].round - 2
    ranks.set_windows(heap)
    y = ranks.combine(work, results, received)
    check_sums(loopback, work, results, y, heard=others({1}))


def test_three_ranks_that_fail_at_three_points():
    """Before a dispatch, between dispatch and combine, and before the next dispatch."""
    loopback = some_loopback(8)
    ranks = Ranks(loopback, deadline_ms=150)
    first, second = a_work(0, loopback), a_work(1, loopback, "zipf")
    results = without_results_of({2, 5}, some_results(2, first))
    received = ranks.dispatch(first, others({2}, 8))
    check_received(loopback, first, received, heard=others({2}, 8))
    del received[5]
    y = ranks.combine(first, results, received)
    check_sums(loopback, first, results, y, heard=others({2, 5}, 8))

    survivors = others({2, 5, 7}, 8)
    assert [ranks.accused_by(rank) for rank in others({2, 5}, 8)] == [[2, 5]] * 6
    results = without_results_of({2, 5, 7}, some_results(3, second))
    received = ranks.dispatch(second, survivors)
    y = ranks.combine(second, results, received)
    check_sums(loopback, second, results, y, heard=survivors)
    assert [ranks.accused_by(rank) for rank in survivors] == [[2, 5, 7]] * 5


@MODES
def test_a_step_times_out_once_however_many_exchanges_it_has(layout):
    loopback, survivors = some_loopback(*layout), others({1})
    ranks = Ranks(loopback, deadline_ms=WAIT_MS)
    for seed in range(8):
        work = a_work(seed, loopback)
        results = some_results(seed, work)
        _, y = ranks.exchange(work, results, survivors)
        check_sums(loopback, work, results, y, heard=survivors)
    for rank in survivors:
        assert ranks.accused_by(rank) == [1]
        assert ranks.seconds[rank] < 2 * WAIT_MS / 1000, "sixteen waits, one of them in vain"


def abort_word(call, words):
    """The call with its abort word in an array on the GPU, which must be kept."""
    address = words.unsafe_buffer_pointer()
    halves = np.array([address & 0xFFFFFFFF, address >> 32], np.uint32)
    return dataclasses.replace(call, abort_address=halves)


@MODES
def test_an_abort_ends_the_step_at_once_and_blames_nobody(layout):
    loopback = some_loopback(*layout)
    ranks = Ranks(loopback, epoch=3, deadline_ms=60_000)
    work = a_work(1, loopback)
    words = jax.block_until_ready(jnp.full(8, 4, jnp.uint32))
    ranks.calls[1] = abort_word(ranks.calls[1], words)
    start = time.monotonic()
    for _ in range(3):
        received = ranks.dispatch(work, [1])
        assert ranks.accused_by(1) == [1], "its own entry says that the step was aborted"
        y = ranks.combine(work, some_results(2, work), received)
        assert ranks.accused_by(1) == [1]
    assert time.monotonic() - start < 30, "less than one deadline"
    assert not y[1].any(), "after the abort an exchange talks to nobody, not even itself"


@pytest.mark.parametrize("epoch", [0, 2, 3])
def test_an_abort_of_the_running_epoch_or_before_changes_nothing(epoch):
    loopback = some_loopback(4)
    ranks = Ranks(loopback, epoch=3, deadline_ms=WAIT_MS)
    words = jax.block_until_ready(jnp.full(8, epoch, jnp.uint32))
    ranks.calls = {r: abort_word(call, words) for r, call in ranks.calls.items()}
    work = a_work(2, loopback)
    results = some_results(3, work)
    _, y = ranks.exchange(work, results, others({0}))
    check_sums(loopback, work, results, y, heard=others({0}))
    assert [ranks.accused_by(rank) for rank in others({0})] == [[0]] * 3


def test_a_host_aborts_a_wait_that_is_under_way():
    loopback, epoch = some_loopback(4), 5
    ranks = Ranks(loopback, epoch=epoch, deadline_ms=60_000)
    work = a_work(3, loopback)
    heap = CudaLoopbackHeap(2, 4, 1 << 20)
    try:
        address = heap.control_address()
        halves = np.array([address & 0xFFFFFFFF, address >> 32], np.uint32)
        call = dataclasses.replace(ranks.calls[2], abort_address=halves)
        sent = ranks.send(work, 2, call)
        tokens = work.slots.shape[1]
        start = time.monotonic()
        out = loopback.receive(loopback.heap, call, sent, tokens=tokens)
        time.sleep(0.2)
        assert not out[3].is_ready(), "nobody came, so it waits"
        heap.control()[2, :4] = np.array([epoch + 1], np.uint32).view(np.uint8)
        heap.post_abort(epoch + 1)
        assert np.asarray(out[3]).tolist() == [0, 0, 1, 0]
        assert time.monotonic() - start < 30, "less than the deadline"
    finally:
        jax.effects_barrier()
        heap.release()


@MODES
def test_late_writes_of_an_evicted_rank_change_nothing(layout):
    """It sends and answers in its old epoch, with its own kernels, between any two phases."""
    loopback, late = some_loopback(*layout), 2
    ranks, sleeper = Ranks(loopback, epoch=2), Ranks(loopback, epoch=2)
    stale = a_work(20, loopback)

    def wake() -> None:
        call = sleeper.calls[late]
        for halves in range(2):
            call = dataclasses.replace(call, round=np.uint32(call.round + halves))
            sent = sleeper.send(stale, late, call)
            nan = np.full(
                (4, *stale.slots.shape[1:], stale.x.shape[-1]), np.nan, ml_dtypes.bfloat16
            )
            everything = np.zeros((4, *stale.slots.shape[1:]), np.int32)
            arguments = (nan, everything, stale.weights, loopback.heap, call)
            jax.block_until_ready((sent, loopback.send_home(*arguments)))

    ranks.start(3, active=[1, 1, 0, 1])
    for seed in range(4):
        work = a_work(seed, loopback, "zipf", none_share=0.1).among(ranks.members)
        results = some_results(seed, work)
        wake()
        received = ranks.dispatch(work)
        wake()
        check_received(loopback, work, received)
        y = ranks.combine(work, results, received)
        wake()
        check_sums(loopback, work, results, y)
        assert not any(ranks.accused_by(rank) for rank in work.members)


@MODES
def test_flags_of_other_epochs_satisfy_no_wait(layout):
    loopback, survivors = some_loopback(*layout), others({2})
    work = a_work(30, loopback)
    results = some_results(31, work)
    for other in (4, 6, 5 + 2048):
        ranks = Ranks(loopback, epoch=5, deadline_ms=WAIT_MS)
        rounds = [loopback.call(rank=0, epoch=other, steps=s).round for s in (0, 1)]
        heap = ranks.windows()
        for window in loopback.layout.views(heap):
            window["sent"][:, 2] = window["returned"][:, 2] = rounds
        ranks.set_windows(heap)
        _, y = ranks.exchange(work, results, survivors)
        check_sums(loopback, work, results, y, heard=survivors)
        assert [ranks.accused_by(rank) for rank in survivors] == [[2]] * 3


@MODES
def test_failure_repair_and_return_compile_nothing(layout, compilations):
    loopback, everyone, survivors = some_loopback(*layout), [0, 1, 2, 3], [0, 1, 3]
    ranks = Ranks(loopback)
    work = a_work(40, loopback)
    results = some_results(41, work)
    check = lambda y, heard: check_sums(loopback, work, results, y, heard)
    check(ranks.exchange(work, results)[1], everyone)
    compilations.clear()
    for epoch in (2, 5):
        ranks.start(epoch, active=[1] * 4)
        check(ranks.exchange(work, results)[1], everyone)
        ranks.start(epoch, active=[1] * 4, steps=1, deadline_ms=WAIT_MS)
        check(ranks.exchange(work, results, survivors)[1], survivors)
        # Evicted: the first and the second step are right at once.
        ranks.start(epoch + 1, active=[1, 1, 0, 1], deadline_ms=DEADLINE_MS)
        for _ in range(2):
            check(ranks.exchange(work.among(survivors), results)[1], survivors)
        # It returns with new memory.
        ranks.poison([2])
        ranks.start(epoch + 2, active=[1] * 4)
        check(ranks.exchange(work, results)[1], everyone)
        assert not any(ranks.accused_by(rank) for rank in everyone)
    assert not compilations
