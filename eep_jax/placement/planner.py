"""Plans that give every expert a live replica with the fewest moves.

All plans are deterministic: the same arguments give the same Plan; ties go to the lowest rank,
then slot, then expert.
"""

import dataclasses

from eep_jax.errors import CoverageLost
from eep_jax.placement.placement import EMPTY, Placement, check, missing_experts, require_room
from eep_jax.placement.sources import Source, Supply, rank_sources


@dataclasses.dataclass(frozen=True)
class Move:
    """Copy of `expert`, all layers, to `slot` of `rank` from the first of `sources` that works."""

    rank: int
    slot: int
    expert: int
    sources: tuple[Source, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The target placement, the moves towards it, and the experts given up (`degrade`)."""

    placement: Placement
    moves: tuple[Move, ...] = ()
    dropped: tuple[int, ...] = ()

    def moves_of(self, rank: int) -> tuple[Move, ...]:
        return tuple(move for move in self.moves if move.rank == rank)


def initial_placement(experts: int, ranks: int, slots_per_rank: int, redundancy: int) -> Placement:
    """The placement of a whole cluster: each expert `redundancy` times, on different ranks.

    Round-robin, each further replica shifted by one rank more, so that the partners of one rank's
    experts are spread. Remaining slots stay EMPTY: repair puts orphans there.

    Raises:
        ValueError: There are too few slots.
    """
    if not 1 <= redundancy <= ranks:
        raise ValueError(f"{redundancy=} must be between 1 and {ranks=}")
    if experts * redundancy > ranks * slots_per_rank:
        raise ValueError(
            f"{experts} experts x {redundancy} replicas do not fit {ranks} ranks x "
            f"{slots_per_rank} slots; raise slots_per_rank or lower redundancy"
        )
    rows = [[] for _ in range(ranks)]
    for replica in range(redundancy):
        for expert in range(experts):
            shift = replica * (1 + expert // ranks)
            order = sorted(range(ranks), key=lambda r: (len(rows[r]), (r - expert - shift) % ranks))
            target = next(r for r in order if expert not in rows[r])
            rows[target].append(expert)
    # Round-robin may overfill a rank. A longer row always has an expert that a shorter one lacks.
    while len(fullest := max(rows, key=len)) > slots_per_rank:
        emptiest = min(rows, key=len)
        moving = next(expert for expert in reversed(fullest) if expert not in emptiest)
        fullest.remove(moving)
        emptiest.append(moving)
    padded = (tuple(row) + (EMPTY,) * (slots_per_rank - len(row)) for row in rows)
    return check(Placement(experts=experts, slots=tuple(padded)))


def plan_repair(
    placement: Placement,
    active,
    *,
    degrade: bool = False,
    supply: Supply | None = None,
    avoid: frozenset[tuple[int, int]] = frozenset(),
) -> Plan:
    """Covers every expert on the active ranks again: exactly one move for each orphan, no other.

    An orphan (an expert without a replica) goes to an EMPTY slot if there is one, else over a
    replica of the expert that has most. The rank with the fewest experts comes first.

    Args:
        placement: The placement before; only slots of `active` ranks count.
        active: Ranks that take part in the next epoch.
        degrade: Experts that find no slot are listed as dropped instead of raising an error.
        supply: Sources other than the banks.
        avoid: Each `(rank, expert)` for which all sources failed.

    Raises:
        CoverageLost: The active ranks have too few slots, or `avoid` excludes all of them for an
            expert, and `degrade` is not set.
    """
    active = tuple(sorted(active))
    away = set(range(len(placement.slots))) - set(active)
    kept = placement.without_ranks(away)
    if not degrade:
        require_room(kept, active)
    target, moves, dropped = kept, [], []
    for expert in missing_experts(kept, active):
        place = _slot_for_orphan(target, [r for r in active if (r, expert) not in avoid])
        if place is None:
            dropped.append(expert)
            continue
        target = target.with_expert(*place, expert)
        moves.append((*place, expert))
    if dropped and not degrade:
        raise CoverageLost(
            f"experts {dropped} have no live replica, and no source supplied them; repair the "
            "sources named here, which are retried automatically, bring a rank back that holds "
            "these experts, or choose cluster.policy=degrade"
        )
    return _with_sources(kept, target, moves, tuple(dropped), supply)


def plan_admission(
    placement: Placement,
    active,
    joining,
    redundancy: int,
    held=None,
    avoid: frozenset[tuple[int, int]] = frozenset(),
) -> Plan:
    """Fills the slots of joining ranks; the slots of active ranks do not change.

    Joiners first take orphans, then the experts with the fewest replicas, up to `redundancy`
    replicas each. A joiner that would get less than its share of a whole cluster (all experts
    survived elsewhere) takes further replicas, and so a part of the work. `held[rank]` is the
    content of a joiner's bank (slot -> expert): among experts with equally few replicas these come
    first, and stay in their slot without a move. `avoid` is as for `plan_repair`.
    """
    joining = tuple(sorted(joining))
    members = tuple(sorted({*active, *joining}))
    # A joiner's bank cannot be read yet, so only active ranks are sources.
    kept = placement.without_ranks(set(range(len(placement.slots))) - set(active))
    target, moves, held = kept, [], held or {}
    while (place := _next_free(target, joining)) is not None:
        rank, _ = place
        refused = {e for r, e in avoid if r == rank}
        expert = _neediest(target, rank, members, redundancy, held.get(rank, ()), refused)
        if expert is None:
            joining = tuple(r for r in joining if r != rank)
            continue
        slot = _preferred_slot(target, rank, expert, held.get(rank, ()))
        target = target.with_expert(rank, slot, expert)
        if held.get(rank, ())[slot : slot + 1] != (expert,):
            moves.append((rank, slot, expert))
    return _with_sources(kept, target, moves, missing_experts(target, members))


def _with_sources(
    before: Placement, target: Placement, moves, dropped, supply: Supply | None = None
) -> Plan:
    # Only a replica that no move overwrites may be read meanwhile.
    written = {(rank, slot) for rank, slot, _ in moves}
    stable = before.without(written)
    planned = tuple(
        Move(rank, slot, expert, rank_sources(stable, rank, expert, supply))
        for rank, slot, expert in moves
    )
    return Plan(placement=check(target), moves=planned, dropped=tuple(dropped))


def _slot_for_orphan(placement: Placement, active) -> tuple[int, int] | None:
    replicas = placement.replicas()
    load = {r: sum(e != EMPTY for e in placement.slots[r]) for r in active}
    free = [(load[r], r, s) for r in active for s, e in enumerate(placement.slots[r]) if e == EMPTY]
    if free:
        return min(free)[1:]
    spare = [
        (-len(replicas[e]), load[r], r, s)
        for r in active
        for s, e in enumerate(placement.slots[r])
        if len(replicas[e]) > 1
    ]
    return min(spare)[2:] if spare else None


def _next_free(placement: Placement, ranks) -> tuple[int, int] | None:
    load = lambda r: sum(e != EMPTY for e in placement.slots[r])
    free = [(load(r), r) for r in ranks if EMPTY in placement.slots[r]]
    if not free:
        return None
    rank = min(free)[1]
    return rank, placement.slots[rank].index(EMPTY)


def _neediest(
    placement: Placement, rank: int, members, redundancy: int, held, refused
) -> int | None:
    replicas = placement.replicas()
    inside = set(members)
    count = lambda e: sum(r in inside for r, _ in replicas.get(e, ()))
    taken = sum(e != EMPTY for e in placement.slots[rank])
    share = placement.experts * redundancy // len(placement.slots)
    wanted = [
        (count(e), e not in held, e)
        for e in range(placement.experts)
        if (count(e) < redundancy or taken < share)
        and e not in placement.slots[rank]
        and e not in refused
    ]
    return min(wanted)[2] if wanted else None


def _preferred_slot(placement: Placement, rank: int, expert: int, held) -> int:
    row = placement.slots[rank]
    if expert in held and row[held.index(expert)] == EMPTY:
        return held.index(expert)
    kept = [slot for slot, e in enumerate(held) if e != EMPTY and e not in row]
    free = [slot for slot, e in enumerate(row) if e == EMPTY]
    return min(free, key=lambda slot: (slot in kept, slot))
