"""Requests and tokens between the table and ranks that come, go, and call again."""

import asyncio

import pytest

from eep_jax.engine.request import Progress, Request
from eep_jax.errors import ProtocolError
from eep_jax.runtime.control import messages
from eep_jax.runtime.control.channels import Channels
from eep_jax.runtime.control.messages import Forget, Generate
from eep_jax.runtime.control.server import Connection
from eep_jax.runtime.serving.dispatcher import RequestDispatcher
from eep_jax.runtime.serving.request_table import Entry, RequestTable


class World:
    """A dispatcher over two ranks that have a channel, and all that it said."""

    def __init__(self, awaited=(), settled=(0, 1)):
        self.table = RequestTable(queue_max=8, finished_max=8, per_rank_max=4)
        self.channels, self.records, self.changed = Channels(), [], []
        for rank in range(2):
            hello = messages.Hello(rank=rank, incarnation=1, pid=7, ticks=9, host="a", run="tiny")
            connection = Connection(hello, 1, asyncio.Queue(64), settled=rank in settled)
            self.channels.register(connection)
        self.dispatcher = RequestDispatcher(
            self.table, self.channels, self._record, self.changed.append, awaited
        )

    def _record(self, kind: str, facts: dict) -> None:
        self.records.append((kind, facts.get("id") or facts["request"]["id"]))

    def submit(self, *names: str) -> list[Entry]:
        entries = []
        for name in names:
            request = Request(
                id=name, prompt=(1, 2), max_tokens=4, temperature=0.0, top_p=1.0, seed=1
            )
            entries.append(self.table.submit(Entry(request)))
            self.dispatcher.accepted(entries[-1])
        return entries

    def told(self, rank: int) -> list:
        queue = self.channels.of(rank).outgoing
        return [queue.get_nowait() for _ in range(queue.qsize())]


def progress(name: str, *tokens: int, start: int = 0, finish: str = "", dropped: int = 0):
    return Progress(id=name, start=start, tokens=tokens, finish=finish, dropped=dropped)


def test_a_request_goes_out_and_its_end_is_kept_before_the_rank_may_forget_it():
    world = World()
    (entry,) = world.submit("x")
    world.dispatcher.assign([0, 1])
    assert world.told(0) == [Generate(request=entry.request)] and world.told(1) == []
    world.dispatcher.produced(0, progress("x", 5, 6))
    world.dispatcher.produced(0, progress("x", 7, start=2, finish="stop"))
    assert (entry.produced, entry.finish) == ([5, 6, 7], "stop")
    assert world.told(0) == [Forget(id="x")] and world.changed == ["x", "x"]
    assert world.records == [("accepted", "x"), ("finished", "x")]


def test_what_a_rank_produces_of_a_request_that_is_not_its_own_changes_nothing():
    world = World()
    (entry,) = world.submit("x")
    world.dispatcher.assign([0])
    world.dispatcher.produced(1, progress("x", 9))
    world.dispatcher.produced(0, progress("unknown", 9))
    assert entry.produced == [] and world.changed == []


def test_a_gap_is_refused():
    world = World()
    world.submit("x")
    world.dispatcher.assign([0])
    with pytest.raises(ProtocolError, match="from 2, but only 0 are known"):
        world.dispatcher.produced(0, progress("x", 9, start=2))


def test_requests_of_a_rank_that_is_out_go_on_elsewhere_with_what_they_have():
    world = World()
    (entry,) = world.submit("x")
    world.dispatcher.assign([0])
    world.dispatcher.produced(0, progress("x", 5))
    world.told(0)
    world.dispatcher.release(0)
    assert world.told(0) == [Forget(id="x")]
    world.dispatcher.assign([1])
    assert world.told(1) == [Generate(request=entry.continuation())]
    assert entry.continuation().produced == (5,)


def test_nothing_is_given_to_a_rank_that_did_not_say_what_it_has():
    world = World(settled=(1,))
    world.submit("x", "y")
    world.dispatcher.assign([0, 1])
    assert world.told(0) == [] and len(world.told(1)) == 2


def test_after_a_restart_the_members_of_before_speak_first():
    world = World(awaited=(0, 1))
    mine, other = world.submit("x", "y")
    world.dispatcher.assign([0, 1])
    world.dispatcher.held(0, (progress("x", 5), progress("old", 1)), is_member=True)
    assert mine.rank == 0 and mine.produced == [5]
    assert world.told(0) == [Forget(id="old")], "nobody wants it any more"
    world.dispatcher.assign([0, 1])
    assert other.rank is None, "rank 1 may have it"
    world.dispatcher.assign([0])  # rank 1 died meanwhile
    assert other.rank == 0 and world.told(0) == [Generate(request=other.request)]


def test_a_rank_that_lost_a_request_on_the_way_is_given_it_again():
    world = World()
    (entry,) = world.submit("x")
    world.dispatcher.assign([0])
    world.told(0)
    world.dispatcher.held(0, (), is_member=True)
    assert world.told(0) == [Generate(request=entry.request)]


def test_a_rank_that_is_no_member_keeps_nothing_but_its_tokens_count():
    world = World()
    (entry,) = world.submit("x")
    world.dispatcher.assign([0])
    world.told(0)
    world.dispatcher.held(0, (progress("x", 5),), is_member=False)
    assert (entry.rank, entry.produced) == (None, [5])
    assert world.told(0) == [Forget(id="x")]


def test_a_client_that_goes_away_frees_the_rank():
    world = World()
    waiting, running = world.submit("x"), world.submit("y")
    world.dispatcher.assign([])
    for entry in (*waiting, *running):
        world.table.cancel(entry.request.id)
        world.dispatcher.cancelled(entry)
    assert world.told(0) == world.told(1) == []
    (entry,) = world.submit("z")
    world.dispatcher.assign([1])
    world.told(1)
    world.table.cancel("z")
    world.dispatcher.cancelled(entry)
    assert world.told(1) == [Forget(id="z")]
    assert [kind for kind, _ in world.records].count("finished") == 3


def test_choices_of_lost_experts_are_told_of_the_request_they_were_made_in():
    world = World()
    one, other = world.submit("x", "y")
    world.dispatcher.assign([0])
    world.dispatcher.produced(0, progress("x", 5, dropped=2), dropped=(3, 1))
    world.dispatcher.produced(0, progress("y", 5), dropped=(3, 1))
    assert (one.degraded, other.degraded) == ({1, 3}, set())
    assert world.table.counts["dropped_choices"] == 2
