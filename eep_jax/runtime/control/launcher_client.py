"""A launcher's end of the control channel: process watching on behalf of the supervisor."""

import asyncio
import contextlib
import dataclasses
import logging
import os
import pathlib
import select
from collections.abc import Callable

import aiohttp

from eep_jax.coordination.protocol import Fenced
from eep_jax.errors import ProtocolError
from eep_jax.runtime.control import messages
from eep_jax.runtime.control.codec import decode, encode
from eep_jax.runtime.control.endpoint import RETRY_MS, EndpointWatch, connect
from eep_jax.runtime.control.identity import is_ending, kill_process, open_process

_log = logging.getLogger(__name__)

POLL_MS = 10
WATCHED_MAX = 4_096


@dataclasses.dataclass(frozen=True, kw_only=True)
class LauncherClientOptions:
    """Address of the supervisor and identity of this host."""

    endpoint_file: pathlib.Path
    address: str  # of the supervisor, host:port; '' reads the file
    token: str
    host: str
    run: str
    heartbeat_ms: int
    message_bytes_max: int


class ProcessWatch:
    """The watched processes of this host, and whether they have ended."""

    def __init__(self):
        self._pidfds: dict[messages.HostProcess, int | None] = {}  # None: it has ended

    def follow(self, processes: tuple[messages.HostProcess, ...]) -> None:
        """Watches exactly these processes. Raises ProtocolError for more than WATCHED_MAX."""
        if len(processes) > WATCHED_MAX:
            raise ProtocolError(f"{len(processes)} processes to watch, at most {WATCHED_MAX}")
        for process in [p for p in self._pidfds if p not in processes]:
            self._forget(process)
        for process in processes:
            if process not in self._pidfds:
                self._pidfds[process] = open_process(process.pid, process.ticks)

    def end(self, process: messages.HostProcess) -> None:
        """Sends SIGKILL to exactly this process; does nothing if it has ended."""
        pidfd = open_process(process.pid, process.ticks)
        if pidfd is not None:
            try:
                kill_process(pidfd)
            finally:
                os.close(pidfd)

    def report(self) -> messages.HostReport:
        for process, pidfd in self._pidfds.items():
            if pidfd is not None and _has_ended(pidfd):
                os.close(pidfd)
                self._pidfds[process] = None
        alive = [p for p, pidfd in self._pidfds.items() if pidfd is not None]
        return messages.HostReport(
            ending=tuple(p for p in alive if is_ending(p.pid)),
            ended=tuple(p for p, pidfd in self._pidfds.items() if pidfd is None),
        )

    def close(self) -> None:
        self.follow(())

    def _forget(self, process: messages.HostProcess) -> None:
        pidfd = self._pidfds.pop(process)
        if pidfd is not None:
            os.close(pidfd)


def _has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


class LauncherClient:
    """Keeps the connection until the supervisor ends the run.

    `on_watched` is called with the processes of every Watch that arrives.
    """

    def __init__(
        self,
        options: LauncherClientOptions,
        on_watched: Callable[[tuple[messages.HostProcess, ...]], None] = lambda processes: None,
    ):
        self._options, self._on_watched = options, on_watched
        self._watch = ProcessWatch()
        self.refused = ""  # why the supervisor rejects this launcher for good

    async def run(self) -> None:
        """Returns when the run is over, or when this launcher was `refused`."""
        complained = ""
        try:
            while True:
                try:
                    if await self._connect_once():
                        return
                    complained = ""
                except (aiohttp.ClientError, OSError, ValueError, LookupError, ProtocolError) as e:
                    if str(e) != complained:
                        complained = str(e)
                        _log.warning("no channel to the supervisor: %s; trying again", e)
                await asyncio.sleep(RETRY_MS / 1000)
        finally:
            self._watch.close()

    async def _connect_once(self) -> bool:
        """Serves one connection to its end. Returns whether the run is over."""
        options = self._options
        at = (options.endpoint_file, options.address, options.token, options.message_bytes_max)
        async with connect(*at) as (socket, url):
            hello = messages.HostHello(host=options.host, run=options.run)
            await socket.send_bytes(encode(hello))
            _log.info("connected to the supervisor at %s", url)
            reporter = asyncio.create_task(
                self._keep_reporting(
                    socket, EndpointWatch(options.endpoint_file, options.address, url)
                )
            )
            try:
                return await self._read(socket)
            finally:
                reporter.cancel()
                with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                    await reporter

    async def _read(self, socket: aiohttp.ClientWebSocketResponse) -> bool:
        async for frame in socket:
            if frame.type is not aiohttp.WSMsgType.BINARY:
                raise ProtocolError(f"a {frame.type.name} frame, expected a binary one")
            message = decode(frame.data, messages.TO_LAUNCHER, self._options.message_bytes_max)
            match message:
                case messages.Watch(processes=processes):
                    self._watch.follow(processes)
                    self._on_watched(processes)
                case messages.EndProcess(process=process):
                    _log.warning(
                        "killing incarnation %d of rank %d", process.incarnation, process.rank
                    )
                    self._watch.end(process)
                case messages.Shutdown():
                    return True
                case Fenced(reason=reason):
                    self.refused = reason
                    return True
        raise ProtocolError("the supervisor closed the channel")

    async def _keep_reporting(
        self, socket: aiohttp.ClientWebSocketResponse, endpoint: EndpointWatch
    ) -> None:
        said, due_ms = None, 0
        while True:
            report = self._watch.report()
            if report != said or due_ms <= 0:
                if endpoint.has_moved():
                    _log.warning("another supervisor has taken the run over")
                    await socket.close()
                    return
                await socket.send_bytes(encode(report))
                said, due_ms = report, self._options.heartbeat_ms
            await asyncio.sleep(POLL_MS / 1000)
            due_ms -= POLL_MS
