"""One peer on another host: what kernels write into its staging slab goes there, flag by flag."""

import logging
import select
import socket
import threading
import time
from collections.abc import Callable

import numpy as np

from eep_jax.errors import HeapError
from eep_jax.heap.mirror.frames import FrameCodec, Kind
from eep_jax.heap.mirror.lane import Lane
from eep_jax.heap.mirror.server import QUESTION
from eep_jax.heap.mirror.wire import end_connection, receive, send
from pallas_kernels.signals import AnyFlag, post

_log = logging.getLogger(__name__)

SLEEP_NS = 100_000_000  # then a look at the connection: what broke in silence lost a frame
RETRY_S = 0.1


class MirrorSender:
    """Forwards a staging window to its peer from a thread of its own, until it is closed.

    Nothing is queued: a flag that is posted again before it was forwarded replaces the earlier
    one, whose step is over. After a broken connection it calls again, and sends what stands: frames
    that come twice are harmless.
    """

    def __init__(
        self,
        peer: int,
        codec: FrameCodec,
        windows: list[dict[str, np.ndarray]],
        rank: int,
        lane: Lane,
        call: Callable[[], Lane],
    ):
        """`lane` stands; `call` makes another one, or raises OSError or HeapError."""
        self._peer, self._codec, self._rank = peer, codec, rank
        self._staging, self._own = windows[peer], windows[rank]
        self._lane, self._call = lane, call
        flags = codec.flags(self._staging)
        self._kinds = [kind for kind, _ in flags]
        self._stop = np.zeros(1, np.uint32)
        self._any = AnyFlag([*(flag for _, flag in flags), self._stop])
        self._done = self._any.values()  # what the flags held before is nothing of this peer's
        self._again = threading.Event()
        self.frames = self.bytes = self.reconnections = 0
        name = f"mirror-{peer}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread, soon: it may be calling a host that is gone, which others must not wait
        for. What is on its way may still arrive."""
        post(self._stop, 1)
        self._again.set()
        self._lane.end()

    def _run(self) -> None:
        while not self._stop[0]:
            try:
                self._forward_changes()
            except OSError as error:
                if not self._stop[0]:
                    _log.warning("the mirror to rank %d broke: %s", self._peer, error)
                    self._reconnect()
        self._lane.close()

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
            # In the order in which kernels made them: what comes later tells the peer that the
            # earlier is over, and its place may be written again.
            first = min(values[i] for i in due)
            for i in sorted(due, key=lambda i: (values[i] - first, self._kinds[i])):
                self._done[i] = values[i]  # before it: what comes of it may clear the flag
                self._forward(self._kinds[i], values[i])

    def _check_connection(self) -> None:
        """Raises ConnectionError where the peer closed it; it never sends anything."""
        poll = select.poll()
        poll.register(self._lane.connection, select.POLLIN)
        if poll.poll(0):
            raise ConnectionError("the peer closed the connection")

    def _forward(self, kind: Kind, number: int) -> None:
        pieces = self._codec.pack(kind, number, self._staging, self._own, self._peer)
        self._lane.send(pieces)
        self.frames += 1
        self.bytes += sum(len(piece) for piece in pieces)

    def _reconnect(self) -> None:
        complained = False
        self._lane.close()
        while not self._stop[0]:
            try:
                self._lane = self._call()
            except (OSError, HeapError) as error:
                if not complained:
                    _log.warning("cannot reach rank %d: %s; trying again", self._peer, error)
                complained = True
                self._again.wait(RETRY_S)
                continue
            self.reconnections += 1
            self._done = [0] * len(self._done)
            return


class MirrorReader:
    """Reads bytes of a peer's slab over one connection, made when it is first needed."""

    def __init__(self, peer: int, call: Callable[[], socket.socket]):
        self._peer, self._call = peer, call
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None

    def read(self, offset: int, nbytes: int, deadline_s: float) -> np.ndarray:
        """A copy of these bytes. Raises HeapError where they do not come in time."""
        ends_s = time.monotonic() + deadline_s
        with self._lock:
            try:
                if self._connection is None:
                    self._connection = self._call()
                send(self._connection, [QUESTION.pack(offset, nbytes)], deadline_s)
                return np.frombuffer(receive(self._connection, nbytes, ends_s), np.uint8)
            except OSError as error:
                self._drop()
                raise HeapError(
                    f"cannot read {nbytes} bytes of rank {self._peer} over its mirror: {error}"
                ) from error

    def close(self) -> None:
        """Whoever reads gives up."""
        if self._lock.acquire(blocking=False):
            self._drop()
            self._lock.release()
        elif (connection := self._connection) is not None:
            end_connection(connection)

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
