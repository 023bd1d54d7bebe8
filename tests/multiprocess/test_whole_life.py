"""Costs of an idle run, and its leftovers when it has ended."""

import os
import pathlib
import signal
import stat
import subprocess
import sys
import time

import pytest

from tests.support.processes import RANKS, WHOLE_S, ClusterUnderTest

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(400)]


def processor_seconds(pid: int) -> float:
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_an_idle_cluster_leaves_the_cores_alone(cluster):
    cluster.wait(lambda s: s["requests"]["running"] == 0, "an idle cluster")
    time.sleep(0.5)
    pids = [cluster.pid(rank) for rank in range(RANKS)]
    before, started = sum(map(processor_seconds, pids)), time.monotonic()
    time.sleep(3)
    share = (sum(map(processor_seconds, pids)) - before) / (time.monotonic() - started)
    assert share < 0.5, f"{RANKS} idle ranks use {share:.2f} cores"


def test_every_rank_of_an_idle_cluster_wakes_for_one_request(cluster):
    cluster.wait(lambda s: s["requests"]["running"] == 0, "an idle cluster")
    steps = [r["steps"] for r in cluster.status()["ranks"]]
    body = {"model": "tiny-moe-kjv", "prompt": "And", "max_tokens": 20, "temperature": 0}
    status, answer = cluster.run(cluster.post(body))
    assert status == 200
    assert answer["usage"]["completion_tokens"] == 20
    cluster.wait(
        lambda s: all(
            r["steps"] >= before + 20 for r, before in zip(s["ranks"], steps, strict=True)
        ),
        "every rank to have stepped",
    )


def launcher_in(directory: pathlib.Path, *flags: str) -> subprocess.Popen:
    """A launcher that makes its run directory in this one."""
    return subprocess.Popen(
        [sys.executable, "-m", "launch.local", "--config=tiny_cpu", "--port=0", *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"TMPDIR": str(directory)},
        # A test run under nohup ignores the end of its terminal, and so would this.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )


def test_nothing_is_left_behind_when_the_terminal_is_closed(tmp_path):
    launcher = launcher_in(tmp_path)
    try:
        ends_s = time.monotonic() + WHOLE_S
        while len(mentioning(tmp_path)) < RANKS + 2 and time.monotonic() < ends_s:
            time.sleep(0.02)
        (run_dir,) = tmp_path.glob("eep-run-*")
        assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
        others = [p for p in run_dir.rglob("*") if stat.S_IMODE(p.stat().st_mode) & 0o077]
        assert others == [], "nothing is for the eyes of others"
        launcher.send_signal(signal.SIGHUP)
        assert launcher.wait(60) == 0
    finally:
        launcher.kill()
        launcher.wait(10)
    assert mentioning(tmp_path) == [] and os.listdir(tmp_path) == []


def test_nothing_is_left_behind_even_if_the_launcher_is_killed(tmp_path):
    memory = tmp_path / "memory"
    memory.mkdir()
    launcher = launcher_in(tmp_path, f"--override=cluster.backup_dir={memory}")
    try:
        ends_s = time.monotonic() + WHOLE_S
        while len(mentioning(tmp_path)) < RANKS + 2 and time.monotonic() < ends_s:
            time.sleep(0.02)
        assert len(mentioning(tmp_path)) >= RANKS + 2
        while len(os.listdir(memory)) < RANKS and time.monotonic() < ends_s:
            time.sleep(0.02)
        assert len(os.listdir(memory)) == RANKS
    finally:
        launcher.kill()
        launcher.wait(10)
    ends_s = time.monotonic() + WHOLE_S
    left = lambda: [*os.listdir(memory), *tmp_path.glob("eep-*")]
    while (mentioning(tmp_path) or left()) and time.monotonic() < ends_s:
        time.sleep(0.02)
    assert mentioning(tmp_path) == []
    assert left() == [], "neither what a process kept in memory, nor token and prompts"


def test_per_rank_combine_serves_too(tmp_path):
    """Its sums depend on the placement, so completions are only asked to be complete."""
    with ClusterUnderTest(tmp_path, "engine.combine=per_rank") as cluster:
        assert all(result.finish_reason == "length" for result in cluster.truth)


def mentioning(run_dir: pathlib.Path) -> list[int]:
    """Processes whose command line names this run directory."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if str(run_dir).encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue  # it ended while we looked
    return found
