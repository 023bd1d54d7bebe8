"""Promises of combine, one class for all implementations and both modes."""

import dataclasses
import itertools

import numpy as np
import pytest

from pallas_kernels.combine.host import ordered_sum
from pallas_kernels.combine.reference import combine_reference
from tests.support.kernels import an_exchange, naive_combine, some_results
from tests.support.loopback import some_ranks

# Sums of at most three products of float32 near one: a few units in the last place, 2**-24 each,
# because XLA may fuse a product into a sum and `per_rank` adds in another order.
CLOSE = {"rtol": 2e-6, "atol": 2e-6}


def reference(work, results, mode, tokens_window=None):
    slots, weights = work.slots, work.weights
    # What an inactive rank may have left is never summed.
    results = np.where(work.active[:, None, None, None, None] > 0, results, np.float32(np.nan))
    return np.asarray(
        combine_reference(results, slots, weights, work.active, work.slots_per_rank, mode)
    )


def host(work, results, mode, tokens_window=8):
    outcome = some_ranks(work.ranks, tokens=tokens_window, mode=mode).exchange(work, results)
    assert not any(s.any() for s in outcome.suspicion.values())
    return outcome.y


@pytest.mark.parametrize("mode", ["per_choice", "per_rank"])
@pytest.mark.parametrize("implementation", [reference, host], ids=lambda f: f.__name__)
class TestCombine:
    def check(self, implementation, mode, work, **options):
        results = some_results(9, work)
        y = implementation(work, results, mode, **options)
        np.testing.assert_allclose(y, naive_combine(work, results), **CLOSE)

    @pytest.mark.parametrize("ranks", [1, 2, 4, 8])
    def test_every_token_gets_the_weighted_sum_of_its_choices(self, implementation, mode, ranks):
        for seed in range(4):
            self.check(implementation, mode, an_exchange(seed, ranks=ranks))

    def test_any_set_of_members_sums_only_what_members_computed(self, implementation, mode):
        for members in itertools.product([0, 1], repeat=4):
            self.check(implementation, mode, an_exchange(1).among(np.flatnonzero(members)))

    def test_all_choices_may_lie_on_one_rank(self, implementation, mode):
        self.check(implementation, mode, an_exchange(2, only_ranks=[1], none_share=0.0))

    def test_one_rank_may_hold_several_choices_of_a_token(self, implementation, mode):
        work = an_exchange(3, only_ranks=[0, 3], none_share=0.0)
        work.slots[:, 0] = work.slots[:, 0, :1]
        self.check(implementation, mode, work)

    def test_tokens_without_any_slot_get_zero(self, implementation, mode):
        self.check(implementation, mode, an_exchange(4, none_share=1.0))

    def test_ranks_without_tokens_compute_for_others(self, implementation, mode):
        work = an_exchange(5, none_share=0.0)
        work.slots[[1, 2]] = -1
        self.check(implementation, mode, work)

    def test_a_step_may_be_narrower_than_the_window(self, implementation, mode):
        for tokens in (1, 5):
            self.check(implementation, mode, an_exchange(6, tokens=tokens), tokens_window=8)


def test_per_choice_adds_in_the_order_of_k_to_the_bit():
    work = an_exchange(7)
    results = some_results(8, work)
    np.testing.assert_array_equal(host(work, results, "per_choice"), naive_combine(work, results))


def moved(work, owner_of):
    """The same routing with the work of rank r done by rank `owner_of[source][r]`."""
    owner, local = work.slots // work.slots_per_rank, work.slots % work.slots_per_rank
    new = np.stack([np.asarray(owner_of[s])[owner[s]] for s in range(work.ranks)])
    slots = np.where(work.slots >= 0, new * work.slots_per_rank + local, -1)
    return slots.astype(np.int32)


@pytest.mark.parametrize(
    "owner_of",
    [
        [[3, 2, 1, 0]] * 4,  # another placement
        [[0, 1, 0, 1]] * 4,  # two ranks do the work of four
        [[0, 1, 2, 3], [3, 0, 1, 2], [2, 2, 0, 0], [1, 1, 1, 1]],  # other replicas for each source
    ],
)
def test_per_choice_gives_the_same_bits_wherever_experts_live(owner_of):
    work = an_exchange(11)
    of_choice = some_results(12, work).sum(axis=0)  # one owner each, so this only drops the axis
    before = host(work, some_results(12, work), "per_choice")
    after = dataclasses.replace(work, slots=moved(work, owner_of))
    owner = after.slots // work.slots_per_rank
    elsewhere = owner[None] != np.arange(4)[:, None, None, None]
    results = np.where((elsewhere | (after.slots < 0)[None])[..., None], 0, of_choice[None])
    np.testing.assert_array_equal(host(after, results.astype(np.float32), "per_choice"), before)


def test_a_sum_of_one_choice_is_its_product():
    weights, rows = np.float32([[0.5]]), np.float32([[[2.0, 4.0]]])
    np.testing.assert_array_equal(ordered_sum(weights, rows), [[1.0, 2.0]])
