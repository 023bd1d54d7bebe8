"""State, events and commands of the coordinator: values only."""

import dataclasses

from eep_jax.config import ClusterConfig
from eep_jax.coordination.protocol import Load, Mode, Status
from eep_jax.membership.view import View
from eep_jax.placement.balance import Aim
from eep_jax.placement.load import LoadEstimate
from eep_jax.placement.placement import Placement
from eep_jax.placement.planner import Move, Plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankRecord:
    """The newest process of one rank, as known to the supervisor."""

    incarnation: int = 0
    fenced: int = 0  # messages of incarnations up to this one are refused for good
    fenced_ms: int = 0
    ended: bool = True
    ending: bool = False
    killed: bool = False
    heard_ms: int = 0
    channel_lost_ms: int | None = None
    accused_by: tuple[int, ...] = ()
    status: Status | None = None
    load: Load | None = None

    @property
    def is_current(self) -> bool:
        return self.incarnation > self.fenced

    @property
    def is_loading(self) -> bool:
        """Whether this process, if it is no member, has not offered itself yet."""
        return self.status is None or self.status.mode is Mode.ALONE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """A pending epoch. `leaving` ranks take part in the change, and stand by after it.

    In a `planned` change no rank died, and ranks end their step before they take part.
    """

    kind: str  # "formation", "repair", "admission", "resync", "background" or "drain"
    reason: str
    view: View
    plan: Plan
    started_ms: int
    ready: frozenset[int] = frozenset()
    leaving: tuple[int, ...] = ()
    fetched: tuple[Move, ...] = ()  # carried out beforehand
    planned: bool = False

    @property
    def takes_part(self) -> tuple[int, ...]:
        return self.view.in_epoch + self.leaving  # copies nothing if no rank leaves

    def includes(self, rank: int) -> bool:
        """Whether `takes_part` lists the rank."""
        return self.view.includes(rank) or rank in self.leaving


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackgroundTask:
    """Experts on their way into slots that the placement of `epoch` does not use.

    `number` is unique, also among the tasks of former supervisors.
    """

    number: int
    kind: str  # of the change that follows
    reason: str
    epoch: int
    plan: Plan
    leaving: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shortages:
    """Reasons why a rank could not get an expert, by `(rank, expert)`; see `shortages`."""

    reasons: dict[tuple[int, int], str] = dataclasses.field(default_factory=dict)
    until_ms: int = 0  # time of the next try
    tries: int = 0  # in a row without success


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackgroundState:
    """The pending background task, and what limits the next one; see `background`."""

    task: BackgroundTask | None = None
    from_ms: int = 0  # earliest start of the next task
    number: int = 0  # of the last task
    done: tuple[Placement, Aim] | None = None  # these two leave nothing to do


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadState:
    """Measured load of the experts, and the load that balancing currently spreads."""

    measured: LoadEstimate = dataclasses.field(default_factory=LoadEstimate)
    spreading: tuple[float, ...] = ()  # fixed while it is being spread; empty if none is
    from_ms: int = 0  # earliest time at which balancing considers the measured load again


@dataclasses.dataclass(frozen=True)
class Quiet:
    """Result of the last look at all ranks, see `quiet`. The other ranks wait for `witness`."""

    due_ms: int
    witness: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoordinatorState:
    """`view` and `placement` are the committed ones, with suspects and joining ranks marked.

    While `blocked`, dead ranks have also left them, under the old epoch, in which no rank steps.
    """

    config: ClusterConfig
    view: View
    placement: Placement
    records: tuple[RankRecord, ...]
    epoch_tried: int = 0
    change: Change | None = None
    dirty: frozenset[tuple[int, int]] = (
        frozenset()
    )  # (rank, slot) an abandoned plan may have written
    dropped: tuple[int, ...] = ()  # experts given up under `degrade`
    shortages: Shortages = dataclasses.field(default_factory=Shortages)
    blocked: str = ""  # reason of lost coverage; empty while every expert is covered
    resync: str = ""  # why the members need a new epoch; empty if they do not
    out: frozenset[int] = frozenset()  # ranks that the operator took out, or that are to leave
    background: BackgroundState = BackgroundState()
    load: LoadState = LoadState()
    first_offer_ms: int | None = None
    advanced_ms: int | None = None  # time of the last event
    quiet: Quiet | None = None


@dataclasses.dataclass(frozen=True)
class Arrived:
    """Event: a new process of `rank` asks for an incarnation."""

    rank: int


@dataclasses.dataclass(frozen=True)
class Unrecorded:
    """Event: a process has an incarnation that this supervisor's journal does not know.

    The journal is older than the ranks: it was off when its supervisor died, or an old copy was
    put in its place.
    """

    rank: int
    incarnation: int


@dataclasses.dataclass(frozen=True)
class Disconnected:
    """Event: the control channel of this process broke."""

    rank: int
    incarnation: int


@dataclasses.dataclass(frozen=True)
class Ending:
    """Event: this process runs no more code; its memory may exist until Ended."""

    rank: int
    incarnation: int


@dataclasses.dataclass(frozen=True)
class Ended:
    """Event: this process is known to have ended."""

    rank: int
    incarnation: int


@dataclasses.dataclass(frozen=True)
class ScaleTo:
    """Event: the operator wants exactly these ranks out of the cluster; see `scaling`."""

    out: frozenset[int]


@dataclasses.dataclass(frozen=True)
class Measured:
    """Event: a rank's counts of tokens per chosen expert since its last report."""

    choices: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Tick:
    """Event: time passed."""


@dataclasses.dataclass(frozen=True)
class Send:
    """Command: send `message` to this incarnation; it may be lost."""

    rank: int
    incarnation: int
    message: object


@dataclasses.dataclass(frozen=True)
class Answer:
    """Command: send `message` to the sender of the event."""

    message: object


@dataclasses.dataclass(frozen=True)
class Kill:
    """Command: end this process with SIGKILL, then report Ended."""

    rank: int
    incarnation: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Note:
    """Command: record in the journal. `kind` names the event, `facts` are plain values."""

    kind: str
    facts: dict
