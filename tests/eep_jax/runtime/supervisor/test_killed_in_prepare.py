"""Real supervisor processes, each killed by SIGKILL at one step of an open Prepare, in a row."""

import asyncio
import json
import pathlib
import signal
import subprocess
import sys

import aiohttp
import pytest

from eep_jax.runtime.control.endpoint import JOURNAL
from eep_jax.runtime.history.journal import replay
from tests.support.control_world import TOKEN, a_config, expected_text
from tests.support.fake_rank import FakeRank

ROOT = pathlib.Path(__file__).parents[4]
RANKS, DEADLINE_S = 3, 120.0
SUPERVISOR = """
import asyncio, os, pathlib, signal, sys
from eep_jax.runtime.control.channels import Channels
from eep_jax.runtime.history.journal import Journal
from eep_jax.runtime.supervisor.supervisor import Supervisor
from tests.support.control_world import TOKEN, a_config

run_dir, point, count = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])

def reached(name):
    global count
    if name == point:
        count -= 1
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)

def hooked(call, name_of):
    def around(self, *arguments, **more):
        name = name_of(*arguments)
        reached("before " + name)
        result = call(self, *arguments, **more)
        reached("after " + name)
        return result
    return around

Journal.append = hooked(Journal.append, lambda kind, facts: f"record {kind}")
Channels.send = hooked(
    Channels.send, lambda rank, message, *_: f"send {type(message).__name__}"
)

async def serve():
    await Supervisor(a_config(int(sys.argv[4])), run_dir, TOKEN).run(asyncio.Event())

asyncio.run(serve())
"""
STEPS = (
    ("before record prepare", 1),
    ("after record prepare", 1),
    ("before send Prepare", 2),
    ("after send Prepare", 2),
    ("before record commit", 1),
    ("after record commit", 1),
    ("before send Commit", 1),
    ("before send Commit", 2),
    ("after send Commit", 2),
)


class World:
    """Fake ranks in this process, and one supervisor process after the other."""

    def __init__(self, run_dir: pathlib.Path):
        self.run_dir, self.supervisor = run_dir, None
        self.ranks: dict[int, FakeRank] = {}

    def start_rank(self, rank: int) -> None:
        slots = a_config(RANKS).cluster.slots_per_rank
        self.ranks[rank] = FakeRank(rank, slots, self.run_dir, TOKEN).start()

    def start_supervisor(self, point: str = "", count: int = 0) -> None:
        command = [sys.executable, "-c", SUPERVISOR, str(self.run_dir), point]
        command += [str(count), str(RANKS)]
        self.supervisor = subprocess.Popen(command, cwd=ROOT)

    async def ask(self, path: str, **request) -> tuple[int, dict]:
        """(status, answer); (0, {}) while no supervisor answers."""
        try:
            endpoint = (self.run_dir / "endpoint.json").read_text()
            at = json.loads(endpoint)
            url = f"http://{at['http_host']}:{at['http_port']}{path}"
            method = "POST" if request else "GET"
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session,
                session.request(method, url, **request) as answer,
            ):
                return answer.status, await answer.json()
        except (OSError, ValueError, aiohttp.ClientError, TimeoutError):
            return 0, {}

    async def is_whole(self) -> bool:
        _, status = await self.ask("/v1/fault_tolerance/status")
        return status.get("state") == "serving" and all(
            rank["mode"] == "serving" and rank["state"] == "active" for rank in status["ranks"]
        )

    async def dies(self) -> None:
        """Has members leave and return until the supervisor has died at its step."""
        while self.supervisor.poll() is None:
            if await self.is_whole():
                await self.ranks[RANKS - 1].close()
                self.start_rank(RANKS - 1)
            await asyncio.sleep(0.02)
        assert self.supervisor.returncode == -signal.SIGKILL

    async def close(self) -> None:
        self.supervisor.kill()
        self.supervisor.wait(DEADLINE_S)
        for rank in self.ranks.values():
            await rank.close()


async def deaths_in_a_row(run_dir: pathlib.Path) -> None:
    world = World(run_dir)
    try:
        world.start_supervisor()
        for rank in range(RANKS):
            world.start_rank(rank)
        while not await world.is_whole():
            await asyncio.sleep(0.02)
        survivors = [world.ranks[rank].body.pid for rank in range(RANKS - 1)]
        for rank in world.ranks.values():
            rank.pace.clear()
        body = {"model": "tiny-model", "prompt": "Hi", "seed": 1, "max_tokens": 30}
        request = {"json": body, "headers": {"Idempotency-Key": "one"}}
        asking = asyncio.create_task(world.ask("/v1/completions", **request))
        while not any(rank.requests for rank in world.ranks.values()):
            await asyncio.sleep(0.02)
        world.supervisor.kill()
        for step in STEPS:
            world.supervisor.wait(DEADLINE_S)
            world.start_supervisor(*step)
            await world.dies()
        world.start_supervisor()
        while not await world.is_whole():
            await asyncio.sleep(0.02)
        await asking
        for rank in world.ranks.values():
            rank.pace.set()
        while (answer := await world.ask("/v1/completions", **request))[0] != 200:
            await asyncio.sleep(0.02)
        assert answer[1]["choices"][0]["text"] == expected_text("Hi", 30)
        assert [world.ranks[rank].body.pid for rank in range(RANKS - 1)] == survivors
        assert all(world.ranks[rank].incarnation == 1 for rank in range(RANKS - 1))
        epochs = [r["epoch"] for r in replay(run_dir / JOURNAL) if r["kind"] == "commit"]
        assert epochs == sorted(set(epochs))
    finally:
        await world.close()


@pytest.mark.timeout(300)
def test_each_next_one_goes_on_with_the_same_ranks_and_the_same_request(tmp_path):
    asyncio.run(asyncio.wait_for(deaths_in_a_row(tmp_path), 2 * DEADLINE_S))
