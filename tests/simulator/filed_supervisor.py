"""A simulated supervisor over a real run directory, killed at a chosen step of an open change.

Steps are counted while a Prepare is open: each event, each command before it is carried out, and
each record of the journal when a part of its line is on disk. What is left is what a kill leaves:
the files as they are, and an owner whose process is gone.
"""

import json
import pathlib

from eep_jax.config import RunConfig
from eep_jax.coordination import coordinator
from eep_jax.coordination.protocol import Welcome
from eep_jax.coordination.state import Answer, Ended, Note
from eep_jax.runtime.control.endpoint import JOURNAL
from eep_jax.runtime.control.messages import HostProcess
from eep_jax.runtime.history.journal_format import encode_record
from eep_jax.runtime.history.recovery import process_facts
from eep_jax.runtime.supervisor.run_files import open_run
from tests.simulator.cluster import Cluster
from tests.simulator.supervisor_process import SupervisorProcess

RESTART_MS = 200


class Killed(Exception):
    """The supervisor is dead."""


class FiledSupervisor(SupervisorProcess):
    """One life of the supervisor; the next one knows what the files say, and nothing else."""

    def __init__(self, cluster: "FiledCluster"):
        self.cluster, self.alive, self.stopped, self.postponed = cluster, True, False, []
        self.files = open_run(cluster.run_dir, cluster.run_config)
        before = self.files.before
        self.state = before.coordinator_state(cluster.config, cluster.now_ms)
        for rank, incarnation in before.ended:
            self.feed(Ended(rank, incarnation))
        for _, found in before.processes:
            if cluster.process(found.rank, found.incarnation) is None:
                self.feed(Ended(found.rank, found.incarnation))
        self.tick()

    def feed(self, event, asker=None) -> None:
        if not self.alive:
            return
        try:
            self._feed(event, asker)
        except Killed:
            self.cluster.kill_supervisor()

    def _feed(self, event, asker) -> None:
        was_open = self.state.change is not None
        state, commands = self.cluster.advance(self.state, event, self.cluster.now_ms)
        is_open = was_open or state.change is not None
        if was_open:
            self.step(True, type(event).__name__)
        self.state = state
        for command in commands:
            self.step(is_open, f"before {name_of(command)}")
            if isinstance(command, Note):
                self.write(command.kind, command.facts, is_open)
            if isinstance(command, Answer) and isinstance(command.message, Welcome):
                self.write("process", facts_of(asker, command.message.incarnation), is_open)
            self.carry_out(command, asker)

    def write(self, kind: str, facts: dict, is_open: bool) -> None:
        if self.cluster.is_next(is_open):
            line = encode_record({**facts, "kind": kind})
            with (self.cluster.run_dir / JOURNAL).open("ab") as journal:
                journal.write(line[: len(line) // 2])
        self.step(is_open, f"half of {kind}")
        self.files.journal.append(kind, facts)

    def step(self, is_open: bool, name: str) -> None:
        """Raises Killed if this is the step to die at."""
        if is_open and self.cluster.count(name):
            self.files.journal.close()
            path = self.files.owner.path
            path.write_text(json.dumps(json.loads(path.read_text()) | {"pid": 1, "ticks": 0}))
            raise Killed


class FiledCluster(Cluster):
    """A cluster whose supervisor dies at each of `kills`, counted in steps from the last one."""

    def __init__(
        self,
        run_dir: pathlib.Path,
        kills: list[int],
        config: RunConfig,
        advance=coordinator.advance,
    ):
        self.run_dir, self.run_config = run_dir, config
        self.armed, self.kills, self.steps, self.died_at = False, kills, 0, []
        super().__init__(config.cluster, config.model.experts, 0, advance)

    def new_supervisor(self) -> FiledSupervisor:
        return FiledSupervisor(self)

    def is_next(self, is_open: bool) -> bool:
        return self.armed and is_open and bool(self.kills) and self.steps == self.kills[0]

    def count(self, name: str) -> bool:
        """Counts one step; returns whether the supervisor dies at it."""
        dies = self.is_next(True)
        self.steps += self.armed
        if dies:
            self.kills, self.steps = self.kills[1:], 0
            self.died_at.append(name)
            self.after(RESTART_MS, self.start_supervisor)
        return dies

    def close(self) -> None:
        if self.supervisor is not None:
            self.supervisor.files.close()


def facts_of(process, incarnation: int) -> dict:
    found = HostProcess(rank=process.rank, incarnation=incarnation, pid=process.pid, ticks=1)
    return process_facts("", found)


def name_of(command) -> str:
    kind = getattr(command, "kind", "") or type(getattr(command, "message", command)).__name__
    return f"{type(command).__name__} {kind}"
