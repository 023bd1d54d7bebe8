"""Processes of ranks on all hosts: local ones by pidfd, remote ones by their launchers."""

from eep_jax.runtime.control.messages import HostProcess
from eep_jax.runtime.processes.local import LocalProcesses
from eep_jax.runtime.processes.remote import HostWatch

OWN_HOST = ""  # the supervisor's, whose id another boot changes


class RankProcesses:
    """Routes each call to the watcher of the process's host."""

    def __init__(self, own_host: str, here: LocalProcesses, elsewhere: HostWatch):
        self._own_host, self._here, self._elsewhere = own_host, here, elsewhere

    def can_watch(self, host: str) -> bool:
        """Whether the end of a process on this host would be seen."""
        return host == self._own_host or self._elsewhere.has_launcher(host)

    def watch(self, host: str, process: HostProcess) -> None:
        """Watches a process; its end is reported once. Idempotent."""
        if self.named(host) == OWN_HOST:
            self._here.watch(process)
        else:
            self._elsewhere.watch(host, process)

    def kill(self, rank: int, incarnation: int) -> None:
        """Sends SIGKILL to exactly this process; does nothing if it has ended."""
        self._here.kill(rank, incarnation)
        self._elsewhere.kill(rank, incarnation)

    @property
    def known(self) -> list[tuple[str, HostProcess]]:
        """(host, process) pairs: at least the newest process of each rank that has not ended."""
        elsewhere = [(found.host, found.process) for found in self._elsewhere.processes.values()]
        return [*((OWN_HOST, process) for process in self._here.known), *elsewhere]

    def knows(self, host: str, process: HostProcess) -> bool:
        """Whether this process was admitted and is still in `known`."""
        return (self.named(host), process) in self.known

    def named(self, host: str) -> str:
        """OWN_HOST for the supervisor's host, else `host`: the form of `known` and the journal."""
        return OWN_HOST if host == self._own_host else host

    def pid_of(self, rank: int, incarnation: int) -> int | None:
        """The pid on the process's own host; None if the process has ended or is unknown."""
        found = self._elsewhere.processes.get((rank, incarnation))
        return self._here.pid_of(rank, incarnation) if found is None else found.process.pid

    def alive_ms(self, rank: int, incarnation: int) -> int | None:
        """Time when the process was last seen running; None for remote processes."""
        return self._here.alive_ms(rank, incarnation)
