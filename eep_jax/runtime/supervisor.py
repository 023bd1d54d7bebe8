"""The supervisor process: receive, decide, record, carry out. Never imports JAX.

It may be killed at any time: ranks go on without it, and the next one reads the journal, waits for
the ranks to come back, and asks them what they have.
"""

import asyncio
import logging
import pathlib

from eep_jax.config import RunConfig
from eep_jax.coordination import coordinator
from eep_jax.coordination.options import coordinator_options
from eep_jax.coordination.protocol import Fenced, Refused, Status, Welcome
from eep_jax.coordination.scaling import Wish, ranks_out
from eep_jax.coordination.state import (
    Answer,
    Arrived,
    Disconnected,
    Ended,
    Ending,
    Kill,
    Measured,
    Note,
    ScaleTo,
    Send,
    Tick,
)
from eep_jax.engine.request import Progress
from eep_jax.errors import ProtocolError
from eep_jax.membership.view import RankState
from eep_jax.runtime import messages
from eep_jax.runtime.admission import Returns, Seen, admit
from eep_jax.runtime.channels import Channels
from eep_jax.runtime.chat_template import open_chat_template
from eep_jax.runtime.chronicle import Chronicle
from eep_jax.runtime.clock import Clock, SystemClock
from eep_jax.runtime.completion import CompletionLimits
from eep_jax.runtime.control import Connection, ControlServer
from eep_jax.runtime.endpoint import ports_before, write_endpoint
from eep_jax.runtime.hosts import HostWatch
from eep_jax.runtime.http_api import build_app
from eep_jax.runtime.identity import host_id
from eep_jax.runtime.journal import Journal, replay
from eep_jax.runtime.listeners import Listeners
from eep_jax.runtime.local_processes import LocalProcesses
from eep_jax.runtime.message_checks import (
    check_hello,
    check_progress,
    check_status,
    check_telemetry,
)
from eep_jax.runtime.rank_processes import RankProcesses
from eep_jax.runtime.reports import Reports
from eep_jax.runtime.request_flow import RequestFlow
from eep_jax.runtime.requests import Entry, RequestBook
from eep_jax.runtime.restart import process_facts, read_back, snapshot
from eep_jax.runtime.serving import Serving
from eep_jax.runtime.supervisor_files import ENDPOINT, JOURNAL
from eep_jax.runtime.tokenizer import open_tokenizer, tokenizer_directory

_log = logging.getLogger(__name__)

TICK_MS = 50
BODY_BYTES_MIN = 1 << 20  # that the body of any request may have
BODY_BYTES_PER_TOKEN = 32  # of the context; some tokens are long, and JSON escapes


class Supervisor:
    """All state of the control process; every method runs in its one event loop."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: pathlib.Path,
        token: str,
        clock: Clock | None = None,
        host: str = "",
    ):
        """`host` is this host's id, if it shall be another than `identity.host_id()`.

        Raises ValueError where the model's tokenizer or chat template cannot be used.
        """
        self.config, self._run_dir = config, pathlib.Path(run_dir)
        self._clock = clock or SystemClock()
        self._hosts = HostWatch(
            config.name,
            self._clock.now_ms,
            self._on_process_ending,
            self._on_process_ended,
        )
        self._local = LocalProcesses(
            self._clock.now_ms, self._on_process_ending, self._on_process_ended
        )
        self._processes = RankProcesses(host_id(host), self._local, self._hosts)
        self.channels = Channels()
        self.telemetry: dict[int, messages.Telemetry] = {}
        self._tokenizer = open_tokenizer(config)
        self._template = open_chat_template(tokenizer_directory(config))
        serve, engine = config.serve, config.engine
        self.book = RequestBook(serve.queue_max, serve.finished_max, engine.batch_slots * 2)
        self._serving = Serving(
            self.book,
            config.model.end_tokens,
            self._unavailable,
            self._accepted,
            self._cancelled,
        )
        self._control = ControlServer(
            token, serve.message_bytes_max, self._on_message, self._on_closed
        )
        before = read_back(replay(self._run_dir / JOURNAL), config)
        self._journal = Journal(self._run_dir / JOURNAL)
        now_ms, options = self._clock.now_ms(), coordinator_options(config)
        self.state = before.coordinator_state(options, now_ms)
        members = self.state.view.in_epoch
        self.chronicle = Chronicle(self._journal, self._clock.now_ms, before.events, members)
        self.book.restore(before.entries)
        self._restored = before
        self._flow = RequestFlow(
            self.book,
            self.channels,
            self._journal.append,
            self._serving.changed,
            awaited=members,
        )
        if not before.is_first:
            facts = {"epoch": before.view.epoch, "requests": len(before.entries)}
            self.chronicle.note("restarted", facts)
        self.reports = Reports(
            config,
            lambda: self.state,
            self.book,
            self.chronicle,
            self.telemetry,
            self._processes,
            self.channels,
        )
        self.submit = self._serving.submit
        self.health, self.status, self.metrics = (
            self.reports.health,
            self.reports.status,
            self.reports.metrics,
        )

    async def run(self, stop: asyncio.Event, ready: asyncio.Event | None = None) -> None:
        """Serves until `stop` is set, then ends all ranks. Raises OSError for a taken port."""
        serve = self.config.serve
        limits = CompletionLimits(
            model=self.config.model.name,
            context_tokens=self.config.engine.context_tokens,
            tokenizer=self._tokenizer,
        )
        body_bytes_max = max(BODY_BYTES_MIN, BODY_BYTES_PER_TOKEN * limits.context_tokens)
        endpoint_file = self._run_dir / ENDPOINT
        control_before, http_before = ports_before(endpoint_file)
        listeners, looking = Listeners(), None
        try:
            control = self._control.build_app()
            control_port = await listeners.open(
                control, serve.control_host, serve.control_port, control_before
            )
            http = build_app(self, limits, template=self._template, body_bytes_max=body_bytes_max)
            http_port = await listeners.open(http, serve.host, serve.port, http_before)
            write_endpoint(endpoint_file, serve, control_port, http_port)
            self._watch_known_processes()
            looking = asyncio.create_task(self._local.keep_looking())
            _log.info("serving on http://%s:%d", serve.host, http_port)
            if ready is not None:
                ready.set()
            while not stop.is_set():
                self._feed(Tick())
                self._hosts.give_up_lost(self.config.cluster.host_lost_ms, self._believed())
                self.chronicle.note_repairs()
                if self._journal.is_full:
                    self.compact()
                try:
                    await asyncio.wait_for(stop.wait(), TICK_MS / 1000)
                except TimeoutError:
                    continue
        finally:
            if looking is not None:
                looking.cancel()
            await self._close(listeners)

    async def _close(self, listeners: Listeners) -> None:
        await listeners.stop()  # who is told to end must not call again
        self._hosts.shut_down()
        self.channels.shut_down()
        await asyncio.sleep(0.1)  # for the writers to pass the last message on
        await listeners.close()
        self._local.close()
        self._journal.close()

    # Messages of ranks.

    def _on_message(self, connection: Connection, message) -> None:
        if isinstance(connection.hello, messages.HostHello):
            return self._hosts.on_message(connection, message)
        if isinstance(message, messages.Hello):
            return self._on_hello(connection, message)
        if not connection.incarnation:
            raise ProtocolError(f"{type(message).__name__} before the Hello was answered")
        if isinstance(message, Status):
            rank, incarnation = connection.hello.rank, connection.incarnation
            check_status(message, rank, incarnation, self.config)
            self._feed(message, connection)
        elif self._is_current(connection):
            self._on_report(connection, message)

    def _is_current(self, connection: Connection) -> bool:
        """Whether this is the channel of its rank's process; one that was evicted is not heard."""
        believed = self.state.records[connection.hello.rank].believed
        return believed and self.channels.is_current(connection)

    def _on_report(self, connection: Connection, message) -> None:
        rank = connection.hello.rank
        match message:
            case messages.Produced(progress=progress) if connection.settled:
                for part in self._checked(rank, progress):
                    self._flow.produced(rank, part, self.state.dropped)
            case messages.Held(progress=progress):
                is_member, dropped = rank in self.state.view.in_epoch, self.state.dropped
                self._flow.held(rank, self._checked(rank, progress), is_member, dropped)
                connection.settled = True
            case messages.Telemetry():
                self._on_telemetry(rank, message)
        self._assign()

    def _on_telemetry(self, rank: int, telemetry: messages.Telemetry) -> None:
        check_telemetry(telemetry, rank, self.config)
        self.telemetry[rank] = telemetry
        if telemetry.change is not None:
            self.chronicle.told(rank, telemetry.change)
        if any(telemetry.chosen):
            self._feed(Measured(telemetry.chosen))

    def _on_hello(self, connection: Connection, hello: messages.Hello) -> None:
        check_hello(hello, self.config)
        if hello != connection.hello or self.channels.is_current(connection):
            raise ProtocolError(f"rank {hello.rank} introduced itself twice")
        match admit(hello, self._seen(hello)):
            case Returns():
                self.channels.register(connection)
                self._processes.watch(hello.host, _process_of(hello, hello.incarnation))
            case Arrived() as event:
                self._feed(event, connection)
            case Fenced(reason=reason) as answer:
                _log.error("rank %d cannot take part: %s", hello.rank, reason)
                self._answer(connection, answer)
            case answer:
                self._answer(connection, answer)

    def _seen(self, hello: messages.Hello) -> Seen:
        record = self.state.records[hello.rank]
        process = _process_of(hello, record.incarnation)
        peers = [
            peer
            for rank, peer in self.channels.hellos().items()
            if rank != hello.rank and self.state.records[rank].believed
        ]
        return Seen(
            newest=record.incarnation,
            is_newest=record.believed and self._processes.knows(hello.host, process),
            peers=tuple(peers),
            watchable=self._processes.can_watch(hello.host),
        )

    def _checked(self, rank: int, progress: tuple[Progress, ...]) -> tuple[Progress, ...]:
        for part in progress:
            check_progress(part, rank, self.config)
        return progress

    def _on_closed(self, connection: Connection) -> None:
        if isinstance(connection.hello, messages.HostHello):
            return self._hosts.on_closed(connection)
        if self.channels.remove(connection):
            self._feed(Disconnected(connection.hello.rank, connection.incarnation))

    # Decisions, and what follows from them.

    def _feed(self, event, connection: Connection | None = None) -> None:
        self.state, commands = coordinator.advance(self.state, event, self._clock.now_ms())
        for command in commands:
            match command:
                case Send(rank=rank, incarnation=incarnation, message=message):
                    self.channels.send(rank, message, incarnation)
                case Answer(message=message):
                    self._answer(connection, message)
                case Kill(rank=rank, incarnation=incarnation, reason=reason):
                    self._kill(rank, incarnation, reason)
                case Note(kind=kind, facts=facts):
                    self._note(kind, facts)
        self._assign()

    def _note(self, kind: str, facts: dict) -> None:
        silent_ms = self._silent_ms(facts["rank"]) if kind == "dead" else 0
        self.chronicle.note(kind, facts, silent_ms)
        match kind:
            case "dead":
                self._flow.release(facts["rank"])
            case "commit":
                for rank in facts["drained"]:
                    self._flow.release(rank)

    def _silent_ms(self, rank: int) -> int:
        """How long ago a rank that was judged dead last gave a sign of life."""
        record = self.state.records[rank]
        alive_ms = self._processes.alive_ms(rank, record.incarnation)
        ending = alive_ms is not None and (record.ending or record.ended)
        return max(0, self._clock.now_ms() - (alive_ms if ending else record.heard_ms))

    def _answer(self, connection: Connection | None, message) -> None:
        if connection is None:
            return
        if isinstance(message, Welcome):
            hello = connection.hello
            connection.incarnation = message.incarnation
            self.channels.register(connection)
            process, host = _process_of(hello, message.incarnation), hello.host
            self._journal.append("process", process_facts(self._processes.named(host), process))
            self._processes.watch(host, process)
        elif isinstance(message, Refused):
            _log.info("refused rank %d: %s", connection.hello.rank, message.reason)
        connection.send(message)

    def _kill(self, rank: int, incarnation: int, reason: str) -> None:
        _log.warning("killing incarnation %d of rank %d: %s", incarnation, rank, reason)
        self._processes.kill(rank, incarnation)

    # Requests.

    def _assign(self) -> None:
        """Gives waiting requests to the members that stay."""
        believed = lambda rank: self.state.records[rank].believed
        active = self.state.view.with_state(RankState.ACTIVE)
        if not self.state.blocked:
            self._flow.assign([r for r in active if believed(r) and r not in self.state.out])

    def _accepted(self, entry: Entry) -> None:
        self._flow.accepted(entry)
        self._assign()

    def _cancelled(self, entry: Entry) -> None:
        self._flow.cancelled(entry)

    def _unavailable(self) -> str:
        if self.state.view.epoch == 0:
            return "the cluster is starting: not all ranks are ready yet"
        return f"no expert coverage: {self.state.blocked}" if self.state.blocked else ""

    # What the operator asks for.

    def apply(self, wish: Wish) -> dict:
        """Takes ranks out, or back; see `scaling.ranks_out` for what it refuses and why."""
        self._feed(ScaleTo(ranks_out(self.state, wish)))
        return self.reports.scale()

    # Processes.

    def _on_process_ending(self, process: messages.HostProcess) -> None:
        self._feed(Ending(process.rank, process.incarnation))

    def _on_process_ended(self, process: messages.HostProcess, why: str = "") -> None:
        """It is known to have ended, or is lost with its host: `why`."""
        facts = {"rank": process.rank, "incarnation": process.incarnation, "pid": process.pid}
        self._note("ended", facts | ({"reason": why} if why else {}))
        self._feed(Ended(process.rank, process.incarnation))

    def _believed(self) -> set[tuple[int, int]]:
        return {(r, x.incarnation) for r, x in enumerate(self.state.records) if x.believed}

    def _watch_known_processes(self) -> None:
        for host, process in self._restored.processes:
            self._processes.watch(host, process)
        for rank, incarnation in self._restored.ended:
            self._feed(Ended(rank, incarnation))

    def compact(self) -> None:
        """Has the journal say in few lines what the next supervisor must know."""
        entries, commit = self.book.entries.values(), self.chronicle.commit
        self._journal.compact(snapshot(self.state, commit, self._processes.known, entries))


def _process_of(hello: messages.Hello, incarnation: int) -> messages.HostProcess:
    """The process that says Hello, as it is known on its host."""
    return messages.HostProcess(
        rank=hello.rank, incarnation=incarnation, pid=hello.pid, ticks=hello.ticks
    )
