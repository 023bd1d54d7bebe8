"""Invariants after every event of a simulation, whatever fails; and the test for recovery."""

from eep_jax.coordination import background
from eep_jax.coordination.protocol import Mode
from eep_jax.coordination.state import Note
from eep_jax.membership.view import Member, RankState
from eep_jax.placement.placement import holds, missing_experts
from tests.simulator import supervisor_process


class SafetyViolated(AssertionError):
    """The cluster did what it must never do."""


def require(kept: bool, broken_promise: str) -> None:
    if not kept:
        raise SafetyViolated(broken_promise)


class Checkers:
    """Sees every journal entry and every change of a process, and remembers what they imply."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.epochs = {}  # epoch -> (who is in, placement), wherever it was seen
        self.committed = {}  # epoch -> incarnation of each member
        self.evicted = {}  # (rank, incarnation) -> epoch that left it out
        self.was_ready = set()  # (epoch, rank, incarnation)
        self.last_seen = {}  # pid -> (epoch, prepared)

    def recorded(self, note: Note) -> None:
        if note.kind != "commit":
            return
        view, placement = supervisor_process.committed(note, self.cluster.experts)
        members = note.facts["members"]
        newest = max(self.committed, default=0)
        require(view.epoch > newest, f"epoch {view.epoch} is committed after {newest}")
        self.agree(view, placement)
        for rank, incarnation in members.items():
            name = (rank, incarnation)
            ready = (view.epoch, *name) in self.was_ready
            require(ready, f"epoch {view.epoch} is committed but {name} was never ready for it")
            require(name not in self.evicted, f"{name} is back in epoch {view.epoch}")
        for rank, incarnation in self.committed.get(newest, {}).items():
            if members.get(rank) != incarnation and rank not in note.facts["drained"]:
                self.evicted[rank, incarnation] = view.epoch
        self.committed[view.epoch] = members
        missing = set(missing_experts(placement, members)) - set(note.facts["dropped"])
        require(not missing, f"epoch {view.epoch} is committed without experts {missing}")

    def changed(self, process) -> None:
        state = process.state
        before = self.last_seen.get(process.pid, (0, 0))
        # A rank that was drained has no epoch, but forgets none.
        epoch = max(state.epoch, state.left)
        grew = epoch >= before[0] and max(epoch, state.prepared) >= max(before)
        require(grew, f"{process} went back from {before} to {epoch}, {state.prepared}")
        self.last_seen[process.pid] = (epoch, state.prepared)
        if state.prepare is not None:
            self.agree(state.prepare.view, state.prepare.placement)
        if state.mode is Mode.READY:
            self.was_ready.add((state.prepared, process.rank, process.incarnation))
        if state.mode is Mode.SERVING:
            self.serves(process)

    def serves(self, process) -> None:
        state, name = process.state, (process.rank, process.incarnation)
        self.agree(state.view, state.placement)
        require(state.epoch in self.committed, f"{process} serves {state.epoch}, not committed")
        member = state.view.members[process.rank]
        own = Member(RankState.ACTIVE, process.incarnation)
        require(member == own, f"{process} serves epoch {state.epoch} as {member}")
        evicted = self.evicted.get(name, state.epoch + 1)
        require(evicted > state.epoch, f"{process} serves {state.epoch}, evicted at {evicted}")
        wanted = state.placement.slots[process.rank]
        true = holds(process.bank, wanted)
        require(true, f"{process} serves with {process.bank}, its placement says {wanted}")

    def agree(self, view, placement) -> None:
        inside = {r: view.members[r].incarnation for r in view.in_epoch}
        known = self.epochs.setdefault(view.epoch, (inside, placement))
        require(known == (inside, placement), f"epoch {view.epoch} means two different things")


def is_well(cluster) -> bool:
    """Whether every rank serves in one epoch, which the supervisor agrees with, in full coverage.

    Ranks that the operator took out stand by instead, and nothing is left to do in the background.
    Second processes of a rank that wait to be let in are allowed.
    """
    supervisor = cluster.supervisor
    processes = [process for process in cluster.living() if process.incarnation]
    if supervisor is None or len(processes) != cluster.config.ranks:
        return False
    state = supervisor.state
    if state.change is not None or state.dropped or state.blocked:
        return False
    if not background.is_resting(state):
        return False
    for process in processes:
        mine = process.state
        if process.rank in state.out:
            if mine.mode not in (Mode.OFFERED, Mode.STANDBY):
                return False
            continue
        if mine.mode is not Mode.SERVING or mine.epoch != state.view.epoch:
            return False
        inside = [(r, state.view.members[r]) for r in state.view.in_epoch]
        known = [(r, mine.view.members[r]) for r in mine.view.in_epoch]
        if mine.placement != state.placement or known != inside:
            return False
    return not missing_experts(state.placement, state.view.with_state(RankState.ACTIVE))
