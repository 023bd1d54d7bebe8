"""Promises of scratch directories: private, and gone with their process, however that ends."""

import os
import pathlib
import signal
import stat
import subprocess
import sys
import time

import pytest

from eep_jax.runtime.rank import scratch_dir
from eep_jax.runtime.rank.scratch_dir import open_scratch, sweep

PROGRAM = """
import pathlib, sys, time
from eep_jax.runtime.rank.scratch_dir import open_scratch
print(open_scratch(pathlib.Path(sys.argv[1]), "test").path, flush=True)
time.sleep(60)
"""


def wait_until_gone(path, deadline_s=10.0):
    ends_s = time.monotonic() + deadline_s
    while path.exists():
        assert time.monotonic() < ends_s, f"{path} is left behind"
        time.sleep(0.01)


@pytest.fixture
def child(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    path = tmp_path / process.stdout.readline().strip()
    (path / "file").write_text("x")
    yield process, path
    process.kill()
    process.wait(10)


def test_it_is_for_this_user_alone(tmp_path):
    found = open_scratch(tmp_path, "test")
    assert stat.S_IMODE(found.path.stat().st_mode) == 0o700
    found.close()
    wait_until_gone(found.path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_leaves_nothing(child, number):
    process, path = child
    process.send_signal(number)
    process.wait(10)
    wait_until_gone(path)


def test_it_can_be_kept_and_removed_at_once(tmp_path):
    kept, removed = open_scratch(tmp_path, "test"), open_scratch(tmp_path, "test")
    kept.keep()
    removed.remove()
    assert not removed.path.exists()
    (name,) = {p.name for p in tmp_path.iterdir()}
    gone = kept.path.with_name(name.replace(f"-{os.getpid()}-", "-1-"))  # its process is another
    kept.path.rename(gone)
    with scratch_dir.scratch(tmp_path, "test") as path:  # sweeps
        assert gone.exists() and path.is_dir()
    assert list(tmp_path.iterdir()) == [gone]


def test_a_signal_to_all_processes_of_a_job_leaves_nothing_either(child):
    process, path = child
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    (helper,) = map(int, children.read_text().split())
    ends_s = time.monotonic() + 10.0
    while not ignores(helper, signal.SIGTERM):  # it has only just begun
        assert time.monotonic() < ends_s
        time.sleep(0.01)
    for pid in (helper, process.pid):
        os.kill(pid, signal.SIGTERM)
    process.wait(10)
    wait_until_gone(path)


def ignores(pid: int, number: int) -> bool:
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.partition("SigIgn:")[2].split()[0], 16) >> (number - 1) & 1)


def test_another_process_sweeps_only_what_the_dead_left(tmp_path, child, monkeypatch):
    _, living = child
    ended = tmp_path / f"eep-test-{scratch_dir._boot()}-{os.getpid()}-1-abc"
    elsewhere = tmp_path / f"eep-test-0123456789ab-{os.getpid()}-1-abc"
    other = tmp_path / "eep-something-else"
    for path in (ended, elsewhere, other):
        path.mkdir()
    sweep(tmp_path)
    assert not ended.exists()
    assert living.exists() and elsewhere.exists() and other.exists()


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path):
    with pytest.raises(OSError):
        open_scratch(tmp_path / "missing", "test")
