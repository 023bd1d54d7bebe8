"""Background work of a healthy cluster: redundancy, balance and drains. Pure.

1. Is it calm?        No change is pending, no rank is joining, every member serves.
2. What is next?      One small step of `placement.balance`: towards a placement without the ranks
                      that are to leave; else towards redundancy; else towards even load.
3. Fetch              Members fetch its experts into slots that no table names, while they serve.
4. Due                All experts are there: the coordinator commits the step, which changes only
                      tables.

The committed placement is valid at any time: an interrupted task is dropped, and a new one is
planned once it is calm again.
"""

import dataclasses

from eep_jax.coordination.loading import supply_of
from eep_jax.coordination.protocol import Fetch, Mode, Status
from eep_jax.coordination.shortages import avoided, explain
from eep_jax.coordination.state import BackgroundTask, CoordinatorState, Note, Send
from eep_jax.membership.view import RankState
from eep_jax.placement.balance import Aim, next_step
from eep_jax.placement.load import settled
from eep_jax.placement.placement import missing_experts
from eep_jax.placement.planner import Plan


def advance(
    state: CoordinatorState, now_ms: int
) -> tuple[CoordinatorState, tuple, BackgroundTask | None]:
    """Returns the state, commands, and the task if all of its experts are there."""
    if not is_calm(state):
        return with_background(state, task=None), (), None
    commands = ()
    if state.background.task is None and now_ms >= state.background.from_ms:
        state = _begin(state, now_ms)
        commands = fetches(state)
    task = state.background.task
    if task is None:
        return state, commands, None
    failed = {m.rank: m.expert for m in task.plan.moves if _has_failed(state, task, m)}
    if failed:
        facts = {"ranks": sorted(failed), "experts": sorted(failed.values())}
        facts["reason"] = explain(state)
        retry_ms = now_ms + state.config.background_retry_ms
        state = with_background(state, task=None, from_ms=retry_ms)
        return state, (*commands, Note("fetch_failed", facts)), None
    there = all(_is_there(state, move) for move in task.plan.moves)
    return state, commands, task if there else None


def is_calm(state: CoordinatorState) -> bool:
    """Whether every member serves in the committed epoch and no rank is joining."""
    if state.change is not None or state.blocked or state.resync or state.view.epoch == 0:
        return False
    if state.view.with_state(RankState.SUSPECT):
        return False
    joining = state.view.with_state(RankState.JOINING)
    if any(state.records[rank].is_current and rank not in state.out for rank in joining):
        return False
    members = state.view.in_epoch
    return bool(members) and all(_serves(state, rank) for rank in members)


def is_resting(state: CoordinatorState) -> bool:
    """Whether no background work is left, by what is known now."""
    if state.background.task is not None or draining(state) or not state.view.in_epoch:
        return False
    if state.config.background_experts == 0:
        return True
    return next_step(state.placement, _aim(state, settled(state.load.measured))) is None


def draining(state: CoordinatorState) -> tuple[int, ...]:
    """Members that are to leave."""
    return tuple(rank for rank in state.view.in_epoch if rank in state.out)


def fetches(state: CoordinatorState, only: int | None = None) -> tuple[Send, ...]:
    """Fetch messages of the pending task to all ranks, or one, that have not completed it."""
    task, sends = state.background.task, ()
    for rank in state.view.in_epoch if task is not None else ():
        if only not in (None, rank):
            continue
        moves = task.plan.moves_of(rank)
        status = state.records[rank].status
        if status.fetched < task.number and any(not _is_there(state, move) for move in moves):
            message = Fetch(number=task.number, epoch=task.epoch, moves=moves)
            sends += (Send(rank, state.records[rank].incarnation, message),)
    return sends


def _begin(state: CoordinatorState, now_ms: int) -> CoordinatorState:
    leaving = draining(state)
    if leaving and has_room(state, leaving):
        task = _drain(state, leaving)
        return state if task is None else _with_task(state, now_ms, **task)
    if state.config.background_experts == 0:
        return state
    aim = _aim(state, state.load.spreading)
    loads = settled(state.load.measured) if now_ms >= state.load.from_ms else ()
    if state.background.done == (state.placement, aim) and not loads:
        return state
    supply = supply_of(state)
    plan = next_step(state.placement, aim, supply)
    if plan is None and not aim.loads and loads:
        # The loads are fixed until they are spread: a moving aim might never be reached.
        aim = dataclasses.replace(aim, loads=loads)
        plan = next_step(state.placement, aim, supply)
    if plan is None:
        from_ms = now_ms + state.config.balance_every_ms if aim.loads else state.load.from_ms
        state = _with_load(state, spreading=(), from_ms=from_ms)
        return with_background(state, done=(state.placement, dataclasses.replace(aim, loads=())))
    reason = "load is spread" if aim.loads else "experts get their replicas back"
    state = _with_load(state, spreading=aim.loads)
    return _with_task(state, now_ms, kind="background", plan=plan, reason=reason)


def _aim(state: CoordinatorState, loads: tuple[float, ...]) -> Aim:
    return Aim(
        members=state.view.in_epoch,
        redundancy=state.config.redundancy,
        moves_max=state.config.background_experts,
        loads=loads,
        imbalance_max=state.config.imbalance_max,
        avoid=avoided(state),
    )


def has_room(state: CoordinatorState, leaving) -> bool:
    """Whether the remaining ranks have a slot for every expert. A drain waits until they do."""
    staying = len(set(state.view.in_epoch) - set(leaving))
    return staying * state.config.slots_per_rank >= state.placement.experts


def _drain(state: CoordinatorState, leaving) -> dict | None:
    """Arguments of the drain's next task; None while the drain has to wait."""
    staying = tuple(rank for rank in state.view.in_epoch if rank not in leaving)
    moves_max = max(1, state.config.background_experts)
    names = ", ".join(map(str, leaving))
    aim = Aim(members=staying, redundancy=1, moves_max=moves_max, avoid=avoided(state))
    if (plan := next_step(state.placement, aim, supply_of(state))) is not None:
        return {"kind": "background", "plan": plan, "reason": f"before ranks {names} leave"}
    if missing_experts(state.placement, staying):
        return None  # no source supplies the leaving ranks' experts for now: see shortages
    plan = Plan(placement=state.placement.without_ranks(leaving))
    return {"kind": "drain", "plan": plan, "reason": f"ranks {names} leave", "leaving": leaving}


def _with_task(state: CoordinatorState, now_ms: int, **task) -> CoordinatorState:
    known = (state.records[rank].status.fetched for rank in state.view.in_epoch)
    number = max(now_ms, state.background.number + 1, *(1 + fetched for fetched in known))
    task = BackgroundTask(number=number, epoch=state.view.epoch, **task)
    return with_background(state, task=task, number=number)


def with_background(state: CoordinatorState, **changes) -> CoordinatorState:
    background = dataclasses.replace(state.background, **changes)
    return dataclasses.replace(state, background=background)


def _with_load(state: CoordinatorState, **changes) -> CoordinatorState:
    return dataclasses.replace(state, load=dataclasses.replace(state.load, **changes))


def _serves(state: CoordinatorState, rank: int) -> bool:
    record, status = state.records[rank], state.records[rank].status
    if not record.is_current or record.ending or status is None or status.failure:
        return False
    return status.mode is Mode.SERVING and status.epoch == state.view.epoch


def _is_there(state: CoordinatorState, move) -> bool:
    contents = state.records[move.rank].status.contents
    return contents[move.slot : move.slot + 1] == (move.expert,)


def _has_failed(state: CoordinatorState, task: BackgroundTask, move) -> bool:
    status: Status = state.records[move.rank].status
    return status.fetched >= task.number and not _is_there(state, move)
