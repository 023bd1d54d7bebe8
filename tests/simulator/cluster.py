"""The simulated cluster: one supervisor, the processes of R ranks, a fake clock, a queue."""

import dataclasses
import heapq
import itertools
import random

from eep_jax.config import ClusterConfig
from eep_jax.coordination import coordinator
from eep_jax.coordination.state import Disconnected, Ended, Ending, Note
from eep_jax.placement.sources import SourceKind
from tests.simulator.checkers import Checkers
from tests.simulator.network import Network
from tests.simulator.rank_process import RankProcess, is_checkpoint
from tests.simulator.supervisor_process import SupervisorProcess


@dataclasses.dataclass
class Timing:
    """How long ranks take, in milliseconds, drawn from ranges; and how often a fetch fails."""

    random: random.Random
    warm_up_range_ms: tuple[int, int] = (200, 200)
    move_range_ms: tuple[int, int] = (50, 50)
    respawn_range_ms: tuple[int, int] | None = None  # None: nobody starts a process anew
    peer_failure: float = 0.0
    checkpoint_failure: float = 0.0
    backup_failure: float = 0.0  # gone, too slow, or refused by its digest
    backup_experts: int = 0  # that a rank keeps in host memory

    def warm_up_ms(self) -> int:
        return self.random.randint(*self.warm_up_range_ms)

    def repair_ms(self, moves: int) -> int:
        return 10 + sum(self.random.randint(*self.move_range_ms) for _ in range(moves))

    def heal(self) -> None:
        self.move_range_ms = (50, 50)
        self.peer_failure = self.checkpoint_failure = self.backup_failure = 0.0


class Cluster:
    """All of it. `after` schedules, `run_for` lets time pass, everything else acts at once."""

    def __init__(self, config: ClusterConfig, experts: int, seed: int, advance=coordinator.advance):
        self.config, self.experts, self.advance = config, experts, advance
        self.now_ms = 1_000
        self.random = random.Random(seed)
        self.network = Network(seed)
        self.timing = Timing(random.Random(seed))
        self.checkers = Checkers(self)
        self.journal: list[Note] = []
        self.lines: list[str] = []
        self.processes: list[RankProcess] = []
        self.queue, self.order = [], itertools.count()
        self.pids = itertools.count(1)
        self.holds = self.holds_given_up = 0  # for planned changes
        self.from_backup = 0  # experts
        self.starved: set[int] = set()  # experts that no source supplies
        self.supervisor: SupervisorProcess | None = self.new_supervisor()

    def after(self, duration_ms: int, action) -> None:
        heapq.heappush(self.queue, (self.now_ms + duration_ms, next(self.order), action))

    def run_for(self, duration_ms: int, until=lambda: False) -> bool:
        """Lets time pass. Returns whether `until` came true, which ends it early."""
        end_ms = self.now_ms + duration_ms
        while self.queue and self.queue[0][0] <= end_ms:
            self.now_ms, _, action = heapq.heappop(self.queue)
            action()
            if until():
                return True
        self.now_ms = end_ms
        return until()

    def log(self, line: str) -> None:
        self.lines.append(f"{self.now_ms:>7} ms  {line}")

    def record(self, note: Note) -> None:
        self.journal.append(note)
        self.log(words_of(note))
        self.checkers.recorded(note)

    def changed(self, process: RankProcess) -> None:
        self.checkers.changed(process)

    # Processes.

    def living(self) -> list[RankProcess]:
        return [process for process in self.processes if process.alive]

    def process(self, rank: int, incarnation: int) -> RankProcess | None:
        """The living process with this name, if any."""
        for process in self.processes:
            if process.rank == rank and process.incarnation == incarnation and process.alive:
                return process
        return None

    def newest(self, rank: int) -> RankProcess | None:
        return next((p for p in reversed(self.processes) if p.rank == rank and p.alive), None)

    def spawn(self, rank: int) -> RankProcess:
        process = RankProcess(self, next(self.pids), rank)
        self.processes.append(process)
        return process

    def kill(self, process: RankProcess | None, unseen: bool = False) -> None:
        """SIGKILL. The supervisor sees the exit unless it is `unseen`: a host that vanished."""
        if process is None or not process.alive:
            return
        process.alive = False
        self.processes.remove(process)
        self.log(f"{process} is gone")
        kinds = (Disconnected,) if unseen else (Ending, Ended)
        if process.incarnation:
            # The kernel says early that a process ends, and needs a while to take it apart.
            for event, late_ms in zip(
                (k(process.rank, process.incarnation) for k in kinds), (2, 160), strict=False
            ):
                self.after(
                    late_ms, lambda event=event: self.supervisor and self.supervisor.feed(event)
                )
        if self.timing.respawn_range_ms:
            wait_ms = self.random.randint(*self.timing.respawn_range_ms)
            self.after(wait_ms, lambda: self.respawn(process.rank))

    def respawn(self, rank: int) -> None:
        if self.newest(rank) is None:
            self.spawn(rank)

    def fetch(self, expert: int, source) -> bool:
        """Whether `source` supplies the expert now."""
        if expert in self.starved:
            return False
        if is_checkpoint(source):
            return self.random.random() >= self.timing.checkpoint_failure
        peers = [p for p in self.living() if p.rank == source.rank]
        if source.kind is SourceKind.BACKUP:
            kept = any(expert in p.backups and not p.stopped for p in peers)
            came = kept and self.random.random() >= self.timing.backup_failure
            self.from_backup += came
            return came
        there = any(peer.serves(source.slot, expert) for peer in peers)
        return there and self.random.random() >= self.timing.peer_failure

    # Supervisor.

    def kill_supervisor(self) -> None:
        if self.supervisor is not None:
            self.supervisor.alive = False
            self.supervisor = None
            self.log("supervisor is gone")

    def start_supervisor(self) -> None:
        if self.supervisor is None:
            self.log("supervisor starts")
            self.supervisor = self.new_supervisor()

    def new_supervisor(self) -> SupervisorProcess:
        return SupervisorProcess(self)

    # Network.

    def to_supervisor(self, process: RankProcess, message) -> None:
        for delay_ms in self.network.delays_ms(process.rank, message):
            self.after(delay_ms, lambda: self._at_supervisor(process, message))

    def to_rank(self, process: RankProcess | None, message) -> None:
        if process is None:
            return
        for delay_ms in self.network.delays_ms(process.rank, message):
            self.after(delay_ms, lambda: process.do(lambda: process.receive(message)))

    def _at_supervisor(self, process: RankProcess, message) -> None:
        if self.supervisor is not None:
            self.supervisor.feed(message, asker=process)


def words_of(note: Note) -> str:
    """A note of the journal as a line of a story."""
    facts = note.facts
    match note.kind:
        case "incarnation" | "offered":
            return f"{note.kind}: rank {facts['rank']} incarnation {facts['incarnation']}"
        case "dead":
            return f"dead: {facts['reason']}"
        case "prepare":
            epoch, kind, moves = facts["epoch"], facts["change"], facts["moves"]
            return f"prepare: epoch {epoch}, {kind}, {moves} moves: {facts['reason']}"
        case "commit":
            moves = [f"expert {m['expert']} to rank {m['rank']}" for m in facts["moves"]]
            moved = ", moved " + ", ".join(moves) if moves else ""
            dropped = f", without experts {facts['dropped']}" if facts["dropped"] else ""
            members = " ".join(f"{r}.{i}" for r, i in facts["members"].items())
            return f"commit: epoch {facts['epoch']} of {members}{moved}{dropped}"
        case "coverage_lost":
            return f"coverage lost: {facts['reason']}"
        case "scale":
            return f"scale: ranks {facts['out']} shall be out"
    return f"{note.kind}: {facts}"
