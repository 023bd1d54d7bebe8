"""A host's launcher: its own ranks, and the lock against other launchers of them."""

import dataclasses
import pathlib
import subprocess
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

from configs import tiny_cpu
from eep_jax.runtime.control.messages import HostProcess
from launch import node
from launch.cluster import QUICK_DEATH_S, Child
from launch.environments.environment import Identity
from launch.errors import UsageError
from launch.program import EXIT_USAGE

CONFIG = tiny_cpu.get_config()
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def given():
    with flagsaver.flagsaver():
        yield lambda *arguments: flags.FLAGS(["program", *arguments])


def identity(rank: int, local_rank: int, local_ranks: int) -> Identity:
    return Identity(rank=rank, local_rank=local_rank, local_ranks=local_ranks)


class TestOwnRanks:
    def test_those_given_share_the_gpus_of_this_host(self, given):
        given("--ranks=3,2")
        assert node.own_ranks(CONFIG) == (identity(2, 0, 2), identity(3, 1, 2))

    @pytest.mark.parametrize("text", ["4", "x", "-1", "1,"])
    def test_what_is_no_rank_is_refused(self, given, text):
        given(f"--ranks={text}")
        with pytest.raises(UsageError, match=r"must name ranks of 0\.\.3"):
            node.own_ranks(CONFIG)

    def test_a_task_of_slurm_has_the_rank_of_its_number(self, given, monkeypatch):
        step = {"PROCID": 3, "LOCALID": 1, "NODEID": 1, "STEP_NUM_TASKS": 4}
        for name, value in (step | {"STEP_TASKS_PER_NODE": "2(x2)"}).items():
            monkeypatch.setenv(f"SLURM_{name}", str(value))
        given("--environment=slurm")
        assert node.own_ranks(CONFIG) == (identity(3, 1, 2),)
        given("--environment=slurm", "--rank=2", "--local_rank=0", "--local_ranks=2")
        assert node.own_ranks(CONFIG) == (identity(2, 0, 2),)


def test_a_rank_gets_its_index_among_those_of_its_node(tmp_path):
    ranks = node.HostRanks(["--config=tiny_cpu"], (identity(6, 2, 4),), str(tmp_path), 0)
    command = ranks._command("rank6")
    assert command[:3] == [sys.executable, "-m", "launch.rank"]
    assert {"--rank=6", "--local_rank=2", "--local_ranks=4", "--config=tiny_cpu"} <= set(command)


def test_one_launcher_alone_starts_a_rank_of_a_run_on_a_host():
    first = node.only_launcher("a token of a run", 2)
    with pytest.raises(UsageError, match="rank 2 of this run already has a launcher on this host"):
        node.only_launcher("a token of a run", 2)
    others = [node.only_launcher("a token of a run", 1), node.only_launcher("of another", 2)]
    first.close()
    node.only_launcher("a token of a run", 2).close()
    for other in others:
        other.close()


def test_a_rank_that_lived_long_is_brought_back_however_often_it_dies_then(tmp_path):
    class Process:
        pid = 7
        status: int | None = None

        def poll(self):
            return self.status

    ranks = node.HostRanks([], (identity(0, 0, 1),), str(tmp_path), -1)
    child = Child("rank0", Process(), node.time.monotonic() - QUICK_DEATH_S - 1)
    ranks._look_after(child)
    assert ranks.was_healthy
    child = dataclasses.replace(child, started_s=node.time.monotonic(), quick_deaths=9)
    child.process.status = -9
    ranks.log_path("rank0").touch()
    ranks._look_after(child)
    assert ranks.failure is None


def test_ranks_are_well_once_the_supervisor_has_one_of_them_watched(tmp_path):
    class Sleepers(node.HostRanks):
        def _command(self, name):
            return [sys.executable, "-S", "-c", "import time; time.sleep(60)"]

    ranks = Sleepers([], (identity(2, 0, 2), identity(3, 1, 2)), str(tmp_path), 100)
    ranks.start()
    try:
        assert sorted(ranks.children) == ["rank2", "rank3"]
        stranger = HostProcess(rank=2, incarnation=1, pid=1, ticks=1)
        ranks.let_in((stranger,))
        assert not ranks.was_healthy
        own = dataclasses.replace(stranger, pid=ranks.children["rank2"].process.pid)
        ranks.let_in((stranger, own))
        assert ranks.was_healthy
    finally:
        ranks.stop(0.4)
    assert all(child.process.poll() is not None for child in ranks.children.values())


def test_without_a_supervisor_or_a_run_directory_it_says_what_to_give(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "launch.node", "--ranks=2"],
        env={"PYTHONPATH": str(ROOT), "EEP_TOKEN": "x" * 20, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == EXIT_USAGE
    assert "the supervisor's address is unknown: give --supervisor=HOST:PORT" in done.stderr
