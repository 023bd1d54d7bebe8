"""Driver of the coordinator: feeds it events, and carries its commands out.

Every command is carried out before the next event is fed: nothing called here calls back.
"""

import dataclasses
import logging
from collections.abc import Callable

from eep_jax.coordination import coordinator
from eep_jax.coordination.protocol import Refused, Welcome
from eep_jax.coordination.state import (
    Answer,
    CoordinatorState,
    Ended,
    Ending,
    Kill,
    Note,
    Send,
    Unrecorded,
)
from eep_jax.runtime.control.channels import Channels
from eep_jax.runtime.control.messages import Hello, HostProcess
from eep_jax.runtime.control.server import Connection
from eep_jax.runtime.history.event_log import EventLog
from eep_jax.runtime.history.journal import Journal
from eep_jax.runtime.history.recovery import process_facts
from eep_jax.runtime.processes.registry import RankProcesses

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DriverDeps:
    """Dependencies of the driver.

    `released` is called with a rank whose requests must move to others, `settled` after every
    event, once its commands have been carried out.
    """

    now_ms: Callable[[], int]
    channels: Channels
    processes: RankProcesses
    journal: Journal
    event_log: EventLog
    released: Callable[[int], None]
    settled: Callable[[], None]


class Driver:
    """Sole owner of the coordinator's state."""

    def __init__(self, state: CoordinatorState, deps: DriverDeps):
        self.state, self._deps = state, deps

    def feed(self, event, connection: Connection | None = None) -> None:
        """Feeds one event. `connection`, of the process that caused it, receives the answer."""
        deps = self._deps
        self.state, commands = coordinator.advance(self.state, event, deps.now_ms())
        for command in commands:
            match command:
                case Send(rank=rank, incarnation=incarnation, message=message):
                    deps.channels.send(rank, message, incarnation)
                case Answer(message=message):
                    if connection is not None:
                        self.answer(connection, message)
                case Kill(rank=rank, incarnation=incarnation, reason=reason):
                    _log.warning("killing incarnation %d of rank %d: %s", incarnation, rank, reason)
                    deps.processes.kill(rank, incarnation)
                case Note(kind=kind, facts=facts):
                    self._note(kind, facts)
        deps.settled()

    def answer(self, connection: Connection, message) -> None:
        """Answers the Hello of a process; an admitted one is watched from now on."""
        if isinstance(message, Welcome):
            self._let_in(connection, message.incarnation)
        elif isinstance(message, Refused):
            _log.info("refused rank %d: %s", connection.hello.rank, message.reason)
        connection.send(message)

    def turn_away(self, event: Unrecorded, connection: Connection) -> None:
        """Fences a process that the journal does not know, and watches it until it has ended."""
        self.feed(event, connection)
        self._watch(connection.hello, event.incarnation)

    def ending(self, process: HostProcess) -> None:
        """Feeds that a process has begun to exit."""
        self.feed(Ending(process.rank, process.incarnation))

    def ended(self, process: HostProcess, why: str = "") -> None:
        """Feeds that a process has ended; `why` it counts as ended if its host is lost."""
        facts = {"rank": process.rank, "incarnation": process.incarnation, "pid": process.pid}
        self._note("ended", facts | ({"reason": why} if why else {}))
        self.feed(Ended(process.rank, process.incarnation))

    def current_processes(self) -> set[tuple[int, int]]:
        """(rank, incarnation) of all processes that may be members."""
        return {(r, x.incarnation) for r, x in enumerate(self.state.records) if x.is_current}

    def _let_in(self, connection: Connection, incarnation: int) -> None:
        deps, hello = self._deps, connection.hello
        connection.incarnation = incarnation
        deps.channels.register(connection)
        self._watch(hello, incarnation)

    def _watch(self, hello: Hello, incarnation: int) -> None:
        """Watches a process. Called before its answer is sent: no later supervisor misses it."""
        processes = self._deps.processes
        process, host = process_of(hello, incarnation), processes.named(hello.host)
        self._deps.journal.append("process", process_facts(host, process))
        processes.watch(host, process)

    def _note(self, kind: str, facts: dict) -> None:
        silent_ms = self._silent_ms(facts["rank"]) if kind == "dead" else 0
        self._deps.event_log.note(kind, facts, silent_ms)
        match kind:
            case "dead":
                self._deps.released(facts["rank"])
            case "commit":
                for rank in facts["drained"]:
                    self._deps.released(rank)

    def _silent_ms(self, rank: int) -> int:
        """Time since the last sign of life of a rank that was judged dead."""
        record = self.state.records[rank]
        alive_ms = self._deps.processes.alive_ms(rank, record.incarnation)
        ending = alive_ms is not None and (record.ending or record.ended)
        return max(0, self._deps.now_ms() - (alive_ms if ending else record.heard_ms))


def process_of(hello: Hello, incarnation: int) -> HostProcess:
    """The process behind a Hello, as its host identifies it."""
    return HostProcess(rank=hello.rank, incarnation=incarnation, pid=hello.pid, ticks=hello.ticks)
