"""Promises of `Placement` and of its queries."""

import dataclasses
import doctest

import pytest

from eep_jax.errors import CoverageLost, InvalidMove
from eep_jax.placement import placement as placements
from eep_jax.placement.placement import EMPTY, check, holds, missing_experts, require_room
from eep_jax.placement.sources import SourceKind, rank_sources
from tests.support.factories import a_placement


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(placements).failed == 0


def test_replicas_are_listed_by_expert_and_ascending():
    placement = a_placement("3 0/0 -/- 3", experts=5)
    assert placement.replicas() == {0: ((0, 1), (1, 0)), 3: ((0, 0), (2, 1))}
    assert missing_experts(placement, [0, 1, 2]) == (1, 2, 4)
    assert missing_experts(placement, [2]) == (0, 1, 2, 4)


def test_changing_a_placement_leaves_the_old_one_alone():
    placement = a_placement("0 1/2 3", experts=4)
    assert placement.with_expert(1, 0, 1) == a_placement("0 1/1 3", experts=4)
    assert placement.without([(0, 1)]) == a_placement("0 -/2 3", experts=4)
    assert placement.without_ranks([1]) == a_placement("0 1/- -", experts=4)
    assert placement == a_placement("0 1/2 3", experts=4)


@pytest.mark.parametrize(
    ("slots", "wrong"),
    [
        (((0, 1), (2,)), r"different numbers of slots: \[1, 2\]"),
        (((0, 4), (1, 2)), r"rank 0 slot 1 holds 4, expected 0\.\.3"),
        (((0, 1), (-2, 2)), "rank 1 slot 0 holds -2"),
        (((0, 1), (2, 2)), "rank 1 holds an expert twice"),
    ],
)
def test_a_wrong_placement_is_refused_by_name(slots, wrong):
    with pytest.raises(InvalidMove, match=wrong):
        check(dataclasses.replace(a_placement("0 1/2 3", experts=4), slots=slots))


def test_a_bank_may_hold_anything_where_its_placement_is_empty():
    assert holds((4, 7), (4, EMPTY)) and holds((4, 7), (EMPTY, EMPTY))
    assert not holds((4, EMPTY), (4, 7)) and not holds((), (EMPTY,))


def test_too_little_room_names_the_experts_and_the_numbers():
    require_room(a_placement(), [0, 1, 2])
    with pytest.raises(CoverageLost) as raised:
        require_room(a_placement(), iter([3, 1]))
    text = str(raised.value)
    assert "experts [0, 1, 4, 5]" in text and "8 slots are needed" in text
    assert "ranks [1, 3] have 6 (3 each)" in text


def test_the_cheapest_source_comes_first_and_the_checkpoint_always_last():
    placement = a_placement("5 0/5 -/- 5/- 5", experts=6)
    kinds = [(source.kind, source.rank, source.slot) for source in rank_sources(placement, 2, 5)]
    assert kinds == [
        (SourceKind.LOCAL, 2, 1),
        (SourceKind.PEER, 3, 1),
        (SourceKind.PEER, 0, 0),
        (SourceKind.PEER, 1, 0),
        (SourceKind.CHECKPOINT, -1, -1),
    ]
