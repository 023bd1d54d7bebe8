"""Environment of a process: its rank, and the supervisor's address."""

import dataclasses
import ipaddress
import socket
from collections.abc import Callable
from typing import NamedTuple, Protocol

from launch.errors import UsageError

PORT_MAX = 65_535

Resolve = Callable[[str], str]  # a host's name to its numeric address; raises OSError


class Address(NamedTuple):
    """Address at which a process listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity:
    """A process's rank, and its index among the ranks of its node.

    The index selects the GPU, so a new process of a rank has the GPU of the last one.
    """

    rank: int
    local_rank: int
    local_ranks: int

    def __post_init__(self):
        if not 0 <= self.local_rank < self.local_ranks:
            raise UsageError(
                f"local rank {self.local_rank} of {self.local_ranks} ranks of a node must be in "
                f"0..{self.local_ranks - 1}; see --local_rank and --local_ranks"
            )


class Environment(Protocol):
    """One class for each way to start processes."""

    def identity(
        self, ranks: int, rank: int | None, local_rank: int | None, local_ranks: int | None
    ) -> Identity:
        """Identity of this process in a run of `ranks`. Given values win over the environment's.

        Raises:
            UsageError: It is unknown, or not a rank of the run.
        """
        ...

    def supervisor(self, given: str, control_port: int) -> Address | None:
        """Address of the control channel; None: the run directory holds it.

        Args:
            given: HOST:PORT, which wins; or "".
            control_port: Port of the configuration; 0: none.

        Raises:
            UsageError: The address is unusable.
        """
        ...

    def http(self, supervisor: Address | None) -> Address | None:
        """Default address of that supervisor's HTTP API; None: that of the configuration."""
        ...


def parse_address(text: str) -> Address:
    """`n0:20017` or `[fd00::1]:20017`. Raises UsageError."""
    host, colon, port = text.rpartition(":")
    if not (colon and host and port.isdecimal() and 0 < int(port) <= PORT_MAX):
        raise UsageError(f"--supervisor={text!r} must be HOST:PORT, such as node17:20017")
    return Address(host.removeprefix("[").removesuffix("]"), int(port))


def check_rank(rank: int | None, ranks: int) -> int:
    """`rank`. Raises UsageError if it is not a rank of the run."""
    if rank is None or not 0 <= rank < ranks:
        raise UsageError(f"--rank={rank} must be in 0..{ranks - 1}")
    return rank


def resolve(host: str) -> str:
    """The first numeric address of a host. Raises OSError."""
    return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]


def is_loopback(address: str) -> bool:
    """Whether a numeric address is reachable only from this machine, or is a wildcard."""
    found = ipaddress.ip_address(address.partition("%")[0])
    return found.is_loopback or found.is_unspecified
