"""A run directory has one owner; others are told who it is, and a dead one is followed at once."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest

from eep_jax.runtime.control import run_owner
from eep_jax.runtime.control.run_owner import LAUNCHER, RunTaken, check_free, claim

ROOT = pathlib.Path(__file__).parents[4]
DEADLINE_S = 60.0
OWN_AND_WAIT = """
import pathlib, sys, time
from eep_jax.runtime.control.run_owner import claim
mine = claim(pathlib.Path(sys.argv[1]))
print("owns", flush=True)
time.sleep(600)
"""


@pytest.fixture
def owner(tmp_path):
    """Another process that owns `tmp_path`."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWN_AND_WAIT, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout.readline() == "owns\n"
    yield process
    process.kill()
    process.wait(DEADLINE_S)
    process.stdout.close()


def changed(tmp_path, **fields) -> pathlib.Path:
    """Changes what the only owner's file says."""
    (path,) = tmp_path.glob("supervisor.owner.*")
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return path


def test_a_second_process_is_told_who_owns_it_and_where_that_serves(tmp_path, owner):
    endpoint = {"http_host": "10.0.0.1", "http_port": 8000}
    (tmp_path / "endpoint.json").write_text(json.dumps(endpoint))
    expected = rf"pid {owner.pid} on host .*serves at http://10\.0\.0\.1:8000; end that one first"
    with pytest.raises(RunTaken, match=expected):
        claim(tmp_path)
    with pytest.raises(RunTaken, match=expected):
        check_free(tmp_path)
    claim(tmp_path, LAUNCHER).release()  # a role of its own


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_next_owner_follows_a_dead_one_at_once_even_before_it_is_reaped(
    tmp_path, owner, number, monkeypatch
):
    monkeypatch.setattr(run_owner, "_beats", pytest.fail)
    owner.send_signal(number)
    mine = claim(tmp_path)
    assert mine.owner.term == 2
    assert [p.name for p in tmp_path.glob("*owner*")] == ["supervisor.owner.2"]


def test_a_stopped_process_owns_its_directory_still(tmp_path, owner):
    owner.send_signal(signal.SIGSTOP)
    with pytest.raises(RunTaken):
        claim(tmp_path)


def test_a_later_process_with_the_pid_of_the_owner_does_not_own(tmp_path, owner):
    changed(tmp_path, ticks=1)
    assert claim(tmp_path).owner.term == 2


def test_an_owner_on_another_host_is_known_by_its_heartbeat(tmp_path, owner):
    path, enough = changed(tmp_path, boot="another"), threading.Event()

    def beat():
        while not enough.wait(0.02):
            os.utime(path)

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(RunTaken):
            claim(tmp_path, silent_ms=int(DEADLINE_S * 1_000))
    finally:
        enough.set()
        beating.join()
    assert claim(tmp_path, silent_ms=100).owner.term == 2


def test_an_owner_that_was_taken_for_dead_steps_down_when_it_wakes_up(tmp_path, monkeypatch):
    monkeypatch.setattr(run_owner, "BEAT_MS", 0)
    former = claim(tmp_path)
    former.beat()
    path = changed(tmp_path, boot="another")
    newer = claim(tmp_path, silent_ms=50)
    assert not path.exists()
    with pytest.raises(RunTaken, match=rf"taken over by the supervisor with pid {os.getpid()}"):
        former.beat()
    newer.beat()
    former.release()
    newer.beat()


def test_it_steps_down_also_where_the_newer_owner_came_after_others_had_left(tmp_path, monkeypatch):
    """A released directory begins with the first term again, which the former owner had, too."""
    monkeypatch.setattr(run_owner, "BEAT_MS", 0)
    former = claim(tmp_path)
    former.path.unlink()
    changed_hands = claim(tmp_path)
    changed(tmp_path, pid=1)
    with pytest.raises(RunTaken):
        former.beat()
    former.release()
    assert changed_hands.path.exists(), "the file of another is left alone"


def test_an_owner_whose_file_was_removed_owns_on(tmp_path, monkeypatch):
    monkeypatch.setattr(run_owner, "BEAT_MS", 0)
    mine = claim(tmp_path)
    mine.path.unlink()
    mine.beat()
    with pytest.raises(RunTaken):
        claim(tmp_path)


def test_a_released_directory_is_free(tmp_path):
    for _ in range(3):
        claim(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}'])
def test_a_file_that_says_nothing_counts_as_of_another_host(tmp_path, text):
    (tmp_path / "supervisor.owner.7").write_text(text)
    assert claim(tmp_path, silent_ms=50).owner.term == 8


def test_without_room_the_next_owner_writes_over_the_file_of_the_last(tmp_path, owner, monkeypatch):
    owner.kill()
    write = run_owner._write

    def full(path, text, how):
        write(path, "", how)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_owner, "_write", full)
    mine = claim(tmp_path)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["supervisor.owner.2"]
    assert run_owner._read(tmp_path, "supervisor", 2) == mine.owner


def test_without_hard_links_a_term_is_created_exclusively(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    first = claim(tmp_path)
    with pytest.raises(FileExistsError):
        run_owner._create(tmp_path, "supervisor", first.owner, None)


RACE = """
import pathlib, sys
from eep_jax.runtime.control.run_owner import RunTaken, claim
sys.stdin.readline()
try:
    mine = claim(pathlib.Path(sys.argv[1]))
    print("owns", flush=True)
except RunTaken:
    print("refused", flush=True)
sys.stdin.readline()  # an owner lives until the test ends it
"""


def test_of_many_that_claim_at_once_one_wins(tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", RACE, str(tmp_path)]
    racers = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(6)]
    try:
        for racer in racers:
            racer.stdin.write("go\n")
        for racer in racers:
            racer.stdin.flush()
        said = sorted(racer.stdout.readline() for racer in racers)
        assert said == ["owns\n", *["refused\n"] * 5]
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()
