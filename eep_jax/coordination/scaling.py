"""Checks of the operator's requests to take ranks out or back in. Pure."""

import dataclasses

from eep_jax.coordination.state import CoordinatorState
from eep_jax.errors import InvalidMove
from eep_jax.placement.placement import require_room

ACTIONS = ("scale_down", "scale_up")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleRequest:
    """Ranks to take out or back in: `ranks`, or `count` of them.

    With `count`, the highest ranks leave first and the lowest come back first.
    """

    action: str  # see ACTIONS
    ranks: tuple[int, ...] = ()
    count: int = 0


def ranks_out(state: CoordinatorState, request: ScaleRequest) -> frozenset[int]:
    """All ranks that are out once the request is carried out.

    Raises:
        InvalidMove: A rank cannot leave or come back.
        CoverageLost: The remaining ranks have too few slots for all experts.
    """
    if state.view.epoch == 0:
        raise InvalidMove("the cluster is starting: not all ranks are ready yet; ask again later")
    if request.action == "scale_up":
        return state.out - set(_chosen(state, request, sorted(state.out), "is not out"))
    inside = [rank for rank in state.view.in_epoch if rank not in state.out]
    leaving = _chosen(state, request, inside[::-1], "")
    staying = [rank for rank in inside if rank not in leaving]
    require_room(state.placement, staying, "let fewer ranks leave, or bring another one in first")
    return state.out | set(leaving)


def _chosen(
    state: CoordinatorState, request: ScaleRequest, eligible, otherwise: str
) -> tuple[int, ...]:
    if request.count:
        if request.count > len(eligible):
            raise InvalidMove(
                f"count {request.count} is more than the ranks that can {request.action}: "
                f"{sorted(eligible)}"
            )
        return tuple(eligible[: request.count])
    for rank in request.ranks:
        if rank not in state.view.ranks:
            raise InvalidMove(f"rank {rank} is not in 0..{len(state.view.ranks) - 1}")
        if rank not in eligible:
            why = otherwise or _why_not_inside(state, rank)
            raise InvalidMove(
                f"rank {rank} {why}; {request.action} can be asked of {sorted(eligible)}"
            )
    return request.ranks


def _why_not_inside(state: CoordinatorState, rank: int) -> str:
    if rank in state.out:
        return "is on its way out" if state.view.includes(rank) else "is out already"
    return "is not a member now: its process died, or has not come yet; ask again once it is back"
