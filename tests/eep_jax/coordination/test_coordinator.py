"""Promises of the supervisor's side, message by message; tests/scenarios has whole courses."""

import dataclasses

import pytest

from eep_jax.coordination import coordinator
from eep_jax.coordination.participant import Broken, StepAccused
from eep_jax.coordination.protocol import (
    Commit,
    Fenced,
    Load,
    Mode,
    Prepare,
    Refused,
    Welcome,
)
from eep_jax.coordination.state import Answer, Arrived, Disconnected, Ended, Kill, Note, Send, Tick
from eep_jax.membership.view import Member, RankState, View
from eep_jax.placement.placement import EMPTY, missing_experts
from tests.support.factories import ByHand, a_placement, a_serving_cluster, a_status


def answers(commands) -> list:
    return [c.message for c in commands if isinstance(c, Answer)]


def sent(commands, kind) -> dict:
    found = [c for c in commands if isinstance(c, Send) and isinstance(c.message, kind)]
    return {c.rank: c.message for c in found}


def kills(commands) -> list:
    return [(c.rank, c.incarnation) for c in commands if isinstance(c, Kill)]


def kinds(cluster: ByHand) -> list[str]:
    return [note.kind for note in cluster.notes]


class TestFormation:
    def test_the_first_epoch_takes_all_ranks_in_at_once(self):
        cluster = a_serving_cluster()
        assert cluster.state.view.in_epoch == (0, 1, 2, 3)
        assert all(state.mode is Mode.SERVING for state in cluster.ranks.values())
        assert all(state.epoch == 1 for state in cluster.ranks.values())

    def test_it_waits_for_all_ranks_but_not_forever(self):
        cluster = ByHand()
        for rank in (0, 1, 2):
            cluster.join(rank)
        cluster.settle()
        assert cluster.state.view.epoch == 0 and cluster.state.change is None
        cluster.pass_time(5_200)
        cluster.settle()
        assert cluster.state.view.in_epoch == (0, 1, 2) and cluster.state.view.epoch == 1
        assert cluster.state.blocked == ""

    def test_a_death_before_the_first_epoch_is_no_loss_of_coverage(self):
        cluster = ByHand()
        for rank in range(4):
            cluster.join(rank)
        cluster.settle(without=range(4), rounds=1)
        cluster.feed(Ended(3, 1))
        cluster.settle(without=[3])
        assert "coverage_lost" not in kinds(cluster) and cluster.state.view.epoch == 0
        cluster.join(3)
        cluster.settle()
        assert cluster.state.view.in_epoch == (0, 1, 2, 3)


class TestHarmlessMessages:
    def test_a_status_that_came_late_is_ignored(self):
        cluster = a_serving_cluster()
        late = cluster.status(2, mode=Mode.HOLDING, accused=(0,))
        cluster.say(2)
        before = cluster.state
        assert cluster.feed(late) == () and cluster.state == before

    def test_a_repeated_status_is_ignored(self):
        cluster = a_serving_cluster()
        status = cluster.status(2)
        cluster.feed(status)
        before = cluster.state
        assert cluster.feed(status) == () and cluster.state == before

    def test_every_message_may_come_twice(self):
        cluster = a_serving_cluster()
        cluster.feed(Ended(2, 1))
        cluster.feed(Ended(2, 1))
        del cluster.ranks[2]
        for _ in range(8):
            cluster.unsent *= 2
            sends, cluster.unsent = cluster.unsent, []
            for send in sends:
                if send.rank in cluster.ranks:
                    cluster.tell(send.rank, send.message)
            for rank in cluster.ranks:
                status = cluster.status(rank)
                cluster.feed(status)
                cluster.feed(status)
        assert kinds(cluster) == ["dead", "prepare", "commit"]
        assert {state.epoch for state in cluster.ranks.values()} == {2}

    @pytest.mark.parametrize("lost", [Prepare, Commit], ids=["prepare", "commit"])
    def test_a_lost_message_is_repaired_by_the_next_status(self, lost):
        cluster = a_serving_cluster()
        cluster.feed(Ended(2, 1))
        del cluster.ranks[2]
        once = True
        for _ in range(8):
            sends, cluster.unsent = cluster.unsent, []
            for send in sends:
                if once and send.rank == 3 and isinstance(send.message, lost):
                    once = False
                elif send.rank in cluster.ranks:
                    cluster.tell(send.rank, send.message)
            for rank in cluster.ranks:
                cluster.say(rank)
        assert not once
        assert {state.epoch for state in cluster.ranks.values()} == {2}
        assert cluster.state.epoch_tried == 2

    def test_news_of_an_older_incarnation_are_ignored(self):
        cluster = a_serving_cluster(slots_per_rank=4, redundancy=2)
        cluster.feed(Ended(2, 1))
        del cluster.ranks[2]
        cluster.settle()
        assert cluster.join(2) == 2
        cluster.settle()
        before = cluster.state
        for event in (Ended(2, 1), Disconnected(2, 1)):
            cluster.feed(event)
            assert cluster.state == before


class TestArrival:
    def test_a_second_process_for_a_living_rank_is_refused(self):
        cluster = a_serving_cluster()
        (refused,) = answers(cluster.feed(Arrived(2)))
        assert isinstance(refused, Refused)
        assert "rank 2 is served by incarnation 1, which lives" in refused.reason
        assert cluster.state.view.in_epoch == (0, 1, 2, 3)

    def test_a_fenced_process_that_lives_is_killed_before_another_takes_its_rank(self):
        cluster = a_serving_cluster()
        cluster.pass_time(3_400, silent=[1])
        del cluster.ranks[1]
        cluster.settle()
        assert cluster.state.view.in_epoch == (0, 2, 3)
        commands = cluster.feed(Arrived(1))
        assert kills(commands) == [(1, 1)]
        assert "incarnation 1 of rank 1 must end first" in answers(commands)[0].reason
        cluster.feed(Ended(1, 1))
        assert answers(cluster.feed(Arrived(1))) == [Welcome(incarnation=2)]

    def test_a_fenced_process_that_does_not_end_itself_is_killed_after_a_grace(self):
        cluster = a_serving_cluster()
        cluster.pass_time(3_400, silent=[1])
        del cluster.ranks[1]
        found = []
        for _ in range(40):
            cluster.now_ms += 200
            found += kills(cluster.feed(Tick()))
            for rank in cluster.ranks:
                cluster.say(rank)
        assert found == [(1, 1)]

    def test_an_incarnation_is_recorded_before_it_is_sent(self):
        commands = ByHand().feed(Arrived(0))
        assert [type(c) for c in commands] == [Note, Answer]

    def test_a_new_process_waits_until_the_death_of_the_old_one_is_settled(self):
        cluster = a_serving_cluster()
        cluster.feed(Ended(2, 1))
        (refused,) = answers(cluster.feed(Arrived(2)))
        assert "is being settled" in refused.reason


class TestDeath:
    def test_an_evicted_incarnation_is_fenced_whatever_it_sends(self):
        cluster = a_serving_cluster()
        cluster.pass_time(3_400, silent=[1])
        cluster.settle(without=[1])
        for mode in Mode:
            (fenced,) = answers(cluster.say(1, mode=mode))
            assert isinstance(fenced, Fenced)
            assert "incarnation 1 of rank 1 is no longer a member" in fenced.reason
        assert cluster.state.view.in_epoch == (0, 2, 3)

    def test_wrong_contents_are_fatal_to_that_rank_alone(self):
        cluster = a_serving_cluster()
        commands = cluster.say(1, contents=(7, 5, EMPTY))
        (dead,) = [c for c in commands if isinstance(c, Note) and c.kind == "dead"]
        assert dead.facts["rank"] == 1
        assert "rank 1 holds experts (7, 5, -1), expected (1, 5, -1)" in (dead.facts["reason"])
        assert set(sent(commands, Fenced)) == {1}
        cluster.settle()
        assert cluster.state.view.in_epoch == (0, 2, 3)
        assert kinds(cluster).count("dead") == 1

    def test_wrong_contents_when_ready_never_reach_an_epoch(self):
        cluster = a_serving_cluster()
        cluster.feed(Ended(2, 1))
        del cluster.ranks[2]
        cluster.say(0, mode=Mode.READY, prepared=2, contents=(0, 4, 6))
        assert [r for r in range(4) if not cluster.state.records[r].is_current] == [0, 2]

    def test_what_lies_in_an_empty_slot_does_not_matter(self):
        cluster = a_serving_cluster()
        assert cluster.say(1, contents=(1, 5, 6)) == ()
        assert cluster.state.view.in_epoch == (0, 1, 2, 3)

    def test_a_rank_that_failed_dies_for_its_own_reason(self):
        cluster = a_serving_cluster()
        cluster.tell(1, Broken("no source supplied expert 5"))
        cluster.say(1)
        dead = next(note for note in cluster.notes if note.kind == "dead")
        assert dead.facts["reason"] == "rank 1 failed: no source supplied expert 5"

    def test_a_lost_channel_that_comes_back_in_time_is_forgiven(self):
        cluster = a_serving_cluster()
        cluster.feed(Disconnected(1, 1))
        cluster.pass_time(1_000, silent=[1])
        cluster.say(1)
        cluster.pass_time(4_000)
        assert cluster.notes == []

    def test_a_rank_that_compiles_for_minutes_is_not_evicted(self):
        cluster = a_serving_cluster(slots_per_rank=4, redundancy=2)
        cluster.feed(Ended(2, 1))
        del cluster.ranks[2]
        cluster.settle()
        cluster.feed(Arrived(2))
        for sequence in range(1, 600):
            cluster.now_ms += 200
            cluster.sequence = sequence * 100
            for rank in cluster.ranks:
                cluster.say(rank)
            cluster.feed(
                dataclasses.replace(
                    cluster.status(0, mode=Mode.ALONE, epoch=0, stalled_ms=200 * sequence),
                    rank=2,
                    incarnation=2,
                    contents=(),
                )
            )
        assert cluster.state.records[2].is_current

    def test_a_sleep_of_the_supervisor_does_not_count_as_silence(self):
        cluster = a_serving_cluster()
        cluster.now_ms += 60_000
        cluster.feed(Tick())
        cluster.say(0)
        assert cluster.notes == [] and cluster.state.view.in_epoch == (0, 1, 2, 3)
        cluster.pass_time(3_400, silent=[1])
        assert kinds(cluster)[0] == "dead"


class TestWarmUp:
    def test_a_rank_that_compiles_for_a_minute_is_not_evicted(self):
        cluster = a_serving_cluster()
        cluster.feed(Ended(2, 1))
        cluster.ranks.pop(2)
        cluster.settle()
        cluster.feed(Arrived(2))
        for number in range(300):
            cluster.pass_time(200)
            cluster.feed(
                a_status(2, number + 1, Mode.ALONE, incarnation=2, stalled_ms=200 * number)
            )
        assert cluster.state.records[2].is_current
        assert "dead" not in kinds(cluster)[1:], "only its first incarnation died"


class TestSuspicion:
    def test_a_false_accusation_leads_to_a_new_epoch_with_the_same_members(self):
        cluster = a_serving_cluster()
        members, placement = cluster.state.view.members, cluster.state.placement
        cluster.tell(0, StepAccused(1, (2,)))
        cluster.say(0)
        cluster.settle()
        assert cluster.state.view == View(2, members) and cluster.state.placement == placement
        commit = cluster.notes[-1].facts
        assert commit["change"] == "resync" and commit["moves"] == []
        assert commit["reason"] == "rank 0 held a step that timed out on ranks [2]"
        assert cluster.state.records[2].accused_by == ()

    def test_an_accusation_from_an_older_epoch_is_no_sign(self):
        cluster = a_serving_cluster()
        cluster.say(0, mode=Mode.HOLDING, epoch=0, accused=(2,))
        assert cluster.state.records[2].accused_by == ()


class TestCoverage:
    def test_its_loss_blocks_and_a_returning_rank_unblocks(self):
        cluster = a_serving_cluster(slots_per_rank=2)
        cluster.feed(Ended(3, 1))
        del cluster.ranks[3]
        cluster.pass_time(2_000)
        cluster.settle()
        assert kinds(cluster) == ["dead", "coverage_lost"]
        assert "experts [3, 7] have no live replica" in cluster.state.blocked
        assert coordinator.missing(cluster.state) == (3, 7)
        assert cluster.join(3) == 2
        cluster.settle()
        assert cluster.state.blocked == "" and cluster.state.view.epoch == 2
        assert coordinator.missing(cluster.state) == ()
        assert {state.mode for state in cluster.ranks.values()} == {Mode.SERVING}

    def test_what_a_plan_that_was_given_up_may_have_overwritten_counts_as_lost(self):
        cluster = a_serving_cluster(slots_per_rank=4, redundancy=2)
        for rank in (2, 3, 1):  # the second death makes orphans, which go over replicas
            cluster.feed(Ended(rank, 1))
            del cluster.ranks[rank]
        state = cluster.state
        assert state.dirty and len(coordinator.missing(state)) > 8 - 4
        assert f"experts {list(coordinator.missing(state))} have no live" in state.blocked

    def test_it_is_said_once_per_reason(self):
        cluster = a_serving_cluster(slots_per_rank=2)
        for rank in (2, 3):
            cluster.feed(Ended(rank, 1))
            del cluster.ranks[rank]
        cluster.join(2)
        cluster.pass_time(4_000)
        cluster.settle()
        assert kinds(cluster).count("coverage_lost") <= 3

    def test_degrade_goes_on_without_the_experts_that_find_no_slot(self):
        cluster = a_serving_cluster(slots_per_rank=2, policy="degrade")
        cluster.feed(Ended(3, 1))
        del cluster.ranks[3]
        cluster.settle()
        assert cluster.state.dropped == (3, 7) and cluster.state.view.in_epoch == (0, 1, 2)
        assert cluster.notes[-1].facts["dropped"] == [3, 7]
        cluster.join(3)
        cluster.settle()
        assert cluster.state.dropped == () and coordinator.missing(cluster.state) == ()

    def test_all_ranks_can_die_and_come_back(self):
        cluster = a_serving_cluster()
        for rank in range(4):
            cluster.feed(Ended(rank, 1))
        cluster.ranks.clear()
        assert cluster.state.blocked == "no rank is left"
        for rank in range(4):
            assert cluster.join(rank) == 2
        cluster.settle()
        assert cluster.state.view.in_epoch == (0, 1, 2, 3)
        assert {state.mode for state in cluster.ranks.values()} == {Mode.SERVING}


class TestAbandonedChanges:
    def test_a_plan_is_recorded_before_any_rank_hears_of_it(self):
        cluster = a_serving_cluster()
        commands = cluster.feed(Ended(2, 1))
        order = [c.kind if isinstance(c, Note) else type(c.message).__name__ for c in commands]
        assert order == ["dead", "Fenced", "prepare", "Prepare", "Prepare", "Prepare"]

    def test_a_commit_is_recorded_before_any_rank_hears_of_it(self):
        cluster = a_serving_cluster()
        cluster.tell(0, StepAccused(1, ()))
        cluster.say(0)
        for send in cluster.unsent:
            cluster.tell(send.rank, send.message)
        commands = [command for rank in range(4) for command in cluster.say(rank)]
        order = [c.kind if isinstance(c, Note) else type(c.message).__name__ for c in commands]
        assert order == ["commit"] + ["Commit"] * 4

    def test_a_place_that_an_abandoned_plan_may_have_written_is_trusted_no_more(self):
        cluster = a_serving_cluster(slots_per_rank=4, redundancy=2)
        cluster.feed(Ended(0, 1))
        cluster.feed(Ended(1, 1))  # expert 0 is an orphan, written over a replica
        (move,) = cluster.state.change.plan.moves
        given_up = cluster.state.placement.slots[move.rank][move.slot]
        cluster.feed(Ended(3 if move.rank == 2 else 2, 1))
        assert given_up != EMPTY
        assert (move.rank, move.slot) in cluster.state.dirty
        assert cluster.state.blocked

    def test_a_commit_does_not_bring_back_a_joiner_that_died_meanwhile(self):
        cluster = a_serving_cluster(slots_per_rank=4)
        cluster.feed(Ended(2, 1))
        del cluster.ranks[2]
        cluster.settle()
        cluster.join(2)
        cluster.feed(Ended(3, 1))
        cluster.feed(Ended(2, 2))
        del cluster.ranks[2], cluster.ranks[3]
        cluster.settle()
        assert cluster.state.view.members[2] == Member(RankState.ABSENT, 2)
        assert cluster.join(2) == 3

    def test_a_rank_that_knows_a_later_prepare_forces_a_later_epoch(self):
        cluster = a_serving_cluster()
        cluster.tell(0, StepAccused(1, ()))
        cluster.say(0)
        assert cluster.state.change.view.epoch == 2
        cluster.say(1, mode=Mode.READY, prepared=7)
        assert cluster.state.change.view.epoch == 8


class TestLoads:
    def test_a_joiner_gets_a_load_again_until_it_holds_the_wanted_experts(self):
        cluster = a_serving_cluster(slots_per_rank=4, redundancy=2)
        cluster.feed(Ended(2, 1))
        del cluster.ranks[2]
        cluster.settle()
        cluster.join(2)
        cluster.unsent.clear()
        load = sent(cluster.say(2), Load)[2]
        assert set(load.slots) == {1, 2, 4, 6}
        assert sent(cluster.say(2), Load)[2] == load
        assert sent(cluster.say(2, contents=load.slots), Load) == {}

    def test_a_repeated_load_lists_the_experts_that_are_missing_now(self):
        cluster = a_serving_cluster(slots_per_rank=4, redundancy=2)
        cluster.feed(Ended(2, 1))
        del cluster.ranks[2]
        cluster.settle()
        cluster.join(2)
        slots = cluster.state.records[2].load.slots
        once = sent(cluster.say(2, contents=(*slots[:3], EMPTY)), Load)[2]
        assert [move.slot for move in once.moves] == [3]
        again = sent(cluster.say(2, contents=(EMPTY, *slots[1:])), Load)[2]
        assert [move.slot for move in again.moves] == [0]

    def test_it_reads_from_members_only(self):
        cluster = a_serving_cluster(slots_per_rank=4, redundancy=2)
        for rank in (2, 3):
            cluster.feed(Ended(rank, 1))
            del cluster.ranks[rank]
        cluster.settle()
        for rank in (2, 3):
            cluster.join(rank)
        for rank in (2, 3):
            load = cluster.state.records[rank].load
            assert set(load.handles) == {0, 1}
            assert {s.rank for m in load.moves for s in m.sources} <= {-1, 0, 1}


class TestRestart:
    """A supervisor that comes back knows the last commit, and who was let in since."""

    def restart(self, cluster: ByHand, view=None, issued=None, epoch_tried=None) -> None:
        old = cluster.state
        members = tuple(
            m if r in old.view.in_epoch else Member(RankState.ABSENT, old.records[r].fenced)
            for r, m in enumerate(old.view.members)
        )
        cluster.state = coordinator.restored_state(
            old.config,
            view or View(old.view.epoch, members),
            old.placement,
            old.epoch_tried if epoch_tried is None else epoch_tried,
            issued or [record.incarnation for record in old.records],
            cluster.now_ms,
        )
        cluster.unsent.clear()

    def test_ranks_that_serve_are_left_in_peace(self):
        cluster = a_serving_cluster()
        self.restart(cluster)
        cluster.pass_time(12_000)
        assert cluster.notes == [] and cluster.unsent == []

    def test_it_does_not_act_before_it_has_heard_all_or_judged_them(self):
        cluster = a_serving_cluster()
        self.restart(cluster)
        del cluster.ranks[2]  # it died while nobody looked
        cluster.tell(0, StepAccused(1, (2,)))
        cluster.pass_time(3_000)
        assert kinds(cluster) == []
        cluster.pass_time(5_000)
        cluster.settle()
        assert kinds(cluster) == ["dead", "prepare", "commit"]
        assert cluster.state.view.in_epoch == (0, 1, 3)

    def test_its_next_epoch_is_higher_than_any_rank_saw(self):
        cluster = a_serving_cluster()
        self.restart(cluster, epoch_tried=1)
        for rank in range(4):
            cluster.say(rank, mode=Mode.READY, prepared=5 if rank == 1 else 4)
        assert cluster.state.change.view.epoch == 6

    def test_a_rank_that_was_never_seen_can_come_at_once(self):
        cluster = ByHand()
        empty = cluster.state
        cluster.state = coordinator.restored_state(
            empty.config, empty.view, empty.placement, 0, [0] * 4, cluster.now_ms
        )
        assert cluster.feed(Tick()) == ()
        for rank in range(4):
            assert cluster.join(rank) == 1
        cluster.settle()
        assert cluster.state.view.in_epoch == (0, 1, 2, 3)

    def test_a_process_let_in_since_the_commit_is_not_taken_for_the_dead_member(self):
        cluster = a_serving_cluster(slots_per_rank=2)
        view = cluster.state.view
        cluster.feed(Ended(3, 1))
        del cluster.ranks[3]
        cluster.join(3)
        self.restart(cluster, view=view)
        assert cluster.state.view.in_epoch == (0, 1, 2) and cluster.state.resync
        cluster.settle()
        assert cluster.state.view.members[3] == Member(RankState.ACTIVE, 2)
        assert not missing_experts(cluster.state.placement, range(4))

    def test_a_rank_judged_dead_stays_dead(self):
        cluster = a_serving_cluster()
        old = cluster.state
        cluster.pass_time(3_400, silent=[1])
        dead = next(note.facts for note in cluster.notes if note.kind == "dead")
        assert (dead["rank"], dead["incarnation"]) == (1, 1)
        cluster.state = coordinator.restored_state(
            old.config, old.view, old.placement, 2, [1] * 4, cluster.now_ms, fenced=[0, 1, 0, 0]
        )
        cluster.unsent.clear()
        (fenced,) = answers(cluster.say(1))
        assert isinstance(fenced, Fenced)
        cluster.settle(without=[1])
        assert cluster.state.view.in_epoch == (0, 2, 3) and cluster.state.view.epoch == 3

    def test_a_joiner_stays_a_joiner(self):
        cluster = a_serving_cluster(slots_per_rank=4)
        cluster.feed(Ended(2, 1))
        del cluster.ranks[2]
        cluster.settle()
        cluster.join(2)
        self.restart(cluster)
        cluster.settle()
        assert cluster.state.view.members[2] == Member(RankState.ACTIVE, 2)

    def test_a_commit_records_a_joiner_as_not_fenced(self):
        cluster = a_serving_cluster(slots_per_rank=4)
        cluster.feed(Ended(2, 1))
        del cluster.ranks[2]
        cluster.settle()
        cluster.join(2)
        cluster.feed(Ended(3, 1))
        del cluster.ranks[3]
        cluster.settle(without=[2])
        commit = cluster.notes[-1]
        assert commit.kind == "commit"
        assert commit.facts["incarnations"] == [1, 1, 1, 1]
        assert commit.facts["members"] == {0: 1, 1: 1}


def test_a_placement_of_the_factories_is_the_one_of_a_new_cluster():
    expected = a_placement("0 4 -/1 5 -/2 6 -/3 7 -")
    assert a_serving_cluster().state.placement == expected
