"""Real processes that end, are killed, or are gone before anybody looked."""

import asyncio
import contextlib
import errno
import os
import signal
import subprocess
import sys

from eep_jax.runtime.control.identity import open_process, start_ticks
from eep_jax.runtime.control.messages import HostProcess
from eep_jax.runtime.processes import local
from eep_jax.runtime.processes.local import LocalProcesses
from tests.support.control_world import story
from tests.support.fake_rank import start_body

# Its first thread has exited, which makes it a zombie; it is gone when the other one has, too.
HALF_GONE = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(120,)).start()
ctypes.CDLL(None).pthread_exit(None)
"""


class Watched:
    """LocalProcesses over children of this test, and what it reported."""

    def __init__(self):
        self.now_ms, self.ending, self.ended, self._children = 0, [], [], {}
        self.local = LocalProcesses(lambda: self.now_ms, self.ending.append, self.ended.append)

    def start(self, rank: int, incarnation: int = 1, code: str = "") -> HostProcess:
        command = [sys.executable, "-S", "-c", code]
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL) if code else start_body()
        process = HostProcess(
            rank=rank, incarnation=incarnation, pid=child.pid, ticks=start_ticks(child.pid)
        )
        self._children[process] = child
        return process

    def end(self, process: HostProcess) -> None:
        """Its parent has heard of it, so the pid may be used again."""
        self._children[process].kill()
        self._children[process].wait(10)

    def code(self, process: HostProcess) -> int | None:
        return self._children[process].poll()

    async def until(self, condition) -> None:
        while not condition():
            await asyncio.sleep(0.002)

    def close(self) -> None:
        for process in self._children:
            self.end(process)


@contextlib.asynccontextmanager
async def watched():
    world = Watched()
    looking = asyncio.create_task(world.local.keep_looking())
    try:
        yield world
    finally:
        looking.cancel()
        world.local.close()
        world.close()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@story
async def test_an_end_is_told_once_and_then_there_is_no_pid():
    async with watched() as world:
        process, other = world.start(0), world.start(1)
        world.local.watch(process), world.local.watch(other)
        world.local.watch(process)  # as a rank that calls again has it done
        assert world.local.pid_of(0, 1) == process.pid
        world.end(process)
        await world.until(lambda: world.ended)
        assert world.ended == [process] and not world.ending[1:]
        assert world.local.pid_of(0, 1) is None and world.local.pid_of(1, 1) == other.pid
        assert world.local.known == [process, other]


@story
async def test_a_killed_process_is_seen_to_end_and_no_other_is_touched():
    async with watched() as world:
        process, other = world.start(0), world.start(1)
        world.local.watch(process), world.local.watch(other)
        world.local.kill(0, 2)  # not one of these
        world.local.kill(0, 1)
        await world.until(lambda: world.ended == [process])
        await world.until(lambda: world.code(process) == -signal.SIGKILL)
        world.local.kill(0, 1)  # it has ended
        assert world.code(other) is None


@story
async def test_a_process_that_runs_no_more_is_told_of_before_it_is_gone():
    async with watched() as world:
        process = world.start(0, code=HALF_GONE)
        world.local.watch(process)
        await world.until(lambda: world.ending)
        seen_ms, world.now_ms = world.local.alive_ms(0, 1), 70
        await asyncio.sleep(0.05)  # several looks
        assert (world.ending, world.ended) == ([process], [])
        assert world.local.alive_ms(0, 1) == seen_ms
        assert world.local.pid_of(0, 1) == process.pid
        world.end(process)
        await world.until(lambda: world.ended == [process])
        assert world.ending == [process]


@story
async def test_a_process_that_is_only_stopped_is_seen_alive():
    async with watched() as world:
        process = world.start(0)
        world.local.watch(process)
        os.kill(process.pid, signal.SIGSTOP)
        world.now_ms = 70
        await world.until(lambda: world.local.alive_ms(0, 1) == 70)
        assert not world.ending


@story
async def test_one_that_is_gone_or_has_the_pid_of_another_ends_after_watch_returned():
    async with watched() as world:
        gone = world.start(0)
        world.end(gone)
        taken = world.start(1)
        reused = HostProcess(rank=1, incarnation=1, pid=taken.pid, ticks=taken.ticks - 1)
        for process in (gone, reused):
            world.local.watch(process)
        assert world.ended == [], "the caller is in the midst of what led to it"
        await world.until(lambda: world.ended == [gone, reused])
        world.local.kill(1, 1)
        assert world.code(taken) is None, "an innocent process was killed"


@story
async def test_it_keeps_one_process_of_a_rank_and_no_descriptors():
    async with watched() as world:
        before = open_files()
        for incarnation in range(1, 6):
            process = world.start(0, incarnation)
            world.local.watch(process)
            world.end(process)
            await world.until(lambda process=process: world.ended[-1:] == [process])
            assert world.local.known == [process]
        assert open_files() == before


@story
async def test_nothing_is_told_once_it_is_closed():
    async with watched() as world:
        process, gone = world.start(0), world.start(1)
        world.local.watch(process)
        world.end(gone)
        world.local.watch(gone)
        world.local.close()
        world.end(process)
        await asyncio.sleep(0.05)
        assert not world.ended


@story
async def test_one_that_cannot_be_opened_for_want_of_descriptors_is_tried_again(monkeypatch):
    """Else a rank that is let in at that moment could never be replaced: its end is not seen."""
    full = True

    def open_if_room(pid: int, ticks: int) -> int | None:
        if full:
            raise OSError(errno.EMFILE, "Too many open files")
        return open_process(pid, ticks)

    monkeypatch.setattr(local, "open_process", open_if_room)
    async with watched() as world:
        first, second, gone = (world.start(rank) for rank in range(3))
        for process in (first, second, gone):
            world.local.watch(process)
        world.end(gone)
        world.local.kill(1, 1)
        await asyncio.sleep(0.05)
        assert (world.ended, world.code(second)) == ([], None), "nobody could look"
        assert world.local.pid_of(0, 1) == first.pid
        full = False
        await world.until(lambda: len(world.ended) == 2)
        assert {p.rank for p in world.ended} == {1, 2}
        await world.until(lambda: world.code(second) == -signal.SIGKILL)
        world.end(first)
        await world.until(lambda: world.ended[-1] == first)
