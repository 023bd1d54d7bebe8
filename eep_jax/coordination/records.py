"""Small updates and queries of the state, shared by all decisions about a change."""

from eep_jax.coordination.state import CoordinatorState, Send


def with_record(state: CoordinatorState, rank: int, **changes) -> CoordinatorState:
    """The state with changes to the record of one rank."""
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
    """A message to the newest known process of a rank."""
    return Send(rank, state.records[rank].incarnation, message)


def want_resync(state: CoordinatorState, reason: str) -> CoordinatorState:
    """The state with an epoch of the same members requested. The first reason counts."""
    return replaced(state, resync=state.resync or reason)


def handles_of(state: CoordinatorState, ranks) -> dict[int, str]:
    """Handles of the slabs of these ranks, of those that have reported."""
    found = {r: state.records[r].status for r in ranks}
    return {r: status.handle for r, status in found.items() if status is not None}


def unsettled_places(state: CoordinatorState) -> frozenset[tuple[int, int]]:
    """(rank, slot) that a pending or an abandoned plan may be writing."""
    moves_pending = state.change.plan.moves if state.change else ()
    return state.dirty | {(move.rank, move.slot) for move in moves_pending}
