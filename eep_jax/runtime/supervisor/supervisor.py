"""The supervisor process: its parts, wired, and the loop that tells them of time. No JAX.

`reception` receives, `driver` has the coordinator decide and carries out, `chronicle` records.
It may be killed at any time: ranks go on without it, and the next one reads the journal, waits for
the ranks to come back, and asks them what they have.
"""

import asyncio
import logging
import pathlib
import time
from typing import Protocol, runtime_checkable

from eep_jax.config import RunConfig
from eep_jax.coordination.scaling import ScaleRequest, ranks_out
from eep_jax.coordination.state import CoordinatorState, Ended, ScaleTo, Tick
from eep_jax.membership.view import RankState
from eep_jax.runtime.control.channels import Channels
from eep_jax.runtime.control.endpoint import ENDPOINT, JOURNAL, ports_before, write_endpoint
from eep_jax.runtime.control.identity import host_id
from eep_jax.runtime.control.messages import HostProcess
from eep_jax.runtime.control.server import ControlServer
from eep_jax.runtime.history.event_log import EventLog
from eep_jax.runtime.history.journal import Journal, replay
from eep_jax.runtime.history.recovery import read_back, snapshot
from eep_jax.runtime.history.status import StatusReporter
from eep_jax.runtime.http.app import build_app
from eep_jax.runtime.http.completion import CompletionLimits
from eep_jax.runtime.processes.local import LocalProcesses
from eep_jax.runtime.processes.registry import RankProcesses
from eep_jax.runtime.processes.remote import HostWatch
from eep_jax.runtime.serving.dispatcher import RequestDispatcher
from eep_jax.runtime.serving.request_table import Entry, RequestTable
from eep_jax.runtime.serving.service import CompletionFrontend
from eep_jax.runtime.supervisor.driver import Driver, DriverDeps
from eep_jax.runtime.supervisor.listeners import Listeners
from eep_jax.runtime.supervisor.message_handler import MessageHandler
from eep_jax.runtime.text.chat_template import open_chat_template
from eep_jax.runtime.text.open import open_tokenizer, tokenizer_directory

_log = logging.getLogger(__name__)

TICK_MS = 50
BODY_BYTES_MIN = 1 << 20  # that the body of any request may have
BODY_BYTES_PER_TOKEN = 32  # of the context; some tokens are long, and JSON escapes


@runtime_checkable
class Clock(Protocol):
    """Source of time of a process loop; tests bring their own."""

    def now_ms(self) -> int:
        """Milliseconds of a monotonic clock; its zero means nothing."""


class SystemClock:
    """The monotonic clock of this machine, the same for all its processes."""

    def now_ms(self) -> int:
        return time.monotonic_ns() // 1_000_000


class Supervisor:
    """The control process; every method of it and of its parts runs in its one event loop."""

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
        now_ms = (clock or SystemClock()).now_ms
        self._tokenizer = open_tokenizer(config)
        self._template = open_chat_template(tokenizer_directory(config))
        serve, engine = config.serve, config.engine
        self.book = RequestTable(serve.queue_max, serve.finished_max, engine.batch_rows * 2)
        self._serving = CompletionFrontend(
            self.book,
            config.model.end_tokens,
            self._unavailable,
            self._accepted,
            self._cancelled,
        )
        # What was before, and where what comes is written.
        before = read_back(replay(self._run_dir / JOURNAL), config)
        self._journal = Journal(self._run_dir / JOURNAL)
        state = before.coordinator_state(config.cluster, now_ms())
        members = state.view.in_epoch
        self._found, self._gone = before.processes, before.ended
        self.book.restore(before.entries)
        self.chronicle = EventLog(self._journal, now_ms, before.events, members)
        # The ranks: their channels, requests and processes.
        self.channels = Channels()
        self._flow = RequestDispatcher(
            self.book, self.channels, self._journal.append, self._serving.changed, members
        )
        ending, ended = self._on_process_ending, self._on_process_ended
        self._local = LocalProcesses(now_ms, ending, ended)
        self._hosts = HostWatch(config.name, now_ms, ending, ended)
        self._processes = RankProcesses(host_id(host), self._local, self._hosts)
        # Who decides, who hears what is said, who tells of it.
        self._driver = Driver(
            state,
            DriverDeps(
                now_ms=now_ms,
                channels=self.channels,
                processes=self._processes,
                journal=self._journal,
                chronicle=self.chronicle,
                released=self._flow.release,
                settled=self._assign,
            ),
        )
        reception = MessageHandler(
            config,
            self._driver,
            self.channels,
            self._processes,
            self._hosts,
            self._flow,
            self.chronicle,
            self._assign,
        )
        self._control = ControlServer(
            token, serve.message_bytes_max, reception.on_message, reception.on_closed
        )
        self.telemetry = reception.telemetry
        self.reports = StatusReporter(
            config,
            lambda: self.state,
            self.book,
            self.chronicle,
            self.telemetry,
            self._processes,
            self.channels,
        )
        if not before.is_first:
            facts = {"epoch": before.view.epoch, "requests": len(self.book.entries)}
            self.chronicle.note("restarted", facts)
        self.submit = self._serving.submit
        self.health, self.status, self.metrics = (
            self.reports.health,
            self.reports.status,
            self.reports.metrics,
        )

    @property
    def state(self) -> CoordinatorState:
        """What the coordinator knows and has decided."""
        return self._driver.state

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
            http_port = await listeners.open(
                http, serve.host, serve.port, http_before, cancel_handlers=True
            )
            write_endpoint(endpoint_file, serve, control_port, http_port)
            self._watch_known_processes()
            looking = asyncio.create_task(self._local.keep_looking())
            _log.info("serving on http://%s:%d", serve.host, http_port)
            if ready is not None:
                ready.set()
            while not stop.is_set():
                if looking.done():
                    looking.result()  # raises what ended it: nobody would see processes end
                self._driver.feed(Tick())
                self._hosts.give_up_lost(
                    self.config.cluster.host_lost_ms, self._driver.current_processes()
                )
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

    def _on_process_ending(self, process: HostProcess) -> None:
        self._driver.ending(process)

    def _on_process_ended(self, process: HostProcess, why: str = "") -> None:
        self._driver.ended(process, why)

    def _watch_known_processes(self) -> None:
        for host, process in self._found:
            self._processes.watch(host, process)
        for rank, incarnation in self._gone:
            self._driver.feed(Ended(rank, incarnation))

    def _assign(self) -> None:
        """Gives waiting requests to the members that stay."""
        is_current = lambda rank: self.state.records[rank].is_current
        active = self.state.view.with_state(RankState.ACTIVE)
        if not self.state.blocked:
            self._flow.assign([r for r in active if is_current(r) and r not in self.state.out])

    def _accepted(self, entry: Entry) -> None:
        self._flow.accepted(entry)
        self._assign()

    def _cancelled(self, entry: Entry) -> None:
        self._flow.cancelled(entry)

    def _unavailable(self) -> str:
        if self.state.blocked:
            return f"no expert coverage: {self.state.blocked}"
        if self.state.view.epoch == 0:
            return "the cluster is starting: not all ranks are ready yet"
        return ""

    def apply(self, wish: ScaleRequest) -> dict:
        """Takes ranks out, or back; see `scaling.ranks_out` for what it refuses and why."""
        self._driver.feed(ScaleTo(ranks_out(self.state, wish)))
        return self.reports.scale()

    def compact(self) -> None:
        """Has the journal say in few lines what the next supervisor must know."""
        entries, commit = self.book.entries.values(), self.chronicle.commit
        self._journal.compact(snapshot(self.state, commit, self._processes.known, entries))
