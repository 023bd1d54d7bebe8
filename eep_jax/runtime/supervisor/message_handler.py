"""Handlers of the control channel: messages of ranks and launchers are checked and routed."""

import logging

from eep_jax.config import RunConfig
from eep_jax.coordination.protocol import Fenced, Status
from eep_jax.coordination.state import Arrived, Disconnected, Measured, Unrecorded
from eep_jax.engine.request import Progress
from eep_jax.errors import ProtocolError
from eep_jax.runtime.control import messages
from eep_jax.runtime.control.server import Connection
from eep_jax.runtime.processes.remote import HostWatch
from eep_jax.runtime.serving.dispatcher import RequestDispatcher
from eep_jax.runtime.supervisor.admission import Returns, Seen, admit
from eep_jax.runtime.supervisor.driver import Driver, DriverDeps, process_of
from eep_jax.runtime.supervisor.message_checks import (
    check_hello,
    check_progress,
    check_status,
    check_telemetry,
)

_log = logging.getLogger(__name__)


class MessageHandler:
    """The handlers of a `ControlServer`. `telemetry` is the last Telemetry of each rank."""

    def __init__(
        self,
        config: RunConfig,
        deps: DriverDeps,
        driver: Driver,
        hosts: HostWatch,
        dispatcher: RequestDispatcher,
    ):
        self._config, self._driver = config, driver
        self._channels, self._processes, self._hosts = deps.channels, deps.processes, hosts
        self._dispatcher, self._event_log = dispatcher, deps.event_log
        self._assign = deps.settled  # a rank that reported may have room for requests
        self.telemetry: dict[int, messages.Telemetry] = {}

    def on_message(self, connection: Connection, message) -> None:
        """Routes one message. Raises ProtocolError if this sender may not send it now."""
        if isinstance(connection.hello, messages.HostHello):
            return self._hosts.on_message(connection, message)
        if isinstance(message, messages.Hello):
            return self._on_hello(connection, message)
        if not connection.incarnation:
            raise ProtocolError(f"{type(message).__name__} before the Hello was answered")
        if isinstance(message, Status):
            rank, incarnation = connection.hello.rank, connection.incarnation
            check_status(message, rank, incarnation, self._config)
            self._driver.feed(message, connection)
        elif self._is_heard(connection):
            self._on_report(connection, message)

    def on_closed(self, connection: Connection) -> None:
        if isinstance(connection.hello, messages.HostHello):
            return self._hosts.on_closed(connection)
        if self._channels.remove(connection):
            self._driver.feed(Disconnected(connection.hello.rank, connection.incarnation))

    def _on_hello(self, connection: Connection, hello: messages.Hello) -> None:
        check_hello(hello, self._config)
        if hello != connection.hello or self._channels.is_current(connection):
            raise ProtocolError(f"rank {hello.rank} introduced itself twice")
        match admit(hello, self._seen(hello)):
            case Returns():
                self._channels.register(connection)
                self._processes.watch(hello.host, process_of(hello, hello.incarnation))
            case Arrived() as event:
                self._driver.feed(event, connection)
            case Unrecorded() as event:
                self._driver.turn_away(event, connection)
            case Fenced(reason=reason) as answer:
                _log.error("rank %d cannot take part: %s", hello.rank, reason)
                self._driver.answer(connection, answer)
            case answer:
                self._driver.answer(connection, answer)

    def _seen(self, hello: messages.Hello) -> Seen:
        records = self._driver.state.records
        record, hellos = records[hello.rank], self._channels.hellos()
        process = process_of(hello, record.incarnation)
        others = [rank for rank in hellos if rank != hello.rank and records[rank].is_current]
        return Seen(
            newest=record.incarnation,
            is_newest=record.is_current and self._processes.knows(hello.host, process),
            peers=tuple(hellos[rank] for rank in others),
            watchable=self._processes.can_watch(hello.host),
        )

    def _is_heard(self, connection: Connection) -> bool:
        """Whether this is the channel of a rank's current process."""
        is_current = self._driver.state.records[connection.hello.rank].is_current
        return is_current and self._channels.is_current(connection)

    def _on_report(self, connection: Connection, message) -> None:
        rank, state = connection.hello.rank, self._driver.state
        match message:
            case messages.Produced(progress=progress) if connection.settled:
                for part in self._checked(rank, progress):
                    self._dispatcher.produced(rank, part, state.dropped)
            case messages.Held(progress=progress):
                is_member = rank in state.view.in_epoch
                self._dispatcher.held(rank, self._checked(rank, progress), is_member, state.dropped)
                connection.settled = True
            case messages.Telemetry():
                self._on_telemetry(rank, message)
        self._assign()

    def _checked(self, rank: int, progress: tuple[Progress, ...]) -> tuple[Progress, ...]:
        for part in progress:
            check_progress(part, rank, self._config)
        return progress

    def _on_telemetry(self, rank: int, telemetry: messages.Telemetry) -> None:
        check_telemetry(telemetry, rank, self._config)
        self.telemetry[rank] = telemetry
        if telemetry.change is not None:
            self._event_log.add_times(rank, telemetry.change)
        if any(telemetry.chosen):
            self._driver.feed(Measured(telemetry.chosen))
