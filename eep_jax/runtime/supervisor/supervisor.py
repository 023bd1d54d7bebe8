"""The supervisor process: wiring of its parts, and the loop that ticks. No JAX.

`MessageHandler` receives, `Driver` feeds the coordinator and carries its commands out, `EventLog`
records. The process may be killed at any time: ranks go on without it, and the next supervisor
reads the journal, waits for the ranks to reconnect, and learns from them what they hold.
"""

import asyncio
import contextlib
import dataclasses
import logging
import pathlib
import time
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from eep_jax.config import RunConfig
from eep_jax.coordination.state import CoordinatorState, Ended, Tick
from eep_jax.runtime.control.channels import Channels
from eep_jax.runtime.control.endpoint import ENDPOINT, ports_before, write_endpoint
from eep_jax.runtime.control.identity import host_id
from eep_jax.runtime.control.messages import HostProcess
from eep_jax.runtime.control.server import ControlServer
from eep_jax.runtime.history.event_log import EventLog
from eep_jax.runtime.history.recovery import snapshot
from eep_jax.runtime.history.status import StatusReporter
from eep_jax.runtime.http.access import exposure, open_access
from eep_jax.runtime.http.app import build_app
from eep_jax.runtime.http.completion import CompletionLimits
from eep_jax.runtime.processes.local import LocalProcesses
from eep_jax.runtime.processes.registry import RankProcesses
from eep_jax.runtime.processes.remote import HostWatch
from eep_jax.runtime.serving.assemble import assemble_serving
from eep_jax.runtime.supervisor.connection_limits import Limits
from eep_jax.runtime.supervisor.driver import Driver, DriverDeps
from eep_jax.runtime.supervisor.listeners import Listeners
from eep_jax.runtime.supervisor.message_handler import MessageHandler
from eep_jax.runtime.supervisor.run_files import RunFiles, open_run
from eep_jax.runtime.supervisor.service import ClusterService
from eep_jax.runtime.text.chat_template import open_chat_template
from eep_jax.runtime.text.open import open_tokenizer, tokenizer_directory

_log = logging.getLogger(__name__)

TICK_MS = 50
LAST_WORDS_MS = 200  # for clients to be sent why their answers end
JOURNAL_RETRY_MS = 1_000  # between tries to write a journal that is off
CONTROL_CONNECTIONS_MIN = 64  # beside four for each rank: those of clients are counted apart
BODY_BYTES_MIN = 1 << 20  # that the body of any request may have
BODY_BYTES_PER_TOKEN = 32  # of the context; some tokens are long, and JSON escapes


@runtime_checkable
class Clock(Protocol):
    """Source of time of a process loop; tests have their own."""

    def now_ms(self) -> int:
        """Milliseconds of a monotonic clock; its zero means nothing."""


class SystemClock:
    """The monotonic clock of this machine, the same for all its processes."""

    def now_ms(self) -> int:
        return time.monotonic_ns() // 1_000_000


class Supervisor:
    """The control process. Not thread-safe: call it and its parts from its event loop only."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: pathlib.Path,
        token: str,
        clock: Clock | None = None,
        host: str = "",
    ):
        """Wires the parts, and continues from the journal of `run_dir` if there is one.

        Args:
          config: the run.
          run_dir: holds the journal and the file that names the ports.
          token: what a process of the run must know to connect.
          clock: source of time; None takes the monotonic clock.
          host: the id of this host, if it is not `identity.host_id()`.

        Raises:
          ValueError: the model's tokenizer or chat template, or a file of keys, cannot be used.
          RunDirError: `run_dir` is in use, or holds what this run cannot continue.
          OSError: `run_dir` cannot be written.
        """
        self.config, self._run_dir = config, pathlib.Path(run_dir)
        now_ms = (clock or SystemClock()).now_ms
        self._tokenizer = open_tokenizer(config)
        self._access = open_access(config.serve, token)
        self._template = open_chat_template(tokenizer_directory(config))
        self._files = open_run(self._run_dir, config)
        try:
            self._wire(self._files, token, now_ms, host)
        except BaseException:
            self._files.close()
            raise

    def _wire(self, files: RunFiles, token: str, now_ms: Callable[[], int], host: str) -> None:
        config, before = self.config, files.before
        state = before.coordinator_state(config.cluster, now_ms())
        members = state.view.in_epoch
        self._journal, self._now_ms, self._journal_due_ms = files.journal, now_ms, 0
        self.event_log = EventLog(self._journal, now_ms, before.events, members)
        self.channels = Channels()
        serving = assemble_serving(
            config,
            self.channels,
            self._journal.append,
            lambda: self.state,
            before.entries,
            awaited=members,
        )
        self.requests = serving.table
        self._found, self._gone = before.processes, before.ended
        ending, ended = self._on_process_ending, self._on_process_ended
        self._local = LocalProcesses(now_ms, ending, ended)
        self._hosts = HostWatch(config.name, now_ms, ending, ended)
        self._processes = RankProcesses(host_id(host), self._local, self._hosts)
        deps = DriverDeps(
            now_ms=now_ms,
            channels=self.channels,
            processes=self._processes,
            journal=self._journal,
            event_log=self.event_log,
            released=serving.dispatcher.release,
            settled=serving.assign,
        )
        self._driver = Driver(state, deps)
        handler = MessageHandler(config, deps, self._driver, self._hosts, serving.dispatcher)
        self.telemetry = handler.telemetry
        self._control = ControlServer(
            token, config.serve.message_bytes_max, handler.on_message, handler.on_closed
        )
        reporter = StatusReporter(
            config,
            lambda: self.state,
            self.requests,
            self.event_log,
            self.telemetry,
            self._processes,
            self.channels,
            lambda: self._journal.problem,
            now_ms,
        )
        self.service = ClusterService(serving.frontend, reporter, self._driver)
        if not before.is_first:
            facts = {"epoch": before.view.epoch, "requests": len(self.requests.entries)}
            self.event_log.note("restarted", facts)

    @property
    def state(self) -> CoordinatorState:
        """The coordinator's current state."""
        return self._driver.state

    async def run(
        self,
        stop: asyncio.Event,
        ready: asyncio.Event | None = None,
        hurry: asyncio.Event | None = None,
    ) -> None:
        """Serves until `stop` is set, then ends all ranks. Any other end leaves them generating.

        Answers that are under way then are finished first, for at most `serve.shutdown_timeout_s`.

        Args:
          stop: set by the caller to end the run.
          ready: set once both ports are open.
          hurry: set by the caller, after `stop`, to wait for no answer.

        Raises:
          OSError: a port is taken.
          RunTaken: another supervisor has taken over.
        """
        asyncio.get_running_loop().set_exception_handler(_log_in_one_line)
        listeners, looking = Listeners(), None
        try:
            await self._listen(listeners)
            self._watch_known_processes()
            if not self.config.serve.journal_texts:
                self.compact()  # the journal may have texts from before
            looking = asyncio.create_task(self._local.keep_looking())
            if ready is not None:
                ready.set()
            while not stop.is_set():
                if looking.done():
                    looking.result()  # raises what ended it: no end of a process would be seen
                self._tick()
                try:
                    await asyncio.wait_for(stop.wait(), TICK_MS / 1000)
                except TimeoutError:
                    continue
            await self._drain(hurry or asyncio.Event())
        finally:
            if looking is not None:
                looking.cancel()
            await self._close(listeners, ends_run=stop.is_set())

    async def _listen(self, listeners: Listeners) -> None:
        """Opens both ports, the previous ones if they are free, and writes them to the file."""
        serve, endpoint_file = self.config.serve, self._run_dir / ENDPOINT
        limits = CompletionLimits(
            model=serve.served_model_name or self.config.model.name,
            context_tokens=self.config.engine.context_tokens,
            tokenizer=self._tokenizer,
        )
        body_bytes_max = max(BODY_BYTES_MIN, BODY_BYTES_PER_TOKEN * limits.context_tokens)
        control_before, http_before = ports_before(endpoint_file)
        control = self._control.build_app()
        control_port = await listeners.open(
            control,
            serve.control_host,
            serve.control_port,
            control_before,
            limits=Limits(
                connections_max=CONTROL_CONNECTIONS_MIN + 4 * self.config.cluster.ranks,
                head_s=serve.head_deadline_ms / 1000,
            ),
        )
        http = build_app(
            self.service,
            limits,
            template=self._template,
            body_bytes_max=body_bytes_max,
            keep_alive_s=serve.keep_alive_ms / 1000,
            cors_origins=serve.cors_origins,
            access_log=serve.access_log,
            info={"config": dataclasses.asdict(self.config)},
            access=self._access,
            ready_while_changing=serve.ready_while_changing,
        )
        http_port = await listeners.open(
            http,
            serve.host,
            serve.port,
            http_before,
            cancel_handlers=True,
            limits=Limits(
                connections_max=serve.connections_max,
                per_address_max=serve.connections_per_address_max,
                head_s=serve.head_deadline_ms / 1000,
            ),
        )
        write_endpoint(endpoint_file, serve, control_port, http_port)
        if warning := exposure(serve):
            _log.warning("%s", warning)
        _log.info("serving on http://%s:%d", serve.host, http_port)

    def _tick(self) -> None:
        self._files.owner.beat()
        self._driver.feed(Tick())
        self._hosts.give_up_lost(self.config.cluster.host_lost_ms, self._driver.current_processes())
        self.event_log.note_costs()
        if self._journal.problem and self._now_ms() >= self._journal_due_ms:
            self._journal_due_ms = self._now_ms() + JOURNAL_RETRY_MS
            self.compact()
        elif self._journal.is_full:
            self.compact()

    async def _drain(self, hurry: asyncio.Event) -> None:
        """Finishes the answers that are under way; those that take too long end with an error."""
        self.service.drain("the service is shutting down; send the request to another one")
        until_ms = self._now_ms() + self.config.serve.shutdown_timeout_s * 1000
        while self.service.busy and self._now_ms() < until_ms and not hurry.is_set():
            self._tick()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(hurry.wait(), TICK_MS / 1000)
        if self.service.busy:
            _log.warning("answers under way are ended: the time to finish them is over")
            self.service.end_streams(
                "the service was shut down before this answer was complete; send the request again"
            )
            await asyncio.sleep(LAST_WORDS_MS / 1000)

    async def _close(self, listeners: Listeners, ends_run: bool) -> None:
        await listeners.stop()  # a rank that ends must not reconnect
        if ends_run:
            self._hosts.shut_down()
            self.channels.shut_down()
            await asyncio.sleep(0.1)  # for the writers to pass the last message on
        await listeners.close()
        self._local.close()
        self._files.close()

    def _on_process_ending(self, process: HostProcess) -> None:
        self._driver.ending(process)

    def _on_process_ended(self, process: HostProcess, why: str = "") -> None:
        self._driver.ended(process, why)

    def _watch_known_processes(self) -> None:
        for host, process in self._found:
            self._processes.watch(host, process)
        for rank, incarnation in self._gone:
            self._driver.feed(Ended(rank, incarnation))

    def compact(self) -> None:
        """Rewrites the journal as the few records that the next supervisor needs.

        Raises:
          RunTaken: the journal is another supervisor's now.
        """
        self._files.owner.check()
        entries, commit = self.requests.entries.values(), self.event_log.commit
        texts = self.config.serve.journal_texts
        self._journal.compact(
            snapshot(self.state, commit, self._processes.known, entries, with_texts=texts)
        )


def _log_in_one_line(loop: asyncio.AbstractEventLoop, context: dict) -> None:
    """Logs an error of the system, such as no file descriptor for a connection, without a trace."""
    error = context.get("exception")
    if isinstance(error, OSError):
        _log.error("%s: %s", context["message"], error)
    else:
        loop.default_exception_handler(context)
