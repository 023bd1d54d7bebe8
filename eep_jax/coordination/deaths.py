"""Deaths: the detector's verdict on every rank, and the immediate consequences."""

import dataclasses

from eep_jax.coordination.protocol import Fenced, Mode
from eep_jax.coordination.records import send_to, with_record
from eep_jax.coordination.state import CoordinatorState, Kill, Note
from eep_jax.membership import moves
from eep_jax.membership.detector import Signs, judge
from eep_jax.membership.view import RankState
from eep_jax.placement.placement import EMPTY, holds


def fence_dead(state: CoordinatorState, now_ms: int) -> tuple[CoordinatorState, tuple]:
    """Fences dead ranks, and kills evicted processes that do not end themselves."""
    commands: tuple = ()
    for rank, member in enumerate(state.view.members):
        record = state.records[rank]
        if record.is_current:
            verdict = verdict_on(state, rank, now_ms)
            if not verdict.dead:
                continue
            facts = {"rank": rank, "incarnation": record.incarnation, "reason": verdict.reason}
            state = _fence(state, rank, now_ms)
            commands += (Note("dead", facts), send_to(state, rank, Fenced(reason=verdict.reason)))
            if member.state is RankState.ACTIVE:
                state = dataclasses.replace(state, view=moves.suspect(state.view, rank))
            elif member.state is RankState.JOINING:
                state = dataclasses.replace(state, view=moves.withdraw(state.view, rank))
            continue
        fenced_for_ms = now_ms - record.fenced_ms
        alive = not record.ended and not record.killed
        if alive and fenced_for_ms > state.config.fenced_grace_ms:
            kill = Kill(rank, record.incarnation, "it was evicted and did not end itself")
            state, commands = with_record(state, rank, killed=True), (*commands, kill)
    return state, commands


def verdict_on(state: CoordinatorState, rank: int, now_ms: int):
    """The verdict from all signs of a rank, and from the contents of its bank."""
    record, status = state.records[rank], state.records[rank].status
    signs = Signs(
        rank=rank,
        ended=record.ended,
        ending=record.ending,
        heard_ms=record.heard_ms,
        channel_lost_ms=record.channel_lost_ms,
        # A rank that is alone compiles, which may take long and disturbs no other rank.
        stalled_ms=0 if status is None or status.mode is Mode.ALONE else status.stalled_ms,
        accused_by=record.accused_by,
        joining=record.is_loading and state.view.members[rank].state is RankState.ABSENT,
    )
    verdict = judge(now_ms, signs, state.config)
    reason = _disagreement(state, rank)
    if verdict.dead or not reason:
        return verdict
    return dataclasses.replace(verdict, dead=True, reason=reason)


def _disagreement(state: CoordinatorState, rank: int) -> str:
    """The reason why a live rank cannot be used, or ''. Fatal to that rank only."""
    status, change = state.records[rank].status, state.change
    if status is None:
        return ""
    if status.failure:
        return f"rank {rank} failed: {status.failure}"
    expected = None
    if change is not None and status.mode is Mode.READY and status.prepared == change.view.epoch:
        expected = change.plan.placement.slots[rank]
    elif status.mode is Mode.SERVING and status.epoch == state.view.epoch:
        expected = state.placement.slots[rank]
    if expected is None or holds(status.contents, expected):
        return ""
    if len(status.contents) == len(expected) and status.mode is Mode.READY:
        wrong = {e for held, e in zip(status.contents, expected, strict=True) if held != e}
        if wrong <= {EMPTY, *status.lost}:
            return ""  # its Status names the experts that it could not get: see shortages
    return f"rank {rank} holds experts {status.contents}, expected {expected}"


def _fence(state: CoordinatorState, rank: int, now_ms: int) -> CoordinatorState:
    incarnation = state.records[rank].incarnation
    return with_record(state, rank, fenced=incarnation, fenced_ms=now_ms, load=None, accused_by=())
