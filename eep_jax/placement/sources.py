"""Where the bytes of an expert can come from, best first."""

import dataclasses
import enum

from eep_jax.placement.placement import Placement


class SourceKind(enum.Enum):
    """The tiers, cheapest first."""

    LOCAL = "local"  # another slot of the same rank
    PEER = "peer"  # a slot of another rank, over the heap
    CHECKPOINT = "checkpoint"  # Orbax on storage


@dataclasses.dataclass(frozen=True)
class Source:
    """One place to read an expert from; `rank` and `slot` are -1 for the checkpoint."""

    kind: SourceKind
    rank: int = -1
    slot: int = -1


def rank_sources(placement: Placement, rank: int, expert: int) -> tuple[Source, ...]:
    """Sources for bringing `expert` to `rank`: local, then peers (the next rank upwards first),
    then the checkpoint, which always remains."""
    ranks = len(placement.slots)
    places = placement.replicas().get(expert, ())
    ordered = sorted(places, key=lambda place: ((place[0] - rank) % ranks, place[1]))
    near = tuple(
        Source(SourceKind.LOCAL if r == rank else SourceKind.PEER, r, s) for r, s in ordered
    )
    return (*near, Source(SourceKind.CHECKPOINT))
