"""A simulated supervisor: the real coordinator, a journal that outlives it, and its restart."""

from eep_jax.config import ClusterConfig
from eep_jax.coordination import coordinator
from eep_jax.coordination.state import (
    Answer,
    CoordinatorState,
    Ended,
    Kill,
    Note,
    Send,
    Tick,
)
from eep_jax.membership.view import Member, RankState, View, empty_view
from eep_jax.placement.placement import Placement, empty_placement

TICK_MS = 100


class SupervisorProcess:
    """One life of the supervisor. What it did not write into the journal dies with it."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.alive, self.stopped = True, False
        self.postponed = []
        self.commands_left: int | None = None  # it dies after so many commands, if not None
        if cluster.journal:
            self.state = restored(cluster.config, cluster.experts, cluster.journal, cluster.now_ms)
        else:
            self.state = coordinator.initial_state(cluster.config, cluster.experts)
        self.tick()

    def tick(self) -> None:
        if self.alive:
            self.feed(Tick())
            self.cluster.after(TICK_MS, self.tick)

    def wake(self) -> None:
        self.stopped = False
        postponed, self.postponed = self.postponed, []
        for event, asker in postponed:
            self.feed(event, asker)

    def feed(self, event, asker=None) -> None:
        if self.stopped:
            if not isinstance(event, Tick):
                self.postponed.append((event, asker))
            return
        if not self.alive:
            return
        self.state, commands = self.cluster.advance(self.state, event, self.cluster.now_ms)
        for command in commands:
            if self.commands_left is not None:
                self.commands_left -= 1
                if self.commands_left < 0:
                    self.cluster.kill_supervisor()
                    return
            self.carry_out(command, asker)

    def carry_out(self, command, asker) -> None:
        match command:
            case Note():
                self.cluster.record(command)
            case Send(rank=rank, incarnation=incarnation, message=message):
                self.cluster.to_rank(self.cluster.process(rank, incarnation), message)
            case Answer(message=message):
                self.cluster.to_rank(asker, message)
            case Kill(rank=rank, incarnation=incarnation, reason=reason):
                self.cluster.log(f"kill rank {rank} incarnation {incarnation}: {reason}")
                self.cluster.kill(self.cluster.process(rank, incarnation))
                ended = Ended(rank, incarnation)
                self.cluster.after(1, lambda: self.feed(ended))


def restored(
    config: ClusterConfig, experts: int, journal: list[Note], now_ms: int
) -> CoordinatorState:
    """The coordinator's state from the journal alone."""
    view = empty_view(config.ranks)
    placement = empty_placement(experts, config.ranks, config.slots_per_rank)
    issued, fenced, epoch_tried = [0] * config.ranks, [0] * config.ranks, 0
    out = ()
    for note in journal:
        facts = note.facts
        match note.kind:
            case "incarnation":
                issued[facts["rank"]] = facts["incarnation"]
            case "dead":
                fenced[facts["rank"]] = facts["incarnation"]
            case "prepare":
                epoch_tried = facts["epoch"]
            case "scale":
                out = facts["out"]
            case "commit":
                view, placement = committed(note, experts)
    return coordinator.restored_state(
        config, view, placement, epoch_tried, issued, now_ms, fenced, out
    )


def committed(note: Note, experts: int) -> tuple[View, Placement]:
    """The view and placement that a `commit` note records."""
    facts = note.facts
    members = tuple(
        Member(RankState.ACTIVE if rank in facts["members"] else RankState.ABSENT, incarnation)
        for rank, incarnation in enumerate(facts["incarnations"])
    )
    slots = tuple(tuple(row) for row in facts["slots"])
    return View(epoch=facts["epoch"], members=members), Placement(experts=experts, slots=slots)
