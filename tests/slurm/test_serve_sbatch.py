"""A job on virtual nodes: a rank, a task and a node are killed, and every answer is the same."""

import asyncio
import json
import os
import pathlib
import re
import signal
import sys

import aiohttp
import pytest

from launch.load import run_load, run_once
from tests.support import slurm_world
from tests.support.processes import jobs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.timeout(480),
    pytest.mark.skipif(bool(why := slurm_world.why_not()), reason=f"no SLURM here: {why}"),
]
ROOT = pathlib.Path(__file__).parents[2]
CONCURRENCY = 6
START_S, EVENT_S = 180.0, 120.0


class Job:
    """serve.sbatch as submitted, seen over HTTP and in SLURM's queue."""

    def __init__(self, world: slurm_world.SlurmWorld):
        self.world, self.run_dir = world, world.directory / "run"
        self.number = self.sbatch("--nodes=3", "--nodelist=n[0-2]", "launch/slurm/serve.sbatch")

    def sbatch(self, *arguments: str) -> str:
        output = self.world.directory / "log" / "job-%j.log"
        said = self.world.run(
            "sbatch",
            "--parsable",
            f"--output={output}",
            *arguments,
            "--config=tiny_cpu",
            EEP_PYTHON=sys.executable,
            EEP_RUN_DIR=str(self.run_dir),
            EEP_LOST_AFTER_S="4",
            directory=ROOT,
        )
        return said.partition(";")[0]

    def endpoint(self) -> dict:
        return json.loads((self.run_dir / "endpoint.json").read_text())

    @property
    def url(self) -> str:
        at = self.endpoint()
        return f"http://{at['http_host']}:{at['http_port']}"

    def status(self) -> dict | None:
        async def ask():
            url = self.url + "/v1/fault_tolerance/status"
            async with aiohttp.ClientSession() as session, session.get(url) as answer:
                return await answer.json()

        try:
            return self.world.do(ask(), 5.0)
        except (OSError, ValueError, aiohttp.ClientError, TimeoutError):
            return None

    def wait(self, wanted, deadline_s: float, what: str) -> dict:
        """The first status for which `wanted(status)` holds."""

        def found():
            status = self.status()
            return status if status is not None and wanted(status) else None

        try:
            return self.world.wait(found, deadline_s, what)
        except AssertionError as error:
            error.add_note(json.dumps(self.status()) + self.logs())
            raise

    def wait_whole(self, incarnations: dict[int, int], deadline_s: float = EVENT_S) -> dict:
        """All ranks serve, these in their second, third... life."""
        return self.wait(
            lambda s: (
                s["state"] == "serving"
                and all(r["mode"] == "serving" and r["state"] == "active" for r in s["ranks"])
                and all(s["ranks"][rank]["incarnation"] == n for rank, n in incarnations.items())
            ),
            deadline_s,
            f"cluster that is whole again with {incarnations}",
        )

    def process(self, module: str, rank: int) -> tuple[int, dict[str, str]]:
        """Pid and variables of the newest process of a rank: launch.rank, or the task around it."""
        found = [
            (pid, names)
            for pid, names in self.world.processes().items()
            if f"-m {module} " in (text := slurm_world.command(pid))
            and (f"--rank={rank} " in text + " " or self._is_task(names, rank, text))
            and "srun" not in text.split()[0]
        ]
        assert found, f"no {module} of rank {rank}"
        return max(found)

    @staticmethod
    def _is_task(names: dict[str, str], rank: int, text: str) -> bool:
        return "--rank=" not in text and names.get("SLURM_PROCID") == str(rank)

    def load(self, kill) -> list:
        """Results of completions that ran while `kill()` did its work, until it returned."""

        async def generate():
            enough = asyncio.Event()
            load = asyncio.create_task(run_load(self.url, jobs(), CONCURRENCY, enough))
            await asyncio.sleep(0.7)
            try:
                await asyncio.to_thread(kill)
                await asyncio.sleep(0.7)
            finally:
                enough.set()
                results = await load
            return results

        return self.world.do(generate(), 240.0)

    def logs(self) -> str:
        found = [*(self.run_dir / "logs").glob("*"), *(self.world.directory / "log").glob("job*")]
        return "\n".join(f"== {p.name}\n{p.read_text(errors='replace')[-1500:]}" for p in found)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with slurm_world.SlurmWorld(tmp_path_factory.mktemp("slurm"), nodes=4) as started:
        yield started


@pytest.fixture(scope="module")
def job(world):
    return Job(world)


def test_a_job_outlives_its_ranks_its_tasks_and_a_node(world, job):
    job.wait_whole({rank: 1 for rank in range(4)}, START_S)
    token = job.run_dir / "token"
    assert token.stat().st_mode & 0o077 == 0, "others may read the token"
    truth = world.do(run_once(job.url, jobs(), CONCURRENCY), 120.0)
    assert [result.error for result in truth] == [None] * len(truth)

    def kill_a_rank():
        """Its task is alive, and starts the next incarnation."""
        task, _ = job.process("launch.node", 1)
        os.kill(job.process("launch.rank", 1)[0], signal.SIGKILL)
        job.wait_whole({1: 2})
        assert job.process("launch.node", 1)[0] == task

    def kill_a_task():
        """Its rank dies with it; the batch script starts another task on the same node."""
        task, names = job.process("launch.node", 2)
        os.kill(task, signal.SIGKILL)
        job.wait_whole({2: 2})
        again, names_again = job.process("launch.node", 2)
        assert again != task
        assert names_again["SLURMD_NODENAME"] == names["SLURMD_NODENAME"]
        assert names_again["SLURM_STEP_ID"] != names["SLURM_STEP_ID"]

    def kill_a_node():
        """SLURM takes it out of the job, and the job and its other ranks go on."""
        assert job.process("launch.rank", 3)[1]["SLURMD_NODENAME"] == "n2"
        world.kill_node("n2")
        job.wait(lambda s: s["state"] == "serving" and s["ranks"][3]["pid"] is None, EVENT_S, "end")
        nodes = lambda: world.run("squeue", "--noheader", f"--job={job.number}", "--format=%N")
        world.wait(lambda: nodes() == "n[0-1]", EVENT_S, "job without the dead node")
        status = job.status()
        assert [r["state"] for r in status["ranks"]] == ["active"] * 3 + ["absent"]

    def take_another_node():
        job.rejoining = job.sbatch(
            "--nodelist=n3", "launch/slurm/rejoin.sbatch", str(job.run_dir), "3"
        )
        job.wait_whole({3: 2})
        assert job.process("launch.rank", 3)[1]["SLURMD_NODENAME"] == "n3"

    for act in (kill_a_rank, kill_a_task, kill_a_node, take_another_node):
        try:
            results = job.load(act)
        except BaseException as error:
            error.add_note(job.logs())
            raise
        assert results
        for result in results:
            assert result.error is None, (act.__name__, result.error)
            assert result.text == truth[result.job].text, act.__name__


def test_a_supervisor_that_dies_is_started_again_by_the_batch_script(world, job):
    """Runs after the story above, whose ranks go on meanwhile and are found again."""
    job.wait_whole({1: 2, 2: 2, 3: 2})
    before = world.do(run_once(job.url, jobs()[:2], 2), 120.0)
    incarnations = {r["rank"]: r["incarnation"] for r in job.status()["ranks"]}
    pid = job.endpoint()["pid"]
    world.run("kill", "-KILL", str(pid))
    world.wait(lambda: job.endpoint()["pid"] != pid, EVENT_S, "another supervisor")
    job.wait_whole(incarnations)
    after = world.do(run_once(job.url, jobs()[:2], 2), 120.0)
    assert [r.error for r in after] == [None, None]
    assert [r.text for r in after] == [r.text for r in before]


def test_scancel_leaves_nothing_behind(world, job):
    """Runs after the story above: of the job, of what replaced its parts, and in memory."""
    world.run("scancel", job.number)
    world.wait(lambda: not world.run("squeue", "--noheader"), EVENT_S, "empty queue")
    ours = lambda: [pid for pid, names in world.processes().items() if "EEP_RUN_DIR" in names]
    world.wait(lambda: not ours(), EVENT_S, f"end of {[slurm_world.command(p) for p in ours()]}")
    log = (world.directory / "log" / f"job-{job.number}.log").read_text()
    assert "Traceback" not in log
    assert re.findall(r"supervisor ended with status \d+", log) == [
        "supervisor ended with status 137"  # as the test above killed it
    ]
    world.wait(lambda: not world.run("ls", "/dev/shm"), EVENT_S, "empty shared memory")
