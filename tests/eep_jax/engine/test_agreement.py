"""Promise: ranks whose steps overlap launch the same steps, and stop after the same one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eep_jax.engine.agreement import NO_STEP, UNKNOWN, Agreement
from eep_jax.engine.votes import HOLD, IDLE

SMALL, LARGE = 8, 40


class Rank:
    """One rank: it launches and reads steps at its own pace, at most two under way."""

    def __init__(self, votes):
        self.agreement, self.votes = Agreement(SMALL), votes
        self.rows, self.read, self.stop = [], 0, None

    def vote(self, step: int) -> int:
        return self.votes[step % len(self.votes)]

    def move(self, results, eager: bool) -> bool:
        """Launches or reads one step; False if it has to wait for others."""
        if self.stop is not None:
            return False
        under_way = len(self.rows) - self.read
        may_launch = under_way < 2 and self.agreement.rows not in NO_STEP
        if may_launch and (eager or not under_way):
            self.rows.append(self.agreement.take())
            return True
        if under_way and (result := results(self.read)) is not None:
            self.read += 1
            self.stop = self.agreement.hear(result, is_last=self.read == len(self.rows))
            return True
        return False


@settings(max_examples=200, deadline=None)
@given(
    votes=st.lists(
        st.lists(st.sampled_from([IDLE, IDLE, SMALL, LARGE]), min_size=1, max_size=8),
        min_size=1,
        max_size=4,
    ),
    hold_from=st.integers(0, 12),
    paces=st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=60),
)
def test_ranks_launch_the_same_steps_and_stop_together(votes, hold_from, paces):
    ranks = [Rank(own) for own in votes]

    def results(step: int) -> int | None:
        """The largest vote, once all ranks launched the step; from some step on a rank holds."""
        if any(len(rank.rows) <= step for rank in ranks):
            return None
        return HOLD if step >= hold_from else max(rank.vote(step) for rank in ranks)

    for index, eager in paces:
        ranks[index % len(ranks)].move(results, eager)
    for _ in range(200):
        if not any([rank.move(results, True) for rank in ranks]):
            break
    assert all(rank.stop in (IDLE, HOLD) for rank in ranks), "a rank waits for ever"
    assert len({(tuple(rank.rows), rank.read, rank.stop) for rank in ranks}) == 1
    (rank, *_) = ranks
    assert rank.read == len(rank.rows), "nothing is under way"
    if rank.stop == IDLE:
        assert results(len(rank.rows) - 1) == IDLE


def test_without_overlap_a_vote_counts_in_the_next_step():
    agreement = Agreement(SMALL, overlap=False)
    for rows in (LARGE, SMALL, LARGE):
        agreement.take()
        assert agreement.hear(rows, is_last=True) is None and agreement.rows == rows
        assert agreement.between == 0
    agreement.take()
    assert agreement.hear(IDLE, is_last=True) == IDLE and agreement.rows == SMALL


def test_a_vote_counts_in_the_step_after_the_next():
    agreement = Agreement(SMALL)
    assert agreement.take() == SMALL and agreement.rows == UNKNOWN
    assert agreement.hear(LARGE, is_last=True) is None
    assert [agreement.take(), agreement.take()] == [LARGE, SMALL]
    assert agreement.hear(LARGE, is_last=False) is None and agreement.take() == LARGE
    assert agreement.hear(SMALL, is_last=False) is None and agreement.rows == SMALL


def test_a_pause_waits_for_the_step_under_way_which_may_end_it():
    agreement = Agreement(SMALL)
    agreement.take()
    agreement.hear(LARGE, is_last=True)
    agreement.take(), agreement.take()
    assert agreement.hear(IDLE, is_last=False) is None and agreement.rows in NO_STEP
    assert agreement.hear(LARGE, is_last=True) is None
    assert [agreement.take(), agreement.take()] == [LARGE, SMALL]


@pytest.mark.parametrize("rows", [[SMALL], [LARGE, SMALL]])
def test_discarded_steps_are_launched_anew(rows):
    agreement = Agreement(SMALL)
    agreement.take()
    agreement.hear(LARGE, is_last=True)
    agreement.take(), agreement.take()
    agreement.put_back(rows)
    assert [agreement.take() for _ in rows] == rows
