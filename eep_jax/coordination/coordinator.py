"""The supervisor's side of a change: `(state, event) -> (state, commands)`, pure.

Every event ends in the same few questions, asked in this order:
1. Who is dead?       `detector.judge` over all signs; dead ranks are fenced at once, for good.
2. Is a change due?   A death, a held step, a rank out of step, a joining rank that has loaded:
                      Prepare a new epoch. A death while a change is pending abandons it for a
                      later epoch.
3. Is it agreed?      All ranks of the pending epoch are READY with the right experts: Commit.
4. Who waits outside? Joining ranks receive a Load.
5. Is it calm?        Then `background` does work that is not urgent.
"""

import dataclasses

from eep_jax.config import ClusterConfig
from eep_jax.coordination import background
from eep_jax.coordination.changes import (
    certain_placement,
    commit_change,
    is_ready,
    lost_preparation,
    prepare_for,
    start_background,
    start_change,
    without_members,
)
from eep_jax.coordination.deaths import fence_dead, verdict_on
from eep_jax.coordination.loading import assign_loads, load_for
from eep_jax.coordination.protocol import (
    OUTSIDE,
    Commit,
    Fenced,
    Mode,
    Refused,
    StandBy,
    Status,
    Welcome,
)
from eep_jax.coordination.quiet import is_quiet, look
from eep_jax.coordination.records import replaced, send_to, want_resync, with_record
from eep_jax.coordination.shortages import forget_old, note_lost
from eep_jax.coordination.state import (
    Answer,
    Arrived,
    CoordinatorState,
    Disconnected,
    Ended,
    Ending,
    Kill,
    Measured,
    Note,
    RankRecord,
    ScaleTo,
    Tick,
    Unrecorded,
)
from eep_jax.membership import moves
from eep_jax.membership.view import RankState, View, empty_view
from eep_jax.placement.load import observe
from eep_jax.placement.placement import Placement, empty_placement, holds, missing_experts

OWN_PAUSE_MS = 1_000  # a longer gap between two events means that the supervisor itself slept


def initial_state(config: ClusterConfig, experts: int) -> CoordinatorState:
    """The state of the first supervisor of a run."""
    return CoordinatorState(
        config=config,
        view=empty_view(config.ranks),
        placement=empty_placement(experts, config.ranks, config.slots_per_rank),
        records=(RankRecord(),) * config.ranks,
    )


def restored_state(
    config: ClusterConfig,
    view: View,
    placement: Placement,
    epoch_tried: int,
    issued,
    now_ms: int,
    fenced=None,
    out=frozenset(),
) -> CoordinatorState:
    """The state of a restarted supervisor: the committed epoch and the newest incarnations.

    `issued[rank]` is the newest incarnation ever issued, `fenced[rank]` the newest that was judged
    dead, `view` holds the members, `out` the ranks that the operator took out. A member gets
    `restart_grace_ms` to reconnect before its silence counts.
    """
    since_ms = now_ms + config.restart_grace_ms
    fenced = fenced or [0] * config.ranks
    # A member that was judged dead stays dead; it also was where a newer process was admitted.
    members = [(rank, view.members[rank].incarnation) for rank in view.in_epoch]
    gone = [rank for rank, inc in members if issued[rank] > inc or fenced[rank] >= inc]
    view = without_members(view, gone)
    records = tuple(
        RankRecord(
            incarnation=issued[rank],
            fenced=max(fenced[rank], member.incarnation if not view.includes(rank) else 0),
            ended=issued[rank] == 0,
            heard_ms=since_ms,
            channel_lost_ms=since_ms,
        )
        for rank, member in enumerate(view.members)
    )
    return CoordinatorState(
        config=config,
        view=view,
        placement=placement.without_ranks(gone),
        records=records,
        epoch_tried=max(epoch_tried, view.epoch),
        out=frozenset(out),
        resync=f"ranks {gone} died before the supervisor restarted" if gone else "",
    )


def advance(state: CoordinatorState, event, now_ms: int) -> tuple[CoordinatorState, tuple]:
    """Applies one event and all that follows from it. A Tick comes several times a second."""
    before = _excuse_own_pause(state, now_ms)
    state, commands = _take(before, event, now_ms)
    if is_quiet(before, state, event, now_ms) and _goes_on(state, event.rank, now_ms):
        return _note_ready(state, event), commands
    state, more = _settle(state, now_ms)
    state = dataclasses.replace(state, quiet=look(state))
    return state, (*commands, *more)


def _goes_on(state: CoordinatorState, rank: int, now_ms: int) -> bool:
    """Whether a rank that just reported is alive, and can still prepare the pending change."""
    if verdict_on(state, rank, now_ms).dead:
        return False
    change, status = state.change, state.records[rank].status
    return change is None or not lost_preparation(status, change.view.epoch)


def _note_ready(state: CoordinatorState, status: Status) -> CoordinatorState:
    """Counts one more ready rank of a change that still waits for another."""
    change = state.change
    if change is None or status.rank in change.ready:
        return state
    if not is_ready(state.records[status.rank], change):
        return state
    ready = change.ready | {status.rank}
    return replaced(state, change=replaced(change, ready=ready))


def _excuse_own_pause(state: CoordinatorState, now_ms: int) -> CoordinatorState:
    """Does not count the time that the supervisor itself slept as silence of the ranks."""
    pause_ms = now_ms - (now_ms if state.advanced_ms is None else state.advanced_ms)
    if pause_ms or state.advanced_ms is None:
        state = dataclasses.replace(state, advanced_ms=now_ms)
    if pause_ms <= OWN_PAUSE_MS:
        return state
    for rank, record in enumerate(state.records):
        lost_ms = record.channel_lost_ms
        state = with_record(
            state,
            rank,
            heard_ms=record.heard_ms + pause_ms,
            channel_lost_ms=None if lost_ms is None else lost_ms + pause_ms,
        )
    return state


def _take(state: CoordinatorState, event, now_ms: int) -> tuple[CoordinatorState, tuple]:
    match event:
        case Arrived(rank=rank):
            return _arrived(state, rank, now_ms)
        case Unrecorded():
            return _on_unrecorded(state, event, now_ms)
        case Status():
            return _on_status(state, event, now_ms)
        case Disconnected(rank=rank, incarnation=incarnation):
            record = state.records[rank]
            if incarnation != record.incarnation or record.channel_lost_ms is not None:
                return state, ()
            return with_record(state, rank, channel_lost_ms=now_ms), ()
        case Ending(rank=rank, incarnation=incarnation):
            if incarnation != state.records[rank].incarnation:
                return state, ()
            return with_record(state, rank, ending=True), ()
        case Ended(rank=rank, incarnation=incarnation):
            if incarnation != state.records[rank].incarnation:
                return state, ()
            return with_record(state, rank, ended=True), ()
        case ScaleTo(out=out):
            if out == state.out:
                return state, ()
            return dataclasses.replace(state, out=out), (Note("scale", {"out": sorted(out)}),)
        case Measured(choices=choices):
            measured = observe(state.load.measured, choices, now_ms)
            load = dataclasses.replace(state.load, measured=measured)
            return dataclasses.replace(state, load=load), ()
        case Tick():
            return state, ()
    raise TypeError(f"unknown event of the coordinator: {event!r}")


def _arrived(state: CoordinatorState, rank: int, now_ms: int):
    record = state.records[rank]
    if not record.ended:
        if record.is_current:
            reason = f"rank {rank} is served by incarnation {record.incarnation}, which lives"
            return state, (Answer(Refused(reason=reason)),)
        kill = Kill(rank, record.incarnation, "a new incarnation waits for its place")
        reason = f"incarnation {record.incarnation} of rank {rank} must end first"
        return with_record(state, rank, killed=True), (kill, Answer(Refused(reason=reason)))
    if state.view.members[rank].state is not RankState.ABSENT:
        reason = f"the death of incarnation {record.incarnation} of rank {rank} is being settled"
        return state, (Answer(Refused(reason=reason)),)
    fresh = RankRecord(
        incarnation=record.incarnation + 1, fenced=record.incarnation, ended=False, heard_ms=now_ms
    )
    records = state.records[:rank] + (fresh,) + state.records[rank + 1 :]
    facts = {"rank": rank, "incarnation": fresh.incarnation}
    return dataclasses.replace(state, records=records), (
        Note("incarnation", facts),
        Answer(Welcome(incarnation=fresh.incarnation)),
    )


def _on_unrecorded(state: CoordinatorState, event: Unrecorded, now_ms: int):
    """Fences the process, whose epochs nobody knows, and makes its number the newest."""
    rank, known = event.rank, state.records[event.rank].incarnation
    if event.incarnation <= known:
        return state, ()
    # No incarnation is issued before the last one has ended.
    state, commands = fence_dead(with_record(state, rank, ended=True), now_ms)
    reason = (
        f"the journal is older than rank {rank}: it knows incarnation {known}, this process is "
        f"{event.incarnation}; it has to end, and a new process takes its place"
    )
    unknown = RankRecord(
        incarnation=event.incarnation,
        fenced=event.incarnation,
        fenced_ms=now_ms,
        heard_ms=now_ms,
        ended=False,
    )
    state = replaced(state, records=state.records[:rank] + (unknown,) + state.records[rank + 1 :])
    facts = {"rank": rank, "incarnation": event.incarnation}
    return state, (
        *commands,
        Note("incarnation", facts),
        Note("dead", facts | {"reason": reason}),
        Answer(Fenced(reason=reason)),
    )


def _on_status(state: CoordinatorState, status: Status, now_ms: int):
    rank, record = status.rank, state.records[status.rank]
    if status.incarnation != record.incarnation or not record.is_current:
        reason = (
            f"incarnation {status.incarnation} of rank {rank} is no longer a member; "
            "start a new process to return"
        )
        return state, (Answer(Fenced(reason=reason)),)
    if record.status is not None and status.sequence <= record.status.sequence:
        return state, ()
    state = with_record(state, rank, status=status, heard_ms=now_ms, channel_lost_ms=None)
    state = note_lost(state, status, now_ms)
    # A rank may know an epoch that a dead supervisor had tried.
    tried = max(state.epoch_tried, status.epoch, status.prepared)
    if tried != state.epoch_tried:
        state = dataclasses.replace(state, epoch_tried=tried)
    inside = state.view.includes(rank)
    if status.mode is Mode.HOLDING and inside and status.epoch == state.view.epoch:
        for accused in status.accused:
            by = {*state.records[accused].accused_by, rank}
            state = with_record(state, accused, accused_by=tuple(sorted(by)))
        if state.change is not None:
            return _put_in_step(state, status)
        reason = f"rank {rank} held a step" + (
            f" that timed out on ranks {list(status.accused)}" if status.accused else ""
        )
        return want_resync(state, reason), ()
    if status.mode in OUTSIDE and state.view.members[rank].state is RankState.ABSENT:
        view = moves.offer(state.view, rank, status.incarnation)
        first_ms = now_ms if state.first_offer_ms is None else state.first_offer_ms
        state = dataclasses.replace(state, view=view, first_offer_ms=first_ms)
        return state, (Note("offered", {"rank": rank, "incarnation": status.incarnation}),)
    return _put_in_step(state, status)


def _put_in_step(state: CoordinatorState, status: Status):
    """Answers a Status that is behind the agreement with what its rank has missed."""
    rank, change = status.rank, state.change
    if change is not None and change.includes(rank):
        if status.prepared < change.view.epoch:
            return state, (prepare_for(state, rank),)
        return state, ()
    if state.view.includes(rank):
        if status.epoch != state.view.epoch:
            if status.mode is Mode.READY and status.prepared == state.view.epoch:
                return state, (send_to(state, rank, Commit(epoch=state.view.epoch)),)
            return want_resync(state, f"rank {rank} is at epoch {status.epoch}"), ()
        if status.mode in (Mode.PREPARING, Mode.READY):
            return want_resync(state, f"rank {rank} prepared epoch {status.prepared}"), ()
        return state, background.fetches(state, only=rank)
    if status.epoch:  # it was drained, and the StandBy has not reached it
        return state, (send_to(state, rank, StandBy(epoch=state.epoch_tried)),)
    load = state.records[rank].load
    if status.mode in OUTSIDE and load is not None and not holds(status.contents, load.slots):
        # What it holds, and which ranks can be read, may have changed since the first Load.
        load = load_for(state, rank, load.slots)
        return with_record(state, rank, load=load), (send_to(state, rank, load),)
    return state, ()


def _settle(state: CoordinatorState, now_ms: int) -> tuple[CoordinatorState, tuple]:
    state, commands = fence_dead(forget_old(state, now_ms), now_ms)
    for step in (start_change, commit_change, assign_loads, start_background):
        state, more = step(state, now_ms)
        commands += more
    return state, commands


def missing(state: CoordinatorState) -> tuple[int, ...]:
    """Experts without a live replica in the committed epoch, for reports.

    While blocked, also those whose slots an abandoned plan may have overwritten.
    """
    placement = certain_placement(state, ()) if state.blocked else state.placement
    return missing_experts(placement, state.view.with_state(RankState.ACTIVE))
