"""Promises of background work: small, beside the steps, and second to everything else."""

import dataclasses

from eep_jax.coordination import background, coordinator
from eep_jax.coordination.protocol import Fetch, Mode, Prepare, StandBy
from eep_jax.coordination.state import Ended, Measured, ScaleTo, Send, Tick
from eep_jax.membership.view import RankState
from eep_jax.placement.placement import EMPTY, missing_experts
from tests.support.factories import ByHand, a_serving_cluster

ROOMY = {"slots_per_rank": 6, "redundancy": 2}


def sent(cluster: ByHand, kind) -> list[Send]:
    return [send for send in cluster.unsent if isinstance(send.message, kind)]


def kill(cluster: ByHand, rank: int) -> None:
    cluster.feed(Ended(rank, cluster.incarnations[rank]))
    del cluster.ranks[rank]


def changes(cluster: ByHand) -> list[str]:
    return [note.facts["change"] for note in cluster.notes if note.kind == "commit"]


def replicas_min(cluster: ByHand) -> int:
    replicas = cluster.state.placement.replicas()
    return min(len(replicas[e]) for e in range(cluster.state.placement.experts))


def until_fetching(cluster: ByHand) -> None:
    """Passes messages until ranks have been told what to fetch, and no further."""
    while not sent(cluster, Fetch):
        cluster.settle(rounds=1)


class TestRedundancy:
    def test_it_comes_back_in_epochs_of_few_experts(self):
        cluster = a_serving_cluster(**ROOMY, background_experts=1)
        kill(cluster, 2)
        cluster.settle(rounds=30)
        assert replicas_min(cluster) == 2
        assert changes(cluster) == ["repair", "background", "background"]
        for note in cluster.notes:
            if note.kind == "commit":
                ranks = [move["rank"] for move in note.facts["moves"]]
                assert len(ranks) == len(set(ranks))

    def test_experts_are_fetched_before_anybody_prepares(self):
        cluster = a_serving_cluster(**ROOMY)
        kill(cluster, 2)
        until_fetching(cluster)
        assert cluster.state.change is None
        epoch = cluster.state.view.epoch
        for send in sent(cluster, Fetch):
            slots = cluster.state.placement.slots[send.rank]
            assert send.message.epoch == epoch
            assert all(slots[move.slot] == EMPTY for move in send.message.moves)
        cluster.settle(rounds=1)
        prepares = sent(cluster, Prepare)
        assert len(prepares) == 3
        assert all(p.message.planned and not p.message.moves for p in prepares)

    def test_a_lost_fetch_is_sent_again(self):
        cluster = a_serving_cluster(**ROOMY)
        kill(cluster, 2)
        until_fetching(cluster)
        cluster.unsent.clear()
        cluster.settle(rounds=8)
        assert replicas_min(cluster) == 2

    def test_none_is_done_where_none_is_wanted(self):
        cluster = a_serving_cluster(**ROOMY, background_experts=0)
        kill(cluster, 2)
        cluster.settle()
        assert changes(cluster) == ["repair"] and cluster.state.background.task is None

    def test_a_death_comes_first(self):
        cluster = a_serving_cluster(**ROOMY)
        kill(cluster, 2)
        until_fetching(cluster)
        kill(cluster, 3)
        assert cluster.state.change.kind == "repair" and cluster.state.background.task is None
        cluster.settle(rounds=30)
        assert not missing_experts(cluster.state.placement, (0, 1))
        assert background.is_resting(cluster.state)

    def test_a_rank_that_cannot_fetch_is_left_alone_for_a_while(self):
        cluster = a_serving_cluster(**ROOMY)
        kill(cluster, 2)
        until_fetching(cluster)
        task = cluster.state.background.task
        failing = task.plan.moves[0].rank
        cluster.unsent.clear()
        cluster.say(failing, fetched=task.number)
        assert [note.kind for note in cluster.notes][-1] == "fetch_failed"
        assert cluster.state.background.task is None and cluster.state.records[failing].is_current
        cluster.feed(Tick())
        assert cluster.state.background.task is None
        cluster.pass_time(cluster.state.config.background_retry_ms + 400)
        cluster.settle()
        assert replicas_min(cluster) == 2

    def test_it_waits_for_a_rank_that_returns(self):
        cluster = a_serving_cluster(**ROOMY)
        kill(cluster, 2)
        cluster.settle(rounds=1)
        cluster.join(2)
        cluster.settle(rounds=30)
        assert replicas_min(cluster) == 2
        assert cluster.state.view.in_epoch == (0, 1, 2, 3)


class TestBalance:
    def test_measured_load_is_spread_and_then_rested(self):
        cluster = a_serving_cluster(slots_per_rank=4)
        cluster.feed(Measured((100_000, 1, 1, 1, 100, 100, 100, 100)))
        cluster.settle(rounds=40)
        replicas = cluster.state.placement.replicas()
        assert len(replicas[0]) > 1 and min(map(len, replicas.values())) == 1
        assert background.is_resting(cluster.state) and set(changes(cluster)) == {"background"}

    def test_few_choices_move_nothing(self):
        cluster = a_serving_cluster(slots_per_rank=4)
        cluster.feed(Measured((100, 1, 1, 1, 1, 1, 1, 1)))
        cluster.settle()
        assert changes(cluster) == []

    def test_load_is_looked_at_once_in_a_while(self):
        cluster = a_serving_cluster(slots_per_rank=4)
        even, uneven = (1_000,) * 8, (10**6, *(1,) * 7)
        cluster.feed(Measured(even))
        cluster.feed(Measured(uneven))
        cluster.settle()
        assert changes(cluster) == []
        cluster.pass_time(cluster.state.config.balance_every_ms + 400)
        cluster.settle(rounds=40)
        assert "background" in changes(cluster)


class TestDrain:
    def test_a_rank_leaves_once_the_others_have_its_experts(self):
        cluster = a_serving_cluster()
        cluster.feed(ScaleTo(frozenset({3})))
        cluster.settle(rounds=20)
        assert cluster.state.view.in_epoch == (0, 1, 2)
        assert not missing_experts(cluster.state.placement, (0, 1, 2))
        assert changes(cluster) == ["background", "drain"]
        assert cluster.ranks[3].mode is Mode.STANDBY and cluster.state.records[3].is_current
        assert cluster.state.view.members[3].state is RankState.JOINING

    def test_it_comes_back_as_the_same_incarnation(self):
        cluster = a_serving_cluster()
        cluster.feed(ScaleTo(frozenset({3})))
        cluster.settle(rounds=20)
        cluster.feed(ScaleTo(frozenset()))
        cluster.settle(rounds=20)
        assert cluster.state.view.in_epoch == (0, 1, 2, 3)
        assert cluster.ranks[3].mode is Mode.SERVING
        assert cluster.state.view.members[3].incarnation == 1

    def test_a_lost_stand_by_is_sent_again(self):
        cluster = a_serving_cluster()
        cluster.feed(ScaleTo(frozenset({3})))
        while not sent(cluster, StandBy):
            cluster.settle(rounds=1)
        cluster.unsent = [s for s in cluster.unsent if not isinstance(s.message, StandBy)]
        assert cluster.ranks[3].mode is Mode.READY
        cluster.settle(rounds=4)
        assert cluster.ranks[3].mode is Mode.STANDBY

    def test_a_rank_that_did_not_hear_that_it_left_is_not_let_in_before(self):
        cluster = a_serving_cluster()
        cluster.feed(ScaleTo(frozenset({3})))
        while not sent(cluster, StandBy):
            cluster.settle(rounds=1)
        cluster.unsent = [s for s in cluster.unsent if not isinstance(s.message, StandBy)]
        cluster.feed(ScaleTo(frozenset()))
        assert cluster.state.change is None and cluster.state.records[3].load is None
        cluster.settle(rounds=20)
        assert cluster.state.view.in_epoch == (0, 1, 2, 3)

    def test_too_few_slots_leave_the_rank_where_it_is(self):
        cluster = a_serving_cluster()
        cluster.feed(ScaleTo(frozenset({2, 3})))
        cluster.settle()
        assert cluster.state.view.in_epoch == (0, 1, 2, 3) and changes(cluster) == []
        assert cluster.state.change is None

    def test_a_death_in_the_middle_repairs_with_the_rank_that_was_to_leave(self):
        cluster = a_serving_cluster(slots_per_rank=4)
        cluster.feed(ScaleTo(frozenset({3})))
        until_fetching(cluster)
        kill(cluster, 0)
        assert cluster.state.change.view.in_epoch == (1, 2, 3)
        cluster.settle(rounds=30)
        assert cluster.state.view.in_epoch == (1, 2)
        assert not missing_experts(cluster.state.placement, (1, 2))

    def test_the_death_of_the_leaving_rank_is_a_death(self):
        cluster = a_serving_cluster()
        cluster.feed(ScaleTo(frozenset({3})))
        while cluster.state.change is None or cluster.state.change.kind != "drain":
            cluster.settle(rounds=1)
        kill(cluster, 3)
        cluster.settle()
        assert cluster.state.view.in_epoch == (0, 1, 2) and "dead" in [
            note.kind for note in cluster.notes
        ]

    def test_a_restart_keeps_the_ranks_that_are_out(self):
        cluster = a_serving_cluster()
        cluster.feed(ScaleTo(frozenset({3})))
        cluster.settle(rounds=20)
        state = cluster.state
        absent = dataclasses.replace(state.view.members[3], state=RankState.ABSENT, incarnation=0)
        view = dataclasses.replace(state.view, members=(*state.view.members[:3], absent))
        cluster.state = coordinator.restored_state(
            state.config, view, state.placement, 9, [1] * 4, cluster.now_ms, out=state.out
        )
        cluster.settle()
        assert cluster.state.view.in_epoch == (0, 1, 2) and cluster.state.out == {3}
        cluster.feed(ScaleTo(frozenset()))
        cluster.settle(rounds=20)
        assert cluster.state.view.in_epoch == (0, 1, 2, 3)
