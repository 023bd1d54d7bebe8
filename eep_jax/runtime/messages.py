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
    boot_id: str  # of the operating system: same id, same machine, pids can be watched
    run: str  # name of the configuration


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


TO_SUPERVISOR = _by_name(Hello, protocol.Status, Produced, Held, Telemetry)
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
