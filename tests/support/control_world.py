"""A real Supervisor on loopback sockets with fake ranks around it, and clients of its HTTP API."""

import asyncio
import contextlib
import functools
import json
import pathlib

import aiohttp

from eep_jax.config import ClusterConfig, EngineConfig, ModelConfig, RunConfig, ServeConfig
from eep_jax.runtime.supervisor.supervisor import Supervisor
from tests.support.fake_rank import FakeRank

TOKEN = "a token of sixteen characters or more"
DEADLINE_S = 20.0


def story(coroutine_function):
    """Runs an async test under a deadline."""

    @functools.wraps(coroutine_function)
    def test(*args, **kwargs):
        asyncio.run(asyncio.wait_for(coroutine_function(*args, **kwargs), DEADLINE_S))

    return test


def a_config(ranks: int = 2, serve: dict | None = None, **cluster) -> RunConfig:
    """Four experts on ranks of four slots; the model is never computed."""
    model = ModelConfig(
        name="tiny-model",
        vocab_size=256,
        hidden=8,
        layers=1,
        query_heads=1,
        kv_heads=1,
        head_dim=8,
        experts=4,
        experts_per_token=2,
        expert_hidden=8,
    )
    return RunConfig(
        name="tiny",
        model=model,
        cluster=ClusterConfig(ranks=ranks, **{"slots_per_rank": 4, "redundancy": 1, **cluster}),
        engine=EngineConfig(batch_rows=8, prefill_tokens=8, context_tokens=512),
        serve=ServeConfig(port=0, **{"shutdown_timeout_s": 0, **(serve or {})}),
    )


class ControlWorld:
    """One run directory. Supervisors and ranks come and go; all end with `world`."""

    def __init__(self, config: RunConfig, run_dir: pathlib.Path):
        self.config, self.run_dir = config, run_dir
        self.ranks: dict[int, FakeRank] = {}
        self.supervisor: Supervisor | None = None
        self._stop: asyncio.Event | None = None
        self._running: asyncio.Task | None = None
        self._everybody: list[FakeRank] = []

    async def start_supervisor(self) -> Supervisor:
        self.supervisor = Supervisor(self.config, self.run_dir, TOKEN)
        self._stop, ready, self.hurry = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._running = asyncio.create_task(self.supervisor.run(self._stop, ready, self.hurry))
        waiting = asyncio.create_task(ready.wait())
        await asyncio.wait({self._running, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if self._running.done():
            self._running.result()
        return self.supervisor

    async def stop_supervisor(self) -> None:
        if self._stop is not None:
            self._stop.set()
            await self._running
            self._stop = None

    def start_rank(self, rank: int, **changes) -> FakeRank:
        slots = self.config.cluster.slots_per_rank
        fake = FakeRank(rank, slots, self.run_dir, TOKEN, **changes).start()
        self.ranks[rank] = fake
        self._everybody.append(fake)
        return fake

    async def form(self) -> None:
        """A supervisor, all ranks, and the first epoch."""
        await self.start_supervisor()
        for rank in range(self.config.cluster.ranks):
            self.start_rank(rank)
        await self.until(self.is_whole)

    def is_whole(self) -> bool:
        status = self.supervisor.service.status()
        return status["state"] == "serving" and all(r["mode"] == "serving" for r in status["ranks"])

    async def until(self, condition) -> None:
        """Waits until `condition()` holds; the deadline is that of the story."""
        while not condition():
            await asyncio.sleep(0.005)

    @property
    def url(self) -> str:
        endpoint = json.loads((self.run_dir / "endpoint.json").read_text())
        return f"http://{endpoint['http_host']}:{endpoint['http_port']}"

    @contextlib.asynccontextmanager
    async def completion(self, key: str | None = None, **fields):
        """The response to a completion request; `fields` change its body."""
        body = {"model": self.config.model.name, "prompt": "Hi", "seed": 1, **fields}
        headers = {} if key is None else {"Idempotency-Key": key}
        timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.post(self.url + "/v1/completions", json=body, headers=headers) as response,
        ):
            yield response

    async def complete(self, key: str | None = None, **fields) -> tuple[int, str]:
        """(status, text or error message) of a completion."""
        async with self.completion(key, **fields) as response:
            answer = await response.json()
        if response.status != 200:
            return response.status, answer["error"]["message"]
        return response.status, answer["choices"][0]["text"]


@contextlib.asynccontextmanager
async def a_world(run_dir: pathlib.Path, **config):
    world = ControlWorld(a_config(**config), run_dir)
    try:
        yield world
    finally:
        for rank in world._everybody:
            await rank.close()
        await world.stop_supervisor()


async def texts(response: aiohttp.ClientResponse):
    """The text of each server-sent event until [DONE]; an error event raises."""
    async for line in response.content:
        if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
            continue
        event = json.loads(line.removeprefix(b"data: "))
        if "error" in event:
            raise AssertionError(event["error"]["message"])
        for choice in event["choices"]:
            yield choice["text"]


def expected_text(prompt: str, max_tokens: int, seed: int = 1) -> str:
    """What a fake rank answers."""
    total = sum(prompt.encode()) + seed
    return "".join(chr(97 + (total + 7 * index) % 26) for index in range(max_tokens))
