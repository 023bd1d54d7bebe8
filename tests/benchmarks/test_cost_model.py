"""The cost model counts bytes as the windows have them, and agrees with what was measured."""

import itertools

import numpy as np
import pytest

from benchmarks import cost_model
from benchmarks.cost_model import NVLINK, RDMA, Kernel, Load, checked, silent_peer_us, total_us


@pytest.mark.parametrize("ranks, experts, choices", [(4, 8, 3), (2, 6, 2), (8, 8, 4), (5, 5, 5)])
def test_destinations_are_those_of_every_possible_choice(ranks, experts, choices):
    each = experts // ranks
    found = [
        len({expert // each for expert in chosen})
        for chosen in itertools.combinations(range(experts), choices)
    ]
    load = Load(ranks=ranks, experts=experts, choices=choices)
    assert load.destinations == pytest.approx(np.mean(found))


def test_with_more_ranks_than_experts_a_token_goes_to_k_ranks():
    assert Load(ranks=512).destinations == pytest.approx(8)


@pytest.mark.parametrize("dtype", ["", "float8_e4m3fn"])
def test_bytes_are_those_of_the_windows(dtype):
    load = Load(ranks=8, tokens=16, hidden=256, dispatch_dtype=dtype)
    regions = load.layout.regions
    one_half = lambda name: regions[name].bytes / 2  # the other parity
    rows = 16 * load.destinations * regions["rows"].bytes / (2 * 8 * 16)
    rest = one_half("slots") + one_half("weights") + one_half("votes")
    assert load.dispatch_bytes == pytest.approx(rows + rest)
    assert load.combine_bytes == one_half("returns") / 8
    assert load.flags_bytes == one_half("sent") + one_half("returned")


@pytest.mark.parametrize("bench", ["dispatch", "combine"])
def test_the_model_is_near_every_point_that_was_measured(bench):
    _, points = checked(cost_model.all_results(), bench)
    seen = [tokens for tokens in points if tokens not in cost_model.FIT_TOKENS]
    assert len(seen) >= 4
    for tokens in seen:
        model, measured = points[tokens]
        assert model == pytest.approx(measured, rel=0.15), tokens


def test_a_silent_peer_costs_one_deadline_however_many_there_are():
    assert silent_peer_us(100.0, 2_000.0, 0) == 100
    assert silent_peer_us(100.0, 2_000.0, 1) == silent_peer_us(100.0, 2_000.0, 5) == 2_100


def test_time_grows_with_ranks_and_with_slower_links():
    kernels = {"dispatch": Kernel(10.0, 1.4e12), "combine": Kernel(10.0, 0.8e12)}
    for link in (NVLINK, RDMA):
        times = [total_us(kernels, Load(ranks=r), link) for r in cost_model.RANKS]
        assert times == sorted(times)
    load = Load(ranks=64)
    assert total_us(kernels, load, NVLINK) < total_us(kernels, load, RDMA)


def test_a_point_that_is_missing_is_named():
    with pytest.raises(ValueError, match=r"no result at \[512\] tokens"):
        cost_model.fit({16: 11.0}, "dispatch")
