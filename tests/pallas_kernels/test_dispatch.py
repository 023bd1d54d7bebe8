"""Promises of dispatch, one class for all implementations."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch.api import dispatch
from pallas_kernels.dispatch.reference import dispatch_reference
from pallas_kernels.exchange.call import Call, Choices, ExchangeSpec
from pallas_kernels.window import WindowLayout
from tests.support.kernels import an_exchange, naive_dispatch, some_results
from tests.support.loopback import some_ranks


def reference(work, tokens_window=None):
    rows, here = dispatch_reference(work.x, work.slots, work.active, work.slots_per_rank)
    return np.asarray(rows), np.asarray(here)


def host(work, tokens_window=8):
    outcome = some_ranks(work.ranks, tokens=tokens_window).exchange(work, some_results(0, work))
    assert not any(s.any() for s in outcome.suspicion.values())
    return outcome.rows, outcome.here


@pytest.mark.parametrize("implementation", [reference, host], ids=lambda f: f.__name__)
class TestDispatch:
    def check(self, implementation, work, **options):
        rows, here = implementation(work, **options)
        wanted_rows, wanted_here = naive_dispatch(work)
        # Rows are copied, not computed, so not a bit may differ.
        np.testing.assert_array_equal(rows, wanted_rows)
        np.testing.assert_array_equal(here, wanted_here)

    @pytest.mark.parametrize("ranks", [1, 2, 4, 8])
    def test_every_row_reaches_the_ranks_of_its_slots_and_no_other(self, implementation, ranks):
        for seed in range(4):
            self.check(implementation, an_exchange(seed, ranks=ranks))

    def test_any_set_of_members_exchanges_among_itself(self, implementation):
        for members in itertools.product([0, 1], repeat=4):
            self.check(implementation, an_exchange(1).among(np.flatnonzero(members)))

    def test_all_rows_may_go_to_one_rank(self, implementation):
        self.check(implementation, an_exchange(2, only_ranks=[2], none_share=0.0))

    def test_choices_without_a_slot_go_nowhere(self, implementation):
        self.check(implementation, an_exchange(3, none_share=1.0))

    def test_ranks_without_tokens_still_receive(self, implementation):
        work = an_exchange(4, none_share=0.0)
        work.slots[[0, 2]] = -1
        self.check(implementation, work)

    def test_a_step_may_be_narrower_than_the_window(self, implementation):
        for tokens in (1, 5):
            self.check(implementation, an_exchange(5, tokens=tokens), tokens_window=8)


def test_weights_of_every_token_travel_with_it():
    work = an_exchange(6)
    outcome = some_ranks().exchange(work, some_results(0, work))
    for destination in range(work.ranks):
        np.testing.assert_array_equal(outcome.sent_weights[destination], work.weights)


def test_all_members_learn_the_largest_vote_of_any():
    work = an_exchange(7).among([0, 2, 3])
    outcome = some_ranks().exchange(work, some_results(0, work), votes=[2, 9, 0, 1])
    assert outcome.vote[[0, 2, 3]].tolist() == [2, 2, 2]


def lower_dispatch(tokens, hidden, choices, **layout):
    call = Call(
        rank=np.int32(0),
        active=np.ones(2, np.int32),
        epoch=np.uint32(1),
        round=np.uint32(2),
        deadline_ms=np.uint32(1),
        vote=np.uint32(0),
        suspicion=np.zeros(2, np.int32),
    )
    window = WindowLayout(ranks=2, **{"tokens": 4, "choices": 2, "hidden": 8} | layout)
    arguments = (
        jnp.zeros((tokens, hidden)),
        jnp.zeros((tokens, choices), jnp.int32),
        jnp.zeros((tokens, choices)),
        jnp.zeros((2, 4096), jnp.uint8),
    )
    spec = ExchangeSpec(window, slots_per_rank=2)
    run = lambda x, slots, weights, heap: dispatch(x, Choices(slots, weights), heap, call, spec)
    return jax.eval_shape(run, *arguments)


@pytest.mark.parametrize("sizes", [(5, 8, 2), (4, 7, 2), (4, 8, 3)])
def test_what_does_not_fit_the_window_is_refused_while_tracing(sizes):
    tokens, hidden, choices = sizes
    brought = f"{tokens} tokens x {hidden} channels x {choices} choices"
    said = f"{brought} do not fit a window of 4 x 8 x 2"
    with pytest.raises(ValueError, match=said):
        lower_dispatch(*sizes)


def test_rows_of_another_type_are_refused_by_name():
    with pytest.raises(NotImplementedError, match="row_dtype='float16'"):
        lower_dispatch(4, 8, 2, row_dtype="float16")
