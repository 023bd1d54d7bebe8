"""Quiet reports: Statuses that cannot change a decision, so that hundreds of ranks cost little.

After every event the coordinator looks at all ranks. For most reports of members that is useless:
a heartbeat equal to the last one, or one more rank that is ready while another is not. The last
look at all ranks bounds the effect of such a report:

- no lease, channel grace or fencing grace expires before `due_ms`;
- `witness`, if there is one, keeps a change from being agreed, or the cluster from being calm.

A Tick always looks at all ranks.
"""

from eep_jax.coordination.protocol import Mode, Status
from eep_jax.coordination.state import CoordinatorState, Quiet, RankRecord
from eep_jax.membership.detector import lease_of
from eep_jax.membership.view import RankState

# Status fields that can change a decision, beside its time of arrival.
_DECIDING = (
    "mode",
    "epoch",
    "prepared",
    "contents",
    "fetched",
    "accused",
    "lost",
    "stalled_ms",
    "failure",
)
_USUAL = (Mode.SERVING, Mode.PREPARING, Mode.READY)


def look(state: CoordinatorState) -> Quiet | None:
    """Bounds that hold until an event that is not quiet; None before the first epoch."""
    if state.view.epoch == 0 or state.blocked or state.resync:
        return None
    members = state.view.members
    absent = [member.state is RankState.ABSENT for member in members]
    due = [_due_ms(state, r, outside) for r, outside in zip(state.records, absent, strict=True)]
    return Quiet(min(due), _witness(state))


def is_quiet(before: CoordinatorState, after: CoordinatorState, event, now_ms: int) -> bool:
    """Whether `event`, which turned `before` into `after`, requires no look at all ranks.

    The reporting rank itself still has to be checked: whether it is dead, and whether it can still
    prepare.
    """
    known = before.quiet
    if known is None or now_ms >= known.due_ms or not isinstance(event, Status):
        return False
    rank, same = event.rank, ("view", "change", "placement", "resync", "background", "blocked")
    if event.mode not in _USUAL or event.accused or event.lost or rank == known.witness:
        return False
    if before.view.members[rank].state is not RankState.ACTIVE:
        return False
    if any(getattr(before, name) is not getattr(after, name) for name in same):
        return False
    if known.witness is not None:
        return True
    last = before.records[rank].status
    return last is not None and all(getattr(last, n) == getattr(event, n) for n in _DECIDING)


def _due_ms(state: CoordinatorState, record: RankRecord, outside: bool) -> int:
    """The time at which this record decides something else, if no message comes."""
    config = state.config
    if not record.is_current:
        waits = not record.ended and not record.killed
        return record.fenced_ms + config.fenced_grace_ms if waits else _NEVER
    joining = outside and record.is_loading
    due = record.heard_ms + lease_of(joining, record.accused_by, config)
    if record.channel_lost_ms is not None:
        due = min(due, record.channel_lost_ms + config.channel_grace_ms)
    return due


def _witness(state: CoordinatorState) -> int | None:
    """The last rank that a pending change, or else calm, still waits for."""
    change = state.change
    if change is not None:
        waited = [rank for rank in change.takes_part if rank not in change.ready]
    else:
        epoch = state.view.epoch
        serves = lambda s: s is not None and s.mode is Mode.SERVING and s.epoch == epoch
        waited = [r for r in state.view.in_epoch if not serves(state.records[r].status)]
    return waited[-1] if waited else None


_NEVER = 2**63
