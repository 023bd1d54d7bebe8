"""The supervisor's side of a change: `(state, event) -> (state, commands)`, pure.

Every event ends in the same few questions, asked in this order:
1. Who is dead?       `detector.judge` over all signs; the dead are fenced at once and for good.
2. Is a change due?   A death, a held step, a rank out of step, a joining rank that has loaded:
                      Prepare a new epoch. A death while a change is pending abandons it for a
                      later epoch.
3. Is it agreed?      All ranks of the pending epoch are READY with the right experts: Commit.
4. Who waits outside? Joining ranks are told what to Load.
5. Is it calm?        Then `background` does what need not be done at once.
"""

import dataclasses

from eep_jax.coordination import background
from eep_jax.coordination.protocol import (
    Commit,
    Fenced,
    Load,
    Mode,
    Prepare,
    Refused,
    StandBy,
    Status,
    Welcome,
)
from eep_jax.coordination.quiet import is_quiet, look
from eep_jax.coordination.state import (
    Answer,
    Arrived,
    Change,
    CoordinatorOptions,
    CoordinatorState,
    Disconnected,
    Ended,
    Ending,
    Kill,
    Measured,
    Note,
    RankRecord,
    ScaleTo,
    Send,
    Tick,
)
from eep_jax.errors import CoverageLost
from eep_jax.membership import moves
from eep_jax.membership.detector import Signs, judge
from eep_jax.membership.view import RankState, View, empty_view
from eep_jax.placement.load import observe
from eep_jax.placement.placement import (
    EMPTY,
    Placement,
    empty_placement,
    holds,
    missing_experts,
)
from eep_jax.placement.planner import (
    Move,
    Plan,
    initial_placement,
    plan_admission,
    plan_repair,
)
from eep_jax.placement.sources import SourceKind, Supply, median_rates, rank_sources

# A process in one of these modes that is no member wants to become one. The last two are left over
# from a change that was abandoned, or that a supervisor which died had begun.
_OUTSIDE = (Mode.OFFERED, Mode.STANDBY, Mode.PREPARING, Mode.READY)


def initial_state(options: CoordinatorOptions) -> CoordinatorState:
    """The state of a supervisor that was never started before."""
    return CoordinatorState(
        options=options,
        view=empty_view(options.ranks),
        placement=empty_placement(options.experts, options.ranks, options.slots_per_rank),
        records=(RankRecord(),) * options.ranks,
    )


def restored_state(
    options: CoordinatorOptions,
    view: View,
    placement: Placement,
    epoch_tried: int,
    issued,
    now_ms: int,
    fenced=None,
    out=frozenset(),
) -> CoordinatorState:
    """The state of a restarted supervisor: the committed epoch, and who was last let in.

    `issued[rank]` is the newest incarnation ever given out, `fenced[rank]` the newest that was
    judged dead, `view` names the members, `out` the ranks that the operator took out. A member gets
    `restart_grace_ms` to come back before its silence counts.
    """
    since_ms = now_ms + options.restart_grace_ms
    fenced = fenced or [0] * options.ranks
    # A member that was judged dead stays so; where a newer process was let in, it had been.
    members = [(rank, view.members[rank].incarnation) for rank in view.in_epoch]
    gone = [rank for rank, inc in members if issued[rank] > inc or fenced[rank] >= inc]
    view = _without(view, gone)
    records = tuple(
        RankRecord(
            incarnation=issued[rank],
            fenced=max(fenced[rank], member.incarnation if rank not in view.in_epoch else 0),
            ended=issued[rank] == 0,
            heard_ms=since_ms,
            channel_lost_ms=since_ms,
        )
        for rank, member in enumerate(view.members)
    )
    return CoordinatorState(
        options=options,
        view=view,
        placement=placement.without_ranks(gone),
        records=records,
        epoch_tried=max(epoch_tried, view.epoch),
        out=frozenset(out),
        resync=f"ranks {gone} died before the supervisor restarted" if gone else "",
    )


def advance(state: CoordinatorState, event, now_ms: int) -> tuple[CoordinatorState, tuple]:
    """Feeds one event and settles all that follows from it. A Tick comes several times a second."""
    before = _excuse_own_pause(state, now_ms)
    state, commands = _take(before, event, now_ms)
    if is_quiet(before, state, event, now_ms) and _goes_on(state, event.rank, now_ms):
        return _note_ready(state, event), commands
    state, more = _settle(state, now_ms)
    state = dataclasses.replace(state, quiet=look(state))
    return state, (*commands, *more)


def _goes_on(state: CoordinatorState, rank: int, now_ms: int) -> bool:
    """Whether a rank that just reported is well, and can still prepare what is pending."""
    if _verdict(state, rank, now_ms).dead:
        return False
    change, status = state.change, state.records[rank].status
    return change is None or not _lost_preparation(status, change.view.epoch)


def _note_ready(state: CoordinatorState, status: Status) -> CoordinatorState:
    """One rank more is ready; another one is not."""
    change = state.change
    if change is None or status.rank in change.ready:
        return state
    if not _is_ready(state.records[status.rank], change):
        return state
    ready = change.ready | {status.rank}
    return dataclasses.replace(state, change=dataclasses.replace(change, ready=ready))


def _excuse_own_pause(state: CoordinatorState, now_ms: int) -> CoordinatorState:
    """A supervisor that slept heard nobody: no rank is to blame for the time of the sleep."""
    pause_ms = now_ms - (now_ms if state.advanced_ms is None else state.advanced_ms)
    if pause_ms or state.advanced_ms is None:
        state = dataclasses.replace(state, advanced_ms=now_ms)
    if pause_ms <= state.options.own_pause_ms:
        return state
    for rank, record in enumerate(state.records):
        lost_ms = record.channel_lost_ms
        state = _with(
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
        case Status():
            return _heard(state, event, now_ms)
        case Disconnected(rank=rank, incarnation=incarnation):
            record = state.records[rank]
            if incarnation != record.incarnation or record.channel_lost_ms is not None:
                return state, ()
            return _with(state, rank, channel_lost_ms=now_ms), ()
        case Ending(rank=rank, incarnation=incarnation):
            if incarnation != state.records[rank].incarnation:
                return state, ()
            return _with(state, rank, ending=True), ()
        case Ended(rank=rank, incarnation=incarnation):
            if incarnation != state.records[rank].incarnation:
                return state, ()
            return _with(state, rank, ended=True), ()
        case ScaleTo(out=out):
            if out == state.out:
                return state, ()
            return dataclasses.replace(state, out=out), (Note("scale", {"out": sorted(out)}),)
        case Measured(choices=choices):
            return dataclasses.replace(state, load=observe(state.load, choices, now_ms)), ()
        case Tick():
            return state, ()
    raise TypeError(f"{event!r} is no event of the coordinator")


def _arrived(state: CoordinatorState, rank: int, now_ms: int):
    record = state.records[rank]
    if not record.ended:
        if record.believed:
            reason = f"rank {rank} is served by incarnation {record.incarnation}, which lives"
            return state, (Answer(Refused(reason=reason)),)
        kill = Kill(rank, record.incarnation, "a new incarnation waits for its place")
        reason = f"incarnation {record.incarnation} of rank {rank} must end first"
        return _with(state, rank, killed=True), (kill, Answer(Refused(reason=reason)))
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


def _heard(state: CoordinatorState, status: Status, now_ms: int):
    rank, record = status.rank, state.records[status.rank]
    if status.incarnation != record.incarnation or not record.believed:
        reason = (
            f"incarnation {status.incarnation} of rank {rank} is no longer a member; "
            "start a new process to return"
        )
        return state, (Answer(Fenced(reason=reason)),)
    if record.status is not None and status.sequence <= record.status.sequence:
        return state, ()
    state = _with(state, rank, status=status, heard_ms=now_ms, channel_lost_ms=None)
    # A rank may know of an epoch that a supervisor which died had tried.
    tried = max(state.epoch_tried, status.epoch, status.prepared)
    if tried != state.epoch_tried:
        state = dataclasses.replace(state, epoch_tried=tried)
    inside = rank in state.view.in_epoch
    if status.mode is Mode.HOLDING and inside and status.epoch == state.view.epoch:
        for accused in status.accused:
            by = {*state.records[accused].accused_by, rank}
            state = _with(state, accused, accused_by=tuple(sorted(by)))
        if state.change is not None:
            return _put_in_step(state, status)
        reason = f"rank {rank} held a step" + (
            f" that timed out on ranks {list(status.accused)}" if status.accused else ""
        )
        return _want_resync(state, reason), ()
    if status.mode in _OUTSIDE and state.view.members[rank].state is RankState.ABSENT:
        view = moves.offer(state.view, rank, status.incarnation)
        first_ms = now_ms if state.first_offer_ms is None else state.first_offer_ms
        state = dataclasses.replace(state, view=view, first_offer_ms=first_ms)
        return state, (Note("offered", {"rank": rank, "incarnation": status.incarnation}),)
    return _put_in_step(state, status)


def _put_in_step(state: CoordinatorState, status: Status):
    """Answers a Status that is behind the agreement with what its rank has missed."""
    rank, change = status.rank, state.change
    if change is not None and rank in change.takes_part:
        if status.prepared < change.view.epoch:
            return state, (_prepare_for(state, rank),)
        return state, ()
    if rank in state.view.in_epoch:
        if status.epoch != state.view.epoch:
            if status.mode is Mode.READY and status.prepared == state.view.epoch:
                return state, (_send(state, rank, Commit(epoch=state.view.epoch)),)
            return _want_resync(state, f"rank {rank} is at epoch {status.epoch}"), ()
        if status.mode in (Mode.PREPARING, Mode.READY):
            return _want_resync(state, f"rank {rank} prepared epoch {status.prepared}"), ()
        return state, background.fetches(state, only=rank)
    if status.epoch:  # it was drained, and does not know so yet
        return state, (_send(state, rank, StandBy(epoch=state.epoch_tried)),)
    load = state.records[rank].load
    if status.mode in _OUTSIDE and load is not None and not holds(status.contents, load.slots):
        # What it holds, and who can be read from, may have changed since it was first told.
        load = _load(state, rank, load.slots)
        return _with(state, rank, load=load), (_send(state, rank, load),)
    return state, ()


def _settle(state: CoordinatorState, now_ms: int) -> tuple[CoordinatorState, tuple]:
    state, commands = _bury(state, now_ms)
    for step in (_start_change, _commit, _assign_loads, _start_background):
        state, more = step(state, now_ms)
        commands += more
    return state, commands


def _bury(state: CoordinatorState, now_ms: int) -> tuple[CoordinatorState, tuple]:
    commands: tuple = ()
    for rank, member in enumerate(state.view.members):
        record = state.records[rank]
        if record.believed:
            verdict = _verdict(state, rank, now_ms)
            if not verdict.dead:
                continue
            facts = {"rank": rank, "incarnation": record.incarnation, "reason": verdict.reason}
            state = _fence(state, rank, now_ms)
            commands += (Note("dead", facts), _send(state, rank, Fenced(reason=verdict.reason)))
            if member.state is RankState.ACTIVE:
                state = dataclasses.replace(state, view=moves.suspect(state.view, rank))
            elif member.state is RankState.JOINING:
                state = dataclasses.replace(state, view=moves.withdraw(state.view, rank))
            continue
        fenced_for_ms = now_ms - record.fenced_ms
        alive = not record.ended and not record.killed
        if alive and fenced_for_ms > state.options.fenced_grace_ms:
            kill = Kill(rank, record.incarnation, "it was evicted and did not end itself")
            state, commands = _with(state, rank, killed=True), (*commands, kill)
    return state, commands


def _verdict(state: CoordinatorState, rank: int, now_ms: int):
    record, status = state.records[rank], state.records[rank].status
    signs = Signs(
        rank=rank,
        ended=record.ended,
        ending=record.ending,
        heard_ms=record.heard_ms,
        channel_lost_ms=record.channel_lost_ms,
        # A rank that is alone compiles, which may take long and disturbs nobody.
        stalled_ms=0 if status is None or status.mode is Mode.ALONE else status.stalled_ms,
        accused_by=record.accused_by,
    )
    verdict = judge(now_ms, signs, state.options.detector)
    reason = _disagreement(state, rank)
    if verdict.dead or not reason:
        return verdict
    return dataclasses.replace(verdict, dead=True, reason=reason)


def _disagreement(state: CoordinatorState, rank: int) -> str:
    """Why a rank cannot be used though it lives, or ''. Fatal to that rank alone."""
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
    return f"rank {rank} holds experts {status.contents}, its placement says {expected}"


def _fence(state: CoordinatorState, rank: int, now_ms: int) -> CoordinatorState:
    incarnation = state.records[rank].incarnation
    return _with(state, rank, fenced=incarnation, fenced_ms=now_ms, load=None, accused_by=())


def _start_change(state: CoordinatorState, now_ms: int) -> tuple[CoordinatorState, tuple]:
    """Prepares a new epoch if a member died, members are out of step, or joining ranks loaded."""
    if state.change is not None:
        reason = _why_hopeless(state, state.change)
        if not reason:
            return state, ()
        state = dataclasses.replace(state, change=None, dirty=_unsettled(state))
        state = _want_resync(state, reason)
    loaded = _loaded(state, now_ms)
    if state.view.with_state(RankState.SUSPECT) or state.resync or loaded:
        return _begin(state, loaded, now_ms)
    return state, ()


def _why_hopeless(state: CoordinatorState, change: Change) -> str:
    """Why a pending change can never be committed, or ''."""
    epoch, members = change.view.epoch, change.takes_part
    gone = [r for r in members if not state.records[r].believed]
    if gone:
        return f"ranks {gone} died while epoch {epoch} was prepared"
    lost = [r for r in members if _lost_preparation(state.records[r].status, epoch)]
    return f"ranks {lost} cannot prepare epoch {epoch} any more" if lost else ""


def _lost_preparation(status: Status, epoch: int) -> bool:
    """A rank listens to no Prepare older than its newest, which a dead supervisor may have sent."""
    at_work = status.mode in (Mode.PREPARING, Mode.READY)
    return status.prepared > epoch or (status.prepared == epoch and not at_work)


def _unsettled(state: CoordinatorState) -> frozenset[tuple[int, int]]:
    """Places that a pending or an abandoned plan may be writing."""
    moves_pending = state.change.plan.moves if state.change else ()
    return state.dirty | {(move.rank, move.slot) for move in moves_pending}


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
        return state, ()  # a restarted supervisor first hears from all, or judges them dead
    try:
        found, degrade = _found(state, joining), state.options.degrade
        plan = plan_repair(found, members, degrade=degrade, supply=_supply(state))
    except CoverageLost as error:
        return _block(state, members, str(error))
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


def _start_background(state: CoordinatorState, now_ms: int) -> tuple[CoordinatorState, tuple]:
    """Prepares the epoch of a background task once all its experts are there."""
    state, commands, task = background.advance(state, _supply(state), now_ms)
    if task is None:
        return state, commands
    view = state.view
    for rank in task.leaving:
        view = moves.stand_by(view, rank)
    change = Change(
        kind=task.kind,
        reason=task.reason,
        view=moves.at_epoch(state.view, view, state.epoch_tried + 1),
        # What was fetched is there: nothing is left to move, and nothing to write anew.
        plan=Plan(placement=task.plan.placement, dropped=task.plan.dropped),
        started_ms=now_ms,
        leaving=task.leaving,
        fetched=task.plan.moves,
        planned=True,
    )
    state, more = _propose(dataclasses.replace(state, background=None), change)
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
    handles = _handles(state, change.view.in_epoch)  # one for all: it is encoded once
    sends = tuple(_prepare_for(state, rank, handles) for rank in change.takes_part)
    # The record comes first: a restarted supervisor must not use this epoch for another change.
    return state, (Note("prepare", facts), *sends)


def _found(state: CoordinatorState, joining) -> Placement:
    """What the members and these joining ranks hold for certain, as far as it is wanted there."""
    found = _with_loads(state.placement, state, joining)
    wrong = {
        (rank, slot)
        for rank in (*state.view.in_epoch, *joining)
        if (status := state.records[rank].status) is not None and status.contents
        for slot, expert in enumerate(found.slots[rank])
        if expert != EMPTY and status.contents[slot] != expert
    }
    return found.without(state.dirty | wrong)


def _with_loads(placement: Placement, state: CoordinatorState, joining) -> Placement:
    for rank in joining:
        for slot, expert in enumerate(state.records[rank].load.slots):
            placement = placement.with_expert(rank, slot, expert)
    return placement


def _block(state: CoordinatorState, members, reason: str):
    """No epoch can be made of these members: nobody steps until somebody comes back.

    The dead leave at once, for else no new process could take their ranks and end this.
    """
    if state.view.epoch == 0 and not members:
        return dataclasses.replace(state, resync=""), ()  # nobody has come yet
    suspects, news = state.view.with_state(RankState.SUSPECT), state.blocked != reason
    state = dataclasses.replace(
        state,
        view=_without(state.view, suspects),
        placement=state.placement.without_ranks(suspects),
        blocked=reason,
    )
    facts = {"reason": reason, "members": list(members)}
    return state, (Note("coverage_lost", facts),) if news else ()


def _without(view: View, ranks) -> View:
    """The view without these members, under the same epoch: none can be stepped in any more."""
    for rank in ranks:
        if view.members[rank].state is RankState.ACTIVE:
            view = moves.suspect(view, rank)
        view = dataclasses.replace(moves.evict(view, rank), epoch=view.epoch)
    return view


def _commit(state: CoordinatorState, now_ms: int) -> tuple[CoordinatorState, tuple]:
    change = state.change
    if change is None:
        return state, ()
    ready = frozenset(r for r in change.takes_part if _is_ready(state.records[r], change))
    if ready != frozenset(change.takes_part):
        return dataclasses.replace(state, change=dataclasses.replace(change, ready=ready)), ()
    # Ranks outside of both epochs may have come or gone since the Prepare.
    settled = {*state.view.in_epoch, *change.view.in_epoch}
    members = tuple(
        change.view.members[r] if r in settled else state.view.members[r] for r in state.view.ranks
    )
    inside = change.view.in_epoch
    records = tuple(
        dataclasses.replace(record, accused_by=(), load=None if r in inside else record.load)
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
    )
    facts = {
        "change": change.kind,
        "epoch": change.view.epoch,
        "reason": change.reason,
        "members": {r: change.view.members[r].incarnation for r in inside},
        # Of the others, the newest that is fenced: a joining process is not.
        "incarnations": [
            change.view.members[r].incarnation if r in inside else record.fenced
            for r, record in enumerate(records)
        ],
        "slots": [list(row) for row in change.plan.placement.slots],
        "moves": [_move_facts(move) for move in (*change.fetched, *change.plan.moves)],
        "dropped": list(change.plan.dropped),
        "drained": list(change.leaving),
        "prepare_ms": now_ms - change.started_ms,
    }
    commit, stand_by = Commit(epoch=change.view.epoch), StandBy(epoch=change.view.epoch)
    sends = tuple(_send(state, rank, commit) for rank in inside)
    sends += tuple(_send(state, rank, stand_by) for rank in change.leaving)
    # The record comes first: an epoch that any rank serves is one that a restart knows of.
    return state, (Note("commit", facts), *sends)


def _is_ready(record: RankRecord, change: Change) -> bool:
    status = record.status
    return (
        record.believed
        and status is not None
        and status.mode is Mode.READY
        and status.prepared == change.view.epoch
    )


def _assign_loads(state: CoordinatorState, now_ms: int) -> tuple[CoordinatorState, tuple]:
    """Tells every joining rank that has no task yet which experts to load."""
    joining, commands = state.view.with_state(RankState.JOINING), ()
    waiting = tuple(
        r
        for r in joining
        if (record := state.records[r]).load is None
        and r not in state.out
        and record.status.epoch == 0  # else it was drained, and must hear so first
    )
    if not waiting:
        return state, commands
    loading = tuple(r for r in joining if state.records[r].load is not None)
    wanted = _wanted(state, waiting, loading)
    for rank in waiting:
        load = _load(state, rank, wanted.slots[rank])
        state = _with(state, rank, load=load)
        commands += (_send(state, rank, load),)
    return state, commands


def _wanted(state: CoordinatorState, waiting, loading) -> Placement:
    """The placement with what these joining ranks shall hold."""
    options = state.options
    if state.view.epoch == 0:
        return initial_placement(
            options.experts, options.ranks, options.slots_per_rank, options.redundancy
        )
    base = _with_loads(state.placement, state, loading)
    counted = [r for r in (*state.view.in_epoch, *loading) if state.records[r].believed]
    held = {rank: state.records[rank].status.contents for rank in waiting}
    return plan_admission(base, counted, waiting, options.redundancy, held).placement


def _load(state: CoordinatorState, rank: int, slots: tuple[int, ...]) -> Load:
    """What brings a joining rank from what it holds to `slots`, read from members only."""
    members = tuple(r for r in state.view.in_epoch if state.records[r].believed)
    away = set(state.view.ranks) - set(members)
    readable = state.placement.without_ranks(away).without(_unsettled(state))
    held, supply = state.records[rank].status.contents, _supply(state)
    planned = tuple(
        Move(rank, slot, expert, rank_sources(readable, rank, expert, supply))
        for slot, expert in enumerate(slots)
        if expert != EMPTY and held[slot : slot + 1] != (expert,)
    )
    return Load(slots=slots, moves=planned, handles=_handles(state, members))


def _supply(state: CoordinatorState) -> Supply:
    """What live ranks say that they back up, and what they measured."""
    alive = {
        rank: record.status
        for rank, record in enumerate(state.records)
        if record.believed and not record.ending and record.status is not None
    }
    allowed = state.options.sources
    if state.view.epoch == 0:
        allowed = tuple(SourceKind)  # the first experts of all come from the checkpoint
    return Supply(
        backups={rank: s.backup for rank, s in alive.items() if s.backup.experts},
        rates=median_rates(s.rates for s in alive.values()) if state.options.measured else {},
        allowed=allowed,
    )


def _loaded(state: CoordinatorState, now_ms: int) -> tuple[int, ...]:
    """Joining ranks that can be admitted. The first epoch waits for all ranks, but not forever."""
    joining = state.view.with_state(RankState.JOINING)
    loaded = tuple(r for r in joining if r not in state.out and _has_loaded(state.records[r]))
    if state.view.epoch == 0 and len(loaded) < state.options.ranks:
        waited_ms = now_ms - (now_ms if state.first_offer_ms is None else state.first_offer_ms)
        return loaded if waited_ms >= state.options.formation_ms else ()
    return loaded


def _has_loaded(record: RankRecord) -> bool:
    status, load = record.status, record.load
    return (
        load is not None
        and status is not None
        and status.mode in _OUTSIDE
        and status.epoch == 0
        and holds(status.contents, load.slots)
    )


def _prepare_for(state: CoordinatorState, rank: int, handles: dict[int, str] | None = None) -> Send:
    change = state.change
    prepare = Prepare(
        epoch=change.view.epoch,
        view=change.view,
        placement=change.plan.placement,
        moves=change.plan.moves_of(rank),
        handles=_handles(state, change.view.in_epoch) if handles is None else handles,
        reason=change.reason,
        planned=change.planned,
    )
    return _send(state, rank, prepare)


def _handles(state: CoordinatorState, ranks) -> dict[int, str]:
    found = {r: state.records[r].status for r in ranks}
    return {r: status.handle for r, status in found.items() if status is not None}


def _move_facts(move: Move) -> dict:
    sources = [source.kind.value for source in move.sources]
    return {"rank": move.rank, "slot": move.slot, "expert": move.expert, "sources": sources}


def _want_resync(state: CoordinatorState, reason: str) -> CoordinatorState:
    return dataclasses.replace(state, resync=state.resync or reason)


def _send(state: CoordinatorState, rank: int, message) -> Send:
    return Send(rank, state.records[rank].incarnation, message)


def _with(state: CoordinatorState, rank: int, **changes) -> CoordinatorState:
    record = dataclasses.replace(state.records[rank], **changes)
    records = state.records[:rank] + (record,) + state.records[rank + 1 :]
    return dataclasses.replace(state, records=records)


def missing(state: CoordinatorState) -> tuple[int, ...]:
    """Experts without a live replica in the committed epoch, for reports."""
    return missing_experts(state.placement, state.view.with_state(RankState.ACTIVE))
