"""How frames get to one peer: over the connection itself, or beside it."""

import socket
from typing import Protocol, runtime_checkable

from eep_jax.heap.mirror.wire import end_connection, send

SEND_DEADLINE_S = 5.0  # for the peer to take a frame; its step has given up long before


@runtime_checkable
class Lane(Protocol):
    """One way to a peer, of one thread. `connection` stands as long as the peer wants frames."""

    connection: socket.socket

    def send(self, pieces: list) -> None:
        """A frame: its header, and the buffers of its payload, which may be reused afterwards.

        Frames arrive in order. Raises OSError where the peer is gone or takes nothing in time.
        """

    def end(self) -> None:
        """Has `send` give up, from any thread."""

    def close(self) -> None:
        """Gives back what the lane holds. Of its own thread; may be called twice."""


class TcpLane:
    """Frames over the connection."""

    def __init__(self, connection: socket.socket):
        self.connection = connection

    def send(self, pieces: list) -> None:
        send(self.connection, pieces, SEND_DEADLINE_S)

    def end(self) -> None:
        end_connection(self.connection)

    def close(self) -> None:
        self.connection.close()
