"""What happens to a run directory, its owner and its disk harms no rank and no request."""

import resource
import subprocess
import sys

import pytest

from launch.cluster import SUPERVISOR
from tests.support.processes import is_out

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(400)]


def processes_of(status: dict) -> list[tuple]:
    return [(rank["pid"], rank["incarnation"]) for rank in status["ranks"]]


@pytest.mark.parametrize("program", ["launch.local", "launch.supervise"])
def test_a_second_one_on_the_same_directory_ends_with_a_sentence_and_harms_nobody(cluster, program):
    before, run_dir = cluster.status(), cluster.cluster.run_dir
    files = {name: (run_dir / name).read_bytes() for name in ("endpoint.json", "token")}
    with cluster.load():
        done = subprocess.run(
            [sys.executable, "-m", program, "--port=0", f"--run_dir={run_dir}"],
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode in (1, 2)
    (line,) = (done.stdout + done.stderr).strip().splitlines()[-1:]
    assert f"{run_dir} is in use by the" in line and f"serves at {cluster.cluster.url};" in line
    assert "Traceback" not in done.stdout + done.stderr
    after = cluster.status()
    assert (processes_of(after), after["epoch"]) == (processes_of(before), before["epoch"])
    assert {name: (run_dir / name).read_bytes() for name in files} == files


def test_a_full_disk_ends_nothing_and_the_journal_goes_on_when_there_is_room(cluster):
    """No file may grow, of the supervisor and of every rank; then one rank dies all the same."""
    children = cluster.cluster.children
    limits = {
        name: resource.prlimit(child.process.pid, resource.RLIMIT_FSIZE, (0, -1))
        for name, child in children.items()
    }
    supervisor = children[SUPERVISOR].process.pid
    off = lambda s: any("the journal is off" in problem for problem in s["problems"])
    with cluster.load():
        cluster.wait(off, "a journal that is off")
        cluster.signal(1)
        cluster.wait(is_out(1), "an eviction without a disk")
        cluster.wait_whole()  # its new process is one with a disk
    assert off(cluster.status())
    for name, before in limits.items():
        if name != "rank1":
            resource.prlimit(children[name].process.pid, resource.RLIMIT_FSIZE, before)
    cluster.wait(lambda s: not off(s), "a journal that is written again")
    assert children[SUPERVISOR].process.pid == supervisor
    # The next supervisor knows all of it: no rank is turned away, none begins anew.
    before = cluster.wait_whole()
    cluster.cluster.kill(SUPERVISOR)
    restarted = lambda s: any(event["kind"] == "restarted" for event in s["events"])
    cluster.wait(restarted, "the next supervisor")
    assert processes_of(cluster.wait_whole()) == processes_of(before)
