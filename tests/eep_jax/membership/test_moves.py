"""Promises of `membership.moves`: whatever order the moves come in, a View stays a View."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eep_jax.errors import InvalidMove
from eep_jax.membership import moves
from eep_jax.membership.view import Member, RankState, View, check, empty_view
from tests.support.factories import a_view

NEEDS = {
    "offer": RankState.ABSENT,
    "withdraw": RankState.JOINING,
    "admit": RankState.JOINING,
    "suspect": RankState.ACTIVE,
    "clear": RankState.SUSPECT,
    "evict": RankState.SUSPECT,
}
LEADS_TO = {
    "offer": RankState.JOINING,
    "withdraw": RankState.ABSENT,
    "admit": RankState.ACTIVE,
    "suspect": RankState.SUSPECT,
    "clear": RankState.ACTIVE,
    "evict": RankState.ABSENT,
}
STARTS_AN_EPOCH = ("admit", "evict")


def make(view: View, name: str, rank: int, incarnation: int) -> View:
    move = getattr(moves, name)
    return move(view, rank, incarnation) if name == "offer" else move(view, rank)


@st.composite
def attempts(draw):
    ranks = draw(st.integers(1, 8))
    attempt = st.tuples(
        st.sampled_from(sorted(NEEDS)), st.integers(0, ranks - 1), st.integers(1, 4)
    )
    return ranks, draw(st.lists(attempt, max_size=60))


@given(attempts())
def test_any_sequence_of_moves_keeps_a_view_valid(drawn):
    ranks, tried = drawn
    view, used = empty_view(ranks), set()
    for name, rank, incarnation in tried:
        before = view.members[rank]
        fresh = name != "offer" or incarnation > before.incarnation
        if before.state is not NEEDS[name] or not fresh:
            with pytest.raises(InvalidMove, match=f"rank {rank} "):
                make(view, name, rank, incarnation)
            continue
        after = check(make(view, name, rank, incarnation))
        assert after.epoch == view.epoch + (name in STARTS_AN_EPOCH)
        assert after.members[rank].state is LEADS_TO[name]
        others = [r for r in view.ranks if r != rank]
        assert all(after.members[r] == view.members[r] for r in others)
        if name == "offer":
            assert (rank, incarnation) not in used, "an incarnation came back"
        used |= {(rank, after.members[rank].incarnation)}
        view = after


@given(attempts())
def test_members_change_only_with_the_epoch(drawn):
    ranks, tried = drawn
    view = empty_view(ranks)
    for name, rank, incarnation in tried:
        try:
            after = make(view, name, rank, incarnation)
        except InvalidMove:
            continue
        assert (after.in_epoch == view.in_epoch) == (after.epoch == view.epoch)
        view = after


@pytest.mark.parametrize("name", sorted(NEEDS))
@pytest.mark.parametrize("state", list(RankState), ids=lambda state: state.value)
def test_an_illegal_move_says_what_is_and_what_was_needed(name, state):
    view = a_view(f"{state.value} active")
    if state is NEEDS[name]:
        return
    with pytest.raises(InvalidMove) as raised:
        make(view, name, 0, 9)
    found, needed = f"rank 0 is {state.value}", f"only a rank that is {NEEDS[name].value}"
    assert found in str(raised.value) and needed in str(raised.value)


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_that_does_not_exist_cannot_move(rank):
    with pytest.raises(InvalidMove, match=rf"rank {rank} is not in 0\.\.1"):
        moves.suspect(a_view("active active"), rank)


@pytest.mark.parametrize("leave", ["evict", "withdraw"])
def test_an_incarnation_never_returns(leave):
    view = moves.offer(a_view("active absent"), 1, 3)
    if leave == "evict":
        view = moves.suspect(moves.admit(view, 1), 1)
    view = getattr(moves, leave)(view, 1)
    for incarnation in (1, 2, 3):
        with pytest.raises(InvalidMove, match="only a newer process may join"):
            moves.offer(view, 1, incarnation)
    assert moves.offer(view, 1, 4).members[1] == Member(RankState.JOINING, 4)


@given(st.integers(0, 9), st.integers(-2, 12))
def test_several_moves_become_one_change_under_a_later_epoch(epoch, wanted):
    before = a_view("active suspect", epoch=epoch)
    after = moves.evict(before, 1)
    if wanted > epoch:
        assert moves.at_epoch(before, after, wanted) == View(wanted, after.members)
        return
    with pytest.raises(InvalidMove, match="epochs only grow"):
        moves.at_epoch(before, after, wanted)


@pytest.mark.parametrize(
    ("view", "wrong"),
    [
        (View(-1, (Member(),)), "epoch -1 is negative"),
        (View(0, ()), "at least one rank"),
        (View(0, (Member(incarnation=-2),)), "rank 0 has incarnation -2"),
        (View(0, (Member(RankState.ACTIVE, 0),)), "rank 0 is active but has no incarnation"),
    ],
)
def test_a_wrong_view_is_refused_by_name(view, wrong):
    with pytest.raises(InvalidMove, match=wrong):
        check(view)


def test_a_view_reads_as_one_line():
    assert str(a_view("active suspect joining absent", epoch=7)) == (
        "epoch=7 0:active 1:suspect 2:joining 3:absent"
    )
