"""Accidents of a run directory, its owner and its disk harm no rank and no request."""

import os
import resource
import signal
import subprocess
import sys
import time

import aiohttp
import pytest

from launch.cluster import SUPERVISOR
from tests.support.processes import EVENT_S, RANKS, is_out

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(400)]


def processes_of(status: dict) -> list[tuple]:
    return [(rank["pid"], rank["incarnation"]) for rank in status["ranks"]]


def limited(pid: int, kind: int, most: int) -> tuple[int, int]:
    """Limits a running process; returns its limits before."""
    before = resource.prlimit(pid, kind)
    resource.prlimit(pid, kind, (most, before[1]))
    return before


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
        name: limited(child.process.pid, resource.RLIMIT_FSIZE, 0)
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


def test_health_is_false_while_all_ranks_are_frozen_and_true_again_by_itself(cluster):
    async def health() -> int:
        async with (
            aiohttp.ClientSession() as session,
            session.get(cluster.cluster.url + "/health") as answer,
        ):
            return answer.status

    def until(status: int) -> None:
        ends_s = time.monotonic() + EVENT_S
        while cluster.run(health()) != status:
            assert time.monotonic() < ends_s, f"health is not {status}"
            time.sleep(0.02)

    until(200)
    for rank in range(RANKS):
        cluster.signal(rank, signal.SIGSTOP)
    try:
        until(503)
    finally:
        for rank in range(RANKS):
            cluster.signal(rank, signal.SIGCONT)
    until(200)


def test_a_death_while_no_file_descriptor_is_left_is_settled_without_a_trace_in_the_log(cluster):
    supervisor, log = (
        cluster.cluster.children[SUPERVISOR].process.pid,
        cluster.cluster.log_path(SUPERVISOR),
    )
    written, used = log.stat().st_size, len(os.listdir(f"/proc/{supervisor}/fd"))
    before = cluster.status()
    limit = limited(supervisor, resource.RLIMIT_NOFILE, used)
    try:
        cluster.signal(2)
        ends_s = time.monotonic() + EVENT_S
        while b"dead {'rank': 2" not in log.read_bytes()[written:]:
            assert time.monotonic() < ends_s, "its death was not seen"
            time.sleep(0.02)
        time.sleep(0.5)  # its successor calls, and there is no room for it
    finally:
        resource.prlimit(supervisor, resource.RLIMIT_NOFILE, limit)
    after = cluster.wait_whole()
    assert after["ranks"][2]["incarnation"] == before["ranks"][2]["incarnation"] + 1
    assert cluster.cluster.children[SUPERVISOR].process.pid == supervisor
    assert b"Traceback" not in log.read_bytes()[written:]
