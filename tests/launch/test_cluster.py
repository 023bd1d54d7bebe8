"""The launcher restarts processes, gives up with a reason, and leaves no process behind."""

import asyncio
import contextlib
import json
import os
import pathlib
import signal
import stat
import subprocess
import sys
import tempfile
import time

import pytest
from aiohttp import web

from eep_jax.config import ClusterConfig
from eep_jax.errors import RunDirError
from eep_jax.runtime.control import run_owner
from eep_jax.runtime.rank.priority import nice_of
from launch import cluster as cluster_module
from launch.cluster import (
    DELAY_MAX_MS,
    GIVE_UP_AFTER,
    SUPERVISOR,
    Child,
    ClusterFailed,
    LocalCluster,
    is_whole,
    rank_name,
)
from tests.support.waiting import is_readable

DEADLINE_S = 20.0
ROOT = pathlib.Path(__file__).parents[2]
SLEEP = "import time; time.sleep(60)"


class ScriptedCluster(LocalCluster):
    """Its processes run these lines of Python instead: `scripts[name]`, else they sleep."""

    def __init__(self, run_dir, ranks: int = 2, respawn_delay_ms: int = 10, **scripts: str):
        super().__init__([], ranks, run_dir and str(run_dir), respawn_delay_ms)
        self.scripts = scripts

    def _command(self, name: str) -> list[str]:
        return [sys.executable, "-S", "-u", "-c", self.scripts.get(name, SLEEP)]

    def pid(self, name: str) -> int:
        return self.children[name].process.pid


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # also for run_dir=None
    made = []

    def make(run_dir=tmp_path / "run", **options) -> ScriptedCluster:
        made.append(ScriptedCluster(run_dir, **options))
        return made[-1]

    yield make
    for cluster in made:
        for child in cluster.children.values():
            child.process.kill()
            child.process.wait(DEADLINE_S)


async def watched(cluster: LocalCluster, condition) -> None:
    """Watches the cluster until `condition()` holds."""
    watch = asyncio.create_task(cluster.watch())
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                await asyncio.sleep(0.01)
    finally:
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)


def has_ended(pidfd: int) -> bool:
    return is_readable(pidfd, DEADLINE_S)


class TestStart:
    def test_a_supervisor_and_every_rank_run_with_a_log_each(self, scripted):
        cluster = scripted(rank1="print('it is one')")
        cluster.start()
        assert set(cluster.children) == {SUPERVISOR, "rank0", "rank1"}
        cluster.children["rank1"].process.wait(DEADLINE_S)
        assert cluster.log_tail("rank1") == "it is one"
        assert cluster.log_tail("rank0") == ""

    def test_processes_get_the_flags_the_run_directory_and_their_rank(self, tmp_path):
        cluster = LocalCluster(["--config=tiny_cpu"], 2, str(tmp_path), -1)
        for name, module in ((SUPERVISOR, "launch.supervise"), ("rank1", "launch.rank")):
            command = cluster._command(name)
            assert command[:3] == [sys.executable, "-m", module]
            assert {f"--run_dir={tmp_path}", f"--parent_pid={os.getpid()}"} <= set(command)
            assert "--config=tiny_cpu" in command
            assert ("--rank=1" in command) == (name == "rank1")
            assert not any("token" in word for word in command)

    def test_the_token_is_new_secret_and_kept_over_a_restart(self, tmp_path):
        first = LocalCluster([], 1, str(tmp_path), -1)
        path = first.run_dir / "token"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        token = path.read_text()
        assert len(token) >= 32
        LocalCluster([], 1, str(tmp_path), -1)
        assert path.read_text() == token

    def test_only_a_process_that_returns_is_put_behind_those_that_serve(self, scripted):
        told = "import os; print(os.environ.get('EEP_PRIORITY_LOWERED'));" + SLEEP
        cluster = scripted(rank0=told, rank1=told)
        cluster.start()
        cluster.children["rank1"].process.kill()
        cluster.children["rank1"].process.wait(DEADLINE_S)
        cluster.start_rank(1)
        wanted = {SUPERVISOR: 0, "rank0": 0, "rank1": ClusterConfig.joiner_nice}
        with contextlib.suppress(FileNotFoundError):  # of a kernel without autogroups
            assert {name: nice_of(cluster.pid(name)) for name in wanted} == wanted
        ends_s = time.monotonic() + DEADLINE_S
        while not cluster.log_tail("rank1").endswith("1") and time.monotonic() < ends_s:
            time.sleep(0.01)
        assert cluster.log_tail("rank1").endswith("1"), "it knows what to take back"
        assert cluster.log_tail("rank0") in ("", "None")


class TestWatch:
    def test_a_killed_rank_comes_back_as_another_process(self, scripted):
        cluster = scripted()
        cluster.start()
        before = cluster.pid("rank1")
        others = cluster.pid("rank0"), cluster.pid(SUPERVISOR)
        at_s = cluster.kill("rank1")
        asyncio.run(watched(cluster, lambda: cluster.pid("rank1") != before))
        assert (cluster.pid("rank0"), cluster.pid(SUPERVISOR)) == others
        (exit_s, name, status) = cluster.exits[0]
        assert (name, status) == ("rank1", -signal.SIGKILL) and exit_s >= at_s

    def test_with_a_negative_delay_only_on_request(self, scripted):
        cluster = scripted(respawn_delay_ms=-1)
        cluster.start()
        before, supervisor = cluster.pid("rank0"), cluster.pid(SUPERVISOR)
        cluster.kill("rank0"), cluster.kill(SUPERVISOR)
        # The supervisor comes back in any case, and by then the rank would have, too.
        asyncio.run(watched(cluster, lambda: cluster.pid(SUPERVISOR) != supervisor))
        assert cluster.pid("rank0") == before
        cluster.start_rank(0)
        assert cluster.pid("rank0") != before

    def test_each_quick_death_doubles_the_delay_up_to_a_maximum(self, tmp_path, monkeypatch):
        clock = FakeTime()
        monkeypatch.setattr(cluster_module, "time", clock)
        cluster, delays = ScriptedCluster(tmp_path, respawn_delay_ms=1_000), []
        cluster.was_healthy = True
        for deaths in range(8):
            child = Child("rank0", Dead(1), clock.now_s, quick_deaths=deaths)
            cluster._look_after(child)
            delays.append((child.restart_at_s - clock.now_s) * 1_000)
        assert delays[:4] == pytest.approx([1_000, 2_000, 4_000, 8_000])
        assert delays[-1] == pytest.approx(DELAY_MAX_MS)

    def test_a_process_that_lived_long_returns_without_a_longer_delay(self, tmp_path, monkeypatch):
        clock = FakeTime()
        monkeypatch.setattr(cluster_module, "time", clock)
        cluster = ScriptedCluster(tmp_path, respawn_delay_ms=1_000)
        child = Child("rank0", Dead(-9), clock.now_s - 60.0, quick_deaths=2)
        cluster._look_after(child)
        assert child.quick_deaths == 0
        assert child.restart_at_s - clock.now_s == pytest.approx(1.0)


class FakeTime:
    """Stands still."""

    now_s = 1_000.0

    def monotonic(self) -> float:
        return self.now_s


class Dead:
    """A process that has ended."""

    def __init__(self, status: int):
        self._status = status

    def poll(self) -> int:
        return self._status


class TestLack:
    def test_a_process_that_cannot_be_started_now_is_started_later(self, scripted, monkeypatch):
        cluster, reported, popen = scripted(respawn_delay_ms=1), [], subprocess.Popen
        cluster.report, cluster.was_healthy = reported.append, True
        monkeypatch.setattr(cluster_module, "SPAWN_RETRY_S", 0.01)
        cluster.start()
        before = cluster.pid("rank1")

        def lacking(*_, **__):
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(subprocess, "Popen", lacking)
        cluster.kill("rank1")
        asyncio.run(watched(cluster, lambda: len(reported) >= 3))
        assert reported[1] == "rank1 cannot be started now: Too many open files; trying again"
        monkeypatch.setattr(subprocess, "Popen", popen)
        asyncio.run(watched(cluster, lambda: cluster.pid("rank1") != before))

    def test_a_process_whose_log_cannot_be_opened_runs_without(self, scripted):
        cluster, reported = scripted(), []
        cluster.report = reported.append
        (cluster.run_dir / "logs" / "rank0.log").mkdir()
        cluster.start()
        assert cluster.children["rank0"].process.poll() is None
        assert reported == [f"rank0 has no log: {cluster.log_path('rank0')}: Is a directory"]
        assert cluster.last_words(cluster.children["rank0"]) == ""


class TestOwner:
    def test_a_launcher_believes_only_its_own_supervisor(self, scripted):
        cluster = scripted()
        cluster.start()
        endpoint = {"http_host": "127.0.0.1", "http_port": 1, "pid": os.getpid()}
        (cluster.run_dir / "endpoint.json").write_text(json.dumps(endpoint))
        with pytest.raises(ConnectionError, match="has not written its address yet"):
            _ = cluster.url
        endpoint["pid"] = cluster.pid(SUPERVISOR)
        (cluster.run_dir / "endpoint.json").write_text(json.dumps(endpoint))
        assert cluster.url == "http://127.0.0.1:1"

    def test_a_second_one_starts_no_process(self, scripted):
        first, second = scripted(), scripted()
        first.start()
        with pytest.raises(RunDirError, match=f"in use by the launcher with pid {os.getpid()}"):
            second.start()
        assert second.children == {}
        first.stop(timeout_s=0.4)
        second.start()

    def test_one_that_was_replaced_gives_up_with_the_reason(self, scripted, monkeypatch):
        monkeypatch.setattr(run_owner, "BEAT_MS", 0)
        cluster = scripted()
        cluster.start()
        (path,) = cluster.run_dir.glob("launcher.owner.*")
        path.rename(path.with_suffix(".9"))
        asyncio.run(watched(cluster, lambda: cluster.failure))
        assert "was taken over by the launcher" in cluster.failure

    def test_without_processes_the_start_fails_in_a_sentence(self, scripted, monkeypatch):
        def lacking(*_, **__):
            raise OSError(11, "Resource temporarily unavailable")

        monkeypatch.setattr(subprocess, "Popen", lacking)
        cluster = scripted()
        with pytest.raises(ClusterFailed, match=r"supervisor cannot be started: .*unavailable"):
            cluster.start()
        cluster.stop()
        assert list(cluster.run_dir.glob("*.owner.*")) == []


class TestGivingUp:
    def test_a_rank_that_never_lives_ends_the_start_with_its_last_words(self, scripted):
        cluster = scripted(rank0="import sys; sys.exit('no weights')", respawn_delay_ms=1)

        async def story():
            watch = asyncio.create_task(cluster.watch())
            try:
                await cluster.wait_for(lambda s: True, DEADLINE_S, "the start", poll_ms=10)
            finally:
                await asyncio.wait_for(watch, DEADLINE_S)

        cluster.start()
        with pytest.raises(ClusterFailed, match="rank0 ended with status 1:") as caught:
            asyncio.run(story())
        assert "no weights" in str(caught.value)
        assert [name for _, name, _ in cluster.exits] == ["rank0"] * GIVE_UP_AFTER

    def test_an_error_of_usage_is_not_tried_again(self, scripted):
        cluster = scripted(supervisor="import sys; print('use --port'); sys.exit(2)")
        cluster.start()
        asyncio.run(watched(cluster, lambda: cluster.failure))
        assert cluster.failure.startswith("supervisor ended with status 2:")
        assert "use --port" in cluster.failure
        assert len(cluster.exits) == 1

    def test_every_end_is_reported_with_its_reason_and_consequence(self, scripted):
        said = """
import os, sys
print(f"3 W agent: process {os.getpid()} is ending: the disk is full")
print("4 W agent: rank 1 is ending: error: process 1 is ending: it slept")
sys.exit(75)"""
        cluster, reported = scripted(rank0=said, respawn_delay_ms=1), []
        cluster.report, cluster.was_healthy = reported.append, True
        cluster.start()
        asyncio.run(watched(cluster, lambda: len(reported) >= 2))
        ended = "rank0 ended with status 75: the disk is full; it starts again in "
        assert reported[:2] == [ended + "0.001 s", ended + "0.002 s"]

    def test_once_healthy_it_never_gives_up(self, scripted):
        cluster = scripted(rank0="import sys; sys.exit(2)", respawn_delay_ms=1)
        cluster.was_healthy = True
        cluster.start()
        asyncio.run(watched(cluster, lambda: len(cluster.exits) > GIVE_UP_AFTER))
        assert cluster.failure is None

    def test_what_does_not_happen_in_time_names_the_logs_and_keeps_them(self, scripted):
        cluster = scripted(run_dir=None)
        with pytest.raises(ClusterFailed, match=f"the start did not happen.*{cluster.run_dir}"):
            asyncio.run(cluster.wait_for(lambda s: True, 0.05, "the start", poll_ms=10))
        cluster.stop()
        assert (cluster.run_dir / "logs").is_dir()


class TestWaitFor:
    def test_a_timeout_reports_the_last_problems(self, scripted):
        cluster = scripted()

        async def status(session):
            return {"problems": ["experts [3] have no live replica"]}

        cluster.status = status
        with pytest.raises(ClusterFailed, match=r"logs\nexperts \[3\] have no live replica"):
            asyncio.run(cluster.wait_for(lambda s: False, 0.05, "the start", poll_ms=10))

    def test_it_asks_until_the_status_is_as_wanted(self, scripted):
        cluster, asked = scripted(), []

        async def answer(_):
            asked.append(1)
            return web.json_response({"epoch": len(asked)})

        async def story():
            app = web.Application()
            app.router.add_get("/v1/fault_tolerance/status", answer)
            runner = web.AppRunner(app)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            host, port = runner.addresses[0]
            text = json.dumps({"http_host": host, "http_port": port})
            waiting = asyncio.create_task(
                cluster.wait_for(lambda s: s["epoch"] == 3, DEADLINE_S, "epoch 3", poll_ms=5)
            )
            await asyncio.sleep(0.02)  # nobody has written where to ask yet
            (cluster.run_dir / "endpoint.json").write_text(text)
            try:
                return await waiting
            finally:
                await runner.cleanup()

        assert asyncio.run(story()) == {"epoch": 3}
        assert cluster.was_healthy


STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up")
time.sleep(60)
"""


class TestStop:
    def test_no_process_is_left_whatever_state_it_is_in(self, scripted):
        cluster = scripted(ranks=3, rank0=STUBBORN, rank1="pass")
        cluster.start()
        while "up" not in cluster.log_tail("rank0"):
            time.sleep(0.01)
        cluster.kill("rank2", signal.SIGSTOP)
        pidfds = [os.pidfd_open(c.process.pid) for c in cluster.children.values()]
        cluster.stop(timeout_s=0.6)
        for pidfd in pidfds:
            assert has_ended(pidfd)
            os.close(pidfd)
        assert all(c.process.returncode is not None for c in cluster.children.values())

    def test_may_be_repeated_and_come_before_a_start(self, scripted):
        cluster = scripted()
        cluster.stop()
        cluster.start()
        cluster.stop(timeout_s=0.4)
        cluster.stop(timeout_s=0.4)

    def test_a_temporary_run_directory_goes_and_a_given_one_stays(self, scripted, tmp_path):
        temporary, given = scripted(run_dir=None), scripted(run_dir=tmp_path / "mine")
        assert temporary.run_dir.is_dir()
        temporary.stop(), given.stop()
        assert not temporary.run_dir.exists() and (tmp_path / "mine" / "logs").is_dir()


LAUNCHER = """
import os, sys, time
from launch.cluster import LocalCluster

class Bonded(LocalCluster):
    def _command(self, name):
        code = "import sys, time; from launch.processes import end_with_parent;"
        code += f"end_with_parent({os.getpid()}); print('bonded', flush=True); time.sleep(60)"
        return [sys.executable, "-c", code]

cluster = Bonded([], 2, sys.argv[1], -1)
cluster.start()
while any("bonded" not in cluster.log_tail(name) for name in cluster.children):
    time.sleep(0.01)
print(*[child.process.pid for child in cluster.children.values()], flush=True)
time.sleep(60)
"""


class TestBond:
    def test_a_launcher_that_is_killed_takes_all_its_processes_along(self, tmp_path):
        launcher = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        try:
            pids = [int(word) for word in launcher.stdout.readline().split()]
            assert len(pids) == 3
            pidfds = [os.pidfd_open(pid) for pid in pids]
        finally:
            launcher.kill()
            launcher.wait(DEADLINE_S)
            launcher.stdout.close()
        for pidfd in pidfds:
            assert has_ended(pidfd)
            os.close(pidfd)

    def test_a_process_whose_parent_is_gone_already_ends_at_once(self):
        code = "from launch.processes import end_with_parent; end_with_parent(1 << 22); print('on')"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, cwd=ROOT, timeout=DEADLINE_S
        )
        assert (done.returncode, done.stdout) == (0, b"")


class TestIsWhole:
    @staticmethod
    def status(**changes) -> dict:
        rank = {"state": "active", "mode": "serving", "epoch": 3}
        return {"state": "serving", "epoch": 3, "ranks": [dict(rank), rank | changes]}

    def test_all_ranks_serve_in_the_committed_epoch(self):
        assert is_whole(self.status())

    @pytest.mark.parametrize(
        "changes", [{"state": "joining"}, {"mode": "ready"}, {"mode": None}, {"epoch": 2}]
    )
    def test_one_rank_that_does_not_is_enough(self, changes):
        assert not is_whole(self.status(**changes))

    def test_not_during_a_change(self):
        assert not is_whole(self.status() | {"state": "changing"})

    def test_names_of_ranks(self):
        assert [rank_name(r) for r in (0, 12)] == ["rank0", "rank12"]
