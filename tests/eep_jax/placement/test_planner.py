"""Promises of the planner, over every small cluster: fewest moves, full coverage, no surprises."""

import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from eep_jax.errors import CoverageLost
from eep_jax.placement.placement import EMPTY, check, missing_experts
from eep_jax.placement.planner import initial_placement, plan_admission, plan_repair
from eep_jax.placement.sources import SourceKind
from tests.support.factories import a_placement


@st.composite
def whole_clusters(draw):
    """A cluster's placement as it begins, `(placement, redundancy)`."""
    ranks, slots = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    experts = draw(st.integers(1, min(24, ranks * slots)))
    redundancy = draw(st.integers(1, min(ranks, ranks * slots // experts)))
    return initial_placement(experts, ranks, slots, redundancy), redundancy


@st.composite
def worn_clusters(draw):
    """A placement after deaths, repairs and losses, `(placement, active, redundancy)`."""
    placement, redundancy = draw(whole_clusters())
    everyone = range(len(placement.slots))
    for _ in range(draw(st.integers(0, 2))):
        left = draw(st.sets(st.sampled_from(everyone), min_size=1))
        placement = plan_repair(placement, left, degrade=True).placement
    places = list(itertools.product(everyone, range(placement.slots_per_rank)))
    placement = placement.without(draw(st.sets(st.sampled_from(places), max_size=4)))
    return placement, draw(st.sets(st.sampled_from(everyone), min_size=1)), redundancy


def changed_places(before, after):
    return {
        (rank, slot)
        for rank, row in enumerate(after.slots)
        for slot, expert in enumerate(row)
        if expert not in (EMPTY, before.slots[rank][slot])
    }


def has_room(placement, active) -> bool:
    return len(active) * placement.slots_per_rank >= placement.experts


def assert_sources_are_stable(before, plan, active) -> None:
    written = {(move.rank, move.slot) for move in plan.moves}
    for move in plan.moves:
        *near, last = move.sources
        assert last.kind is SourceKind.CHECKPOINT
        for source in near:
            assert (source.rank, source.slot) not in written
            assert source.rank in active
            assert before.slots[source.rank][source.slot] == move.expert
            assert (source.kind is SourceKind.LOCAL) == (source.rank == move.rank)


class TestInitialPlacement:
    def test_it_works_wherever_the_replicas_fit(self):
        sizes = itertools.product(range(1, 9), range(1, 9), range(1, 25))
        for ranks, slots, experts in sizes:
            for redundancy in range(1, min(ranks, ranks * slots // experts) + 1):
                placement = check(initial_placement(experts, ranks, slots, redundancy))
                replicas = placement.replicas()
                assert sorted(replicas) == list(range(experts))
                for places in replicas.values():
                    assert len({rank for rank, _ in places}) == len(places) == redundancy

    @given(whole_clusters())
    def test_ranks_hold_about_the_same(self, cluster):
        placement, _ = cluster
        held = [sum(e != EMPTY for e in row) for row in placement.slots]
        assert max(held) - min(held) <= 2

    @pytest.mark.parametrize(
        ("experts", "ranks", "slots", "redundancy", "wrong"),
        [
            (4, 2, 4, 0, "redundancy=0 must be between 1 and ranks=2"),
            (4, 2, 4, 3, "redundancy=3 must be between 1 and ranks=2"),
            (9, 2, 4, 1, "9 experts x 1 replicas do not fit 2 ranks x 4 slots"),
            (5, 2, 4, 2, "5 experts x 2 replicas do not fit"),
        ],
    )
    def test_what_does_not_fit_is_refused_with_its_numbers(
        self, experts, ranks, slots, redundancy, wrong
    ):
        with pytest.raises(ValueError, match=wrong):
            initial_placement(experts, ranks, slots, redundancy)


class TestRepair:
    @given(whole_clusters(), st.data())
    def test_what_was_tried_in_vain_is_not_asked_for_again(self, cluster, data):
        placement, _ = cluster
        ranks = range(len(placement.slots))
        active = sorted(data.draw(st.sets(st.sampled_from(ranks), min_size=1)))
        placement = placement.without_ranks(set(ranks) - set(active))
        missing = missing_experts(placement, active)
        pairs = [(rank, expert) for rank in active for expert in missing]
        avoid = frozenset(data.draw(st.sets(st.sampled_from(pairs)))) if pairs else frozenset()
        try:
            plan = plan_repair(placement, active, avoid=avoid)
        except CoverageLost:
            assert avoid or not has_room(placement, active)
            plan = plan_repair(placement, active, avoid=avoid, degrade=True)
            assert plan.dropped
        assert not avoid & {(move.rank, move.expert) for move in plan.moves}
        held = missing_experts(plan.placement, active)
        assert set(held) <= set(plan.dropped)

    @given(whole_clusters())
    def test_every_subset_of_ranks_is_covered_or_said_to_be_too_small(self, cluster):
        placement, _ = cluster
        everyone = range(len(placement.slots))
        for size in range(1, len(everyone) + 1):
            for active in itertools.islice(itertools.combinations(everyone, size), 30):
                if has_room(placement, active):
                    plan = plan_repair(placement, active)
                    assert not missing_experts(plan.placement, active)
                    continue
                missing = missing_experts(placement, active)
                with pytest.raises(CoverageLost) as raised:
                    plan_repair(placement, active)
                text, available = str(raised.value), size * placement.slots_per_rank
                assert f"experts {list(missing)}" in text
                assert f"{placement.experts} slots are needed" in text
                assert f"ranks {list(active)} have {available} " in text

    @given(worn_clusters())
    def test_only_orphans_move_each_of_them_once(self, cluster):
        placement, active, _ = cluster
        assume(has_room(placement, active))
        plan = plan_repair(placement, active)
        orphans = missing_experts(placement, active)
        assert tuple(sorted(move.expert for move in plan.moves)) == orphans
        moved = {(move.rank, move.slot) for move in plan.moves}
        assert len(moved) == len(plan.moves)
        assert changed_places(placement, plan.placement) == moved
        for move in plan.moves:
            assert plan.placement.slots[move.rank][move.slot] == move.expert
        for rank, row in enumerate(plan.placement.slots):
            if rank not in active:
                assert set(row) == {EMPTY}
            for slot, expert in enumerate(row):
                untouched = placement.slots[rank][slot] if rank in active else EMPTY
                assert (rank, slot) in moved or expert == untouched

    @given(worn_clusters())
    def test_a_free_slot_is_taken_before_a_replica_is_given_up(self, cluster):
        placement, active, _ = cluster
        assume(has_room(placement, active))
        plan = plan_repair(placement, active)
        replaced = [m for m in plan.moves if placement.slots[m.rank][m.slot] != EMPTY]
        if replaced:
            assert all(EMPTY not in plan.placement.slots[rank] for rank in active)

    @given(worn_clusters())
    def test_sources_are_never_slots_that_the_same_plan_writes(self, cluster):
        placement, active, _ = cluster
        plan = plan_repair(placement, active, degrade=True)
        assert_sources_are_stable(placement, plan, active)

    @given(worn_clusters())
    def test_the_same_arguments_give_the_same_plan(self, cluster):
        placement, active, _ = cluster
        plans = [
            plan_repair(placement, order, degrade=True)
            for order in (sorted(active), sorted(active, reverse=True), frozenset(active))
        ]
        assert plans[0] == plans[1] == plans[2]

    @given(worn_clusters())
    def test_degrade_drops_exactly_what_found_no_slot(self, cluster):
        placement, active, _ = cluster
        plan = plan_repair(placement, active, degrade=True)
        assert plan.dropped == missing_experts(plan.placement, active)
        room = len(active) * placement.slots_per_rank
        assert len(plan.dropped) == max(0, placement.experts - room)

    def test_each_survivor_gets_its_own_moves(self):
        plan = plan_repair(a_placement(), [0, 1, 3])
        assert [(m.rank, m.slot, m.expert) for m in plan.moves] == [(0, 2, 4), (1, 2, 5)]
        assert plan.moves_of(0) == plan.moves[:1] and plan.moves_of(3) == ()


class TestAdmission:
    @given(worn_clusters())
    def test_active_ranks_are_left_alone_and_joiners_reach_the_redundancy(self, cluster):
        placement, active, redundancy = cluster
        placement = placement.without_ranks(set(range(len(placement.slots))) - active)
        joining = set(range(len(placement.slots))) - active
        plan = plan_admission(placement, active, joining, redundancy)
        for rank in active:
            assert plan.placement.slots[rank] == placement.slots[rank]
        assert {move.rank for move in plan.moves} <= joining
        moved = {(move.rank, move.slot) for move in plan.moves}
        assert changed_places(placement, plan.placement) == moved
        replicas = plan.placement.replicas()
        short = [e for e in range(placement.experts) if len(replicas.get(e, ())) < redundancy]
        for rank in joining:
            row = plan.placement.slots[rank]
            assert EMPTY not in row or set(short) <= set(row)
        assert plan.dropped == missing_experts(plan.placement, active | joining)
        assert_sources_are_stable(placement, plan, active)

    @given(whole_clusters(), st.data())
    def test_a_rank_that_left_a_whole_cluster_gets_back_what_the_others_lack(self, cluster, data):
        placement, redundancy = cluster
        rank = data.draw(st.sampled_from(range(len(placement.slots))))
        others = set(range(len(placement.slots))) - {rank}
        plan = plan_admission(placement.without_ranks([rank]), others, [rank], redundancy)
        assert set(plan.placement.slots[rank]) == set(placement.slots[rank])

    @given(worn_clusters(), st.data())
    def test_what_a_joiner_holds_stays_in_its_slot_at_no_move(self, cluster, data):
        placement, active, redundancy = cluster
        joining = set(range(len(placement.slots))) - active
        placement = placement.without_ranks(joining)
        wanted = plan_admission(placement, active, joining, redundancy).placement
        held = {rank: data.draw(st.permutations(wanted.slots[rank])) for rank in joining}
        held = {rank: tuple(row) for rank, row in held.items()}
        plan = plan_admission(placement, active, joining, redundancy, held)
        for move in plan.moves:
            assert held[move.rank][move.slot] != move.expert
        for rank in joining:
            for slot, expert in enumerate(plan.placement.slots[rank]):
                if expert != EMPTY and expert in held[rank]:
                    assert held[rank][slot] == expert
        if len(joining) == 1:
            assert plan.moves == ()

    def test_a_joiner_never_reads_from_another(self):
        placement = a_placement("0 1 -/2 3 -/- - -/- - -", experts=6)
        plan = plan_admission(placement, [0, 1], [2, 3], 2)
        assert {4, 5} <= {move.expert for move in plan.moves}
        assert all(s.rank in (-1, 0, 1) for move in plan.moves for s in move.sources)


@given(worn_clusters())
def test_a_joiner_takes_its_share_of_experts_even_if_none_is_needed(cluster):
    placement, active, redundancy = cluster
    joining = set(range(len(placement.slots))) - active
    assume(joining)
    plan = plan_admission(placement.without_ranks(joining), active, joining, redundancy)
    share = placement.experts * redundancy // len(placement.slots)
    for rank in joining:
        held = [e for e in plan.placement.slots[rank] if e != EMPTY]
        assert len(held) >= min(share, placement.slots_per_rank, placement.experts)
