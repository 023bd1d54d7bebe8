"""The commands of a text story, played on a simulated cluster with a perfect network."""

from eep_jax.coordination.participant import Broken, StepAccused
from eep_jax.coordination.state import ScaleTo
from eep_jax.placement.placement import EMPTY
from tests.simulator.cluster import Cluster
from tests.support.factories import EXPERTS, some_cluster


class Story:
    """One cluster, told what to do line by line. `run` returns what happened, then who is in.

    start 4 [experts=8 slots=3 redundancy=1 degrade=1]   four ranks that serve in epoch 1
    form 4 ...     the same, told from the beginning; late=1: the last of them has no process yet;
                   starved=2: no source supplies expert 2
    spawn 2        a new process of rank 2        kill 2     SIGKILL; `vanish 2` is one not seen
    stop 1         SIGSTOP                        wake 1     SIGCONT
    drain 3        the operator takes rank 3 out  grow 3     and wants it back
    accuse 0 2     a step of 0 timed out on 2     stick 1    engine hangs, heartbeats go on
    corrupt 1      it finds that its bank is not what its placement says
    starve 4       no source supplies expert 4    mend 4     they do again
    advance 500    milliseconds pass              show       each rank's mode and experts
    until commit   time passes until the next line of news that starts with this word
    drop commit 3  the next Commit to 3 is lost   cut 1 2    ranks out of reach; `cut` alone: none
    kill-supervisor, start-supervisor, restart-supervisor, stop-supervisor, wake-supervisor
    crash-supervisor 3   it dies after three more commands
    """

    def __init__(self):
        self.cluster: Cluster | None = None
        self.told = 0

    def run(self, commands: tuple[str, ...]) -> list[str]:
        shown = []
        for line in commands:
            name, *words = line.split()
            shown += getattr(self, name.replace("-", "_"))(*words) or []
        return [*self._news(), *shown, self._members()]

    def start(self, ranks: str, *settings: str) -> None:
        self.form(ranks, *settings)
        self.told = len(self.cluster.lines)

    def form(self, ranks: str, *settings: str) -> None:
        values = {key: int(value) for key, value in (s.split("=") for s in settings)}
        config = some_cluster(
            ranks=int(ranks),
            slots_per_rank=values.get("slots", 3),
            redundancy=values.get("redundancy", 1),
            policy="degrade" if values.get("degrade") else "fail_closed",
            background_experts=values.get("background", 2),
        )
        self.cluster = Cluster(config, values.get("experts", EXPERTS), seed=0)
        if "starved" in values:
            self.cluster.starved.add(values["starved"])
        for rank in range(int(ranks) - values.get("late", 0)):
            self.cluster.spawn(rank)
        self.cluster.run_for(2_000)

    def spawn(self, rank: str) -> None:
        self.cluster.spawn(int(rank))

    def kill(self, rank: str) -> None:
        self.cluster.kill(self._process(rank))

    def vanish(self, rank: str) -> None:
        self.cluster.kill(self._process(rank), unseen=True)

    def stop(self, rank: str) -> None:
        self._process(rank).stopped = True

    def wake(self, rank: str) -> None:
        self._process(rank).wake()

    def stick(self, rank: str) -> None:
        self._process(rank).stuck_since_ms = self.cluster.now_ms

    def accuse(self, rank: str, *accused: str) -> None:
        process = self._process(rank)
        process.feed(StepAccused(process.state.epoch, tuple(map(int, accused))))

    def drain(self, *ranks: str) -> None:
        self._scale(lambda out: out | set(map(int, ranks)))

    def grow(self, *ranks: str) -> None:
        self._scale(lambda out: out - set(map(int, ranks)))

    def _scale(self, change) -> None:
        supervisor = self.cluster.supervisor
        supervisor.feed(ScaleTo(frozenset(change(supervisor.state.out))))

    def corrupt(self, rank: str) -> None:
        process = self._process(rank)
        contents = (process.bank[-1], *process.bank[1:])
        process.feed(Broken(f"its bank holds {contents}, its placement says {tuple(process.bank)}"))

    def starve(self, expert: str) -> None:
        self.cluster.starved.add(int(expert))

    def mend(self, expert: str) -> None:
        self.cluster.starved.remove(int(expert))

    def advance(self, duration_ms: str) -> None:
        self.cluster.run_for(int(duration_ms))

    def until(self, word: str) -> None:
        lines, known = self.cluster.lines, len(self.cluster.lines)
        came = lambda: any(news(line).startswith(word) for line in lines[known:])
        assert self.cluster.run_for(20_000, until=came), f"no {word} came"

    def drop(self, message: str, rank: str) -> None:
        self.cluster.network.drops.append((message, int(rank)))

    def cut(self, *ranks: str) -> None:
        self.cluster.network.cut = frozenset(map(int, ranks))

    def kill_supervisor(self) -> None:
        self.cluster.kill_supervisor()

    def start_supervisor(self) -> None:
        self.cluster.start_supervisor()

    def restart_supervisor(self) -> None:
        self.cluster.kill_supervisor()
        self.cluster.start_supervisor()

    def crash_supervisor(self, commands: str) -> None:
        self.cluster.supervisor.commands_left = int(commands)

    def stop_supervisor(self) -> None:
        self.cluster.supervisor.stopped = True

    def wake_supervisor(self) -> None:
        self.cluster.supervisor.wake()

    def show(self) -> list[str]:
        lines = []
        for process in sorted(self.cluster.living(), key=lambda p: (p.rank, p.incarnation)):
            experts = " ".join("-" if e == EMPTY else str(e) for e in process.bank)
            state = process.state
            lines.append(f"  {process} is {state.mode.value} at epoch {state.epoch}: {experts}")
        return lines

    def _process(self, rank: str):
        processes = [p for p in self.cluster.living() if p.rank == int(rank)]
        assert processes, f"rank {rank} has no process"
        return max(processes, key=lambda process: process.incarnation)

    def _news(self) -> list[str]:
        lines, self.told = self.cluster.lines[self.told :], len(self.cluster.lines)
        return [news(line) for line in lines]

    def _members(self) -> str:
        supervisor = self.cluster.supervisor
        return str(supervisor.state.view) if supervisor else "no supervisor"


def news(line: str) -> str:
    """A line of the cluster's log without its time."""
    return line.split(" ms  ", 1)[1]
