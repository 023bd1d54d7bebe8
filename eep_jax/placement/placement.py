"""Placement of experts: the expert in each slot of each rank, and coverage."""

import collections
import dataclasses

from eep_jax.errors import CoverageLost, InvalidMove

EMPTY = -1  # a slot without an expert
WITHOUT_A_RANK = "bring a rank back, or choose cluster.policy=degrade"


@dataclasses.dataclass(frozen=True)
class Placement:
    """Expert of each slot, `slots[rank][slot]`; EMPTY if there is none.

    A rank that is away has only EMPTY slots. The flat id of a slot is `rank * S + slot`.
    """

    experts: int
    slots: tuple[tuple[int, ...], ...]

    @property
    def slots_per_rank(self) -> int:
        return len(self.slots[0])

    def replicas(self) -> dict[int, tuple[tuple[int, int], ...]]:
        """`(rank, slot)` of each expert's replicas, ascending; experts without one are left out."""
        places = collections.defaultdict(list)
        for rank, row in enumerate(self.slots):
            for slot, expert in enumerate(row):
                if expert != EMPTY:
                    places[expert].append((rank, slot))
        return {expert: tuple(found) for expert, found in sorted(places.items())}

    def without(self, places) -> "Placement":
        """The same with these `(rank, slot)` emptied."""
        gone = set(places)
        rows = (
            tuple(EMPTY if (rank, slot) in gone else e for slot, e in enumerate(row))
            for rank, row in enumerate(self.slots)
        )
        return dataclasses.replace(self, slots=tuple(rows))

    def without_ranks(self, ranks) -> "Placement":
        """The same with all slots of these ranks emptied."""
        places = [(rank, slot) for rank in ranks for slot in range(self.slots_per_rank)]
        return self.without(places)

    def with_expert(self, rank: int, slot: int, expert: int) -> "Placement":
        row = self.slots[rank]
        row = row[:slot] + (expert,) + row[slot + 1 :]
        rows = self.slots[:rank] + (row,) + self.slots[rank + 1 :]
        return dataclasses.replace(self, slots=rows)


def check(placement: Placement) -> Placement:
    """Returns the placement, or raises InvalidMove naming the wrong slot."""
    widths = {len(row) for row in placement.slots}
    if len(widths) != 1:
        raise InvalidMove(f"ranks have different numbers of slots: {sorted(widths)}")
    for rank, row in enumerate(placement.slots):
        for slot, expert in enumerate(row):
            if expert != EMPTY and not 0 <= expert < placement.experts:
                raise InvalidMove(
                    f"rank {rank} slot {slot} holds {expert}, expected 0..{placement.experts - 1}"
                )
        held = [e for e in row if e != EMPTY]
        if len(held) != len(set(held)):
            raise InvalidMove(f"rank {rank} holds an expert twice: {row}")
    return placement


def empty_placement(experts: int, ranks: int, slots_per_rank: int) -> Placement:
    return check(Placement(experts=experts, slots=((EMPTY,) * slots_per_rank,) * ranks))


def missing_experts(placement: Placement, active) -> tuple[int, ...]:
    """Experts without a replica on an active rank, ascending."""
    active = set(active)
    held = {e for rank, row in enumerate(placement.slots) if rank in active for e in row}
    return tuple(e for e in range(placement.experts) if e not in held)


def holds(contents, slots) -> bool:
    """Whether a bank with these contents can serve these slots. EMPTY slots match any content.

    >>> holds((4, 7, 2), (4, EMPTY, 2)), holds((4, 7, 2), (7, 4, 2)), holds((), (4, 7, 2))
    (True, False, False)
    """
    if contents == slots:  # the usual case, checked for every message of every rank
        return True
    wanted = zip(contents, slots, strict=False)
    return len(contents) == len(slots) and all(e in (EMPTY, held) for held, e in wanted)


def _more_slots(placement: Placement, active) -> str:
    """The setting that would have been enough for these ranks; '' if there is no rank."""
    if not active:
        return ""
    return f"configure cluster.slots_per_rank={-(-placement.experts // len(active))} or more, "


def require_room(placement: Placement, active, way_out: str = WITHOUT_A_RANK) -> None:
    """Raises CoverageLost if the active ranks have fewer slots than there are experts."""
    active = tuple(active)
    available = len(active) * placement.slots_per_rank
    if available < placement.experts:
        missing = missing_experts(placement, active)
        raise CoverageLost(
            f"experts {list(missing)} have no live replica: {placement.experts} slots are needed "
            f"and ranks {sorted(active)} have {available} ({placement.slots_per_rank} each); "
            f"{_more_slots(placement, active)}{way_out}"
        )
