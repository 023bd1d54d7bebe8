"""Server of a rank for ranks of other hosts: stores their frames and serves reads of its slab."""

import functools
import itertools
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable

from eep_jax.errors import HeapError
from eep_jax.handshake import admit
from eep_jax.heap.mirror.frames import HEADER, BadFrame
from eep_jax.heap.mirror.nixl import NixlInbox
from eep_jax.heap.mirror.wire import (
    BODY_DEADLINE_S,
    HANDSHAKE_S,
    SERVICE,
    Introduction,
    Purpose,
    end_connection,
    prepare,
    receive,
    receive_introduction,
    reply,
    send,
)

_log = logging.getLogger(__name__)

ACCEPT_PAUSE_S = 0.05
READ = struct.Struct("<QQ")  # offset and length of bytes of the slab
READ_BYTES_MAX = 1 << 30
NO_NIXL = "NIXL is not available here"
UNAUTHENTICATED_MAX = 16  # connections at once that are not authenticated yet


class MirrorServer:
    """Listens at `host`, on the port of `address` (host:port), until `close`.

    Args:
        host: address of this machine.
        token: the run's token, proved by both ends.
        ranks: bounds the number of connections.
        refusal: reason to refuse a caller; '' accepts it.
        payload_bytes: (kind, items) -> length of a frame's payload; raises BadFrame.
        store: (introduction, call, kind, round, items, payload) stores a frame; may raise
            BadFrame. `call` numbers connections, so frames of an older one are recognised.
        read: (offset, bytes) -> that part of the slab.
        inbox: receiver of frames over NIXL, if available.
    """

    def __init__(
        self,
        host: str,
        token: str,
        ranks: int,
        refusal: Callable[[Introduction], str],
        payload_bytes: Callable[[int, int], int],
        store: Callable[[Introduction, int, int, int, int, memoryview], None],
        read: Callable[[int, int], memoryview],
        inbox: NixlInbox | None = None,
    ):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, 0), family=family, backlog=128)
        except OSError as error:
            raise HeapError(
                f"cannot serve a mirror at {host}: {error.strerror}; --mirror_host must be an "
                "address of this machine"
            ) from error
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{shown}:{self._socket.getsockname()[1]}"
        self._token, self._refusal = token, refusal
        self._payload_bytes, self._store, self._read = payload_bytes, store, read
        self._inbox = inbox
        self._unauthenticated = threading.BoundedSemaphore(UNAUTHENTICATED_MAX)
        # Per peer one for writes, a few for reads, and those being replaced.
        self._admitted = threading.BoundedSemaphore(8 * ranks)
        self._open: set[socket.socket] = set()
        self._calls = itertools.count(1)
        self._lock, self._closed = threading.Lock(), False
        threading.Thread(target=self._accept, name="mirror-server", daemon=True).start()

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed, connections = True, list(self._open)
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for connection in connections:
            end_connection(connection)

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, (host, *_) = self._socket.accept()
            except OSError:
                if not self._closed:
                    time.sleep(ACCEPT_PAUSE_S)  # out of descriptors, for example: transient
                continue
            if not self._unauthenticated.acquire(blocking=False):
                _log.warning(
                    "refused %s: %d connections are not authenticated yet",
                    host,
                    UNAUTHENTICATED_MAX,
                )
                connection.close()
                continue
            body = threading.Thread(
                target=self._serve, args=(connection, host), name="mirror-caller", daemon=True
            )
            body.start()

    def _serve(self, connection: socket.socket, host: str) -> None:
        with connection:
            try:
                introduction, call = self._introduced(connection)
            except (OSError, ValueError) as error:
                _log.warning("refused a mirror connection from %s: %s", host, error)
                return
            finally:
                self._unauthenticated.release()
            if introduction is None:
                return
            try:
                if introduction.purpose is Purpose.WRITES:
                    self._take_frames(connection, introduction, call)
                elif introduction.purpose is Purpose.READS:
                    self._serve_reads(connection)
                else:
                    self._inbox.serve(
                        connection, functools.partial(self._store, introduction, call)
                    )
            except (BadFrame, HeapError) as error:
                _log.error("closing the mirror of rank %d: %s", introduction.rank, error)
            except OSError as error:
                if not self._closed:
                    _log.info("the mirror of rank %d ended: %s", introduction.rank, error)
            finally:
                self._forget(connection)

    def _introduced(self, connection: socket.socket) -> tuple[Introduction | None, int]:
        """Authenticates a caller: its introduction and number, or (None, 0) if refused."""
        prepare(connection)
        admit(connection, self._token, HANDSHAKE_S, SERVICE)
        introduction = receive_introduction(connection)
        reason = self._refusal(introduction)
        if not reason and introduction.purpose is Purpose.NIXL and self._inbox is None:
            reason = NO_NIXL
        if not reason and not self._admitted.acquire(blocking=False):
            reason = "too many open connections"
        if reason:
            _log.info("refused rank %d: %s", introduction.rank, reason)
            reply(connection, reason)
            return None, 0
        # Numbered before the caller may send, so its next connection has a larger number.
        with self._lock:
            call = next(self._calls)
            self._open.add(connection)
        try:
            reply(connection)
        except OSError:
            self._forget(connection)
            raise
        return introduction, call

    def _forget(self, connection: socket.socket) -> None:
        with self._lock:
            self._open.discard(connection)
        self._admitted.release()

    def _take_frames(
        self, connection: socket.socket, introduction: Introduction, call: int
    ) -> None:
        while True:
            header = receive(connection, HEADER.size, None)
            kind, number, items, length = HEADER.unpack(header)
            expected = self._payload_bytes(kind, items)
            if length != expected:  # before anything is allocated for it
                raise BadFrame(f"frame of {length} bytes, expected {expected}")
            payload = receive(connection, length, time.monotonic() + BODY_DEADLINE_S)
            self._store(introduction, call, kind, number, items, memoryview(payload))

    def _serve_reads(self, connection: socket.socket) -> None:
        while True:
            offset, length = READ.unpack(receive(connection, READ.size, None))
            if length > READ_BYTES_MAX:
                raise BadFrame(f"read of {length} bytes, at most {READ_BYTES_MAX} at once")
            send(connection, [self._read(offset, length)], BODY_DEADLINE_S + length / 1e6)
