"""Which reports change nothing but themselves: so that hundreds of ranks cost little each.

After every event the coordinator looks at all ranks. For most reports of members that is in vain:
a heartbeat that says what the last one said, or one rank more that is ready while another is not.
What such a report could bring about is known from the last look at all ranks:

- nobody's lease, channel or grace runs out before `due_ms`;
- `witness`, if there is one, keeps a change from being agreed, or calm from being there.

A Tick always looks at all ranks.
"""

from eep_jax.coordination.protocol import Mode, Status
from eep_jax.coordination.state import CoordinatorState, Quiet, RankRecord
from eep_jax.membership.view import RankState

# What of a Status decides anything, beside the time of its coming and what it measured.
_TELLING = (
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
    """What holds until something else than a quiet report comes; None while nobody was let in."""
    if state.view.epoch == 0 or state.blocked or state.resync:
        return None
    due = [_due_ms(state, record) for record in state.records]
    return Quiet(min(due), _witness(state))


def is_quiet(before: CoordinatorState, after: CoordinatorState, event, now_ms: int) -> bool:
    """Whether `event`, which made `after` of `before`, calls for no look at all ranks.

    The reporting rank itself must be looked at all the same: whether it is dead, and whether it
    can still prepare.
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
    told = before.records[rank].status
    return told is not None and all(getattr(told, n) == getattr(event, n) for n in _TELLING)


def _due_ms(state: CoordinatorState, record: RankRecord) -> int:
    """Until when this record means the same, if nothing else is heard."""
    config = state.config
    if not record.is_current:
        waits = not record.ended and not record.killed
        return record.fenced_ms + config.fenced_grace_ms if waits else _NEVER
    lease_ms = config.accused_lease_ms if record.accused_by else config.lease_ms
    due = record.heard_ms + lease_ms
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
