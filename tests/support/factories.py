"""Small worlds for tests: views, placements, options, statuses and a cluster run by hand."""

from eep_jax.config import ClusterConfig
from eep_jax.coordination import coordinator, participant
from eep_jax.coordination.protocol import Mode, Status
from eep_jax.coordination.state import Answer, Arrived, Note, Send, Tick
from eep_jax.membership.view import Member, RankState, View, check
from eep_jax.placement.placement import EMPTY, Placement
from eep_jax.placement.placement import check as check_placement

EXPERTS = 8


def a_view(states: str = "active active active active", epoch: int = 1) -> View:
    """A view from words. `a_view("active absent")`: rank 0 is in, 1 was never seen."""
    found = [RankState(word) for word in states.split()]
    members = (Member(s, 0 if s is RankState.ABSENT else 1) for s in found)
    return check(View(epoch=epoch, members=tuple(members)))


def a_placement(rows: str = "0 1 -/2 3 -/4 5 -/6 7 -", experts: int = 8) -> Placement:
    """A placement from text: ranks apart by `/`, `-` is an EMPTY slot."""
    slots = tuple(
        tuple(EMPTY if word == "-" else int(word) for word in row.split())
        for row in rows.split("/")
    )
    return check_placement(Placement(experts=experts, slots=slots))


def some_cluster(**changes) -> ClusterConfig:
    """Four ranks with three slots each, for EXPERTS, unless `changes` say otherwise."""
    defaults = {"ranks": 4, "slots_per_rank": 3, "formation_ms": 5_000, "stall_ms": 4_000}
    return ClusterConfig(**{**defaults, **changes})


def a_status(rank: int, sequence: int = 1, mode: Mode = Mode.OFFERED, **changes) -> Status:
    """What `rank` says of itself as its first incarnation."""
    values = {"incarnation": 1, "handle": f"slab-{rank}", **changes}
    return Status(rank=rank, sequence=sequence, mode=mode, **values)


class ByHand:
    """A coordinator and its ranks without a network: a test passes every message by itself.

    `feed` gives the coordinator an event and keeps its commands; `tell` gives a rank a message and
    does at once what the rank asks for; `say` lets a rank report. `settle` passes all that is left.
    """

    def __init__(self, config: ClusterConfig | None = None, experts: int = EXPERTS):
        self.now_ms = 1_000
        self.state = coordinator.initial_state(config or some_cluster(), experts)
        self.ranks: dict[int, participant.ParticipantState] = {}
        self.incarnations: dict[int, int] = {}
        self.sequence = 0
        self.unsent: list[Send] = []
        self.notes: list[Note] = []

    def feed(self, event) -> tuple:
        """Feeds the coordinator; its Sends wait in `unsent`, its Notes are kept in `notes`."""
        self.state, commands = coordinator.advance(self.state, event, self.now_ms)
        self.unsent += [c for c in commands if isinstance(c, Send)]
        self.notes += [c for c in commands if isinstance(c, Note)]
        return commands

    def pass_time(self, duration_ms: int, silent=()) -> None:
        """Lets time pass; all ranks but the silent ones report every 200 ms."""
        for _ in range(duration_ms // 200):
            self.now_ms += 200
            self.feed(Tick())
            for rank in self.ranks:
                if rank not in silent:
                    self.say(rank)

    def join(self, rank: int) -> int:
        """Starts a process of `rank` that has compiled and waits for its experts."""
        answers = [c.message for c in self.feed(Arrived(rank)) if _is_answer(c)]
        self.incarnations[rank] = answers[0].incarnation
        self.ranks[rank] = participant.ParticipantState(rank=rank)
        self.tell(rank, participant.WarmedUp())
        self.say(rank)
        return self.incarnations[rank]

    def status(self, rank: int, **changes) -> Status:
        self.sequence += 1
        values = {
            "incarnation": self.incarnations[rank],
            "sequence": self.sequence,
            "handle": f"slab-{rank}",
        }
        return self.ranks[rank].status(**values | changes)

    def say(self, rank: int, **changes) -> tuple:
        return self.feed(self.status(rank, **changes))

    def tell(self, rank: int, event) -> tuple:
        """Gives a rank one event and carries out its actions, all fetches succeeding."""
        self.ranks[rank], actions = participant.advance(self.ranks[rank], event)
        for action in actions:
            match action:
                case participant.FillBank(load=load):
                    self.tell(rank, participant.Loaded(self._filled(rank, load.slots, load.moves)))
                case participant.FillSlots(fetch=fetch):
                    bank = self._filled(rank, self.ranks[rank].contents, fetch.moves)
                    self.tell(rank, participant.Fetched(fetch.number, bank))
                case participant.CarryOut(prepare=prepare):
                    slots = prepare.placement.slots[rank]
                    contents = self._filled(rank, slots, prepare.moves)
                    self.tell(rank, participant.Prepared(prepare.epoch, contents))
        return actions

    def settle(self, without=(), rounds: int = 12) -> None:
        """Passes messages both ways until nothing new is said. `without` are ranks cut off."""
        for _ in range(rounds):
            sends, self.unsent = self.unsent, []
            for send in sends:
                lives = send.rank in self.ranks and send.rank not in without
                if lives and self.incarnations[send.rank] == send.incarnation:
                    self.tell(send.rank, send.message)
            for rank in self.ranks:
                if rank not in without:
                    self.say(rank)

    def _filled(self, rank: int, slots, moves) -> tuple[int, ...]:
        bank = list(self.ranks[rank].contents or (EMPTY,) * len(slots))
        for move in moves:
            bank[move.slot] = move.expert
        return tuple(bank)


def a_serving_cluster(**changes) -> ByHand:
    """All ranks of `some_cluster` serve in epoch 1."""
    cluster = ByHand(some_cluster(**changes))
    for rank in range(cluster.state.config.ranks):
        cluster.join(rank)
    cluster.settle()
    assert cluster.state.view.epoch == 1, cluster.state
    cluster.notes.clear()
    return cluster


def _is_answer(command) -> bool:
    return isinstance(command, Answer)
