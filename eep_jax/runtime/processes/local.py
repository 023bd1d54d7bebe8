"""Ranks' processes on this host, watched by pidfd and killed.

A process is identified by its pid and start time, and then held by a pidfd, so a later process with
the same pid is neither watched nor killed.
"""

import asyncio
import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable

from eep_jax.runtime.control.identity import is_ending, kill_process, open_process
from eep_jax.runtime.control.messages import HostProcess

_log = logging.getLogger(__name__)

LOOK_MS = 10


@dataclasses.dataclass(eq=False)
class _Watched:
    """`pidfd` is None while it cannot be opened, and once the process is known to have ended."""

    process: HostProcess
    alive_ms: int  # when it was last seen running
    pidfd: int | None = None
    ending: bool = False
    ended: bool = False
    to_kill: bool = False  # also once it can be opened


class LocalProcesses:
    """The admitted processes, each until a newer one of its rank is admitted.

    `on_ending` and `on_ended` are called by the event loop, at most once for a process, and never
    from within a method of this class.
    """

    def __init__(
        self,
        now_ms: Callable[[], int],
        on_ending: Callable[[HostProcess], None],
        on_ended: Callable[[HostProcess], None],
    ):
        self._now_ms, self._on_ending, self._on_ended = now_ms, on_ending, on_ended
        self._watched: dict[tuple[int, int], _Watched] = {}

    def watch(self, process: HostProcess) -> None:
        """Watches a process; its end is reported even if it has ended already.

        Call it in the event loop.
        """
        key = (process.rank, process.incarnation)
        if key in self._watched:
            return
        for old, found in list(self._watched.items()):
            if old[0] == process.rank and found.ended:
                del self._watched[old]
        self._watched[key] = watched = _Watched(process, self._now_ms())
        try:
            self._open(watched)
        except OSError as error:
            # Retried at every look: only this sees the process end, and only then can another one
            # take its place.
            _log.error("the process of rank %d cannot be watched yet: %s", process.rank, error)

    def kill(self, rank: int, incarnation: int) -> None:
        """Sends SIGKILL to exactly this process; does nothing if it has ended or is unknown."""
        watched = self._watched.get((rank, incarnation))
        if watched is not None:
            watched.to_kill = True
            if watched.pidfd is not None:
                kill_process(watched.pidfd)

    @property
    def known(self) -> list[HostProcess]:
        """The newest process of each rank on this host, ended or not."""
        return [watched.process for watched in self._watched.values()]

    def pid_of(self, rank: int, incarnation: int) -> int | None:
        """The pid of a process; None if it has ended or is unknown."""
        watched = self._watched.get((rank, incarnation))
        return watched.process.pid if watched is not None and not watched.ended else None

    def alive_ms(self, rank: int, incarnation: int) -> int | None:
        """Time when the process was last seen running; None if it is unknown."""
        watched = self._watched.get((rank, incarnation))
        return None if watched is None else watched.alive_ms

    async def keep_looking(self) -> None:
        """Reports processes that begin to exit, well before they are gone. Runs until cancelled."""
        while True:
            for watched in list(self._watched.values()):
                if not watched.ended:
                    self._look(watched)
            # A look takes some 20 us; with many ranks they stay a small part of the time.
            await asyncio.sleep(max(LOOK_MS, len(self._watched)) / 1000)

    def close(self) -> None:
        """Stops watching; the processes go on."""
        for watched in self._watched.values():
            self._let_go(watched)
            watched.ended = True
        self._watched.clear()

    def _open(self, watched: _Watched) -> None:
        """Opens the pidfd, or schedules the end. Raises OSError if /proc cannot be read."""
        loop = asyncio.get_running_loop()
        watched.pidfd = open_process(watched.process.pid, watched.process.ticks)
        if watched.pidfd is None:
            loop.call_soon(self._end, watched)
            return
        loop.add_reader(watched.pidfd, self._end, watched)
        if watched.to_kill:
            kill_process(watched.pidfd)

    def _look(self, watched: _Watched) -> None:
        if watched.pidfd is None:
            with contextlib.suppress(OSError):
                self._open(watched)
        if watched.ending:
            return
        if is_ending(watched.process.pid):
            watched.ending = True
            self._on_ending(watched.process)
        else:
            watched.alive_ms = self._now_ms()

    def _end(self, watched: _Watched) -> None:
        if watched.ended:
            return
        self._let_go(watched)
        watched.ended = True
        self._on_ended(watched.process)

    def _let_go(self, watched: _Watched) -> None:
        if watched.pidfd is not None:
            asyncio.get_running_loop().remove_reader(watched.pidfd)
            os.close(watched.pidfd)
            watched.pidfd = None
