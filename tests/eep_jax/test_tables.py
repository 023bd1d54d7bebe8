"""Promises of Tables: what a step reads agrees with the View and the Placement."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eep_jax.placement.placement import EMPTY, Placement, check
from eep_jax.tables import NO_SLOT, assign, build_tables, check_tables, solo_tables
from tests.support.factories import a_placement, a_view


@st.composite
def clusters(draw):
    ranks, slots = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    experts = draw(st.integers(1, 8))
    row = st.permutations([*range(experts), *[EMPTY] * slots]).map(lambda p: tuple(p[:slots]))
    placement = check(Placement(experts=experts, slots=tuple(draw(row) for _ in range(ranks))))
    state = st.sampled_from(["active", "suspect", "absent", "joining"])
    states = draw(st.lists(state, min_size=ranks, max_size=ranks))
    return a_view(" ".join(states), epoch=draw(st.integers(0, 9))), placement


@given(clusters())
def test_every_entry_is_a_live_replica_of_its_expert_and_none_is_forgotten(cluster):
    view, placement = cluster
    size = placement.slots_per_rank
    for rank in view.ranks:
        tables = build_tables(view, placement, rank)
        assert np.flatnonzero(tables.active).tolist() == list(view.in_epoch)
        assert int(tables.epoch) == view.epoch
        for expert in range(placement.experts):
            ids = [i for i in tables.expert_slots[expert].tolist() if i != NO_SLOT]
            places = placement.replicas().get(expert, ())
            live = {r * size + s for r, s in places if r in view.in_epoch}
            own = {i for i in live if i // size == rank}
            assert set(ids) == (own or live), "a replica of its own, else all that live"
            assert tables.replicas[expert] == len(ids)


@given(clusters())
def test_shapes_and_types_depend_on_the_sizes_alone(cluster):
    view, placement = cluster
    shapes = lambda tables: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tables)
    solo = solo_tables(len(view.members), placement.experts, placement.slots_per_rank, 0)
    assert shapes(build_tables(view, placement, 0)) == shapes(solo)


def slots_for(expert_ids, tables) -> list[list[int]]:
    """What `assign` says inside a compiled step."""
    return jax.jit(assign)(np.int32(expert_ids), tables).tolist()


def test_replicas_elsewhere_take_turns_by_token_the_next_rank_first():
    tables = build_tables(a_view(), a_placement("- -/0 1/0 -/0 1", experts=2), rank=0)
    assert slots_for([[0], [0], [0], [0], [1], [1]], tables) == [[2], [4], [6], [2], [3], [7]]


def test_ranks_start_their_turns_at_different_replicas():
    placement = a_placement("- -/0 -/- -/0 -", experts=1)
    first = [slots_for([[0]], build_tables(a_view(), placement, rank)) for rank in (0, 2)]
    assert first == [[[2]], [[6]]]


def test_a_choice_of_no_expert_or_of_a_lost_one_has_no_slot():
    tables = build_tables(a_view("active absent"), a_placement("0 -/1 -", experts=2), rank=0)
    assert slots_for([[-1, 1, 0]], tables) == [[NO_SLOT, NO_SLOT, 0]]


@pytest.mark.parametrize("rank", range(3))
def test_alone_every_expert_is_in_a_slot_of_the_own_rank(rank):
    tables = solo_tables(ranks=3, experts=8, slots_per_rank=3, rank=rank)
    (slots,) = slots_for([[*range(8)]], check_tables(tables))
    assert {slot // 3 for slot in slots} == {rank}
    assert np.flatnonzero(tables.active).tolist() == [rank] and tables.epoch == 0


def test_tables_that_miscount_their_replicas_are_refused_by_expert():
    tables = solo_tables(ranks=2, experts=3, slots_per_rank=3, rank=0)
    wrong = dataclasses.replace(tables, replicas=np.array([1, 2, 1], np.int32))
    with pytest.raises(ValueError, match=r"experts \[1\] have \[1\] slots, not \[2\]"):
        check_tables(wrong)
