"""Promises of fetching in threads: deadlines, sources that hang, bounded concurrency."""

import gc
import threading
import time
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eep_jax.placement.sources import Source, SourceKind
from eep_jax.storage.block_loader import load_array
from eep_jax.storage.fetcher import Fetch, Fetcher, Prefetcher

FIRST, SECOND = (Source(SourceKind.BACKUP, rank) for rank in (1, 2))


class World:
    """Sources that answer at once, and counts of fetches under way or not taken yet."""

    def __init__(self, wanted, at_once, failing=()):
        self.fetcher, self.begun, self.held, self.most = Fetcher(10_000), [], 0, 0
        self.failing = set(failing)
        self.start, self.fetcher.start = self.fetcher.start, self._start
        self.ahead = Prefetcher(self.fetcher, wanted, self._make, at_once)

    def _make(self, wanted):
        fetch = Fetch(wanted[1].rank, lambda: self._fetch(wanted))
        fetch.wanted = wanted
        return fetch

    def _start(self, fetch):
        self.begun.append(fetch.wanted)
        self.held += 1
        self.most = max(self.most, self.held)
        return self.start(fetch)

    def _fetch(self, wanted):
        if wanted in self.failing:
            raise ConnectionResetError("gone")
        return wanted

    def take(self, expert, source):
        fetch = self.ahead.take(self.ahead.begin((expert, source)))
        self.held -= 1
        assert fetch.seconds >= 0
        return fetch.result()


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

    def work(expert):
        started.append(expert)
        return expert if expert == 0 else all_there.wait(10) or expert

    make = lambda expert: Fetch(FIRST.rank, lambda: work(expert))
    ahead = Prefetcher(Fetcher(20_000), range(4), make, 3)
    for expert in range(4):  # three meet at the barrier, so three run at the same time
        ahead.take(ahead.begin(expert)).result()
    assert started[0] == 0 and sorted(started) == [0, 1, 2, 3]


def test_after_a_failure_a_source_is_asked_for_one_expert_again():
    world = World([(e, FIRST) for e in range(4)], 2, failing=[(1, FIRST)])
    world.take(0, FIRST)
    with pytest.raises(ConnectionResetError):
        world.take(1, FIRST)
    assert len(world.begun) == 3 and world.take(2, FIRST) == (2, FIRST)


def test_an_unannounced_expert_is_fetched_as_well():
    world = World([], 4)
    assert world.take(7, SECOND) == (7, SECOND)


@pytest.fixture
def hanging():
    """A fetcher, its fetch of key "disk" past the deadline, and the event that ends it."""
    end, fetcher = threading.Event(), Fetcher(1)
    fetch = fetcher.start(Fetch("disk", lambda: end.wait(30)))
    while not fetcher._hangs(fetch):
        pass
    yield fetcher, fetch, end
    end.set()


def test_a_source_that_hangs_costs_one_thread_even_without_a_wait(hanging):
    fetcher, first, end = hanging
    for _ in range(3):
        refused = fetcher.start(Fetch("disk", lambda: 1))
        with pytest.raises(TimeoutError, match="an earlier read from it still hangs"):
            refused.result()
        assert not refused.threads
    other = fetcher.start(Fetch("peer", lambda: 2))
    assert other.result(30) == 2
    end.set()
    first.threads[0].join(30)
    assert fetcher.start(Fetch("disk", lambda: 3)).result(30) == 3


def test_an_answer_after_the_deadline_is_not_the_result(hanging):
    fetcher, fetch, end = hanging
    assert fetcher.is_over(fetch)
    end.set()
    fetch.threads[0].join(30)
    with pytest.raises(TimeoutError, match="took longer than 1 ms"):
        fetch.result()


def test_results_are_freed_with_their_fetch():
    gc.disable()
    try:
        fetcher = Fetcher(60_000)
        fetch = fetcher.start(Fetch("disk", lambda: np.zeros(1 << 20)))
        result = weakref.ref(fetch.result(30))
        fetch.threads[0].join(30)
        del fetch
        assert result() is None
        array = np.zeros(4)
        load_array(array, "nothing", lambda: [])
        loaded = weakref.ref(array)
        del array
        ends_s = time.monotonic() + 30
        while loaded() is not None:  # until the loader's threads have ended
            assert time.monotonic() < ends_s
            time.sleep(0.01)
    finally:
        gc.enable()


def test_progress_postpones_the_deadline():
    fetcher = Fetcher(60_000)
    go_on = threading.Event()
    fetch = fetcher.start(Fetch("disk", lambda: go_on.wait(30)))
    fetch.progress_s -= 120.0
    assert fetcher._hangs(fetch)
    fetch.progress_s += 120.0
    assert not fetcher.is_over(fetch)
    go_on.set()
    fetcher.wait(fetch)
    assert fetch.result()
