"""Dispatch and combine on a GPU equal their specifications, for all routings and memberships.

EEP_TEST_PLATFORM=gpu python -m pytest tests/gpu/test_exchange.py
"""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.combine.reference import combine_reference
from pallas_kernels.dispatch.reference import dispatch_reference
from pallas_kernels.exchange.fp8 import pack_rows
from pallas_kernels.exchange.gpu import read_region
from tests.gpu.exchanges import (
    CLOSE,
    Ranks,
    a_work,
    check_received,
    check_sums,
    rows_of,
    some_loopback,
    some_results,
)
from tests.support.kernels import naive_combine

pytestmark = pytest.mark.gpu
# Each compiles its own kernels, which takes most of this file's time. R, mode, fp8
FOUR = [(4, "per_choice", False), (4, "per_rank", True)]
LAYOUTS = [(1, "per_choice", True), (2, "per_rank", False), *FOUR]
LAYOUTS += [(8, "per_choice", False), (8, "per_rank", True)]
ROUTINGS = ["random", "k_hot", "zipf", "one_rank"]


def name(layout) -> str:
    ranks, mode, fp8 = layout
    return f"{ranks}-{mode}-{'fp8' if fp8 else 'bf16'}"


def check_exchange(ranks: Ranks, work, seed: int) -> dict:
    results = some_results(seed, work)
    received, y = ranks.exchange(work, results)
    check_received(ranks.loopback, work, received)
    check_sums(ranks.loopback, work, results, y)
    assert not any(ranks.accused_by(rank) for rank in work.members)
    return y


@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
class TestEveryLayout:
    def test_all_routings_in_a_row_in_windows_of_nan(self, layout):
        ranks = Ranks(some_loopback(*layout))
        for seed, routing in enumerate(ROUTINGS * 2):
            check_exchange(ranks, a_work(seed, ranks.loopback, routing), seed)
            if seed % 3 == 2:
                ranks.poison()

    def test_choices_without_a_slot_and_ranks_without_tokens(self, layout):
        ranks = Ranks(some_loopback(*layout), epoch=2)
        for seed, none_share in enumerate((0.3, 0.9, 1.0)):
            work = a_work(seed, ranks.loopback, none_share=none_share)
            check_exchange(ranks, work, seed)
        for empty in ({0}, {layout[0] - 1}, set(range(layout[0]))):
            work = a_work(9, ranks.loopback, "zipf", empty=empty)
            y = check_exchange(ranks, work, 9)
            assert not any(y[rank].any() for rank in empty)

    def test_rounds_wrap_and_epochs_follow_without_clearing_a_flag(self, layout):
        ranks = Ranks(some_loopback(*layout))
        for epoch, steps in ((4095, 2**20 - 3), (4096, 1), (4097, 0)):
            ranks.start(epoch, steps=steps)
            for seed in range(3):
                check_exchange(ranks, a_work(seed, ranks.loopback, none_share=0.2), seed)


def masks(ranks: int) -> list[list[int]]:
    if ranks == 4:
        return [[int(m >> r & 1) for r in range(4)] for m in range(1, 16)]
    return [
        [1, 0, 1, 1, 0, 1, 1, 1],
        [0, 0, 0, 0, 0, 0, 0, 1],
        [1, 0] * 4,
        [0, 1, 1, 1, 1, 1, 1, 1],
    ]


@pytest.mark.parametrize("layout", [*FOUR, *LAYOUTS[-2:]], ids=name)
def test_every_membership_is_an_argument_of_the_same_executables(layout, compilations):
    loopback = some_loopback(*layout)
    ranks = Ranks(loopback)
    check_exchange(ranks, a_work(0, loopback, none_share=0.2), 0)  # compiles what checks compute
    compilations.clear()
    for seed, active in enumerate(masks(layout[0])):
        ranks.poison()
        ranks.start(2 + seed, active=active, steps=seed % 2)
        members = np.flatnonzero(active)
        # Slots of absent ranks stay in the routing: kernels leave them out themselves.
        work = a_work(seed, loopback, ROUTINGS[seed % 3], none_share=0.1).among(members)
        check_exchange(ranks, work, seed)
    assert not compilations


def test_the_specifications_say_the_same():
    """`dispatch_reference` and `combine_reference`; the other tests compare with plain loops."""
    loopback = some_loopback(4)
    ranks = Ranks(loopback, [1, 1, 0, 1])
    work = a_work(3, loopback, "zipf", none_share=0.1).among([0, 1, 3])
    results = some_results(4, work)
    received, y = ranks.exchange(work, results)
    data = [jnp.asarray(a) for a in (work.x, work.slots, work.active)]
    rows, here = dispatch_reference(*data, work.slots_per_rank)
    found = jnp.asarray(np.nan_to_num(results))
    sums = combine_reference(found, data[1], work.weights, data[2], work.slots_per_rank)
    for rank in work.members:
        array = np.asarray(rows_of()(received[rank][0])).astype(np.float32)
        np.testing.assert_array_equal(array, rows[rank])
        np.testing.assert_array_equal(received[rank][1], here[rank])
        np.testing.assert_allclose(y[rank], sums[rank], rtol=0, atol=4 * CLOSE * 4)


def test_per_choice_rounds_each_product_and_each_sum_in_the_order_of_k():
    loopback = some_loopback(4)
    work = a_work(5, loopback)
    results = some_results(6, work)
    _, y = Ranks(loopback).exchange(work, results)
    wanted = naive_combine(work, results)
    for rank in range(4):
        np.testing.assert_array_equal(y[rank], wanted[rank])


def test_per_choice_gives_the_same_bits_wherever_experts_live():
    loopback = some_loopback(4)
    before = a_work(7, loopback)
    owner, local = before.slots // before.slots_per_rank, before.slots % before.slots_per_rank
    moved = (3 - owner) * before.slots_per_rank + local
    after = dataclasses.replace(before, slots=moved.astype(np.int32))
    results = np.nan_to_num(some_results(8, before)).sum(axis=0)  # of each choice, wherever it ran
    everywhere = np.broadcast_to(results, (4, *results.shape))
    _, first = Ranks(loopback).exchange(before, everywhere)
    _, second = Ranks(loopback).exchange(after, everywhere)
    for rank in range(4):
        np.testing.assert_array_equal(first[rank], second[rank])


def test_a_step_may_be_narrower_than_the_window():
    loopback = some_loopback(2, "per_rank")
    ranks = Ranks(loopback)
    for seed in range(3):
        check_exchange(ranks, a_work(seed, loopback, none_share=0.2, tokens=8), seed)


def test_rows_leave_in_the_bytes_that_pack_rows_gives():
    loopback = some_loopback(2, "per_rank", True, hidden=2048)
    work = a_work(11, loopback, tokens=loopback.layout.tokens)
    size = np.float32(2.0) ** np.random.default_rng(0).integers(-40, 40, (*work.x.shape[:2], 16))
    x = (work.x * np.repeat(size, 128, axis=-1)).astype(ml_dtypes.bfloat16)
    x[0, 0], x[1, 1, :256] = 0, 1e-30
    work = dataclasses.replace(work, x=x.astype(np.float32))
    received, _ = Ranks(loopback).exchange(work, some_results(0, work))
    with jax.default_device(jax.devices("cpu")[0]):
        packed = np.asarray(pack_rows(jnp.asarray(x)))
    for rows, here, *_ in received.values():
        layout, after = loopback.layout, rows.lists.counts
        found = read_region("rows", rows.spec, rows.heap, rows.call, after)
        found = np.asarray(found)[:, : layout.tokens, : layout.hidden * 33 // 32]
        sent = (np.asarray(here) >= 0).any(-1)
        np.testing.assert_array_equal(found[sent], packed[..., : found.shape[-1]][sent])


def test_a_prefill_in_full_windows():
    """T=128, K=8: lists in tiles of 128 rows, by eight warpgroups; rows of two passes of a warp."""
    sizes = {"tokens": 128, "choices": 8, "hidden": 2048, "slots_per_rank": 16}
    loopback = some_loopback(4, "per_rank", True, **sizes)
    assert loopback.dispatch_config.tile_rows == 128
    ranks = Ranks(loopback)
    for seed, routing in enumerate(("random", "k_hot")):
        check_exchange(ranks, a_work(seed, loopback, routing), seed)
