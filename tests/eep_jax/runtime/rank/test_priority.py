"""Promises of a joiner's priority: lower from its start, full again once it says so."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

from eep_jax.runtime.rank import priority

JOINER = """
import sys
from eep_jax.runtime.rank import priority
for line in sys.stdin:
    print(priority.restore_priority(), flush=True)
"""
AUTOGROUPS = pathlib.Path("/proc/self/autogroup").exists()


@pytest.fixture
def started():
    """Starts a process that takes its priority back for each line it reads."""
    processes = []

    def start(**variables) -> subprocess.Popen:
        path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", JOINER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
                env=os.environ | path | variables,
            )
        )
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate(timeout=10)


def ask(process) -> str:
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def lowered(pid: int, nice: int) -> bool:
    """`priority.lower`, again: the kernel lets users, but for root, change one group in 100 ms."""
    tries = (priority.lower(pid, nice) or time.sleep(0.1) for _ in range(50 if AUTOGROUPS else 1))
    return any(tries)


@pytest.mark.timeout(60)
def test_a_process_is_lowered_and_takes_it_back(started):
    process = started(**{priority.LOWERED: "1"})
    assert lowered(process.pid, 7) is AUTOGROUPS
    if AUTOGROUPS:
        assert priority.nice_of(process.pid) == 7
        assert ask(process) == "True" and priority.nice_of(process.pid) == 0
        assert lowered(process.pid, 3) and ask(process) == "True"
        assert priority.nice_of(process.pid) == 3, "it was taken back once; this is another's doing"


@pytest.mark.timeout(60)
def test_a_process_that_no_launcher_lowered_changes_nothing(started):
    process = started()
    if priority.lower(process.pid, 4):
        assert ask(process) == "True" and priority.nice_of(process.pid) == 4


def test_only_the_session_of_its_own_leader_is_lowered():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert os.getsid(child.pid) != child.pid and not priority.lower(child.pid, 4)
    finally:
        child.communicate(b"\n", timeout=10)
    assert not priority.lower(child.pid, 4), "it is gone"
