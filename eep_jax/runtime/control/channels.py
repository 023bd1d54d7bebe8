"""Registry of the current control connection of each rank: the newest one of its process."""

from collections.abc import Iterable

from eep_jax.runtime.control import messages
from eep_jax.runtime.control.server import Connection


class Channels:
    """At most one connection per rank. Messages to a rank without a connection are lost."""

    def __init__(self):
        self._of_rank: dict[int, Connection] = {}

    def of(self, rank: int) -> Connection | None:
        return self._of_rank.get(rank)

    def host_of(self, rank: int) -> str | None:
        """The id of a rank's host; None while the rank has no channel."""
        connection = self._of_rank.get(rank)
        return None if connection is None else connection.hello.host

    def is_current(self, connection: Connection) -> bool:
        return self._of_rank.get(connection.hello.rank) is connection

    def register(self, connection: Connection) -> None:
        """Makes a new connection the channel of its rank; closes the previous one."""
        before = self._of_rank.get(connection.hello.rank)
        self._of_rank[connection.hello.rank] = connection
        if before is not None:
            before.close()  # its rank has reconnected, so the old connection is dead

    def remove(self, connection: Connection) -> bool:
        """Removes a closed connection. Returns whether it was the channel of its rank."""
        if not self.is_current(connection):
            return False
        del self._of_rank[connection.hello.rank]
        return True

    def send(self, rank: int, message, incarnation: int | None = None) -> None:
        """Sends a message to a rank, if given only to this incarnation of it."""
        connection = self._of_rank.get(rank)
        if connection is not None and incarnation in (None, connection.incarnation):
            connection.send(message)

    def hellos(self) -> dict[int, messages.Hello]:
        """The Hello of each rank that has a channel."""
        return {rank: connection.hello for rank, connection in self._of_rank.items()}

    def settled(self, ranks: Iterable[int]) -> list[int]:
        """Those of `ranks` whose current channel is settled (see Connection)."""
        return [rank for rank in ranks if (found := self.of(rank)) and found.settled]

    def shut_down(self) -> None:
        """Sends Shutdown to all ranks and closes their channels."""
        for connection in self._of_rank.values():
            connection.send(messages.Shutdown())
            connection.close()
