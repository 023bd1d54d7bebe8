"""Transports of frames to one peer: the protocol, and TCP."""

import socket
from typing import Protocol, runtime_checkable

from eep_jax.heap.mirror.wire import end_connection, send

SEND_DEADLINE_S = 5.0  # for the peer to accept a frame; longer than a step waits


@runtime_checkable
class FrameStream(Protocol):
    """Sends frames to one peer, from one thread, while its `connection` stays open."""

    connection: socket.socket

    def send(self, pieces: list[bytes | memoryview]) -> None:
        """Sends a frame: its header, then the buffers of its payload, reusable on return.

        Frames arrive in order. Raises OSError if the peer is gone or too slow.
        """

    def end(self) -> None:
        """Aborts `send`; thread-safe."""

    def close(self) -> None:
        """Frees the resources; idempotent. Call it from the sending thread only."""


class TcpStream:
    """Sends frames over the connection itself."""

    def __init__(self, connection: socket.socket):
        self.connection = connection

    def send(self, pieces: list[bytes | memoryview]) -> None:
        send(self.connection, pieces, SEND_DEADLINE_S)

    def end(self) -> None:
        end_connection(self.connection)

    def close(self) -> None:
        self.connection.close()
