"""Changes of epoch: members, moves, Prepare, and Commit once all ranks are ready."""

import dataclasses

from eep_jax.coordination import background
from eep_jax.coordination.loading import ready_to_join, supply_of, with_loads
from eep_jax.coordination.protocol import Commit, Mode, Prepare, StandBy, Status
from eep_jax.coordination.records import (
    handles_of,
    replaced,
    send_to,
    unsettled_places,
    want_resync,
)
from eep_jax.coordination.shortages import after_success, avoided, explain
from eep_jax.coordination.state import Change, CoordinatorState, Note, RankRecord, Send
from eep_jax.errors import CoverageLost
from eep_jax.membership import moves
from eep_jax.membership.view import RankState, View
from eep_jax.placement.placement import EMPTY, Placement
from eep_jax.placement.planner import Move, Plan, plan_repair


def start_change(state: CoordinatorState, now_ms: int) -> tuple[CoordinatorState, tuple]:
    """Prepares a new epoch if a member died, members are out of step, or joining ranks loaded."""
    if state.change is not None:
        reason = _why_hopeless(state, state.change)
        if not reason:
            return state, ()
        state = dataclasses.replace(state, change=None, dirty=unsettled_places(state))
        state = want_resync(state, reason)
    loaded = ready_to_join(state, now_ms)
    if state.view.with_state(RankState.SUSPECT) or state.resync or loaded:
        return _begin(state, loaded, now_ms)
    return state, ()


def _begin(state: CoordinatorState, joining, now_ms: int) -> tuple[CoordinatorState, tuple]:
    """Prepares the epoch without the suspects and with the given joining ranks."""
    suspects = state.view.with_state(RankState.SUSPECT)
    view = state.view
    for rank in suspects:
        view = moves.evict(view, rank)
    for rank in joining:
        view = moves.admit(view, rank)
    members = view.in_epoch
    if not members:
        return _block(state, members, "no rank is left")
    if any(state.records[rank].status is None for rank in members):
        return state, ()  # after a restart, first every member reports or is judged dead
    try:
        found, degrade = certain_placement(state, joining), state.config.policy == "degrade"
        supply, avoid = supply_of(state), avoided(state)
        plan = plan_repair(found, members, degrade=degrade, supply=supply, avoid=avoid)
    except CoverageLost as error:
        why = explain(state)
        return _block(state, members, f"{error}: {why}" if why else str(error))
    view = moves.at_epoch(state.view, view, state.epoch_tried + 1)
    dead = [f"rank {rank} is out" for rank in suspects]
    back = [f"rank {rank} comes in" for rank in joining]
    kind = "repair" if suspects else "admission" if joining else "resync"
    if state.view.epoch == 0:
        kind = "formation"
    change = Change(
        kind=kind,
        reason="; ".join([*dead, *back]) or state.resync,
        view=view,
        plan=plan,
        started_ms=now_ms,
        planned=kind == "admission" and not state.resync,
    )
    return _propose(state, change, suspects, joining)


def start_background(state: CoordinatorState, now_ms: int) -> tuple[CoordinatorState, tuple]:
    """Prepares the epoch of a background task once all of its experts are there."""
    state, commands, task = background.advance(state, now_ms)
    if task is None:
        return state, commands
    view = state.view
    for rank in task.leaving:
        view = moves.stand_by(view, rank)
    change = Change(
        kind=task.kind,
        reason=task.reason,
        view=moves.at_epoch(state.view, view, state.epoch_tried + 1),
        # All experts were fetched before: nothing is left to move or to rewrite.
        plan=Plan(placement=task.plan.placement, dropped=task.plan.dropped),
        started_ms=now_ms,
        leaving=task.leaving,
        fetched=task.plan.moves,
        planned=True,
    )
    state, more = _propose(background.with_background(state, task=None), change)
    return state, (*commands, *more)


def _propose(
    state: CoordinatorState, change: Change, evicted=(), admitted=()
) -> tuple[CoordinatorState, tuple]:
    epoch = change.view.epoch
    state = dataclasses.replace(state, change=change, epoch_tried=epoch, resync="", blocked="")
    facts = {
        "change": change.kind,
        "epoch": epoch,
        "reason": change.reason,
        "evicted": list(evicted),
        "admitted": list(admitted),
        "moves": len(change.plan.moves),
    }
    common = _prepare_without_moves(state)
    sends = tuple(prepare_for(state, rank, common) for rank in change.takes_part)
    # The record comes first: a restarted supervisor must not reuse this epoch for another change.
    return state, (Note("prepare", facts), *sends)


def prepare_for(state: CoordinatorState, rank: int, common: Prepare | None = None) -> Send:
    """The Prepare of the pending change for one rank. `common` is the part without its moves."""
    common = common or _prepare_without_moves(state)
    moves_of_rank = state.change.plan.moves_of(rank)
    # Ranks without moves get the same object, so that the supervisor encodes it once.
    message = dataclasses.replace(common, moves=moves_of_rank) if moves_of_rank else common
    return send_to(state, rank, message)


def _prepare_without_moves(state: CoordinatorState) -> Prepare:
    change = state.change
    return Prepare(
        epoch=change.view.epoch,
        view=change.view,
        placement=change.plan.placement,
        moves=(),
        handles=handles_of(state, change.view.in_epoch),
        reason=change.reason,
        planned=change.planned,
    )


def certain_placement(state: CoordinatorState, joining) -> Placement:
    """The wanted placement, reduced to what members and these joining ranks certainly hold."""
    found = with_loads(state.placement, state, joining)
    wrong = {
        (rank, slot)
        for rank in (*state.view.in_epoch, *joining)
        if (status := state.records[rank].status) is not None and status.contents
        for slot, expert in enumerate(found.slots[rank])
        if expert != EMPTY and status.contents[slot] != expert
    }
    return found.without(state.dirty | wrong)


def commit_change(state: CoordinatorState, now_ms: int) -> tuple[CoordinatorState, tuple]:
    """Commits the pending epoch if all participating ranks are ready."""
    change = state.change
    if change is None:
        return state, ()
    ready = frozenset(r for r in change.takes_part if is_ready(state.records[r], change))
    if ready != frozenset(change.takes_part):
        return dataclasses.replace(state, change=dataclasses.replace(change, ready=ready)), ()
    # Ranks outside of both epochs may have come or gone since the Prepare.
    settled = {*state.view.in_epoch, *change.view.in_epoch}
    members = tuple(
        change.view.members[r] if r in settled else state.view.members[r] for r in state.view.ranks
    )
    inside = change.view.in_epoch
    records = tuple(
        replaced(record, accused_by=(), load=None if change.view.includes(r) else record.load)
        for r, record in enumerate(state.records)
    )
    state = dataclasses.replace(
        state,
        view=dataclasses.replace(change.view, members=members),
        placement=change.plan.placement,
        records=records,
        change=None,
        dirty=frozenset(),
        dropped=change.plan.dropped,
        shortages=after_success(state.shortages),
    )
    facts = {
        "change": change.kind,
        "epoch": change.view.epoch,
        "reason": change.reason,
        "members": {r: change.view.members[r].incarnation for r in inside},
        # Other ranks: the newest fenced incarnation; a joining process does not count.
        "incarnations": [
            change.view.members[r].incarnation if change.view.includes(r) else record.fenced
            for r, record in enumerate(records)
        ],
        "slots": [list(row) for row in change.plan.placement.slots],
        "moves": [_move_facts(move) for move in (*change.fetched, *change.plan.moves)],
        "dropped": list(change.plan.dropped),
        "drained": list(change.leaving),
        "prepare_ms": now_ms - change.started_ms,
    }
    commit, stand_by = Commit(epoch=change.view.epoch), StandBy(epoch=change.view.epoch)
    sends = tuple(send_to(state, rank, commit) for rank in inside)
    sends += tuple(send_to(state, rank, stand_by) for rank in change.leaving)
    # The record comes first: a restarted supervisor must know every epoch that a rank serves.
    return state, (Note("commit", facts), *sends)


def is_ready(record: RankRecord, change: Change) -> bool:
    """Whether a rank has prepared this change."""
    status = record.status
    return (
        record.is_current
        and status is not None
        and status.mode is Mode.READY
        and status.prepared == change.view.epoch
        and not status.lost
    )


def _why_hopeless(state: CoordinatorState, change: Change) -> str:
    """The reason why a pending change can never be committed, or ''."""
    epoch, members = change.view.epoch, change.takes_part
    gone = [r for r in members if not state.records[r].is_current]
    if gone:
        return f"ranks {gone} died while epoch {epoch} was prepared"
    lost = [r for r in members if lost_preparation(state.records[r].status, epoch)]
    short = {r: sorted(found) for r in lost if (found := state.records[r].status.lost)}
    if short:
        return "; ".join(f"rank {rank} could not get experts {e}" for rank, e in short.items())
    return f"ranks {lost} cannot prepare epoch {epoch} any more" if lost else ""


def lost_preparation(status: Status, epoch: int) -> bool:
    """Whether the rank cannot become ready for `epoch` any more.

    A rank ignores every Prepare older than its newest, which a dead supervisor may have sent.
    """
    at_work = status.mode is Mode.PREPARING or (status.mode is Mode.READY and not status.lost)
    return status.prepared > epoch or (status.prepared == epoch and not at_work)


def _block(state: CoordinatorState, members, reason: str):
    """Blocks the cluster: these members cover too few experts, so no rank steps until one returns.

    The dead leave the view at once: otherwise no new process could take their ranks.
    """
    if state.view.epoch == 0 and not members:
        return dataclasses.replace(state, resync=""), ()  # no rank has come yet
    suspects, news = state.view.with_state(RankState.SUSPECT), state.blocked != reason
    state = dataclasses.replace(
        state,
        view=without_members(state.view, suspects),
        placement=state.placement.without_ranks(suspects),
        blocked=reason,
    )
    facts = {"reason": reason, "members": list(members)}
    return state, (Note("coverage_lost", facts),) if news else ()


def without_members(view: View, ranks) -> View:
    """The view without these members, under the same epoch, in which no rank steps any more."""
    for rank in ranks:
        if view.members[rank].state is RankState.ACTIVE:
            view = moves.suspect(view, rank)
        view = dataclasses.replace(moves.evict(view, rank), epoch=view.epoch)
    return view


def _move_facts(move: Move) -> dict:
    sources = [source.kind.value for source in move.sources]
    return {"rank": move.rank, "slot": move.slot, "expert": move.expert, "sources": sources}
