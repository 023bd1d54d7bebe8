"""Which connection is a rank's channel: the newest of its process; what it is sent goes there."""

from collections.abc import Iterable

from eep_jax.runtime.control import messages
from eep_jax.runtime.control.server import Connection


class Channels:
    """At most one connection for each rank. A rank without one misses what it is sent."""

    def __init__(self):
        self._of_rank: dict[int, Connection] = {}

    def of(self, rank: int) -> Connection | None:
        return self._of_rank.get(rank)

    def host_of(self, rank: int) -> str | None:
        """The id of the host that a rank called from, None while it has no channel."""
        connection = self._of_rank.get(rank)
        return None if connection is None else connection.hello.host

    def is_current(self, connection: Connection) -> bool:
        return self._of_rank.get(connection.hello.rank) is connection

    def register(self, connection: Connection) -> None:
        """Makes it the channel of its rank, whose process has called."""
        before = self._of_rank.get(connection.hello.rank)
        self._of_rank[connection.hello.rank] = connection
        if before is not None:
            before.close()  # its rank has called again, so nobody is at the other end

    def remove(self, connection: Connection) -> bool:
        """Forgets a connection that was closed; whether it was the channel of its rank."""
        if not self.is_current(connection):
            return False
        del self._of_rank[connection.hello.rank]
        return True

    def send(self, rank: int, message, incarnation: int | None = None) -> None:
        """To this incarnation only, if one is named."""
        connection = self._of_rank.get(rank)
        if connection is not None and incarnation in (None, connection.incarnation):
            connection.send(message)

    def hellos(self) -> dict[int, messages.Hello]:
        """What each rank that has a channel said of itself."""
        return {rank: connection.hello for rank, connection in self._of_rank.items()}

    def settled(self, ranks: Iterable[int]) -> list[int]:
        """Those of `ranks` that have a channel and have said on it which requests they have."""
        return [rank for rank in ranks if (found := self.of(rank)) and found.settled]

    def shut_down(self) -> None:
        """Tells all ranks that the run is over."""
        for connection in self._of_rank.values():
            connection.send(messages.Shutdown())
            connection.close()
