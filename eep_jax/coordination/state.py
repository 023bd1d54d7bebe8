"""What the supervisor knows, what can happen to it, and what it can be told to do: values only."""

import dataclasses

from eep_jax.config import ClusterConfig
from eep_jax.coordination.protocol import Load, Status
from eep_jax.membership.view import View
from eep_jax.placement.balance import Aim
from eep_jax.placement.load import LoadEstimate
from eep_jax.placement.placement import Placement
from eep_jax.placement.planner import Move, Plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankRecord:
    """What the supervisor knows of the newest process of one rank."""

    incarnation: int = 0
    fenced: int = 0  # incarnations up to this one are never listened to again
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """A pending epoch. `leaving` ranks take part in the change, and stand by after it.

    Where it is `planned`, no rank died and ranks end their step before they take part.
    """

    kind: str  # "formation", "repair", "admission", "resync", "background" or "drain"
    reason: str
    view: View
    plan: Plan
    started_ms: int
    ready: frozenset[int] = frozenset()
    leaving: tuple[int, ...] = ()
    fetched: tuple[Move, ...] = ()  # what was brought beforehand
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

    `number` tells one such task from all others, also of other supervisors.
    """

    number: int
    kind: str  # of the change that follows
    reason: str
    epoch: int
    plan: Plan
    leaving: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shortages:
    """Why a rank could not get an expert, by `(rank, expert)`; see `shortages`."""

    reasons: dict[tuple[int, int], str] = dataclasses.field(default_factory=dict)
    until_ms: int = 0  # then it is tried again
    tries: int = 0  # in vain, one after the other


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

    While `blocked`, the dead have also left them, under the old epoch, which nobody can step in.
    """

    config: ClusterConfig
    view: View
    placement: Placement
    records: tuple[RankRecord, ...]
    epoch_tried: int = 0
    change: Change | None = None
    dirty: frozenset[tuple[int, int]] = frozenset()  # places an abandoned plan may have written
    dropped: tuple[int, ...] = ()  # experts given up under `degrade`
    shortages: Shortages = dataclasses.field(default_factory=Shortages)
    blocked: str = ""  # why there is no coverage, empty while all is well
    resync: str = ""  # why the members must agree anew, empty if not
    out: frozenset[int] = frozenset()  # ranks that the operator took out, or wants out
    background: BackgroundState = BackgroundState()
    load: LoadState = LoadState()
    first_offer_ms: int | None = None
    advanced_ms: int | None = None  # when the last event came
    quiet: Quiet | None = None


@dataclasses.dataclass(frozen=True)
class Arrived:
    """A new process of `rank` asks to be an incarnation."""

    rank: int


@dataclasses.dataclass(frozen=True)
class Disconnected:
    """The control channel of this process broke."""

    rank: int
    incarnation: int


@dataclasses.dataclass(frozen=True)
class Ending:
    """This process runs no more code of its own. Its memory may be there for a while: see Ended."""

    rank: int
    incarnation: int


@dataclasses.dataclass(frozen=True)
class Ended:
    """This process is known to have ended."""

    rank: int
    incarnation: int


@dataclasses.dataclass(frozen=True)
class ScaleTo:
    """The operator wants exactly these ranks out of the cluster; see `scaling`."""

    out: frozenset[int]


@dataclasses.dataclass(frozen=True)
class Measured:
    """A rank counted how often its tokens chose each expert since it last said so."""

    choices: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Tick:
    """Time passed."""


@dataclasses.dataclass(frozen=True)
class Send:
    """Command: send `message` to this incarnation; it may be lost."""

    rank: int
    incarnation: int
    message: object


@dataclasses.dataclass(frozen=True)
class Answer:
    """Command: send `message` to whoever caused the event."""

    message: object


@dataclasses.dataclass(frozen=True)
class Kill:
    """Command: end this process with SIGKILL, then report Ended."""

    rank: int
    incarnation: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Note:
    """Command: record in the journal. `kind` names what happened, `facts` are plain values."""

    kind: str
    facts: dict
