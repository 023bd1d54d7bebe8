"""The processes of ranks on all hosts: those of this one are watched here, others by launchers."""

from eep_jax.runtime.control.messages import HostProcess
from eep_jax.runtime.processes.local import LocalProcesses
from eep_jax.runtime.processes.remote import HostWatch

OWN_HOST = ""  # the supervisor's, whose id another boot changes


class RankProcesses:
    """Takes each question about a process to whoever watches its host."""

    def __init__(self, own_host: str, here: LocalProcesses, elsewhere: HostWatch):
        self._own_host, self._here, self._elsewhere = own_host, here, elsewhere

    def can_watch(self, host: str) -> bool:
        """Whether the end of a process there would be seen."""
        return host == self._own_host or self._elsewhere.has_launcher(host)

    def watch(self, host: str, process: HostProcess) -> None:
        """Has its end reported, once; harmless when repeated."""
        if self.named(host) == OWN_HOST:
            self._here.watch(process)
        else:
            self._elsewhere.watch(host, process)

    def kill(self, rank: int, incarnation: int) -> None:
        """SIGKILL to exactly that process; nothing if it has ended."""
        self._here.kill(rank, incarnation)
        self._elsewhere.kill(rank, incarnation)

    @property
    def known(self) -> list[tuple[str, HostProcess]]:
        """(host, process), the newest of each rank among them, but for some that have ended."""
        elsewhere = [(found.host, found.process) for found in self._elsewhere.processes.values()]
        return [*((OWN_HOST, process) for process in self._here.known), *elsewhere]

    def knows(self, host: str, process: HostProcess) -> bool:
        """Whether this very process was let in, and is not known to have ended long ago."""
        return (self.named(host), process) in self.known

    def named(self, host: str) -> str:
        """`host`, or OWN_HOST for the supervisor's: as `known` and the journal name it."""
        return OWN_HOST if host == self._own_host else host

    def pid_of(self, rank: int, incarnation: int) -> int | None:
        """As the process's own host counts, or None if it is not known to live."""
        found = self._elsewhere.processes.get((rank, incarnation))
        return self._here.pid_of(rank, incarnation) if found is None else found.process.pid

    def alive_ms(self, rank: int, incarnation: int) -> int | None:
        """When it was last seen not to be ending; None where nobody looks that often."""
        return self._here.alive_ms(rank, incarnation)
