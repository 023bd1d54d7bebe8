"""A process is told apart from another that got its pid later."""

import os
import signal
import subprocess
import sys

import pytest

from eep_jax.runtime.control.identity import (
    boot_id,
    is_ending,
    kill_process,
    open_process,
    start_ticks,
)
from tests.support.waiting import is_readable

DEADLINE_S = 10.0


@pytest.fixture
def child():
    command = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    process = subprocess.Popen(command)
    yield process
    process.kill()
    process.wait(DEADLINE_S)


def has_ended(pidfd: int) -> bool:
    return is_readable(pidfd, DEADLINE_S)


def test_processes_of_one_machine_share_a_boot_id():
    code = "from eep_jax.runtime.control.identity import boot_id; print(boot_id())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert found.stdout.strip() == boot_id()


def test_the_start_of_a_process_never_changes(child):
    ticks = start_ticks(child.pid)
    assert ticks > 0 and start_ticks(child.pid) == ticks
    assert start_ticks(os.getpid()) <= ticks


def test_a_killed_process_is_ending_before_anybody_waits_for_it(child):
    assert not is_ending(child.pid) and not is_ending(os.getpid())
    pidfd = open_process(child.pid, start_ticks(child.pid))
    child.kill()
    assert has_ended(pidfd)
    assert is_ending(child.pid)  # a zombie: its parent has not asked yet
    child.wait(DEADLINE_S)
    assert is_ending(child.pid)
    os.close(pidfd)


def test_a_stopped_process_is_not_ending(child):
    os.kill(child.pid, signal.SIGSTOP)
    assert not is_ending(child.pid)


def test_there_is_no_start_without_a_process(child):
    child.kill()
    child.wait(DEADLINE_S)
    assert start_ticks(child.pid) == 0


def test_a_command_name_with_brackets_and_spaces_confuses_nothing(tmp_path):
    program = tmp_path / "a) 1 (b"
    program.symlink_to(sys.executable)
    process = subprocess.Popen([program, "-S", "-c", "import time; time.sleep(60)"])
    try:
        assert start_ticks(process.pid) >= start_ticks(os.getpid())
    finally:
        process.kill()
        process.wait(DEADLINE_S)


def test_the_end_is_seen_by_whoever_holds_the_pidfd(child):
    pidfd = open_process(child.pid, start_ticks(child.pid))
    kill_process(pidfd)
    assert has_ended(pidfd)
    kill_process(pidfd)  # harmless
    os.close(pidfd)


def test_a_process_that_started_at_another_time_is_not_opened(child):
    assert open_process(child.pid, start_ticks(child.pid) + 1) is None


def test_a_process_that_is_gone_is_not_opened(child):
    ticks = start_ticks(child.pid)
    child.kill()
    child.wait(DEADLINE_S)
    assert open_process(child.pid, ticks) is None


def test_who_lacks_descriptors_to_look_with_takes_nobody_for_dead():
    """A full server must not evict its ranks: what it cannot see is not gone."""
    code = """
import os, resource
from eep_jax.runtime.control.identity import is_ending, open_process, start_ticks
pid = os.getppid()
ticks = start_ticks(pid)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
taken = []
try:
    while True:
        taken.append(os.dup(0))
except OSError:
    pass
for look in (lambda: start_ticks(pid), lambda: open_process(pid, ticks)):
    for spare in (0, 1):  # for the pidfd, or for what is read after it was opened
        closed = [os.close(taken.pop()) for _ in range(spare)]
        try:
            found = look()
            assert found == ticks, found
        except OSError as error:
            print(error.strerror)
        taken += [os.dup(0) for _ in closed]
print(is_ending(pid), is_ending(os.getpid()))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["Too many open files"] * 3 + ["False False"]
