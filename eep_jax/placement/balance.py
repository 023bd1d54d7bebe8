"""Rebalancing while serving: redundancy that a death used up, then the load of the ranks.

Rebalancing proceeds in small steps, each valid by itself. A step *fills* slots that are EMPTY, with
experts that are fetched while the ranks serve, and *releases* surplus replicas, whose slots a later
step may fill. Both happen in one swap of tables, and any step may be the last. Pure and
deterministic like the other plans: ties go to the lowest rank, then slot, then expert.
"""

import dataclasses
import itertools

from eep_jax.placement.placement import EMPTY, Placement, check, missing_experts
from eep_jax.placement.planner import Move, Plan
from eep_jax.placement.sources import Supply, rank_sources

GAIN_MIN = 0.02  # part of the squared load that a change must save to be worth its move


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aim:
    """Goal of the steps. `members` are the ranks that shall serve, ascending."""

    members: tuple[int, ...]
    redundancy: int
    moves_max: int  # of one rank in one step
    loads: tuple[float, ...] = ()  # how often each expert was chosen; empty: unknown, no balancing
    imbalance_max: float = 1.25  # tolerated ratio of the most loaded rank to the mean
    avoid: frozenset[tuple[int, int]] = frozenset()  # (rank, expert) that no source supplied

    @property
    def replicas_wanted(self) -> int:
        return min(self.redundancy, len(self.members))

    def load_of(self, expert: int) -> float:
        return self.loads[expert] if self.loads else 0.0


def next_step(placement: Placement, aim: Aim, supply: Supply | None = None) -> Plan | None:
    """The next step from `placement` towards `aim`, or None if there is nothing to gain.

    Slots of ranks that are not members stay unchanged; they may be read. `0 1 -/0 2 -` with two
    replicas of each expert wanted becomes `0 1 2/0 2 1`. No step removes an expert's last replica
    on the members.
    """
    step = _Step(placement, aim)
    step.restore()
    if not step.is_any and aim.loads and step.is_redundant():
        step.balance()
    return step.plan(supply) if step.is_any else None


def rank_loads(placement: Placement, members, loads) -> dict[int, float]:
    """The load of each member; the replicas of an expert share its load evenly."""
    found = dict.fromkeys(sorted(members), 0.0)
    for expert, places in placement.replicas().items():
        ranks = [rank for rank, _ in places if rank in found]
        for rank in ranks:
            found[rank] += loads[expert] / len(ranks)
    return found


@dataclasses.dataclass(frozen=True, order=True)
class _Relief:
    """Brings `expert` to `rank`, over a replica of `given` or into a free slot (EMPTY).

    The expert leaves rank `leaves`; EMPTY: it also stays there. Lower values are better.
    """

    squares: float  # of the loads, summed
    leaves: int
    expert: int
    rank: int
    given: int


def _squares(loads: dict[int, float]) -> float:
    return sum(load**2 for load in loads.values())


class _Step:
    """A step under construction.

    `target` is the placement after it; `promised[rank]` are experts that a later step will put into
    slots that are EMPTY by then.
    """

    def __init__(self, before: Placement, aim: Aim):
        self.before, self.target, self.aim = before, before, aim
        self.fills: list[tuple[int, int, int]] = []
        self.releases: dict[int, int] = dict.fromkeys(aim.members, 0)
        self.promised: dict[int, set[int]] = {rank: set() for rank in aim.members}
        # Derived from the two above, and read very often.
        self._held = {rank: set(before.slots[rank]) - {EMPTY} for rank in aim.members}
        self._counts = [0] * before.experts
        for expert in itertools.chain.from_iterable(self._held.values()):
            self._counts[expert] += 1

    @property
    def is_any(self) -> bool:
        return self.target != self.before

    def plan(self, supply: Supply | None) -> Plan:
        sources = lambda rank, expert: rank_sources(self.before, rank, expert, supply)
        moves = tuple(Move(r, s, e, sources(r, e)) for r, s, e in self.fills)
        dropped = missing_experts(self.target, range(len(self.target.slots)))
        return Plan(placement=check(self.target), moves=moves, dropped=dropped)

    def is_redundant(self) -> bool:
        wanted = self.aim.replicas_wanted
        return all(self._count(e) >= wanted for e in range(self.target.experts))

    # Redundancy.

    def restore(self) -> None:
        """Gives experts with too few replicas more of them, the neediest first."""
        experts, wanted = range(self.target.experts), self.aim.replicas_wanted
        need = lambda e: (self._count(e), -self.aim.load_of(e), e)
        while True:
            needy = sorted((e for e in experts if self._count(e) < wanted), key=need)
            if not any(self._give(expert) for expert in needy):
                return

    def _give(self, expert: int) -> bool:
        lacking = [r for r in self.aim.members if self._may_get(r, expert)]
        if fillable := [r for r in lacking if self._free(r)]:
            self._fill(min(fillable, key=self._weight), expert)
            return True
        if later := [r for r in lacking if self._room(r)]:
            self._promise(min(later, key=self._weight), expert)
            return True
        return self._make_room(expert, lacking) or self._shift(expert, lacking)

    def _make_room(self, expert: int, lacking) -> bool:
        """Releases a replica of a more redundant expert, to fill its slot in a later step."""
        wanted, count = self.aim.replicas_wanted, self._count(expert)
        spare = [
            (-self._count(e), self.aim.load_of(e), self._weight(r), slot, r)
            for r in lacking
            for slot, e in self._releasable(r)
            if self._count(e) > min(wanted, count + 1) and self._is_spare(r, e)
        ]
        if not spare:
            return False
        *_, slot, rank = min(spare)
        self._release(rank, slot)
        self._promise(rank, expert)
        return True

    def _shift(self, expert: int, lacking) -> bool:
        """All free slots are on ranks that hold the expert: another expert moves there instead."""
        for rank in sorted((r for r in self.aim.members if self._free(r)), key=self._weight):
            for other in lacking:
                for slot, moving in self._releasable(other):
                    if self._may_get(rank, moving):
                        self._fill(rank, moving)
                        self._release(other, slot)
                        self._promise(other, expert)
                        return True
        return False

    # Balance.

    def balance(self) -> None:
        """Takes load from the most loaded rank as long as that is worth a move."""
        while True:
            loads = rank_loads(self.target, self.aim.members, self.aim.loads)
            if max(loads.values()) <= self.aim.imbalance_max * sum(loads.values()) / len(loads):
                return
            best = min(self._reliefs(loads), default=None)
            if best is None or best.squares > (1 - GAIN_MIN) * _squares(loads):
                return
            if best.given == EMPTY:
                self._fill(best.rank, best.expert)
                if best.leaves != EMPTY:
                    self._release(best.leaves, self.target.slots[best.leaves].index(best.expert))
                continue
            if not self.is_any:  # in a step of its own, so that the next one sees its effect
                self._release(best.rank, self.target.slots[best.rank].index(best.given))
            return

    def _reliefs(self, loads: dict[int, float]):
        """All ways to relieve the most loaded rank."""
        hot = min(loads, key=lambda r: (-loads[r], r))
        for _, expert in self._kept(hot):
            for rank in self.aim.members:
                if not self._may_get(rank, expert):
                    continue
                if self._free(rank):
                    for leaves in (EMPTY, hot):
                        after = self._loads_after(loads, expert, rank, leaves)
                        yield _Relief(_squares(after), leaves, expert, rank, EMPTY)
                elif not self._room(rank):
                    yield from self._replacement(loads, expert, rank, hot)

    def _replacement(self, loads: dict[int, float], expert: int, rank: int, hot: int):
        """A replica of `expert` in place of the surplus replica with the least load on `rank`."""
        wanted, load = self.aim.replicas_wanted, self.aim.load_of
        spare = [
            (load(e) / self._count(e), e)
            for _, e in self._releasable(rank)
            if e != expert and self._count(e) > wanted
        ]
        if not spare:
            return
        given = min(spare)[1]
        between = self._loads_after(loads, given, EMPTY, rank)
        # Otherwise the slot might be refilled with the same expert, and so on without end.
        if min(between, key=lambda r: (-between[r], r)) == hot:
            after = self._loads_after(between, expert, rank, EMPTY)
            yield _Relief(_squares(after), EMPTY, expert, rank, given)

    def _loads_after(self, loads, expert: int, comes: int, leaves: int) -> dict[int, float]:
        """The loads once the expert came to one rank and left another; EMPTY for none."""
        after, load = dict(loads), self.aim.load_of(expert)
        before = [r for r in self.aim.members if self._has(r, expert)]
        holders = [r for r in before if r != leaves] + ([comes] if comes != EMPTY else [])
        for r in before:
            after[r] -= load / len(before)
        for r in holders:
            after[r] += load / len(holders)
        return after

    # Slots.

    def _count(self, expert: int) -> int:
        return self._counts[expert]

    def _has(self, rank: int, expert: int) -> bool:
        return expert in self._held[rank]

    def _may_get(self, rank: int, expert: int) -> bool:
        return not self._has(rank, expert) and (rank, expert) not in self.aim.avoid

    def _is_spare(self, rank: int, expert: int) -> bool:
        """Whether another member holds the expert, not only the promise of it."""
        return any(expert in self.target.slots[r] for r in self.aim.members if r != rank)

    def _room(self, rank: int) -> int:
        """Slots that are EMPTY after this step and not promised."""
        return self.target.slots[rank].count(EMPTY) - len(self.promised[rank])

    def _free(self, rank: int) -> bool:
        """Whether this step may fill a slot of the rank: it is EMPTY before and after."""
        filled = sum(r == rank for r, _, _ in self.fills)
        return filled < self.aim.moves_max and self._room(rank) > 0 and self._slot(rank) is not None

    def _slot(self, rank: int) -> int | None:
        pairs = enumerate(zip(self.before.slots[rank], self.target.slots[rank], strict=True))
        return next((slot for slot, pair in pairs if pair == (EMPTY, EMPTY)), None)

    def _weight(self, rank: int):
        """Sorts ranks with less load first."""
        held = self.target.slots[rank]
        busy = sum(self.aim.load_of(e) / max(1, self._count(e)) for e in held if e != EMPTY)
        return busy, len(held) - self._room(rank), rank

    def _kept(self, rank: int) -> list[tuple[int, int]]:
        """Slots of a rank that this step has not changed, with their experts."""
        pairs = enumerate(zip(self.before.slots[rank], self.target.slots[rank], strict=True))
        return [(slot, old) for slot, (old, new) in pairs if old == new != EMPTY]

    def _releasable(self, rank: int) -> list[tuple[int, int]]:
        return self._kept(rank) if self.releases[rank] < self.aim.moves_max else []

    def _fill(self, rank: int, expert: int) -> None:
        slot = self._slot(rank)
        self.fills.append((rank, slot, expert))
        self.target = self.target.with_expert(rank, slot, expert)
        self._hold(rank, expert)

    def _promise(self, rank: int, expert: int) -> None:
        self.promised[rank].add(expert)
        self._hold(rank, expert)

    def _hold(self, rank: int, expert: int) -> None:
        self._held[rank].add(expert)
        self._counts[expert] += 1

    def _release(self, rank: int, slot: int) -> None:
        expert = self.target.slots[rank][slot]
        self.releases[rank] += 1
        self.target = self.target.with_expert(rank, slot, EMPTY)
        self._held[rank].remove(expert)
        self._counts[expert] -= 1
