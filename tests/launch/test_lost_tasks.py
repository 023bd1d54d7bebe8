"""Lost tasks: a rank without a process gets a new task, and another if that does not help."""

from hypothesis import given
from hypothesis import strategies as st

from launch.lost_tasks import AGAIN_MAX_S, LostTasks, ranks_away


def test_a_rank_that_its_task_brings_back_in_time_is_never_lost():
    tasks = LostTasks(10.0)
    assert tasks.lost(0.0, {2}) == []
    assert tasks.lost(9.9, {2}) == []
    assert tasks.lost(10.5, set()) == []
    assert tasks.lost(11.0, {2}) == []
    assert tasks.lost(20.9, {2}) == []


def test_a_rank_that_stays_away_is_lost_and_then_more_and_more_seldom():
    tasks = LostTasks(10.0)
    found = [s for s in range(200) if tasks.lost(float(s), {2})]
    assert found == [10, 30, 70, 150]
    assert tasks.lost(200.0, set()) == []  # it came back: all is forgotten
    assert [s for s in range(201, 220) if tasks.lost(float(s), {2})] == [211]


@given(st.lists(st.sets(st.integers(0, 7)), max_size=60), st.floats(0.5, 20.0))
def test_only_ranks_that_are_away_are_wanted_and_no_two_tasks_soon_after_each_other(away, after_s):
    tasks, last = LostTasks(after_s), {}
    for now_s, ranks in enumerate(away):
        for rank in tasks.lost(float(now_s), ranks):
            assert rank in ranks
            assert now_s - last.get(rank, -AGAIN_MAX_S) >= after_s
            last[rank] = now_s


def test_before_the_first_epoch_no_rank_is_away():
    ranks = [{"rank": 0, "pid": None}, {"rank": 1, "pid": 17}]
    assert ranks_away({"epoch": 0, "ranks": ranks}) == set()
    assert ranks_away({"epoch": 1, "ranks": ranks}) == {0}
