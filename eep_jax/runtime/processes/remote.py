"""Processes of ranks on other hosts, watched and killed by the launchers there.

The supervisor can watch pids of its own host only. A launcher of each other host connects, receives
the processes to watch, reports their ends, and kills them on request.
"""

import dataclasses
import logging
from collections.abc import Callable

from eep_jax.errors import ProtocolError
from eep_jax.runtime.control import messages
from eep_jax.runtime.control.server import Connection

_log = logging.getLogger(__name__)

LAUNCHERS_MAX = 4_096


@dataclasses.dataclass
class RemoteProcess:
    """A rank's process on another host, until it is known to have ended."""

    host: str
    process: messages.HostProcess
    ending: bool = False


class HostWatch:
    """The connected launchers, and the processes that they watch for this supervisor.

    `on_ending` and `on_ended` are called once per process; the second argument of `on_ended` is why
    the process counts as ended although its end was not seen, or ''.
    """

    def __init__(
        self,
        run: str,
        now_ms: Callable[[], int],
        on_ending: Callable[[messages.HostProcess], None],
        on_ended: Callable[[messages.HostProcess, str], None],
    ):
        self._run, self._now_ms = run, now_ms
        self._on_ending, self._on_ended = on_ending, on_ended
        self._launchers: list[Connection] = []
        self._heard_ms: dict[str, int] = {}
        self._since_ms = now_ms()
        self.processes: dict[tuple[int, int], RemoteProcess] = {}

    def has_launcher(self, host: str) -> bool:
        return any(launcher.hello.host == host for launcher in self._launchers)

    def on_message(self, connection: Connection, message) -> None:
        """Handles one message. Raises ProtocolError if a launcher may not send it."""
        hello = connection.hello
        self._heard_ms[hello.host] = self._now_ms()
        match message:
            case messages.HostHello():
                self._join(connection)
            case messages.HostReport(ending=ending, ended=ended):
                for process in ending:
                    self._ending(hello.host, process)
                for process in ended:
                    self._ended(hello.host, process)
            case _:
                raise ProtocolError(
                    f"{type(message).__name__} from a launcher, expected HostReport"
                )

    def on_closed(self, connection: Connection) -> None:
        if connection in self._launchers:
            self._launchers.remove(connection)
            _log.info("the launcher of host %s is gone", connection.hello.host)

    def watch(self, host: str, process: messages.HostProcess) -> None:
        """Asks the launchers of `host` to report the end of this process."""
        key = (process.rank, process.incarnation)
        if key not in self.processes:
            self.processes[key] = RemoteProcess(host, process)
            self._tell(host)

    def kill(self, rank: int, incarnation: int) -> None:
        """Asks for the process to be killed, if it is on another host and has not ended."""
        found = self.processes.get((rank, incarnation))
        if found is not None:
            for launcher in self._of(found.host):
                launcher.send(messages.EndProcess(process=found.process))

    def give_up_lost(self, lost_ms: int, current: set[tuple[int, int]]) -> None:
        """Reports the processes of lost hosts as ended.

        A host is lost when its launchers were silent for `lost_ms` and none of its processes is in
        `current`: (rank, incarnation) pairs that may be members. A process that still runs there
        shares memory with no member, and mirrors drop the frames of an evicted process.
        """
        in_use = {found.host for key, found in self.processes.items() if key in current}
        for key, found in list(self.processes.items()):
            silent_ms = self._now_ms() - self._heard_ms.get(found.host, self._since_ms)
            if found.host not in in_use and silent_ms > lost_ms:
                del self.processes[key]
                why = f"its host {found.host} was silent for {silent_ms} ms, and has no member"
                self._on_ended(found.process, why)

        # A host without launcher and process may never return; if it does, it counts as new.
        known = {found.host for found in self.processes.values()}
        known.update(launcher.hello.host for launcher in self._launchers)
        for host in self.hosts_heard - known:
            del self._heard_ms[host]

    @property
    def hosts_heard(self) -> set[str]:
        """The hosts whose last message is on record."""
        return set(self._heard_ms)

    def shut_down(self) -> None:
        """Sends Shutdown to all launchers and closes their connections."""
        for launcher in self._launchers:
            launcher.send(messages.Shutdown())
            launcher.close()

    def _join(self, connection: Connection) -> None:
        if connection in self._launchers:
            raise ProtocolError("a launcher introduced itself twice")
        if connection.hello.run != self._run:
            raise ProtocolError(f"a launcher runs {connection.hello.run!r}, this is {self._run!r}")
        if len(self._launchers) >= LAUNCHERS_MAX:
            raise ProtocolError(f"{LAUNCHERS_MAX} launchers are connected already")
        self._launchers.append(connection)
        _log.info("a launcher of host %s has called", connection.hello.host)
        self._tell(connection.hello.host)

    def _tell(self, host: str) -> None:
        """Sends the full list: earlier messages may be lost, and none is repeated."""
        of_host = tuple(p.process for p in self.processes.values() if p.host == host)
        for launcher in self._of(host):
            launcher.send(messages.Watch(processes=of_host))

    def _of(self, host: str) -> list[Connection]:
        return [launcher for launcher in self._launchers if launcher.hello.host == host]

    def _known(self, host: str, process: messages.HostProcess) -> RemoteProcess | None:
        found = self.processes.get((process.rank, process.incarnation))
        same = found is not None and (found.host, found.process) == (host, process)
        return found if same else None

    def _ending(self, host: str, process: messages.HostProcess) -> None:
        found = self._known(host, process)
        if found is not None and not found.ending:
            found.ending = True
            self._on_ending(process)

    def _ended(self, host: str, process: messages.HostProcess) -> None:
        if self._known(host, process) is not None:
            del self.processes[process.rank, process.incarnation]
            self._on_ended(process, "")
            self._tell(host)
