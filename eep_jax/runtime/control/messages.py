"""One frozen dataclass per message of the control channel, grouped by receiver."""

import dataclasses

from eep_jax.coordination import protocol
from eep_jax.engine.request import Progress, Request


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hello:
    """First message of a connection. `incarnation` is 0 for a process that has none yet."""

    rank: int
    incarnation: int
    pid: int
    ticks: int  # when the process started, as its host counts: tells reused pids
    host: str  # same id, same host: memory can be mapped, pids can be watched
    run: str  # name of the configuration
    mirrored: bool = False  # whether ranks of other hosts can reach its memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostHello:
    """First message of a launcher: it can see processes of its host end, and end them."""

    host: str
    run: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostProcess:
    """A rank's process, as its own host and the supervisor know it."""

    rank: int
    incarnation: int
    pid: int
    ticks: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostReport:
    """What a launcher sees of the processes that it watches; on every change and heartbeat."""

    ending: tuple[HostProcess, ...] = ()  # they run no more code of their own
    ended: tuple[HostProcess, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watch:
    """To a launcher: all processes of its host that are not known to have ended."""

    processes: tuple[HostProcess, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndProcess:
    """To a launcher: SIGKILL to this process, whoever started it."""

    process: HostProcess


@dataclasses.dataclass(frozen=True, kw_only=True)
class Produced:
    """New tokens of requests of this rank."""

    progress: tuple[Progress, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held:
    """After a reconnect: every request the rank has, with all its tokens."""

    progress: tuple[Progress, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartTimes:
    """How a process spent its start, before it offered itself; see `start_watch`."""

    seconds: dict[str, float]  # by phase
    executables: dict[str, str]  # by step: `loaded`, or `compiled: ` and why
    compilations: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChangeTimes:
    """How a rank spent its last change of epoch, and what it moved since the one before."""

    epoch: int
    load_s: float  # a joining rank's experts, before the change
    detach_s: float
    fetch_s: float
    commit_s: float
    first_step_s: float | None  # after the commit; None until one counted
    moved: dict[str, int]  # experts, by kind of source
    bytes_moved: dict[str, int]
    start: StartTimes | None = None  # of a process for which it was the first change


@dataclasses.dataclass(frozen=True, kw_only=True)
class Telemetry:
    """Numbers for reports, and which experts are chosen: load is spread by that."""

    compilations: int  # since the rank was ready; promised to stay 0
    steps: int
    discarded: int
    moved: dict[str, int]  # experts written, by kind of source
    change: ChangeTimes | None = None  # the last one, repeated
    chosen: tuple[int, ...] = ()  # how often each expert was, since the last one
    bytes_moved: dict[str, int] = dataclasses.field(default_factory=dict)  # by kind of source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    """Begin, or go on with, a request."""

    request: Request


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forget:
    """A request is over for the supervisor: finished, cancelled, or moved to another rank."""

    id: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shutdown:
    """End in order; the run is over."""


def _by_name(*kinds: type) -> dict[str, type]:
    return {kind.__name__: kind for kind in kinds}


TO_SUPERVISOR = _by_name(Hello, protocol.Status, Produced, Held, Telemetry, HostHello, HostReport)
TO_LAUNCHER = _by_name(Watch, EndProcess, Shutdown, protocol.Fenced)
TO_RANK = _by_name(
    protocol.Welcome,
    protocol.Refused,
    protocol.Fenced,
    protocol.Load,
    protocol.Prepare,
    protocol.Commit,
    protocol.Fetch,
    protocol.StandBy,
    Generate,
    Forget,
    Shutdown,
)
