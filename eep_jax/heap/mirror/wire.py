"""TCP connections between mirrors: one purpose each, authenticated by the run's token.

After the handshake the caller introduces itself; the reply is empty, or the reason of a refusal.
Then a connection for WRITES carries frames one way, one for READS requests and replies, and one
for NIXL an offer of memory to write frames into.
"""

import contextlib
import dataclasses
import enum
import socket
import struct
import time
from collections.abc import Sequence

from eep_jax.errors import HeapError
from eep_jax.handshake import enter

SERVICE = b"eep-mirror/1"
HANDSHAKE_S = 2.0
BODY_DEADLINE_S = 5.0  # for the rest of a frame, once its header came
UNACKNOWLEDGED_MS = 5_000  # a connection ends with bytes that stay unacknowledged for so long
ID_BYTES = 16
REASON_BYTES_MAX = 1_000

_INTRODUCTION = struct.Struct(f"<cHHQ{ID_BYTES}s{ID_BYTES}s{ID_BYTES}s")
_REPLY = struct.Struct("<H")


class Purpose(enum.Enum):
    """Purpose of a connection."""

    WRITES = b"W"
    READS = b"R"
    NIXL = b"N"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Introduction:
    """Identity of a caller and of the heap it expects. Both must have equal configurations."""

    purpose: Purpose
    rank: int
    ranks: int
    slab_bytes: int
    layout: bytes  # digest of the window's layout
    heap: bytes  # id of the caller's heap
    wanted: bytes  # id of the heap that it expects to reach

    def pack(self) -> bytes:
        sizes = (self.purpose.value, self.rank, self.ranks, self.slab_bytes)
        return _INTRODUCTION.pack(*sizes, self.layout, self.heap, self.wanted)


def call(address: str, token: str, introduction: Introduction, deadline_s: float) -> socket.socket:
    """Connects to the mirror at `address` (host:port) within the deadline.

    Raises OSError if it is unreachable or does not prove the token, HeapError if it refuses.
    """
    ends_s = time.monotonic() + deadline_s
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host.strip("[]"), int(port)), deadline_s)
    try:
        prepare(connection)
        enter(connection, token, min(HANDSHAKE_S, _left(ends_s)), SERVICE)
        connection.sendall(introduction.pack())
        (length,) = _REPLY.unpack(receive(connection, _REPLY.size, ends_s))
        if length:
            reason = receive(connection, min(length, REASON_BYTES_MAX), ends_s)
            raise HeapError(bytes(reason).decode(errors="replace"))
        connection.settimeout(None)
    except BaseException:
        connection.close()
        raise
    return connection


def receive_introduction(connection: socket.socket) -> Introduction:
    """Reads an authenticated caller's introduction. Raises OSError or ValueError."""
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


def reply(connection: socket.socket, reason: str = "") -> None:
    """Accepts a caller, or refuses it with a reason."""
    text = reason.encode()[:REASON_BYTES_MAX]
    connection.sendall(_REPLY.pack(len(text)) + text)


def prepare(connection: socket.socket) -> None:
    """Disables Nagle's algorithm, and detects a dead host within seconds."""
    for level, option, value in (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    ):
        connection.setsockopt(level, option, value)


def receive(connection: socket.socket, nbytes: int, ends_s: float | None) -> bytearray:
    """Reads exactly `nbytes`. Raises TimeoutError at `ends_s` of the monotonic clock (None: never),
    ConnectionError at the end of the stream."""
    found = bytearray(nbytes)
    view, done = memoryview(found), 0
    while done < nbytes:
        connection.settimeout(None if ends_s is None else _left(ends_s))
        count = connection.recv_into(view[done:])
        if not count:
            raise ConnectionError("the peer closed the connection")
        done += count
    return found


def send(
    connection: socket.socket, pieces: Sequence[bytes | memoryview], deadline_s: float
) -> None:
    """Sends these buffers. Raises TimeoutError if the peer does not accept them in time."""
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
    """Wakes all threads blocked on it; the owner closes it."""
    with contextlib.suppress(OSError):  # ended already
        connection.shutdown(socket.SHUT_RDWR)


def _left(ends_s: float) -> float:
    left_s = ends_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("the peer was too slow")
    return left_s
