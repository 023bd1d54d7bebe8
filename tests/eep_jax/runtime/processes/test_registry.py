"""Each question about a process goes to whoever watches its host."""

import signal

from eep_jax.runtime.control import messages
from eep_jax.runtime.control.identity import start_ticks
from eep_jax.runtime.control.server import Connection
from eep_jax.runtime.processes.local import LocalProcesses
from eep_jax.runtime.processes.registry import OWN_HOST, RankProcesses
from eep_jax.runtime.processes.remote import HostWatch
from tests.support.control_world import story
from tests.support.fake_rank import start_body


class Launcher(Connection):
    """One that called from host `b`, and what it was told."""

    hello = messages.HostHello(host="b", run="tiny")

    def __init__(self):
        self.told = []

    def send(self, message) -> None:
        self.told.append(message)


@story
async def test_processes_of_two_hosts_are_told_apart():
    body = start_body()
    here = LocalProcesses(lambda: 5, lambda process: None, lambda process: None)
    elsewhere = HostWatch("tiny", lambda: 5, lambda *_: None, lambda *_: None)
    processes, launcher = RankProcesses("a", here, elsewhere), Launcher()
    home = messages.HostProcess(rank=0, incarnation=1, pid=body.pid, ticks=start_ticks(body.pid))
    away = messages.HostProcess(rank=1, incarnation=3, pid=body.pid, ticks=home.ticks)
    try:
        assert processes.can_watch("a") and not processes.can_watch("b")
        elsewhere.on_message(launcher, launcher.hello)
        assert processes.can_watch("b") and not processes.can_watch("c")
        processes.watch("a", home), processes.watch("b", away)
        assert launcher.told[-1] == messages.Watch(processes=(away,))
        assert processes.known == [(OWN_HOST, home), ("b", away)]
        assert processes.knows("a", home) and processes.knows("b", away)
        assert not processes.knows("b", home) and not processes.knows("c", away)
        assert (processes.alive_ms(0, 1), processes.alive_ms(1, 3)) == (5, None)
        processes.kill(1, 3)
        assert launcher.told[-1] == messages.EndProcess(process=away)
        assert body.poll() is None, "the same pid of another host is another process"
        processes.kill(0, 1)
        assert body.wait(10) == -signal.SIGKILL
        elsewhere.on_message(launcher, messages.HostReport(ended=(away,)))
        assert processes.pid_of(1, 3) is None
    finally:
        here.close()
        body.kill()
        body.wait(10)
