"""Sources of an expert's bytes, best first."""

import collections
import dataclasses
import enum
import math
import statistics

from eep_jax.placement.placement import Placement


class SourceKind(enum.Enum):
    """Kinds of sources, in their order before any rank has measured them."""

    LOCAL = "local"  # another slot of the same rank
    PEER = "peer"  # a slot of another rank, over the heap
    BACKUP = "backup"  # host memory of this or another rank, served by Orbax
    CHECKPOINT = "checkpoint"  # Orbax on storage


@dataclasses.dataclass(frozen=True)
class Source:
    """One source of an expert.

    `rank` is -1 for the checkpoint; `slot` is -1 except for local and peer; `address` is that of
    another rank's backup server.
    """

    kind: SourceKind
    rank: int = -1
    slot: int = -1
    address: str = ""


@dataclasses.dataclass(frozen=True)
class Backup:
    """Contents of a rank's backup store and the address that serves it; '': it is not served.

    `problem` is the reason why a rank keeps fewer backups than configured.
    """

    address: str = ""
    experts: tuple[int, ...] = ()
    problem: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Supply:
    """Sources other than the banks, their rates, and the kinds that the operator allows."""

    backups: dict[int, Backup] = dataclasses.field(default_factory=dict)  # by live rank
    rates: dict[SourceKind, float] = dataclasses.field(default_factory=dict)  # bytes per second
    allowed: tuple[SourceKind, ...] = tuple(SourceKind)


def rank_sources(
    placement: Placement, rank: int, expert: int, supply: Supply | None = None
) -> tuple[Source, ...]:
    """Sources for bringing `expert` to `rank`, the fastest kind first (see `kind_order`).

    Of one kind the rank itself comes first, then the next higher ranks, cyclically.
    """
    supply, ranks = supply or Supply(), len(placement.slots)
    nearness = lambda other: (other - rank) % ranks
    places = placement.replicas().get(expert, ())
    holders = [r for r, backup in supply.backups.items() if expert in backup.experts]
    found = [
        Source(SourceKind.LOCAL if r == rank else SourceKind.PEER, r, s)
        for r, s in sorted(places, key=lambda place: (nearness(place[0]), place[1]))
    ]
    found += [
        Source(SourceKind.BACKUP, r, address=supply.backups[r].address)
        for r in sorted(holders, key=nearness)
    ]
    found.append(Source(SourceKind.CHECKPOINT))
    order = kind_order(supply.rates, supply.allowed)
    usable = [source for source in found if source.kind in supply.allowed]
    return tuple(sorted(usable, key=lambda source: order.index(source.kind)))


def kind_order(
    rates: dict[SourceKind, float], listed: tuple[SourceKind, ...] = tuple(SourceKind)
) -> tuple[SourceKind, ...]:
    """Kinds of `listed`, best first: measured ones by bytes per second, the others stay in place.

    Rates within a power of two count as equal, so that noise changes no plan.
    Backups at 4 GB/s, the checkpoint at 9: local, peer, checkpoint, backup.
    """
    measured = [kind for kind in listed if rates.get(kind, 0.0) > 0.0]
    faster = iter(
        sorted(measured, key=lambda kind: (-math.frexp(rates[kind])[1], listed.index(kind)))
    )
    return tuple(next(faster) if kind in measured else kind for kind in listed)


def median_rates(measured) -> dict[SourceKind, float]:
    """The median over ranks of what each measured, `{kind's name: bytes per second}`.

    >>> median_rates([{"peer": 2.0}, {"peer": 4.0, "backup": 1.0}, {"peer": 9.0}])
    {<SourceKind.PEER: 'peer'>: 4.0, <SourceKind.BACKUP: 'backup'>: 1.0}
    """
    by_kind = collections.defaultdict(list)
    for rates in measured:
        for name, rate in rates.items():
            by_kind[SourceKind(name)].append(rate)
    return {kind: statistics.median(by_kind[kind]) for kind in SourceKind if by_kind[kind]}
