"""Plan of backups in host memory, so that losing all replicas of an expert costs no disk read."""

import collections

from eep_jax.placement.placement import Placement

SHARD_OVERHEAD_BYTES = 64 << 10  # files and pages around one expert's weights


def plan_backups(
    experts: int, ranks, placement: Placement, expert_bytes: int, bytes_per_rank: int
) -> tuple[tuple[int, ...], ...]:
    """The experts that each rank shall back up, by rank; ranks outside of `ranks` back up none.

    Every rank takes as many as fit into `bytes_per_rank`. Each expert gets a first backup before
    any gets a second. A rank whose slots hold the sole replica of an expert, which would be lost
    with it, backs that expert up only if no other rank has room for it. Otherwise ranks that do not
    hold the expert come before those that do, and those with fewer backups before those with more.
    Deterministic: ties rotate over the ranks by expert.
    """
    ranks, away = tuple(sorted(ranks)), set(range(len(placement.slots))) - set(ranks)
    room = min(experts, max(0, bytes_per_rank) // (expert_bytes + SHARD_OVERHEAD_BYTES))
    replicas = placement.without_ranks(away).replicas()
    holders = {e: {r for r, _ in replicas.get(e, ())} for e in range(experts)}
    sole = {e: min(found) if len(found) == 1 else None for e, found in holders.items()}
    kept = {rank: set() for rank in ranks}
    # Experts that may not go everywhere are placed first.
    order = sorted(range(experts), key=lambda e: (sole[e] is None, e))
    for copies in range(len(ranks) if room < experts else 0):
        for expert in order:
            usable = [r for r in ranks if len(kept[r]) < room and expert not in kept[r]]
            better = [r for r in usable if r != sole[expert]]
            if better:
                cost = lambda r: (r in holders[expert], len(kept[r]), (r - expert) % len(ranks))
                kept[min(better, key=cost)].add(expert)
            elif usable and copies == 0:
                _exchange(kept, expert, sole)
    _fill_up(kept, experts, room)
    return tuple(tuple(sorted(kept.get(r, ()))) for r in range(len(placement.slots)))


def _exchange(kept: dict[int, set[int]], expert: int, sole: dict) -> None:
    """Only the rank with the sole replica of `expert` has room: another backup moves there."""
    target = sole[expert]
    for rank, held in kept.items():
        for other in sorted(held):
            if rank != target and sole[other] != target and other not in kept[target]:
                held.remove(other)
                held.add(expert)
                kept[target].add(other)
                return


def _fill_up(kept: dict[int, set[int]], experts: int, room: int) -> None:
    """Uses remaining room against damaged files: experts with the fewest backups first."""
    count = collections.Counter(e for held in kept.values() for e in held)
    for held in kept.values():
        missing = sorted(set(range(experts)) - held, key=lambda e: (count[e], e))
        added = missing[: room - len(held)]
        held.update(added)
        count.update(added)
