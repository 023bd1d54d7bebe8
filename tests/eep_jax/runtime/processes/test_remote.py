"""Ranks of another host: a real supervisor, a real launcher's link, processes that really end."""

import asyncio
import contextlib
import os
import signal

import pytest

from eep_jax.coordination.protocol import Fenced, Refused
from eep_jax.errors import ProtocolError
from eep_jax.runtime.control import messages
from eep_jax.runtime.control.endpoint import ENDPOINT
from eep_jax.runtime.control.identity import host_id, start_ticks
from eep_jax.runtime.control.launcher_client import (
    LauncherClient,
    LauncherClientOptions,
    ProcessWatch,
)
from eep_jax.runtime.control.server import Connection
from eep_jax.runtime.processes.remote import HostWatch
from tests.support.control_world import TOKEN, a_world, story
from tests.support.fake_rank import start_body

AWAY = {"host": "elsewhere", "mirrored": True}
HOME = {"mirrored": True}


@contextlib.asynccontextmanager
async def a_launcher(world, host: str = "elsewhere", run: str = "tiny"):
    options = LauncherClientOptions(
        endpoint_file=world.run_dir / ENDPOINT,
        address="",
        token=TOKEN,
        host=host,
        run=run,
        heartbeat_ms=100,
        message_bytes_max=1 << 20,
    )
    link = LauncherClient(options)
    task = asyncio.create_task(link.run())
    try:
        yield link
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def state_of(world, rank: int) -> str:
    return world.supervisor.service.status()["ranks"][rank]["state"]


def record(world, rank: int):
    return world.supervisor.state.records[rank]


class TestRanksOfAnotherHost:
    @story
    async def test_take_part_and_their_death_is_seen_by_their_launcher(self, tmp_path):
        async with a_world(tmp_path, lease_ms=60_000, channel_grace_ms=60_000) as world:
            await world.start_supervisor()
            async with a_launcher(world):
                world.start_rank(0, **HOME)
                away = world.start_rank(1, **AWAY)
                await world.until(world.is_whole)
                ranks = world.supervisor.service.status()["ranks"]
                assert [r["host"] for r in ranks] == [host_id(), "elsewhere"]
                assert ranks[1]["pid"] == away.body.pid
                away.body.kill()  # the channel of the fake stays: only its launcher can know
                await world.until(lambda: record(world, 1).fenced == 1)
                dead = [e for e in world.supervisor.event_log.events if e["kind"] == "dead"]
                assert "its process" in dead[-1]["reason"]
                await world.until(lambda: record(world, 1).ended)

    @story
    async def test_are_refused_until_a_launcher_of_their_host_calls(self, tmp_path):
        async with a_world(tmp_path) as world:
            await world.start_supervisor()
            world.start_rank(0, **HOME)
            away = world.start_rank(1, **AWAY)
            await world.until(lambda: any(isinstance(m, Refused) for m in away.answers))
            assert "python -m launch.node" in away.answers[-1].reason
            assert record(world, 1).incarnation == 0
            async with a_launcher(world):
                await world.until(world.is_whole)

    @story
    async def test_without_a_mirror_are_told_what_to_start_them_with(self, tmp_path):
        async with a_world(tmp_path) as world:
            await world.start_supervisor()
            async with a_launcher(world):
                world.start_rank(0)
                await world.until(lambda: record(world, 0).incarnation == 1)
                away = world.start_rank(1, **AWAY)
                await world.until(lambda: any(isinstance(m, Fenced) for m in away.answers))
                reason = away.answers[-1].reason
                assert "ranks [0] serve no mirror" in reason and "--mirror_host" in reason

    @story
    async def test_all_on_one_host_need_no_mirror_wherever_the_supervisor_is(self, tmp_path):
        async with a_world(tmp_path) as world:
            await world.start_supervisor()
            async with a_launcher(world):
                for rank in (0, 1):
                    world.start_rank(rank, host="elsewhere")
                await world.until(world.is_whole)

    @story
    async def test_come_back_only_once_the_old_process_is_known_to_have_ended(self, tmp_path):
        quick = {"fenced_grace_ms": 60_000, "lease_ms": 700, "accused_lease_ms": 700}
        async with a_world(tmp_path, **quick) as world:
            await world.start_supervisor()
            world.start_rank(0, **HOME)
            async with a_launcher(world):
                old = world.start_rank(1, **AWAY)
                await world.until(world.is_whole)
                os.kill(old.body.pid, signal.SIGSTOP)
            for task in old._tasks:  # it is silent, but alive, and its launcher is gone
                task.cancel()
            await world.until(lambda: record(world, 1).fenced == 1)
            new = world.start_rank(1, **AWAY)
            await world.until(lambda: new.answers)
            assert old.body.poll() is None and not record(world, 1).ended
            async with a_launcher(world):  # another one, of the same host: it ends the old one
                await world.until(world.is_whole)
                assert old.body.wait(5) == -signal.SIGKILL
            assert record(world, 1).incarnation == 2

    @story
    async def test_of_a_lost_host_are_given_up_after_a_while(self, tmp_path):
        quick = {"host_lost_ms": 600, "lease_ms": 700, "accused_lease_ms": 700}
        async with a_world(tmp_path, **quick) as world:
            await world.start_supervisor()
            world.start_rank(0, **HOME)
            async with a_launcher(world):
                old = world.start_rank(1, **AWAY)
                await world.until(world.is_whole)
            for task in old._tasks:
                task.cancel()
            await world.until(lambda: record(world, 1).ended)
            assert old.body.poll() is None, "its host is lost: nobody could end it"
            ended = [e for e in world.supervisor.event_log.events if e["kind"] == "ended"]
            assert "elsewhere was silent" in ended[-1]["reason"]
            async with a_launcher(world, "a third host"):
                world.start_rank(1, host="a third host", mirrored=True)
                await world.until(world.is_whole)

    @story
    async def test_are_watched_again_after_the_supervisor_restarted(self, tmp_path):
        async with a_world(tmp_path, lease_ms=60_000, channel_grace_ms=60_000) as world:
            await world.start_supervisor()
            async with a_launcher(world):
                world.start_rank(0, **HOME)
                away = world.start_rank(1, **AWAY)
                await world.until(world.is_whole)
            await world.stop_supervisor()
            for task in away._tasks:
                task.cancel()
            away.body.kill()
            await world.start_supervisor()
            assert not record(world, 1).ended
            async with a_launcher(world):
                await world.until(lambda: record(world, 1).ended)

    @story
    async def test_never_get_the_number_of_one_that_ended_before_the_journal_was_cut(
        self, tmp_path
    ):
        """An old process that is cut off somewhere would be taken for the new one."""
        async with a_world(tmp_path) as world:
            await world.start_supervisor()
            async with a_launcher(world):
                world.start_rank(0, **HOME)
                away = world.start_rank(1, **AWAY)
                await world.until(world.is_whole)
                await away.close()
                await world.until(lambda: record(world, 1).ended)
            supervisor = world.supervisor
            supervisor.compact()
            await world.stop_supervisor()
            await world.start_supervisor()
            await world.until(lambda: record(world, 1).ended)
            async with a_launcher(world):
                world.start_rank(1, **AWAY)
                await world.until(world.is_whole)
            assert record(world, 1).incarnation == 2


class TestProcessWatch:
    def test_says_who_ended_and_kills_exactly_the_process_it_is_told(self):
        watch, bodies = ProcessWatch(), [start_body(), start_body()]
        first, second = (
            messages.HostProcess(rank=r, incarnation=1, pid=b.pid, ticks=start_ticks(b.pid))
            for r, b in enumerate(bodies)
        )
        try:
            watch.follow((first, second))
            assert watch.report() == messages.HostReport()
            reused = messages.HostProcess(rank=0, incarnation=1, pid=first.pid, ticks=1)
            watch.end(reused)
            assert bodies[0].poll() is None, "another process had this pid before"
            watch.end(first)
            bodies[0].wait(10)
            assert watch.report().ended == (first,)
            watch.follow((first,))
            assert watch.report().ended == (first,), "said again for whoever did not hear it"
            watch.follow((reused,))
            assert watch.report().ended == (reused,)
        finally:
            watch.close()
            for body in bodies:
                body.kill()
                body.wait(10)


class TestHostWatch:
    def test_a_report_of_another_host_or_process_changes_nothing(self):
        ended = []
        watch = HostWatch("tiny", lambda: 0, lambda *_: None, lambda *what: ended.append(what))
        process = messages.HostProcess(rank=1, incarnation=2, pid=7, ticks=8)
        watch.watch("b", process)
        other = messages.HostProcess(rank=1, incarnation=2, pid=9, ticks=8)

        class Caller(Connection):
            def __init__(self, host):
                self.hello = messages.HostHello(host=host, run="tiny")

            def send(self, message): ...

        watch.on_message(Caller("c"), messages.HostReport(ended=(process,)))
        watch.on_message(Caller("b"), messages.HostReport(ended=(other,)))
        assert not ended
        watch.on_message(Caller("b"), messages.HostReport(ending=(process,)))
        watch.on_message(Caller("b"), messages.HostReport(ended=(process,)))
        watch.on_message(Caller("b"), messages.HostReport(ended=(process,)))
        assert ended == [(process, "")]

    def test_hosts_that_came_and_went_leave_nothing_behind(self):
        now, ended = [0], []
        watch = HostWatch("tiny", lambda: now[0], print, lambda *what: ended.append(what))
        process = messages.HostProcess(rank=1, incarnation=2, pid=7, ticks=8)

        class Caller(Connection):
            def __init__(self, host, run="tiny"):
                self.hello = messages.HostHello(host=host, run=run)

            def send(self, message): ...

        for number in range(50):
            stranger, caller = Caller(f"s{number}", run="other"), Caller(f"h{number}")
            with pytest.raises(ProtocolError):
                watch.on_message(stranger, stranger.hello)
            watch.on_message(caller, caller.hello)
            watch.on_closed(stranger), watch.on_closed(caller)
        last = Caller("b")
        watch.on_message(last, last.hello)
        watch.watch("b", process)
        watch.on_closed(last)
        now[0] = 100
        watch.give_up_lost(100, set())
        assert watch.hosts_heard == {"b"} and not ended, "it was heard 100 ms ago, not more"
        now[0] = 101
        watch.give_up_lost(100, set())
        assert ended == [(process, ended[0][1])]
        watch.give_up_lost(100, set())
        assert watch.hosts_heard == set()

    def test_a_launcher_of_another_run_is_refused(self):
        watch = HostWatch("tiny", lambda: 0, lambda *_: None, lambda *_: None)

        class Caller(Connection):
            hello = messages.HostHello(host="b", run="other")

            def __init__(self): ...

        with pytest.raises(ProtocolError, match="'other', this is 'tiny'"):
            watch.on_message(Caller(), Caller.hello)
