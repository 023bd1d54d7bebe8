"""Promises to the operator: impossible requests are refused, with values and a way out."""

import dataclasses

import pytest

from eep_jax.coordination.scaling import ScaleRequest, ranks_out
from eep_jax.coordination.state import ScaleTo
from eep_jax.errors import CoverageLost, InvalidMove
from eep_jax.membership.view import RankState
from tests.support.factories import ByHand, a_serving_cluster


def down(*ranks: int, count: int = 0) -> ScaleRequest:
    return ScaleRequest(action="scale_down", ranks=ranks, count=count)


def up(*ranks: int, count: int = 0) -> ScaleRequest:
    return ScaleRequest(action="scale_up", ranks=ranks, count=count)


def a_cluster_without(*ranks: int) -> ByHand:
    cluster = a_serving_cluster(slots_per_rank=8)
    cluster.feed(ScaleTo(frozenset(ranks)))
    cluster.settle(rounds=20)
    return cluster


def test_ranks_go_by_name_or_from_the_highest_and_come_from_the_lowest():
    state = a_cluster_without().state
    assert ranks_out(state, down(1)) == {1}
    assert ranks_out(state, down(count=2)) == {2, 3}
    state = a_cluster_without(1, 3).state
    assert ranks_out(state, down(0)) == {0, 1, 3}
    assert ranks_out(state, up(3)) == {1}
    assert ranks_out(state, up(count=1)) == {3}


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        (down(9), InvalidMove, "rank 9 is not in 0..3"),
        (down(3), InvalidMove, r"rank 3 is out already.*\[0, 1, 2\]"),
        (down(count=4), InvalidMove, r"count 4 is more than.*\[0, 1, 2\]"),
        (down(0, 1, 2), CoverageLost, r"8 slots are needed and ranks \[\] have 0"),
        (up(1), InvalidMove, r"rank 1 is not out.*\[3\]"),
        (up(count=2), InvalidMove, r"count 2 is more than.*\[3\]"),
    ],
)
def test_an_impossible_request_is_refused(request_, error, words):
    state = a_cluster_without(3).state
    with pytest.raises(error, match=words):
        ranks_out(state, request_)


def test_why_a_rank_cannot_leave_is_said_of_each_state_it_can_be_in():
    state = a_serving_cluster().state
    on_its_way = dataclasses.replace(state, out=frozenset({2}))
    with pytest.raises(InvalidMove, match=r"rank 2 is on its way out; .*\[0, 1, 3\]"):
        ranks_out(on_its_way, down(2))
    members = list(state.view.members)
    members[1] = dataclasses.replace(members[1], state=RankState.ABSENT)
    view = dataclasses.replace(state.view, members=tuple(members))
    with pytest.raises(InvalidMove, match=r"rank 1 is not a member now: its process died"):
        ranks_out(dataclasses.replace(state, view=view), down(1))


def test_too_few_slots_are_named():
    with pytest.raises(CoverageLost, match=r"8 slots are needed and ranks \[0, 1\] have 6"):
        ranks_out(a_serving_cluster().state, down(2, 3))


def test_a_cluster_that_starts_is_not_scaled():
    with pytest.raises(InvalidMove, match="is starting"):
        ranks_out(ByHand().state, down(1))
