"""Several fetches at once, never more than allowed, and one alone where nothing is known."""

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eep_jax.placement.sources import Source, SourceKind
from eep_jax.relocation.fetch_ahead import Prefetcher
from eep_jax.relocation.patience import DeadlineRunner

FIRST, SECOND = (Source(SourceKind.BACKUP, rank) for rank in (1, 2))


class World:
    """Sources that answer at once, and what was under way or not taken yet at each begin."""

    def __init__(self, wanted, at_once, failing=()):
        self.patience, self.begun, self.held, self.most = DeadlineRunner(10_000), [], 0, 0
        self.failing, self.lock = set(failing), threading.Lock()
        self.ahead = Prefetcher(wanted, self._begin, lambda source: source.rank, at_once)

    def _begin(self, expert, source):
        self.begun.append((expert, source))
        self.held += 1
        self.most = max(self.most, self.held)
        return self.patience.begin(source.rank, lambda: self._fetch(expert, source))

    def _fetch(self, expert, source):
        if (expert, source) in self.failing:
            raise ConnectionResetError("gone")
        return expert, source

    def take(self, expert, source):
        try:
            found, seconds = self.ahead.take(expert, source, self.patience.wait)
        finally:
            self.held -= 1
        assert seconds >= 0
        return found


@given(
    experts=st.lists(st.integers(0, 9), unique=True, min_size=1),
    at_once=st.integers(1, 5),
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_each_is_fetched_once_in_bounded_room(experts, at_once, data):
    wanted = [(e, data.draw(st.sampled_from([FIRST, SECOND]))) for e in experts]
    failing = data.draw(st.sets(st.sampled_from(wanted)))
    world = World(wanted, at_once, failing)
    for expert, source in wanted:
        if (expert, source) in failing:
            with pytest.raises(ConnectionResetError):
                world.take(expert, source)
        else:
            assert world.take(expert, source) == (expert, source)
    assert sorted(e for e, _ in world.begun) == sorted(experts)
    assert world.most <= at_once + 1, "the last one that was taken is one more"


def test_a_source_proves_itself_before_more_is_asked_of_it():
    world = World([(e, FIRST) for e in range(3)] + [(e, SECOND) for e in range(3, 6)], 3)
    world.take(0, FIRST)
    assert [e for e, _ in world.begun] == [0, 1, 2], "none of the other rank"
    for expert in (1, 2):
        world.take(expert, FIRST)
    assert len(world.begun) == 3
    world.take(3, SECOND)
    assert [e for e, _ in world.begun] == [0, 1, 2, 3, 4, 5]


def test_others_are_under_way_while_one_is_waited_for():
    all_there, started = threading.Barrier(3), []

    def begin(expert, source):
        started.append(expert)
        meet = lambda: expert if expert == 0 else all_there.wait(10) or expert
        return patience.begin(source.rank, meet)

    patience = DeadlineRunner(20_000)
    ahead = Prefetcher([(e, FIRST) for e in range(4)], begin, lambda source: source.rank, 3)
    for expert in range(4):  # three meet, so three go on at the same time
        ahead.take(expert, FIRST, patience.wait)
    assert started == [0, 1, 2, 3]


def test_after_a_failure_a_source_is_asked_for_one_expert_again():
    world = World([(e, FIRST) for e in range(4)], 2, failing=[(1, FIRST)])
    world.take(0, FIRST)
    with pytest.raises(ConnectionResetError):
        world.take(1, FIRST)
    assert len(world.begun) == 3 and world.take(2, FIRST) == (2, FIRST)


def test_what_nobody_announced_is_fetched_all_the_same():
    world = World([], 4)
    assert world.take(7, SECOND) == (7, SECOND)
