"""One frozen dataclass per message of the control channel, grouped by receiver."""

import dataclasses

from eep_jax.coordination import protocol
from eep_jax.engine.request import CacheUse, Progress, Request


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hello:
    """First message of a connection. `incarnation` is 0 for a process that has none yet."""

    rank: int
    incarnation: int
    pid: int
    ticks: int  # start time of the process in its host's ticks: identifies reused pids
    host: str  # processes of one id can map each other's memory and watch pids
    run: str  # name of the configuration
    mirrored: bool = False  # whether ranks of other hosts can reach its memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostHello:
    """First message of a launcher, which can watch and kill the processes of its host."""

    host: str
    run: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostProcess:
    """A rank's process as its own host identifies it."""

    rank: int
    incarnation: int
    pid: int
    ticks: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostReport:
    """State of the processes that a launcher watches; on every change and with every heartbeat."""

    ending: tuple[HostProcess, ...] = ()  # they run no more user code
    ended: tuple[HostProcess, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watch:
    """To a launcher: all processes of its host that are not known to have ended."""

    processes: tuple[HostProcess, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndProcess:
    """To a launcher: send SIGKILL to this process, whoever started it."""

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
    """Seconds of a process's start, before it offered itself; see rank.start_timer."""

    seconds: dict[str, float]  # by phase
    executables: dict[str, str]  # by step: `loaded`, or `compiled: ` and why
    compilations: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChangeTimes:
    """Seconds of a rank's last change of epoch, and experts moved since the previous one."""

    epoch: int
    load_s: float  # a joining rank's experts, before the change
    detach_s: float
    fetch_s: float
    commit_s: float
    first_step_s: float | None  # from the commit to the first committed step; None before it
    moved: dict[str, int]  # experts, by kind of source
    bytes_moved: dict[str, int]
    start: StartTimes | None = None  # if it was the first change of this process


@dataclasses.dataclass(frozen=True, kw_only=True)
class Telemetry:
    """Counts for reports, and how often each expert was chosen, which balancing needs."""

    compilations: int  # since the rank was ready; must stay 0
    steps: int
    discarded: int
    moved: dict[str, int]  # experts written, by kind of source
    change: ChangeTimes | None = None  # the last one, repeated
    cache: CacheUse | None = None
    chosen: tuple[int, ...] = ()  # choices of each expert since the last Telemetry
    bytes_moved: dict[str, int] = dataclasses.field(default_factory=dict)  # by kind of source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    """To a rank: start or continue a request."""

    request: Request


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forget:
    """To a rank: drop a request that was finished, cancelled or moved to another rank."""

    id: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shutdown:
    """To a rank or launcher: the run is over; exit in an orderly way."""


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
