"""The values that supervisor and ranks exchange to agree on membership and placement.

A rank says one thing only, `Status`: all of its state, on every change and with every heartbeat. So
a lost, repeated or late message needs no answer of its own; the next Status repairs it.
"""

import dataclasses
import enum

from eep_jax.membership.view import View
from eep_jax.placement.placement import Placement
from eep_jax.placement.planner import Move
from eep_jax.placement.sources import Backup


class Mode(enum.Enum):
    """What a rank is doing."""

    ALONE = "alone"  # opens memory, compiles, warms up; talks to no other rank
    OFFERED = "offered"  # ready to take experts and to be admitted
    SERVING = "serving"  # steps in its epoch
    HOLDING = "holding"  # discarded a step on suspicion, waits for the next epoch
    PREPARING = "preparing"  # carries out a Prepare
    READY = "ready"  # prepared, waits for the Commit
    STANDBY = "standby"  # was drained: no member, ready to take experts and to be admitted again
    FENCED = "fenced"  # was told that it is no longer a member


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status:
    """All that a rank says of itself. A lower `sequence` of the same incarnation is out of date."""

    rank: int
    incarnation: int
    sequence: int
    mode: Mode
    epoch: int = 0  # last committed epoch it knows; 0 before its first and once it was drained
    prepared: int = 0  # epoch it prepares or is ready for
    contents: tuple[int, ...] = ()  # expert in each slot of its bank, as written and verified
    fetched: int = 0  # number of the last Fetch it went through; `contents` say what came of it
    accused: tuple[int, ...] = ()  # ranks its held step timed out on
    # Experts that no source supplied for the last Load, Fetch or Prepare, and why.
    lost: dict[int, str] = dataclasses.field(default_factory=dict)
    stalled_ms: int = 0  # how long its engine loop has not moved
    handle: str = ""  # how peers reach its slab
    failure: str = ""  # why it cannot go on; fatal to this rank
    # Experts it has in host memory, and where it serves them.
    backup: Backup = dataclasses.field(default_factory=Backup)
    rates: dict[str, float] = dataclasses.field(default_factory=dict)  # bytes/s by kind of source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """To a joining rank: fill your bank to `slots`. Handles are those of the ranks to read from."""

    slots: tuple[int, ...]
    moves: tuple[Move, ...]
    handles: dict[int, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepare:
    """To all ranks of `view`: stop stepping, map and move as said here, then become READY."""

    epoch: int
    view: View
    placement: Placement
    moves: tuple[Move, ...]  # those of the receiver
    handles: dict[int, str]
    reason: str
    planned: bool = False  # nobody died: first end the step, at a round that all ranks agree on


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fetch:
    """To a rank that serves in `epoch`: fill these slots, which it does not use, between steps."""

    number: int
    epoch: int
    moves: tuple[Move, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StandBy:
    """To a rank that was drained: you are no member as of `epoch`; keep what you hold."""

    epoch: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Commit:
    """To all ranks of an epoch, once all are READY for it: step on under its tables."""

    epoch: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Welcome:
    """To a new process: you are this incarnation of your rank."""

    incarnation: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refused:
    """To a new process: not now. It asks again after a while."""

    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fenced:
    """To a process that is no longer a member: end."""

    reason: str
