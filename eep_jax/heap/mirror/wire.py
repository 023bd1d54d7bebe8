"""Connections between mirrors: TCP, one purpose each, only between processes that know the token.

After the handshake the caller says who it is and what for; the answer is empty, or why not. Then
a connection for WRITES carries frames one way, one for READS questions and answers, and one for
NIXL an offer of memory to write frames into.
"""

import contextlib
import dataclasses
import enum
import socket
import struct
import time

from eep_jax.errors import HeapError
from eep_jax.handshake import enter

SERVICE = b"eep-mirror/1"
HANDSHAKE_S = 2.0
BODY_DEADLINE_S = 5.0  # for the rest of a frame, once its header came
UNANSWERED_MS = 5_000  # bytes that the other host does not acknowledge for so long end a connection
ID_BYTES = 16
REASON_BYTES_MAX = 1_000

_INTRODUCTION = struct.Struct(f"<cHHQ{ID_BYTES}s{ID_BYTES}s{ID_BYTES}s")
_ANSWER = struct.Struct("<H")


class Purpose(enum.Enum):
    """What a connection is for."""

    WRITES = b"W"
    READS = b"R"
    NIXL = b"N"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Introduction:
    """Who calls, and whom. Both must have been configured alike."""

    purpose: Purpose
    rank: int
    ranks: int
    slab_bytes: int
    layout: bytes  # digest of the window's layout
    heap: bytes  # id of the caller's heap
    wanted: bytes  # id of the heap that it means to reach

    def pack(self) -> bytes:
        sizes = (self.purpose.value, self.rank, self.ranks, self.slab_bytes)
        return _INTRODUCTION.pack(*sizes, self.layout, self.heap, self.wanted)


def call(address: str, token: str, introduction: Introduction, deadline_s: float) -> socket.socket:
    """A connection that the mirror at `address` (host:port) accepted.

    Raises OSError where it cannot be reached or does not know the token, HeapError where it does
    not want this caller.
    """
    ends_s = time.monotonic() + deadline_s
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host.strip("[]"), int(port)), deadline_s)
    try:
        prepare(connection)
        enter(connection, token, min(HANDSHAKE_S, _left(ends_s)), SERVICE)
        connection.sendall(introduction.pack())
        (length,) = _ANSWER.unpack(receive(connection, _ANSWER.size, ends_s))
        if length:
            reason = receive(connection, min(length, REASON_BYTES_MAX), ends_s)
            raise HeapError(bytes(reason).decode(errors="replace"))
        connection.settimeout(None)
    except BaseException:
        connection.close()
        raise
    return connection


def receive_introduction(connection: socket.socket) -> Introduction:
    """What a caller that proved itself says. Raises OSError, or ValueError for no purpose."""
    raw = receive(connection, _INTRODUCTION.size, time.monotonic() + HANDSHAKE_S)
    purpose, rank, ranks, slab_bytes, layout, heap, wanted = _INTRODUCTION.unpack(raw)
    return Introduction(
        purpose=Purpose(purpose),
        rank=rank,
        ranks=ranks,
        slab_bytes=slab_bytes,
        layout=layout,
        heap=heap,
        wanted=wanted,
    )


def answer(connection: socket.socket, reason: str = "") -> None:
    """Accepts a caller, or says why not."""
    said = reason.encode()[:REASON_BYTES_MAX]
    connection.sendall(_ANSWER.pack(len(said)) + said)


def prepare(connection: socket.socket) -> None:
    """Sends at once, and notices within seconds when the other host is gone."""
    for level, option, value in (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNANSWERED_MS),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    ):
        connection.setsockopt(level, option, value)


def receive(connection: socket.socket, nbytes: int, ends_s: float | None) -> bytearray:
    """Exactly so many bytes. Raises TimeoutError at `ends_s` of the monotonic clock (None: never),
    ConnectionError where the other end closed."""
    found = bytearray(nbytes)
    view, done = memoryview(found), 0
    while done < nbytes:
        connection.settimeout(None if ends_s is None else _left(ends_s))
        count = connection.recv_into(view[done:])
        if not count:
            raise ConnectionError("the other end closed the connection")
        done += count
    return found


def send(connection: socket.socket, pieces: list, deadline_s: float) -> None:
    """All of these buffers. Raises TimeoutError where the other end does not take them in time."""
    ends_s = time.monotonic() + deadline_s
    left = [memoryview(piece) for piece in pieces if len(piece)]
    while left:
        connection.settimeout(_left(ends_s))
        count = connection.sendmsg(left)
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if count:
            left[0] = left[0][count:]


def end_connection(connection: socket.socket) -> None:
    """Wakes whoever waits for it; closing is for its owner."""
    with contextlib.suppress(OSError):  # it is over already
        connection.shutdown(socket.SHUT_RDWR)


def _left(ends_s: float) -> float:
    left_s = ends_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("the other end was too slow")
    return left_s
