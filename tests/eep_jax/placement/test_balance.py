"""Promises of rebalancing: every step is valid, and the steps reach the aim."""

import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from eep_jax.placement.balance import GAIN_MIN, Aim, next_step, rank_loads
from eep_jax.placement.placement import EMPTY, missing_experts
from eep_jax.placement.planner import initial_placement, plan_repair
from tests.eep_jax.placement.test_planner import whole_clusters, worn_clusters
from tests.support.factories import a_placement

MOVES_MAX = st.integers(1, 3)


def steps(placement, aim: Aim, at_most: int = 200):
    """All steps until nothing is left to gain; each is checked to be one that may be taken."""
    for _ in range(at_most):
        plan = next_step(placement, aim)
        if plan is None:
            return
        assert_valid(placement, plan, aim)
        yield plan
        placement = plan.placement
    raise AssertionError(f"{at_most} steps and no end, at {placement.slots}")


def assert_valid(before, plan, aim: Aim) -> None:
    written = {(move.rank, move.slot): move.expert for move in plan.moves}
    covered = set(range(before.experts)) - set(missing_experts(before, aim.members))
    assert not covered & set(missing_experts(plan.placement, aim.members)), "coverage was lost"
    for rank, row in enumerate(before.slots):
        changed = [s for s, e in enumerate(row) if plan.placement.slots[rank][s] != e]
        filled = [s for s in changed if row[s] == EMPTY]
        assert len(filled) <= aim.moves_max
        assert rank in aim.members or not changed
        for slot in changed:
            assert plan.placement.slots[rank][slot] == written.pop((rank, slot), EMPTY)
    assert not written
    for move in plan.moves:
        for source in (s for s in move.sources if s.slot >= 0):
            assert before.slots[source.rank][source.slot] == move.expert


def counts(placement, members) -> list[int]:
    replicas = placement.replicas()
    return [
        sum(rank in members for rank, _ in replicas.get(e, ())) for e in range(placement.experts)
    ]


def possible(placement, members, redundancy) -> bool:
    return placement.experts * min(redundancy, len(members)) <= (
        len(members) * placement.slots_per_rank
    )


@given(worn_clusters(), MOVES_MAX)
def test_redundancy_is_restored_wherever_it_fits_in_few_moves(cluster, moves_max):
    placement, active, redundancy = cluster
    members = tuple(sorted(active))
    placement = placement.without_ranks(set(range(len(placement.slots))) - active)
    aim = Aim(members=members, redundancy=redundancy, moves_max=moves_max)
    lacking = sum(max(0, aim.replicas_wanted - count) for count in counts(placement, members))
    taken = list(steps(placement, aim, at_most=2 * lacking + 1))
    end = taken[-1].placement if taken else placement
    if possible(placement, members, redundancy):
        assert min(counts(end, members)) >= aim.replicas_wanted
    else:
        assert max(counts(end, members)) - min(counts(end, members)) <= max(
            1, max(counts(placement, members)) - aim.replicas_wanted
        )
    # Where a free slot is on the wrong rank, another expert moves there first.
    assert sum(len(plan.moves) for plan in taken) <= 2 * lacking


@given(whole_clusters(), MOVES_MAX, st.data())
def test_what_one_death_used_up_costs_one_move_for_each_replica(cluster, moves_max, data):
    placement, redundancy = cluster
    ranks = range(len(placement.slots))
    assume(len(ranks) > redundancy)
    members = tuple(sorted(set(ranks) - {data.draw(st.sampled_from(ranks))}))
    assume(placement.experts <= len(members) * placement.slots_per_rank)
    repaired = plan_repair(placement, members).placement
    lacking = sum(max(0, redundancy - count) for count in counts(repaired, members))
    aim = Aim(members=members, redundancy=redundancy, moves_max=moves_max)
    taken = list(steps(repaired, aim))
    if all(EMPTY in repaired.slots[r] for r in members) and possible(repaired, members, redundancy):
        assert lacking <= sum(len(plan.moves) for plan in taken) <= 2 * lacking


@given(whole_clusters(), MOVES_MAX, st.data())
def test_ranks_that_shall_leave_can_wherever_the_others_have_the_slots(cluster, moves_max, data):
    placement, _ = cluster
    ranks = range(len(placement.slots))
    staying = tuple(sorted(data.draw(st.sets(st.sampled_from(ranks), min_size=1))))
    assume(len(staying) * placement.slots_per_rank >= placement.experts)
    aim = Aim(members=staying, redundancy=1, moves_max=moves_max)
    orphans = len(missing_experts(placement, staying))
    taken = list(steps(placement, aim, at_most=2 * orphans + 1))
    end = taken[-1].placement if taken else placement
    assert not missing_experts(end, staying)
    assert sum(len(plan.moves) for plan in taken) == orphans
    for rank in set(ranks) - set(staying):
        assert end.slots[rank] == placement.slots[rank]


@given(worn_clusters(), MOVES_MAX, st.data())
def test_load_is_spread_and_every_move_was_worth_its_bytes(cluster, moves_max, data):
    placement, active, redundancy = cluster
    members = tuple(sorted(active))
    placement = placement.without_ranks(set(range(len(placement.slots))) - active)
    count = placement.experts
    loads = tuple(data.draw(st.lists(st.integers(0, 100), min_size=count, max_size=count)))
    before = Aim(members=members, redundancy=redundancy, moves_max=moves_max)
    for plan in steps(placement, before):
        placement = plan.placement
    assume(not missing_experts(placement, members))
    aim = Aim(members=members, redundancy=redundancy, moves_max=moves_max, loads=loads)
    end, moves = placement, 0
    for plan in steps(placement, aim):
        assert min(counts(plan.placement, members)) >= min(counts(end, members))
        end, moves = plan.placement, moves + len(plan.moves)
    squares = lambda p: sum(v**2 for v in rank_loads(p, members, loads).values())
    # So n ranks never move more than log(n) / -log(1 - GAIN_MIN) experts for one look at the load.
    assert squares(end) <= squares(placement) * (1 - GAIN_MIN) ** moves * (1 + 1e-9)


@given(worn_clusters(), st.data())
def test_the_same_arguments_give_the_same_step(cluster, data):
    placement, active, redundancy = cluster
    count = placement.experts
    loads = tuple(data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count)))
    aim = Aim(members=tuple(sorted(active)), redundancy=redundancy, moves_max=2, loads=loads)
    assert next_step(placement, aim) == next_step(placement, aim)


def step_text(placement, **aim) -> str:
    values = {"members": (0, 1, 2), "redundancy": 1, "moves_max": 2, **aim}
    plan = next_step(placement, Aim(**values))
    if plan is None:
        return "nothing"
    return "/".join(
        " ".join("-" if e == EMPTY else str(e) for e in row) for row in plan.placement.slots
    )


def test_a_placement_at_its_aim_is_left_alone():
    assert step_text(a_placement("0 1 -/2 3 -/4 5 -", experts=6)) == "nothing"


def test_a_hot_expert_is_replicated_into_a_free_slot():
    placement = a_placement("0 1 -/2 3 -/4 5 -", experts=6)
    assert step_text(placement, loads=(90, 1, 10, 10, 10, 10)).startswith("0 1 -/")
    assert "0" in step_text(placement, loads=(90, 1, 10, 10, 10, 10)).split("/")[1]


def test_even_load_moves_nothing():
    placement = a_placement("0 1 -/2 3 -/4 5 -", experts=6)
    assert step_text(placement, loads=(10, 12, 11, 10, 12, 10)) == "nothing"


def test_a_surplus_replica_of_a_cold_expert_makes_room_for_a_hot_one():
    placement = a_placement("0 1/2 1/3 2", experts=4)
    text = step_text(placement, loads=(90, 0, 20, 20))
    assert text in ("0 1/2 -/3 2", "0 1/2 1/3 -")


@pytest.mark.parametrize("moves_max", [1, 2, 8])
def test_a_death_of_one_of_four_is_made_good_in_the_fewest_epochs(moves_max):
    placement = initial_placement(16, 4, 12, 2)
    for dead in range(4):
        members = tuple(r for r in range(4) if r != dead)
        aim = Aim(members=members, redundancy=2, moves_max=moves_max)
        left = placement.without_ranks([dead])
        taken = list(steps(left, aim))
        assert sum(len(plan.moves) for plan in taken) == 8
        assert len(taken) <= -(-8 // (3 * moves_max)) + 1
        assert max(len(list(g)) for _, g in itertools.groupby(taken)) == 1
