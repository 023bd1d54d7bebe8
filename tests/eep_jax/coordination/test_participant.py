"""Promises of a rank's side: it follows the newest Prepare; late or repeated ones are harmless."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eep_jax.coordination import participant
from eep_jax.coordination.participant import (
    Broken,
    CarryOut,
    End,
    Fetched,
    FillBank,
    FillSlots,
    Loaded,
    ParticipantState,
    Prepared,
    Report,
    Resume,
    StepAccused,
    WarmedUp,
)
from eep_jax.coordination.protocol import (
    Commit,
    Fenced,
    Fetch,
    Load,
    Mode,
    Prepare,
    StandBy,
)
from eep_jax.placement.placement import EMPTY
from eep_jax.placement.planner import Move
from tests.support.factories import a_placement, a_view


def a_move(slot: int, expert: int, rank: int = 1) -> Move:
    return Move(rank, slot, expert, ())


def a_load(slots=(2, 3, EMPTY)) -> Load:
    moves = tuple(a_move(slot, e) for slot, e in enumerate(slots) if e != EMPTY)
    return Load(slots=slots, moves=moves, handles={})


def a_prepare(epoch: int = 1, moves=()) -> Prepare:
    return Prepare(
        epoch=epoch,
        view=a_view(epoch=epoch),
        placement=a_placement(),
        moves=moves,
        handles={},
        reason="a test",
    )


def a_fetch(number: int = 1, epoch: int = 1) -> Fetch:
    return Fetch(number=number, epoch=epoch, moves=(a_move(2, 4),))


def follow(*events, state=None) -> ParticipantState:
    state = state or ParticipantState(rank=1)
    for event in events:
        state, _ = participant.advance(state, event)
    return state


HELD = (2, 3, EMPTY)
OFFERED = follow(WarmedUp())
LOADED = follow(a_load(), Loaded(HELD), state=OFFERED)
PREPARING = follow(a_prepare(), state=LOADED)
READY = follow(Prepared(1, HELD), state=PREPARING)
SERVING = follow(Commit(epoch=1), state=READY)
HOLDING = follow(StepAccused(1, (3,)), state=SERVING)
STANDBY = follow(a_prepare(2), Prepared(2, HELD), StandBy(epoch=2), state=SERVING)
EVERY = [ParticipantState(rank=1), OFFERED, LOADED, PREPARING, READY, SERVING, HOLDING, STANDBY]
by_mode = pytest.mark.parametrize("state", EVERY, ids=lambda state: state.mode.value)

EVENTS = st.one_of(
    st.just(WarmedUp()),
    st.sampled_from([a_load(), a_load((4, EMPTY, EMPTY))]),
    st.sampled_from([Loaded(HELD), Loaded((4, EMPTY, EMPTY))]),
    st.integers(0, 5).map(a_prepare),
    st.integers(1, 5).map(lambda epoch: a_prepare(epoch, (a_move(2, 4),))),
    st.integers(0, 5).map(lambda epoch: Prepared(epoch, HELD)),
    st.integers(0, 5).map(lambda epoch: Commit(epoch=epoch)),
    st.integers(0, 5).map(lambda epoch: StepAccused(epoch, (0,))),
    st.integers(0, 5).map(lambda epoch: StandBy(epoch=epoch)),
    st.tuples(st.integers(1, 3), st.integers(0, 3)).map(lambda pair: a_fetch(*pair)),
    st.integers(1, 3).map(lambda number: Fetched(number, HELD)),
    st.just(Broken("the disk is full")),
    st.just(Fenced(reason="evicted")),
)


def test_the_whole_way_from_alone_to_serving():
    modes = [s.mode for s in (OFFERED, LOADED, PREPARING, READY, SERVING, HOLDING)]
    assert [mode.value for mode in modes] == [
        "offered", "offered", "preparing", "ready", "serving", "holding",
    ]  # fmt: skip
    assert SERVING.epoch == 1 and SERVING.placement == a_placement() and SERVING.prepared == 0
    assert HOLDING.accused == (3,)


@given(st.lists(EVENTS, max_size=30))
def test_in_any_order_of_events_epochs_only_grow_and_only_a_ready_rank_serves(events):
    state = ParticipantState(rank=1)
    for event in events:
        after, actions = participant.advance(state, event)
        latest = lambda s: max(s.epoch, s.left)  # one that was drained has no epoch
        assert latest(after) >= latest(state)
        assert max(latest(after), after.prepared) >= max(latest(state), state.prepared)
        if after.mode is Mode.SERVING and state.mode is not Mode.SERVING:
            assert state.mode is Mode.READY and event == Commit(epoch=state.prepared)
            assert Resume(after.epoch, after.view, after.placement) in actions
        if state.mode is Mode.FENCED:
            assert after == state and actions == ()
        state = after


@given(st.lists(EVENTS, max_size=12), st.data())
def test_saying_the_same_again_changes_nothing(events, data):
    messages = (Load, Prepare, Commit, Fetch, StandBy, Fenced)
    state = follow(*events)
    again = data.draw(EVENTS.filter(lambda event: isinstance(event, messages)))
    once, _ = participant.advance(state, again)
    twice, actions = participant.advance(once, again)
    assert twice == once
    assert all(isinstance(action, Report) for action in actions)


@by_mode
def test_a_fenced_process_ends_and_stays_fenced(state):
    fenced, actions = participant.advance(state, Fenced(reason="evicted at epoch 4"))
    assert fenced.mode is Mode.FENCED and actions == (End("evicted at epoch 4"),)
    assert follow(a_prepare(9), Commit(epoch=9), a_load(), state=fenced) == fenced


@by_mode
def test_a_broken_rank_reports_why(state):
    broken, actions = participant.advance(state, Broken("the disk is full"))
    assert broken.failure == "the disk is full" and actions == (Report(),)
    assert broken.mode is state.mode


@pytest.mark.parametrize("state", EVERY[1:], ids=lambda state: state.mode.value)
def test_a_newer_prepare_is_followed_from_every_mode(state):
    preparing, actions = participant.advance(state, a_prepare(5))
    assert preparing.mode is Mode.PREPARING and preparing.prepared == 5
    assert actions == (CarryOut(a_prepare(5)),)


def test_a_process_that_still_compiles_follows_nothing():
    alone = ParticipantState(rank=1)
    for message in (a_prepare(5), a_load(), Commit(epoch=5), a_fetch(), StandBy(epoch=5)):
        assert participant.advance(alone, message) == (alone, ())


@pytest.mark.parametrize("epoch", [0, 1])
def test_an_older_prepare_is_only_answered(epoch):
    for state in (READY, SERVING, HOLDING):
        assert participant.advance(state, a_prepare(epoch)) == (state, (Report(),))


@pytest.mark.parametrize("epoch", [0, 2])
def test_the_commit_of_another_epoch_is_ignored(epoch):
    assert participant.advance(READY, Commit(epoch=epoch)) == (READY, ())


def test_a_repeated_commit_does_not_resume_twice():
    assert participant.advance(SERVING, Commit(epoch=1)) == (SERVING, ())


def test_an_abandoned_prepare_that_ends_late_is_ignored():
    newer = follow(a_prepare(2), state=PREPARING)
    assert follow(Prepared(1, (7, 7, 7)), state=newer) == newer
    assert follow(Prepared(2, HELD), state=newer).mode is Mode.READY


def test_a_step_of_an_older_epoch_accuses_no_rank():
    assert participant.advance(SERVING, StepAccused(0, (3,))) == (SERVING, ())


def test_slots_that_are_being_written_hold_nothing_for_certain():
    preparing = follow(a_prepare(2, (a_move(0, 7),)), state=SERVING)
    assert preparing.contents == (EMPTY, 3, EMPTY)
    assert follow(Prepared(2, (7, 3, EMPTY)), state=preparing).contents == (7, 3, EMPTY)


def test_a_load_is_carried_out_once():
    filling, actions = participant.advance(OFFERED, a_load())
    assert actions == (FillBank(a_load()),)
    # An answer would make the supervisor repeat the Load, and so on, at the speed of the network.
    assert participant.advance(filling, a_load()) == (filling, ())
    assert participant.advance(LOADED, a_load()) == (LOADED, (Report(),))


@pytest.mark.parametrize("state", [PREPARING, READY], ids=["preparing", "ready"])
def test_a_rank_that_never_served_accepts_another_load(state):
    other = a_load((4, EMPTY, EMPTY))
    offered, actions = participant.advance(state, other)
    assert offered.mode is Mode.OFFERED and actions == (FillBank(other),)
    # What was given up must not be taken up again.
    assert offered.prepared == 1
    assert participant.advance(offered, a_prepare(1)) == (offered, (Report(),))
    assert follow(Commit(epoch=1), state=offered) == offered


def test_a_member_ignores_a_load():
    for state in (SERVING, HOLDING, follow(a_prepare(2), state=SERVING)):
        assert participant.advance(state, a_load((4, EMPTY, EMPTY))) == (state, ())


class TestFetch:
    def test_a_serving_rank_fetches_and_goes_on_serving(self):
        fetching, actions = participant.advance(SERVING, a_fetch())
        assert fetching.mode is Mode.SERVING and actions == (FillSlots(a_fetch()),)
        assert fetching.contents == (2, 3, EMPTY)
        assert participant.advance(fetching, a_fetch()) == (fetching, ())
        done, actions = participant.advance(fetching, Fetched(1, (2, 3, 4)))
        assert (done.fetched, done.fetch, done.contents) == (1, None, (2, 3, 4))
        assert actions == (Report(),)
        assert participant.advance(done, a_fetch()) == (done, (Report(),))

    def test_one_of_another_epoch_is_ignored(self):
        for epoch in (0, 2):
            assert participant.advance(SERVING, a_fetch(epoch=epoch)) == (SERVING, ())

    @pytest.mark.parametrize("state", [OFFERED, PREPARING, READY, HOLDING, STANDBY])
    def test_only_a_rank_that_serves_fetches(self, state):
        assert participant.advance(state, a_fetch()) == (state, ())

    @pytest.mark.parametrize("event", [a_prepare(2), StepAccused(1, (3,)), StandBy(epoch=2)])
    def test_whatever_is_more_urgent_ends_it(self, event):
        state = follow(a_fetch(), event, state=SERVING)
        assert state.fetch is None and state.contents == (2, 3, EMPTY)
        assert follow(Fetched(1, (2, 3, 4)), state=state) == state


class TestStandBy:
    def test_a_drained_rank_keeps_what_it_holds(self):
        assert STANDBY.mode is Mode.STANDBY and STANDBY.contents == HELD
        assert (STANDBY.epoch, STANDBY.prepared, STANDBY.left) == (0, 0, 2)

    def test_it_follows_nothing_older_than_its_leaving(self):
        for event in (a_prepare(2), Commit(epoch=2), Prepared(2, HELD)):
            assert follow(event, state=STANDBY) == STANDBY

    def test_it_comes_back_as_any_rank_comes_in(self):
        back = follow(a_load((4, EMPTY, EMPTY)), Loaded((4, EMPTY, EMPTY)), state=STANDBY)
        assert back.mode is Mode.OFFERED
        back = follow(a_prepare(5), Prepared(5, (4, 3, EMPTY)), Commit(epoch=5), state=back)
        assert back.mode is Mode.SERVING and back.epoch == 5

    def test_a_late_word_does_not_send_a_member_away(self):
        back = follow(a_prepare(5), Prepared(5, HELD), Commit(epoch=5), state=STANDBY)
        preparing = follow(a_prepare(5), state=STANDBY)
        for epoch in (2, 4):
            assert follow(StandBy(epoch=epoch), state=back) == back
            assert follow(StandBy(epoch=epoch), state=preparing) == preparing


def test_states_are_values():
    with pytest.raises(dataclasses.FrozenInstanceError):
        READY.epoch = 3
