"""Promises of rounds and waits: an old flag satisfies no wait, and every wait ends."""

import threading
import time

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.exchange import signals
from pallas_kernels.exchange.signals import (
    EPOCH_MASK,
    ROUND_BITS,
    ROUND_MASK,
    first_round,
    next_round,
)

epochs = st.integers(0, 2**32 - 1)
counts = st.integers(0, 2**20)
PASSED = 0  # a deadline of the monotonic clock that is over
FAR_NS = 60 * 10**9


def later(current: int, steps: int) -> int:
    return int(next_round(np.uint32(current), steps))


@given(epochs, st.integers(0, 2**21))
def test_rounds_stay_in_their_epoch(epoch, steps):
    found = later(first_round(epoch), steps)
    assert found >> ROUND_BITS == epoch & EPOCH_MASK
    assert found & ROUND_MASK == (signals.FIRST_COUNT + steps) & ROUND_MASK


def test_rounds_wrap_inside_their_twenty_bits():
    last = first_round(5) - signals.FIRST_COUNT + ROUND_MASK
    assert later(last, 1) == 5 << ROUND_BITS
    assert later(last, 1 + signals.FIRST_COUNT) == first_round(5)


@given(epochs, st.integers(0, 2**20))
def test_parity_alternates_even_over_a_wrap(epoch, steps):
    current = later(first_round(epoch), steps)
    assert signals.parity(current) != signals.parity(later(current, 1))
    assert signals.parity(current) == signals.parity(later(current, 2))


@given(st.integers(1, 2**31), st.integers(1, EPOCH_MASK), counts, counts)
def test_no_round_of_one_epoch_is_a_round_of_the_next_4095(epoch, distance, steps, other_steps):
    ours = later(first_round(epoch), steps)
    assert ours != later(first_round(epoch + distance), other_steps)


@given(epochs)
def test_no_epoch_starts_at_a_round_that_a_cleared_flag_shows(epoch):
    assert first_round(epoch) != 0 and later(first_round(epoch), 1) != 0


def test_numpy_and_jax_count_alike():
    for current in (first_round(1), first_round(EPOCH_MASK) | ROUND_MASK):
        counted = jax.jit(next_round)(np.uint32(current))
        assert counted.dtype == np.uint32 and int(counted) == later(current, 1)


def flags_of(*values):
    return np.array(values, np.uint32)


def wait(flags, wanted=7, ranks=(0,), abort=0, epoch=3, deadline_ns=PASSED):
    abort = abort if isinstance(abort, np.ndarray) else flags_of(abort)
    return signals.wait_round(flags, wanted, ranks, abort, epoch, deadline_ns)


def test_a_flag_that_is_there_needs_no_time():
    assert wait(flags_of(7, 7), ranks=(0, 1)) == ([], False)


def test_all_missing_ranks_are_named_and_no_other():
    assert wait(flags_of(7, 6, 7, 0), ranks=(0, 1, 2, 3)) == ([1, 3], False)


def test_ranks_not_waited_for_are_not_missing():
    assert wait(flags_of(0, 7), ranks=(1,)) == ([], False)


@given(st.integers(0, 2**32 - 1))
def test_only_the_exact_round_satisfies_a_wait(found):
    wanted = first_round(3)
    assert wait(flags_of(found), wanted) == ([] if found == wanted else [0], False)


@pytest.mark.parametrize(("abort", "ends"), [(2, False), (3, False), (4, True), (2**31, True)])
def test_only_a_later_epoch_aborts_a_wait(abort, ends):
    assert wait(flags_of(0), abort=abort) == ([] if ends else [0], ends)


def test_an_abort_takes_back_nothing_that_came():
    assert wait(flags_of(7), abort=9) == ([], False)


def in_background(function):
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("what", ["flag", "abort"])
def test_a_sleeping_wait_ends_when_another_thread_writes(what):
    flags, abort, found = flags_of(0), flags_of(0), []
    deadline_ns = time.monotonic_ns() + FAR_NS
    waiter = in_background(lambda: found.append(wait(flags, abort=abort, deadline_ns=deadline_ns)))
    signals.post(*((flags, 7) if what == "flag" else (abort, 4)))
    waiter.join(10)
    assert found == [([], what == "abort")]


def test_posting_wakes_a_sleeper_without_its_timeout():
    flag = flags_of(0)
    sleeper = in_background(lambda: signals.sleep_on(flag, 0, FAR_NS))
    signals.post(flag, 1)
    sleeper.join(10)
    assert not sleeper.is_alive()


def test_a_wait_on_a_flag_that_has_changed_does_not_sleep():
    signals.sleep_on(flags_of(5), 4, FAR_NS)
