"""What a process learns from where it was started: its rank, and where the supervisor is."""

import dataclasses
import ipaddress
import socket
from collections.abc import Callable
from typing import NamedTuple, Protocol

from launch.errors import UsageError

PORT_MAX = 65_535

Resolve = Callable[[str], str]  # a host's name to its numeric address; raises OSError


class Address(NamedTuple):
    """Where a process listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity:
    """Which rank a process is, and its place among the ranks of its node.

    The place says which GPU is its own, so a new process of a rank has that of the one before.
    """

    rank: int
    local_rank: int
    local_ranks: int

    def __post_init__(self):
        if not 0 <= self.local_rank < self.local_ranks:
            raise UsageError(
                f"local rank {self.local_rank} of {self.local_ranks} ranks of a node is none of "
                f"0..{self.local_ranks - 1}; see --local_rank and --local_ranks"
            )


class Environment(Protocol):
    """One class for each way in which processes are started."""

    def identity(
        self, ranks: int, rank: int | None, local_rank: int | None, local_ranks: int | None
    ) -> Identity:
        """Who this process is, in a run of `ranks`. What is given wins over what was found.

        Raises UsageError where that is not to be known, or is none of the run's ranks.
        """
        ...

    def supervisor(self, given: str, control_port: int) -> Address | None:
        """Where the control channel listens; None: the run directory says.

        `given` is HOST:PORT and wins, if it is not empty; `control_port` is the configuration's, 0
        if it names none. Raises UsageError for an address that cannot be right.
        """
        ...

    def http(self, supervisor: Address | None) -> Address | None:
        """Where that supervisor's HTTP API listens unless a flag says; None: as configured."""
        ...


def parse_address(text: str) -> Address:
    """`n0:20017` or `[fd00::1]:20017`. Raises UsageError."""
    host, colon, port = text.rpartition(":")
    if not (colon and host and port.isdecimal() and 0 < int(port) <= PORT_MAX):
        raise UsageError(f"--supervisor={text!r} must be HOST:PORT, such as node17:20017")
    return Address(host.removeprefix("[").removesuffix("]"), int(port))


def check_rank(rank: int | None, ranks: int) -> int:
    """`rank` if it is one of the run's, else UsageError."""
    if rank is None or not 0 <= rank < ranks:
        raise UsageError(f"--rank={rank} must be in 0..{ranks - 1}")
    return rank


def resolve(host: str) -> str:
    """The numeric address of a host, the first that the system gives. Raises OSError."""
    return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]


def is_loopback(address: str) -> bool:
    """Whether a numeric address reaches nobody but this machine, or names all of its interfaces."""
    found = ipaddress.ip_address(address.partition("%")[0])
    return found.is_loopback or found.is_unspecified
