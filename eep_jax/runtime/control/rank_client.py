"""A rank's end of the control channel: a thread that keeps the connection, and two queues."""

import asyncio
import contextlib
import dataclasses
import logging
import os
import pathlib
import queue
import threading
import time
from collections.abc import Callable

import aiohttp

from eep_jax.config import RunConfig
from eep_jax.coordination.protocol import Fenced, Mode, Prepare, Refused, Status, Welcome
from eep_jax.errors import ProtocolError
from eep_jax.runtime.control import messages
from eep_jax.runtime.control.codec import decode, encode
from eep_jax.runtime.control.endpoint import (
    CONNECT_TIMEOUT_MS,
    ENDPOINT,
    RETRY_MS,
    EndpointWatch,
    connect,
)
from eep_jax.runtime.control.identity import host_id, start_ticks

_log = logging.getLogger(__name__)

OUTGOING_MAX = 10_000
INCOMING_MAX = 10_000
REASON_CHARACTERS_MAX = 1_000  # of a failure in a Status


@dataclasses.dataclass(frozen=True)
class Connected:
    """Local event: the channel is connected; messages sent before may be lost."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlClientOptions:
    """Address of the supervisor and identity of this rank."""

    endpoint_file: pathlib.Path  # JSON {"host", "port"}, rewritten by every supervisor
    token: str
    rank: int
    run: str
    heartbeat_ms: int
    message_bytes_max: int
    address: str = ""  # of the supervisor, host:port, where the run directory is not shared
    host: str = ""  # overrides this host's id
    mirrored: bool = False  # whether ranks of other hosts can reach this rank's memory


class ControlClient:
    """Keeps the connection, sends a Status with every heartbeat, and queues incoming messages.

    `on_arrival` is called in the client's thread after a message was queued, `on_prepare` with the
    epoch at once when a Prepare comes in that was not planned: a step in flight should end now, not
    after its deadline; `on_turned_away`, which may be set, with the reason why this process can be
    no rank of this run, as it was started.
    """

    def __init__(
        self,
        options: ControlClientOptions,
        on_arrival: Callable[[], None] = lambda: None,
        on_prepare: Callable[[int], None] = lambda epoch: None,
    ):
        self._options = options
        self.on_arrival, self.on_prepare = on_arrival, on_prepare
        self.on_turned_away: Callable[[str], None] = lambda reason: None
        self._incoming: queue.Queue = queue.Queue(INCOMING_MAX)
        self._status = Status(rank=options.rank, incarnation=0, sequence=0, mode=Mode.ALONE)
        self._incarnation = 0
        self._beat_ns = time.monotonic_ns()
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._outgoing: asyncio.Queue | None = None  # of the connection that stands, if one does
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_ms: int = 1_000) -> None:
        """Sends what is queued, closes the connection, ends the thread."""
        self._stopping = True
        with contextlib.suppress(RuntimeError):  # the loop may be over already
            self._loop.call_soon_threadsafe(self._close_outgoing)
        self._thread.join(timeout_ms / 1000)

    @property
    def incarnation(self) -> int:
        return self._incarnation

    def beat(self) -> None:
        """Called by the engine loop to show progress."""
        self._beat_ns = time.monotonic_ns()

    def publish(self, status: Status) -> None:
        """Sets the Status of future heartbeats, and sends it at once."""
        with self._lock:
            self._status = dataclasses.replace(status, sequence=self._status.sequence)
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._send_status)

    def fail(self, reason: str, wait_ms: int = 2_000) -> None:
        """Reports that this process cannot go on, and closes the connection.

        Waits up to `wait_ms` to be admitted; if it is not, nothing is sent.
        """
        ends_s = time.monotonic() + wait_ms / 1000
        while self._outgoing is None and time.monotonic() < ends_s:
            time.sleep(0.01)
        self.publish(dataclasses.replace(self._status, failure=reason[:REASON_CHARACTERS_MAX]))
        self.stop()

    def send(self, message) -> None:
        """Queues a message; dropped while there is no connection (see `Connected`)."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._enqueue, message)

    def receive(self) -> list:
        """Returns all messages since the last call, oldest first."""
        found = []
        while True:
            try:
                found.append(self._incoming.get_nowait())
            except queue.Empty:
                return found

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._keep_connected())
        finally:
            self._loop.close()

    async def _keep_connected(self) -> None:
        complained = ""
        while not self._stopping:
            try:
                await self._connect_once()
                complained = ""
            except (aiohttp.ClientError, OSError, ValueError, LookupError, ProtocolError) as error:
                if str(error) != complained:
                    complained = str(error)
                    _log.warning("no channel to the supervisor: %s; trying again", error)
            self._outgoing = None
            await asyncio.sleep(RETRY_MS / 1000)

    async def _connect_once(self) -> None:
        options = self._options
        at = (options.endpoint_file, options.address, options.token, options.message_bytes_max)
        async with connect(*at) as (socket, url):
            watch = EndpointWatch(options.endpoint_file, options.address, url)
            await self._introduce(socket)
            self._outgoing = asyncio.Queue(OUTGOING_MAX)
            self._send_status()
            self._arrived(Connected())
            tasks = [
                asyncio.create_task(self._write(socket, self._outgoing)),
                asyncio.create_task(self._heartbeat(watch)),
                asyncio.create_task(self._read(socket)),
            ]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                self._outgoing = None
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _introduce(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        """Says who this is; a new process asks until it is given an incarnation."""
        hello = messages.Hello(
            rank=self._options.rank,
            incarnation=self._incarnation,
            pid=os.getpid(),
            ticks=start_ticks(os.getpid()),
            host=host_id(self._options.host),
            run=self._options.run,
            mirrored=self._options.mirrored,
        )
        while not self._stopping:
            await socket.send_bytes(encode(hello))
            if self._incarnation:
                return
            answer = self._decode(await socket.receive(timeout=CONNECT_TIMEOUT_MS / 1000))
            match answer:
                case Welcome(incarnation=incarnation):
                    self._incarnation = incarnation
                    return
                case Refused(reason=reason):
                    _log.info("not let in yet: %s", reason)
                    await asyncio.sleep(RETRY_MS / 1000)
                case Fenced():
                    self._arrived(answer)
                    self.on_turned_away(answer.reason)
                    raise ProtocolError(answer.reason)

    async def _read(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        while True:
            message = self._decode(await socket.receive())
            if isinstance(message, Prepare) and not message.planned:
                self.on_prepare(message.epoch)
            self._arrived(message)

    async def _write(
        self, socket: aiohttp.ClientWebSocketResponse, outgoing: asyncio.Queue
    ) -> None:
        while (message := await outgoing.get()) is not None:
            await socket.send_bytes(encode(message))
        await socket.close()

    async def _heartbeat(self, watch: EndpointWatch) -> None:
        while True:
            await asyncio.sleep(self._options.heartbeat_ms / 1000)
            if watch.has_moved():
                raise ProtocolError("another supervisor has taken the run over")
            self._send_status()

    def _decode(self, frame: aiohttp.WSMessage):
        if frame.type is not aiohttp.WSMsgType.BINARY:
            raise ProtocolError(
                f"the supervisor closed the channel ({frame.type.name}) {frame.extra or ''}"
            )
        return decode(frame.data, messages.TO_RANK, self._options.message_bytes_max)

    def _arrived(self, message) -> None:
        try:
            self._incoming.put_nowait(message)
        except queue.Full:
            raise ProtocolError(f"the engine left {INCOMING_MAX} messages unread") from None
        self.on_arrival()

    def _send_status(self) -> None:
        stalled_ms = (time.monotonic_ns() - self._beat_ns) // 1_000_000
        with self._lock:
            self._status = dataclasses.replace(
                self._status,
                incarnation=self._incarnation,
                sequence=self._status.sequence + 1,
                stalled_ms=stalled_ms,
            )
            status = self._status
        self._enqueue(status)

    def _enqueue(self, message) -> None:
        if self._outgoing is None:
            return
        try:
            self._outgoing.put_nowait(message)
        except asyncio.QueueFull:
            _log.error("more than %d messages wait for the supervisor; reconnecting", OUTGOING_MAX)
            self._close_outgoing()

    def _close_outgoing(self) -> None:
        outgoing, self._outgoing = self._outgoing, None
        if outgoing is not None:
            while outgoing.full():
                outgoing.get_nowait()
            outgoing.put_nowait(None)


def client_of(
    config: RunConfig, rank: int, run_dir: pathlib.Path, token: str, **others
) -> ControlClient:
    """Makes the client of a rank; `others` are further fields of ControlClientOptions."""
    return ControlClient(
        ControlClientOptions(
            endpoint_file=run_dir / ENDPOINT,
            token=token,
            rank=rank,
            run=config.name,
            heartbeat_ms=config.cluster.heartbeat_ms,
            message_bytes_max=config.serve.message_bytes_max,
            **others,
        )
    )
