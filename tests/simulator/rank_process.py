"""A simulated process of one rank: the real participant with a pretended engine and bank."""

import functools

from eep_jax.coordination import participant
from eep_jax.coordination.participant import ParticipantState
from eep_jax.coordination.protocol import Mode, Prepare, Refused, Welcome
from eep_jax.coordination.state import Arrived
from eep_jax.placement.backups import SHARD_OVERHEAD_BYTES, plan_backups
from eep_jax.placement.placement import EMPTY
from eep_jax.placement.sources import Backup, SourceKind

ASK_AGAIN_MS = 500
HEARTBEAT_MS = 200
STEP_MS = 100
STEP_DEADLINE_MS = 500
HOLD_TRIES_MS = 1_000  # as of the agent
BACKUP_MS = 40  # to read one expert for it
EXPERT_BYTES = 1 << 20


class RankProcess:
    """One process. `state` is the participant, `bank` what its slots truly hold."""

    def __init__(self, cluster, pid: int, rank: int):
        self.cluster, self.pid, self.rank = cluster, pid, rank
        self.incarnation = 0
        self.state = ParticipantState(rank=rank)
        self.bank = [EMPTY] * cluster.config.slots_per_rank
        self.alive, self.stopped = True, False
        self.stuck_since_ms: int | None = None
        self.waiting_for_ms: int | None = None  # since when a step waits for its peers
        self.sequence = 0
        self.postponed = []  # what happened to a stopped process; it happens when it wakes
        self.task, self.next_task = None, None
        self.planned: Prepare | None = None  # waits until all ranks hold
        self.planned_ms = 0
        self.votes_hold = self.held = False
        self.backups: set[int] = set()
        self.ask()

    def __str__(self) -> str:
        return f"rank {self.rank} incarnation {self.incarnation}"

    def do(self, action) -> None:
        """Runs `action` now, or on waking up; a dead process does nothing."""
        if self.stopped:
            self.postponed.append(action)
        elif self.alive:
            action()

    def after(self, duration_ms: int, action) -> None:
        self.cluster.after(duration_ms, functools.partial(self.do, action))

    def wake(self) -> None:
        self.stopped = False
        postponed, self.postponed = self.postponed, []
        for action in postponed:
            self.do(action)

    def ask(self) -> None:
        if self.incarnation == 0:
            self.cluster.to_supervisor(self, Arrived(self.rank))
            self.after(ASK_AGAIN_MS, self.ask)

    def receive(self, message) -> None:
        match message:
            case Welcome(incarnation=incarnation):
                if self.incarnation == 0:
                    self.incarnation = incarnation
                    self.after(self.cluster.timing.warm_up_ms(), self.warmed_up)
                    self.heartbeat()
                    self.step()
            case Refused():
                pass
            case Prepare(planned=True) if self.state.mode is Mode.SERVING:
                self.plan(message)
            case _ if self.incarnation:
                self.feed(message)

    def warmed_up(self) -> None:
        self.feed(participant.WarmedUp())

    def feed(self, event) -> None:
        self.state, actions = participant.advance(self.state, event)
        for action in actions:
            match action:
                case participant.FillBank() | participant.CarryOut() | participant.FillSlots():
                    self.next_task = action
                    if self.task is None:
                        self.start_task()
                case participant.Resume(view=view, placement=placement):
                    self.waiting_for_ms = None
                    self.votes_hold = self.held = False
                    self.back_up(view, placement)
                case participant.End(reason=reason):
                    self.cluster.log(f"{self} ends: {reason}")
                    self.cluster.kill(self)
                case participant.Report():
                    self.report()
        self.cluster.changed(self)

    def report(self) -> None:
        self.sequence += 1
        stalled = self.stuck_since_ms is not None
        status = self.state.status(
            incarnation=self.incarnation,
            sequence=self.sequence,
            stalled_ms=self.cluster.now_ms - self.stuck_since_ms if stalled else 0,
            handle=f"slab-{self.pid}",
            backup=Backup(f"backups-{self.pid}", tuple(sorted(self.backups))),
        )
        self.cluster.to_supervisor(self, status)

    def heartbeat(self) -> None:
        self.report()
        self.after(HEARTBEAT_MS, self.heartbeat)

    def step(self) -> None:
        """A step needs every peer of the epoch in it; it is discarded at the deadline."""
        self.after(STEP_MS, self.step)
        if self.stuck_since_ms is not None:
            return
        self.begin_planned()
        if self.state.mode is not Mode.SERVING or self.held:
            return
        missing = tuple(r for r in self.state.view.in_epoch if not self.steps_with(r))
        if not missing:
            self.waiting_for_ms = None
            self.agree()
        elif self.waiting_for_ms is None:
            self.waiting_for_ms = self.cluster.now_ms
        elif self.cluster.now_ms - self.waiting_for_ms >= STEP_DEADLINE_MS:
            self.feed(participant.StepAccused(self.state.epoch, missing))

    def agree(self) -> None:
        """The largest vote of all ranks holds for all of them, at one round."""
        members = [self.cluster.process(r, m.incarnation) for r, m in self.members()]
        if any(member.votes_hold for member in members):
            self.cluster.holds += 1
            for member in members:
                member.held = True

    def members(self):
        view = self.state.view
        return [(rank, view.members[rank]) for rank in view.in_epoch]

    def plan(self, prepare: Prepare) -> None:
        """Nobody died: first all ranks end their step, at a round that they agree on."""
        if prepare.epoch <= self.state.epoch:
            self.feed(prepare)
            return
        if self.planned is None:
            self.planned_ms = self.cluster.now_ms
        self.planned, self.votes_hold = prepare, True

    def begin_planned(self) -> None:
        """Takes part in a planned change once all ranks hold, or cannot."""
        if self.planned is None:
            return
        if self.state.mode is Mode.SERVING and not self.held:
            if self.cluster.now_ms - self.planned_ms < HOLD_TRIES_MS:
                return
            self.cluster.holds_given_up += 1
        prepare, self.planned = self.planned, None
        self.feed(prepare)

    def back_up(self, view, placement) -> None:
        """Fills what `plan_backups` says, one expert after the other; what was kept stays."""
        room = self.cluster.timing.backup_experts * (EXPERT_BYTES + SHARD_OVERHEAD_BYTES)
        if room:
            experts = self.cluster.experts
            wanted = plan_backups(experts, view.in_epoch, placement, EXPERT_BYTES, room)[self.rank]
            self.backups &= set(wanted)
            for number, expert in enumerate(wanted):
                self.after(number * BACKUP_MS, functools.partial(self.backups.add, expert))

    def steps_with(self, rank: int) -> bool:
        peer = self.cluster.process(rank, self.state.view.members[rank].incarnation)
        if peer is None or peer.stopped or peer.stuck_since_ms is not None:
            return False
        return peer.state.mode is Mode.SERVING and peer.state.epoch == self.state.epoch

    def start_task(self) -> None:
        self.task, self.next_task = self.next_task, None
        if isinstance(self.task, participant.FillSlots):
            self.fetch_one()
            return
        for move in self._moves():
            self.bank[move.slot] = EMPTY  # half-written
        self.after(self.cluster.timing.repair_ms(len(self._moves())), self.end_task)

    def end_task(self) -> None:
        if self.stuck_since_ms is not None:
            self.after(HEARTBEAT_MS, self.end_task)
            return
        task, moves = self.task, self._moves()
        self.task, lost = None, {}
        for move in moves:
            if any(self.cluster.fetch(move.expert, source) for source in move.sources):
                self.bank[move.slot] = move.expert
            else:
                lost[move.expert] = f"no source has expert {move.expert}"
        if isinstance(task, participant.FillBank):
            self.feed(participant.Loaded(tuple(self.bank), lost))
        else:
            self.feed(participant.Prepared(task.prepare.epoch, tuple(self.bank), lost))
        if self.next_task is not None and self.task is None:
            self.start_task()

    def fetch_one(self) -> None:
        """Brings one expert of a background task, between two steps; then looks for the next."""
        fetch, missing = self.task.fetch, [m for m in self._moves() if self.lacks(m)]
        wanted = self.next_task is None and self.state.fetch == fetch
        if wanted and missing:
            self.bank[missing[0].slot] = EMPTY  # half-written
            self.after(self.cluster.timing.repair_ms(1), lambda: self.end_fetch(missing[0]))
            return
        self.task = None
        if wanted:
            self.feed(participant.Fetched(fetch.number, tuple(self.bank)))
        if self.next_task is not None and self.task is None:
            self.start_task()

    def end_fetch(self, move) -> None:
        if self.stuck_since_ms is not None:
            self.after(HEARTBEAT_MS, lambda: self.end_fetch(move))
            return
        used = self.state.placement is not None and self.state.placement.slots[self.rank][move.slot]
        assert self.state.mode is not Mode.SERVING or used == EMPTY, "a slot in use was written"
        if any(self.cluster.fetch(move.expert, source) for source in move.sources):
            self.bank[move.slot] = move.expert
            self.fetch_one()
            return
        fetch, self.task = self.task.fetch, None
        lost = {move.expert: f"no source has expert {move.expert}"}
        self.feed(participant.Fetched(fetch.number, tuple(self.bank), lost))
        if self.next_task is not None and self.task is None:
            self.start_task()

    def lacks(self, move) -> bool:
        return self.bank[move.slot] != move.expert

    def serves(self, slot: int, expert: int) -> bool:
        """Whether a peer can read `expert` from `slot` of this process now."""
        return self.alive and self.bank[slot] == expert

    def _moves(self):
        if isinstance(self.task, participant.FillBank):
            return self.task.load.moves
        if isinstance(self.task, participant.FillSlots):
            return self.task.fetch.moves
        return self.task.prepare.moves


def is_checkpoint(source) -> bool:
    return source.kind is SourceKind.CHECKPOINT
