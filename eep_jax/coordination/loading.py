"""Experts that joining ranks load before they are admitted, and the sources to read from."""

from eep_jax.config import SOURCES
from eep_jax.coordination.protocol import OUTSIDE, Load
from eep_jax.coordination.records import handles_of, send_to, unsettled_places, with_record
from eep_jax.coordination.shortages import avoided
from eep_jax.coordination.state import CoordinatorState, RankRecord
from eep_jax.membership.view import RankState
from eep_jax.placement.placement import EMPTY, Placement, holds
from eep_jax.placement.planner import Move, initial_placement, plan_admission
from eep_jax.placement.sources import SourceKind, Supply, median_rates, rank_sources


def assign_loads(state: CoordinatorState, now_ms: int) -> tuple[CoordinatorState, tuple]:
    """Sends a Load to every joining rank that has none yet."""
    joining, commands = state.view.with_state(RankState.JOINING), ()
    waiting = tuple(
        r
        for r in joining
        if (record := state.records[r]).load is None
        and r not in state.out
        and record.status.epoch == 0  # otherwise it was drained, and needs its StandBy first
    )
    if not waiting:
        return state, commands
    loading = tuple(r for r in joining if state.records[r].load is not None)
    wanted = _wanted(state, waiting, loading)
    for rank in waiting:
        load = load_for(state, rank, wanted.slots[rank])
        state = with_record(state, rank, load=load)
        commands += (send_to(state, rank, load),)
    return state, commands


def _wanted(state: CoordinatorState, waiting, loading) -> Placement:
    """The placement with the experts that these joining ranks shall hold."""
    config = state.config
    if state.view.epoch == 0:
        experts = state.placement.experts
        return initial_placement(experts, config.ranks, config.slots_per_rank, config.redundancy)
    base = with_loads(state.placement, state, loading)
    counted = [r for r in (*state.view.in_epoch, *loading) if state.records[r].is_current]
    held = {rank: state.records[rank].status.contents for rank in waiting}
    avoid = avoided(state)
    return plan_admission(base, counted, waiting, config.redundancy, held, avoid).placement


def load_for(state: CoordinatorState, rank: int, slots: tuple[int, ...]) -> Load:
    """The Load that fills a joining rank's bank to `slots`; it reads from members only."""
    members = tuple(r for r in state.view.in_epoch if state.records[r].is_current)
    away = set(state.view.ranks) - set(members)
    readable = state.placement.without_ranks(away).without(unsettled_places(state))
    held, supply = state.records[rank].status.contents, supply_of(state)
    planned = tuple(
        Move(rank, slot, expert, rank_sources(readable, rank, expert, supply))
        for slot, expert in enumerate(slots)
        if expert != EMPTY and held[slot : slot + 1] != (expert,)
    )
    return Load(slots=slots, moves=planned, handles=handles_of(state, members))


def supply_of(state: CoordinatorState) -> Supply:
    """Backups and measured rates that live ranks reported, and the sources that are allowed."""
    alive = {
        rank: record.status
        for rank, record in enumerate(state.records)
        if record.is_current and not record.ending and record.status is not None
    }
    # Before the first epoch there is only the checkpoint, whatever is allowed later.
    allowed = tuple(map(SourceKind, state.config.sources if state.view.epoch else SOURCES))
    measured = state.config.source_order == "measured"
    return Supply(
        backups={rank: s.backup for rank, s in alive.items() if s.backup.experts},
        rates=median_rates(s.rates for s in alive.values()) if measured else {},
        allowed=allowed,
    )


def ready_to_join(state: CoordinatorState, now_ms: int) -> tuple[int, ...]:
    """Joining ranks to admit. The first epoch waits `formation_ms` for all ranks."""
    joining = state.view.with_state(RankState.JOINING)
    loaded = tuple(r for r in joining if r not in state.out and _has_loaded(state.records[r]))
    if state.view.epoch == 0 and len(loaded) < state.config.ranks:
        waited_ms = now_ms - (now_ms if state.first_offer_ms is None else state.first_offer_ms)
        return loaded if waited_ms >= state.config.formation_ms else ()
    return loaded


def _has_loaded(record: RankRecord) -> bool:
    status, load = record.status, record.load
    return (
        load is not None
        and status is not None
        and status.mode in OUTSIDE
        and status.epoch == 0
        and holds(status.contents, load.slots)
    )


def with_loads(placement: Placement, state: CoordinatorState, joining) -> Placement:
    """The placement with the experts that these joining ranks were sent to load."""
    for rank in joining:
        for slot, expert in enumerate(state.records[rank].load.slots):
            placement = placement.with_expert(rank, slot, expert)
    return placement
