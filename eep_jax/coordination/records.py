"""Small steps that all decisions about a change are made of."""

from eep_jax.coordination.protocol import Mode
from eep_jax.coordination.state import CoordinatorState, Send

# A process in one of these modes that is no member wants to become one. The last two are left over
# from a change that was abandoned, or that a supervisor which died had begun.
OUTSIDE = (Mode.OFFERED, Mode.STANDBY, Mode.PREPARING, Mode.READY)


def with_record(state: CoordinatorState, rank: int, **changes) -> CoordinatorState:
    """The state with changes to what is known of one rank."""
    record = replaced(state.records[rank], **changes)
    records = state.records[:rank] + (record,) + state.records[rank + 1 :]
    return replaced(state, records=records)


def replaced[T](value: T, **changes) -> T:
    """`dataclasses.replace` without its calls per field, for what is done with every Status.

    Only for dataclasses without `__post_init__` and cached properties.
    """
    fresh = object.__new__(type(value))
    vars(fresh).update(vars(value), **changes)
    return fresh


def send_to(state: CoordinatorState, rank: int, message) -> Send:
    """A message to the process of a rank that is known now."""
    return Send(rank, state.records[rank].incarnation, message)


def want_resync(state: CoordinatorState, reason: str) -> CoordinatorState:
    """The state that wants an epoch with the same members, for the first such reason."""
    return replaced(state, resync=state.resync or reason)


def handles_of(state: CoordinatorState, ranks) -> dict[int, str]:
    """Where the slabs of these ranks are found, of those that were heard."""
    found = {r: state.records[r].status for r in ranks}
    return {r: status.handle for r, status in found.items() if status is not None}


def unsettled_places(state: CoordinatorState) -> frozenset[tuple[int, int]]:
    """Places that a pending or an abandoned plan may be writing."""
    moves_pending = state.change.plan.moves if state.change else ()
    return state.dirty | {(move.rank, move.slot) for move in moves_pending}
