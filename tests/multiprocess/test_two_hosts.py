"""Two hosts that are two network namespaces: a supervisor and ranks 0, 1 on one, 2, 3 on the other.

Between them there is nothing but a cable, which is cut: no shared memory, no run directory.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import time

import pytest

from tests.support.netns import ADDRESSES, a_cable, why_not
from tests.support.processes import MODEL, RANKS, incarnation, is_out, jobs

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(400)]

HOME, AWAY = 0, 1
START_S, EVENT_S, ANSWER_S = 150.0, 90.0, 90.0
CONTROL_PORT, HTTP_PORT = 7777, 8000
JOBS = [job | {"seed": job.get("seed", 1)} for job in jobs(max_tokens=32)[::3]]


class TwoHosts:
    """The processes of both hosts, and what a client on the supervisor's host sees."""

    def __init__(self, cable, directory):
        self.cable, self._directory = cable, directory
        self._environment = os.environ | {"EEP_TOKEN": secrets.token_urlsafe(24)}
        self._processes: list[subprocess.Popen] = []

    def __enter__(self) -> "TwoHosts":
        try:
            http = (f"--host={ADDRESSES[HOME]}", f"--port={HTTP_PORT}")
            self._start(HOME, "supervisor", "launch.supervise", *http)
            for side, ranks in ((HOME, "0,1"), (AWAY, "2,3")):
                flags = (f"--ranks={ranks}", "--mirror_host=auto", "--rank_respawn_delay_ms=200")
                self._start(side, f"host{side}", "launch.node", *flags)
            self.wait(is_whole, "both hosts to serve", START_S)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)

    def _start(self, side: int, name: str, module: str, *flags: str) -> None:
        run_dir = self._directory / name
        run_dir.mkdir()
        address = f"--supervisor={ADDRESSES[HOME]}:{CONTROL_PORT}"
        command = [sys.executable, "-m", module, "--config=tiny_cpu", address, *flags]
        with (self._directory / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                self.cable.command(side, [*command, f"--run_dir={run_dir}"]),
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._processes.append(process)

    def _ask(self, path: str, body: dict | None, timeout_s: float) -> subprocess.Popen:
        """curl, inside the supervisor's namespace."""
        url = f"http://{ADDRESSES[HOME]}:{HTTP_PORT}{path}"
        command = ["curl", "-s", "-m", str(timeout_s), url]
        command += [] if body is None else ["-d", json.dumps(body)]
        return subprocess.Popen(self.cable.command(HOME, command), stdout=subprocess.PIPE)

    def status(self) -> dict | None:
        answer = self._ask("/v1/fault_tolerance/status", None, 5).communicate(timeout=20)[0]
        return json.loads(answer) if answer else None

    def wait(self, wanted, what: str, deadline_s: float = EVENT_S) -> dict:
        ends_s = time.monotonic() + deadline_s
        while time.monotonic() < ends_s:
            status = self.status()
            if status is not None and wanted(status):
                return status
            time.sleep(0.05)
        raise AssertionError(f"{what} did not happen; logs are in {self._directory}: {status}")

    def begin(self) -> list[subprocess.Popen]:
        """Completions on their way, more than one host alone would be given."""
        return [self._ask("/v1/completions", job, ANSWER_S) for job in JOBS]

    def texts(self, running: list[subprocess.Popen]) -> list[str]:
        answers = [json.loads(p.communicate(timeout=ANSWER_S + 10)[0]) for p in running]
        return [answer["choices"][0]["text"] for answer in answers]


def is_whole(status: dict) -> bool:
    return status["state"] == "serving" and all(
        r["state"] == "active" and r["mode"] == "serving" for r in status["ranks"]
    )


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    if reason := why_not():
        assert os.geteuid() != 0 or "ip netns add" in reason, reason
        pytest.skip(reason)
    with a_cable() as cable, TwoHosts(cable, tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


def test_the_hosts_are_two(hosts):
    found = [r["host"] for r in hosts.status()["ranks"]]
    assert len(found) == RANKS and found[0] == found[1] != found[2] == found[3]


def test_completions_are_those_of_one_host(hosts, running):
    """`running` is the cluster on one host, which the other tests of this folder break."""
    running.wait_whole()
    local = [running.run(running.post(job)) for job in JOBS]
    assert all(job["model"] == MODEL for job in JOBS)
    texts = hosts.texts(hosts.begin())
    assert texts == [answer["choices"][0]["text"] for _, answer in local]


def test_a_rank_of_the_other_host_is_killed_and_comes_back(hosts):
    before, truth = hosts.status(), hosts.texts(hosts.begin())
    load = hosts.begin()
    os.kill(before["ranks"][3]["pid"], signal.SIGKILL)  # pids are those of one machine
    after = hosts.wait(is_out(3, incarnation(before, 3)), "the eviction of rank 3")
    dead = [e for e in after["events"] if e["kind"] == "dead"][-1]
    assert dead["rank"] == 3 and "its process" in dead["reason"], "its launcher saw it"
    assert hosts.texts(load) == truth
    after = hosts.wait(is_whole, "the return of rank 3")
    assert incarnation(after, 3) == incarnation(before, 3) + 1
    assert hosts.texts(hosts.begin()) == truth


def test_a_cut_cable_leaves_the_supervisors_side_serving_and_the_other_returns(hosts):
    before, truth = hosts.status(), hosts.texts(hosts.begin())
    load = hosts.begin()
    hosts.cable.cut()
    try:
        hosts.wait(
            lambda s: (
                s["state"] == "serving" and all(s["ranks"][r]["state"] == "absent" for r in (2, 3))
            ),
            "the eviction of the other host",
        )
        assert hosts.texts(load) == truth, "requests of the lost ranks went to the others"
        assert hosts.texts(hosts.begin()) == truth
    finally:
        hosts.cable.mend()
    after = hosts.wait(is_whole, "the return of the other host")
    for rank in range(RANKS):
        returned = incarnation(after, rank) - incarnation(before, rank)
        assert returned == (1 if rank in (2, 3) else 0)
    counts = {r["rank"]: r["compilations_after_start"] for r in after["ranks"] if r["rank"] < 2}
    assert counts == {0: 0, 1: 0}
    assert hosts.texts(hosts.begin()) == truth
    repairs = [e for e in hosts.status()["events"] if e["kind"] == "repair"]
    returns = [e["bytes"] for e in repairs if e["change"] == "admission"]
    assert any("peer" in read for read in returns), "experts come out of banks of the other host"
