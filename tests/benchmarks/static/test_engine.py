"""Configurations of static ranks for any number of them."""

import pytest

from benchmarks.processes import with_ranks
from launch.flags import UsageError, load_config


@pytest.mark.parametrize("ranks, slots, redundancy", [(1, 16, 1), (2, 16, 2), (4, 8, 2), (8, 8, 2)])
def test_any_number_of_ranks_has_slots_for_all_replicas(ranks, slots, redundancy):
    cluster = with_ranks(load_config("tiny_cpu"), ranks).cluster
    assert (cluster.ranks, cluster.slots_per_rank, cluster.redundancy) == (ranks, slots, redundancy)


def test_no_rank_is_refused():
    with pytest.raises(UsageError, match="at least 1"):
        with_ranks(load_config("tiny_cpu"), -1)
