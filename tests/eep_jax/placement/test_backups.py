"""Promises of the backup plan: bounded, even, deterministic, and never only on the rank at risk."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eep_jax.placement.backups import SHARD_OVERHEAD_BYTES, plan_backups
from eep_jax.placement.placement import EMPTY, Placement
from eep_jax.placement.planner import initial_placement
from tests.support.factories import a_placement

EXPERT_BYTES = 1 << 20
SHARD_BYTES = EXPERT_BYTES + SHARD_OVERHEAD_BYTES


@st.composite
def worlds(draw):
    """(placement, active ranks, room): any experts in any slots, some ranks away."""
    ranks, slots = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    experts = draw(st.integers(1, 10))
    rows = []
    shuffle = random.Random(draw(st.integers(0, 999)))
    for _ in range(ranks):
        held = shuffle.sample(range(experts), min(experts, shuffle.randint(0, slots)))
        rows.append(tuple(held) + (EMPTY,) * (slots - len(held)))
    active = draw(st.sets(st.integers(0, ranks - 1), min_size=1))
    placement = Placement(experts=experts, slots=tuple(rows)).without_ranks(
        set(range(ranks)) - active
    )
    return placement, tuple(sorted(active)), draw(st.integers(0, experts + 1))


def planned(world):
    placement, active, room = world
    return plan_backups(placement.experts, active, placement, EXPERT_BYTES, room * SHARD_BYTES)


def sole_holder(placement, expert):
    found = {rank for rank, _ in placement.replicas().get(expert, ())}
    return min(found) if len(found) == 1 else None


@given(worlds())
def test_every_rank_is_used_up_to_its_bytes_and_no_further(world):
    placement, active, room = world
    for rank, row in enumerate(planned(world)):
        assert len(row) == (min(room, placement.experts) if rank in active else 0)
        assert list(row) == sorted(set(row)) and set(row) <= set(range(placement.experts))


@given(worlds())
def test_as_many_experts_as_fit_have_a_backup(world):
    placement, active, room = world
    rows = planned(world)
    backed_up = {e for row in rows for e in row}
    assert len(backed_up) == min(placement.experts, len(active) * min(room, placement.experts))


@given(worlds())
def test_no_backup_is_only_where_the_sole_replica_is_if_another_rank_can_hold_it(world):
    placement, active, _ = world
    rows = planned(world)
    useful = lambda e: {r for r in active if e in rows[r] and r != sole_holder(placement, e)}
    for expert in range(placement.experts):
        holders = {r for r in active if expert in rows[r]}
        if holders != {sole_holder(placement, expert)}:
            continue
        for rank in set(active) - holders:
            for other in rows[rank]:
                assert useful(other) == {rank}, f"{expert} could take the place of {other}"


@given(worlds(), st.randoms())
def test_the_order_of_ranks_changes_nothing(world, shuffle):
    placement, active, room = world
    shuffled = list(active)
    shuffle.shuffle(shuffled)
    assert planned((placement, tuple(shuffled), room)) == planned(world)


def test_with_room_for_all_every_rank_keeps_all():
    placement = initial_placement(16, 4, 8, 2)
    rows = plan_backups(16, range(4), placement, EXPERT_BYTES, 16 * SHARD_BYTES)
    assert rows == (tuple(range(16)),) * 4


def test_a_quarter_each_puts_every_expert_away_from_its_replica():
    placement = initial_placement(16, 4, 4, 1)
    rows = plan_backups(16, range(4), placement, EXPERT_BYTES, 4 * SHARD_BYTES)
    assert sorted(e for row in rows for e in row) == list(range(16))
    for rank, row in enumerate(rows):
        assert not set(row) & set(placement.slots[rank])


def test_an_expert_with_a_choice_makes_way_for_one_without():
    """Expert 0 lives on rank 0 alone, expert 1 on both: 1 must not take the place on rank 1."""
    rows = plan_backups(2, range(2), a_placement("0 1/1 -", experts=2), EXPERT_BYTES, SHARD_BYTES)
    assert rows == ((1,), (0,))


@pytest.mark.parametrize("room_bytes", [0, -1, SHARD_BYTES - 1])
def test_no_room_is_no_backup(room_bytes):
    placement = initial_placement(4, 2, 2, 1)
    assert plan_backups(4, range(2), placement, EXPERT_BYTES, room_bytes) == ((), ())
