"""Client of one peer on another host: forwards its staging window, and reads its slab."""

import logging
import select
import socket
import threading
import time
from collections.abc import Callable

import numpy as np

from eep_jax.errors import HeapError
from eep_jax.heap.mirror.frames import FrameCodec, Kind
from eep_jax.heap.mirror.server import READ
from eep_jax.heap.mirror.stream import FrameStream
from eep_jax.heap.mirror.wire import end_connection, receive, send
from pallas_kernels.exchange.signals import AnyFlag, post

_log = logging.getLogger(__name__)

SLEEP_NS = 100_000_000  # between checks of the connection: a silent break lost a frame
RETRY_S = 0.1


class MirrorSender:
    """Forwards a staging window to its peer from a thread of its own, until `close`.

    Nothing is queued: a flag posted again before it was forwarded replaces the earlier one, whose
    step is over. After a broken connection it reconnects and sends the current flags, since
    repeated frames are harmless.
    """

    def __init__(
        self,
        peer: int,
        codec: FrameCodec,
        windows: list[dict[str, np.ndarray]],
        rank: int,
        stream: FrameStream,
        connect: Callable[[], FrameStream],
    ):
        """`stream` is open; `connect` opens another one, or raises OSError or HeapError."""
        self._peer, self._codec, self._rank = peer, codec, rank
        self._staging, self._own = windows[peer], windows[rank]
        self._stream, self._connect = stream, connect
        flags = codec.flags(self._staging)
        self._kinds = [kind for kind, _ in flags]
        self._stop = np.zeros(1, np.uint32)
        self._any = AnyFlag([*(flag for _, flag in flags), self._stop])
        self._done = self._any.values()  # values from before this peer
        self._again = threading.Event()
        self.frames = self.bytes = self.reconnections = 0
        name = f"mirror-{peer}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread soon, without waiting: it may be connecting to a dead host.

        Frames under way may still arrive.
        """
        post(self._stop, 1)
        self._again.set()
        self._stream.end()

    def _run(self) -> None:
        while not self._stop[0]:
            try:
                self._forward_changes()
            except OSError as error:
                if not self._stop[0]:
                    _log.warning("the mirror to rank %d broke: %s", self._peer, error)
                    self._reconnect()
        self._stream.close()

    def _forward_changes(self) -> None:
        while not self._stop[0]:
            values = self._any.values()
            due = [i for i, kind in enumerate(self._kinds) if values[i] not in (0, self._done[i])]
            self._done = [
                value if value == 0 else done
                for value, done in zip(values, self._done, strict=True)
            ]
            if not due:
                self._any.sleep(values, SLEEP_NS)
                self._check_connection()
                continue
            # In the order of the kernels' posts: a later flag implies that the peer may overwrite
            # what the earlier one announced.
            first = min(values[i] for i in due)
            for i in sorted(due, key=lambda i: (values[i] - first, self._kinds[i])):
                self._done[i] = values[i]  # first: the consequence of a frame may clear the flag
                self._forward(self._kinds[i], values[i])

    def _check_connection(self) -> None:
        """Raises ConnectionError if the peer, which never sends anything, closed it."""
        poll = select.poll()
        poll.register(self._stream.connection, select.POLLIN)
        if poll.poll(0):
            raise ConnectionError("the peer closed the connection")

    def _forward(self, kind: Kind, number: int) -> None:
        pieces = self._codec.pack(kind, number, self._staging, self._own, self._peer)
        self._stream.send(pieces)
        self.frames += 1
        self.bytes += sum(len(piece) for piece in pieces)

    def _reconnect(self) -> None:
        warned = False
        self._stream.close()
        while not self._stop[0]:
            try:
                self._stream = self._connect()
            except (OSError, HeapError) as error:
                if not warned:
                    _log.warning("cannot reach rank %d: %s; trying again", self._peer, error)
                warned = True
                self._again.wait(RETRY_S)
                continue
            self.reconnections += 1
            self._done = [0] * len(self._done)
            return


class MirrorReader:
    """Reads a peer's slab over one connection, opened on first use. Thread-safe."""

    def __init__(self, peer: int, connect: Callable[[], socket.socket]):
        self._peer, self._connect = peer, connect
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None

    def read(self, offset: int, nbytes: int, deadline_s: float) -> np.ndarray:
        """Copy of these bytes, uint8. Raises HeapError at the deadline."""
        ends_s = time.monotonic() + deadline_s
        with self._lock:
            try:
                if self._connection is None:
                    self._connection = self._connect()
                send(self._connection, [READ.pack(offset, nbytes)], deadline_s)
                return np.frombuffer(receive(self._connection, nbytes, ends_s), np.uint8)
            except OSError as error:
                self._drop()
                raise HeapError(
                    f"cannot read {nbytes} bytes of rank {self._peer} over its mirror: {error}"
                ) from error

    def close(self) -> None:
        """Aborts a read under way."""
        if self._lock.acquire(blocking=False):
            self._drop()
            self._lock.release()
        elif (connection := self._connection) is not None:
            end_connection(connection)

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
