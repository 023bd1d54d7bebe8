"""Commands of the coordinator are carried out in order, each before the next event is fed."""

import asyncio
import contextlib
import os

from eep_jax.coordination.coordinator import initial_state
from eep_jax.coordination.protocol import Fenced, Mode, Refused, Welcome
from eep_jax.coordination.state import Arrived
from eep_jax.runtime.control.channels import Channels
from eep_jax.runtime.control.server import Connection
from eep_jax.runtime.history.event_log import EventLog
from eep_jax.runtime.history.journal import Journal, replay
from eep_jax.runtime.processes.local import LocalProcesses
from eep_jax.runtime.processes.registry import RankProcesses
from eep_jax.runtime.processes.remote import HostWatch
from eep_jax.runtime.supervisor.driver import Driver, DriverDeps, process_of
from tests.support.control_world import a_config, story
from tests.support.factories import a_status
from tests.support.fake_rank import hello_of, start_body


class World:
    """A driver of two ranks, and what it called."""

    def __init__(self, run_dir):
        config = a_config(ranks=2)
        self.now_ms, self.released, self.settled = 0, [], 0
        self.local = LocalProcesses(
            lambda: self.now_ms, lambda p: self.driver.ending(p), lambda p: self.driver.ended(p)
        )
        elsewhere = HostWatch(config.name, lambda: self.now_ms, print, print)
        self.journal = Journal(run_dir / "journal.jsonl")
        self.event_log = EventLog(self.journal, lambda: self.now_ms)
        self.channels = Channels()
        deps = DriverDeps(
            now_ms=lambda: self.now_ms,
            channels=self.channels,
            processes=RankProcesses("a", self.local, elsewhere),
            journal=self.journal,
            event_log=self.event_log,
            released=self.released.append,
            settled=self._settle,
        )
        self.driver = Driver(initial_state(config.cluster, config.model.experts), deps)

    def _settle(self) -> None:
        self.settled += 1

    def call(self, rank: int, pid: int, **hello) -> Connection:
        """A new process of `rank` says Hello."""
        said = hello_of(rank, pid, "tiny", host="a", **hello)
        connection = Connection(said, 0, asyncio.Queue(16))
        self.driver.feed(Arrived(rank), connection)
        return connection

    def kinds(self) -> list[str]:
        return [record["kind"] for record in replay(self.journal.path)]


@contextlib.asynccontextmanager
async def a_driver(run_dir):
    world = World(run_dir)
    try:
        yield world
    finally:
        world.local.close()
        world.journal.close()


def told(connection: Connection) -> list:
    return [connection.outgoing.get_nowait() for _ in range(connection.outgoing.qsize())]


@story
async def test_who_is_welcome_is_in_the_journal_watched_and_on_a_channel(tmp_path):
    async with a_driver(tmp_path) as world:
        connection = world.call(1, os.getpid())
        assert told(connection) == [Welcome(incarnation=1)] and connection.incarnation == 1
        assert world.kinds() == ["incarnation", "process"]
        assert world.channels.of(1) is connection
        assert world.local.known == [process_of(connection.hello, 1)]
        assert world.driver.current_processes() == {(1, 1)} and world.settled == 1


@story
async def test_a_second_process_is_refused_and_changes_nothing(tmp_path):
    async with a_driver(tmp_path) as world:
        first, second = world.call(1, os.getpid()), world.call(1, os.getpid())
        (answer,) = told(second)
        assert isinstance(answer, Refused) and "which lives" in answer.reason
        assert world.channels.of(1) is first and second.incarnation == 0


@story
async def test_one_that_is_gone_already_is_buried_after_it_was_let_in(tmp_path):
    async with a_driver(tmp_path) as world:
        connection = world.call(1, os.getpid(), ticks=1)  # that process is no more
        assert told(connection) == [Welcome(incarnation=1)]
        while "dead" not in world.kinds():
            await asyncio.sleep(0.002)
        assert world.kinds() == ["incarnation", "process", "ended", "dead"]
        (answer,) = told(connection)
        assert isinstance(answer, Fenced) and world.released == [1]
        assert world.driver.current_processes() == set()


@story
async def test_an_evicted_process_that_does_not_end_is_killed_and_then_replaced(tmp_path):
    body = start_body()
    try:
        async with a_driver(tmp_path) as world:
            old = world.call(1, body.pid)
            failed = a_status(1, incarnation=1, mode=Mode.ALONE, failure="no memory is left")
            world.driver.feed(failed, old)
            assert world.released == [1] and isinstance(told(old)[-1], Fenced)
            world.driver.feed(a_status(1, sequence=2, mode=Mode.ALONE), old)
            assert "no longer a member" in told(old)[-1].reason
            new = world.call(1, os.getpid())  # it waits for a place, so the old one is ended
            assert "must end first" in told(new)[-1].reason
            while "ended" not in world.kinds():
                await asyncio.sleep(0.002)
            assert body.wait(10) != 0
            assert told(world.call(1, os.getpid())) == [Welcome(incarnation=2)]
    finally:
        body.kill()
        body.wait(10)
