"""Messages by which supervisor and ranks agree on membership and placement.

A rank sends one message only, `Status`: all of its state, on every change and with every heartbeat.
So a lost, repeated or late message needs no answer of its own; the next Status repairs it.
"""

import dataclasses
import enum

from eep_jax.membership.view import View
from eep_jax.placement.placement import Placement
from eep_jax.placement.planner import Move
from eep_jax.placement.sources import Backup


class Mode(enum.Enum):
    """Activity of a rank."""

    ALONE = "alone"  # opens memory, compiles, warms up; has no contact with other ranks
    OFFERED = "offered"  # ready to take experts and to be admitted
    SERVING = "serving"  # steps in its epoch
    HOLDING = "holding"  # discarded a step on suspicion; waits for the next epoch
    PREPARING = "preparing"  # carries out a Prepare
    READY = "ready"  # prepared, waits for the Commit
    STANDBY = "standby"  # drained: not a member, ready to take experts and to be admitted again
    FENCED = "fenced"  # no longer a member


# Modes of a process outside of the epoch that can be admitted. The last two remain from a change
# that was abandoned, or begun by a supervisor that died.
OUTSIDE = (Mode.OFFERED, Mode.STANDBY, Mode.PREPARING, Mode.READY)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status:
    """The whole state of a rank. A lower `sequence` of the same incarnation is out of date."""

    rank: int
    incarnation: int
    sequence: int
    mode: Mode
    epoch: int = 0  # last committed epoch it knows; 0 before its first and once it was drained
    prepared: int = 0  # epoch it prepares or is ready for
    contents: tuple[int, ...] = ()  # expert in each slot of its bank, as written and verified
    fetched: int = 0  # number of the last completed Fetch; `contents` show its result
    accused: tuple[int, ...] = ()  # ranks that its held step timed out on
    # Experts that no source supplied for the last Load, Fetch or Prepare, with the reason.
    lost: dict[int, str] = dataclasses.field(default_factory=dict)
    stalled_ms: int = 0  # time since its engine loop last moved
    handle: str = ""  # for peers to map its slab
    failure: str = ""  # the reason why it cannot continue; fatal to this rank
    # Experts in its host memory, and the address at which it serves them.
    backup: Backup = dataclasses.field(default_factory=Backup)
    rates: dict[str, float] = dataclasses.field(default_factory=dict)  # bytes/s by kind of source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """To a joining rank: fill the bank to `slots`. Handles are those of the ranks to read from."""

    slots: tuple[int, ...]
    moves: tuple[Move, ...]
    handles: dict[int, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepare:
    """To all ranks of `view`: stop stepping, map handles, carry out moves, then become READY."""

    epoch: int
    view: View
    placement: Placement
    moves: tuple[Move, ...]  # those of the receiver
    handles: dict[int, str]
    reason: str
    planned: bool = False  # no rank died: first end the step, at a round that all ranks agree on


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fetch:
    """To a rank that serves in `epoch`: fill these unused slots between steps."""

    number: int
    epoch: int
    moves: tuple[Move, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StandBy:
    """To a drained rank: not a member as of `epoch`; its bank keeps its contents."""

    epoch: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Commit:
    """To all ranks of an epoch, once all are READY for it: step under its tables."""

    epoch: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Welcome:
    """To a new process: its incarnation of its rank."""

    incarnation: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refused:
    """To a new process: it cannot be accepted now, and asks again after a while."""

    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fenced:
    """To a process that is no longer a member: it must end."""

    reason: str
