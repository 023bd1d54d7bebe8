"""Silent and slow connections shut nobody out."""

import asyncio
import contextlib

import aiohttp
from aiohttp import web

from eep_jax.runtime.supervisor.connection_limits import Limits
from eep_jax.runtime.supervisor.listeners import Listeners
from tests.support.control_world import story

HOST, LONG_S = "127.0.0.1", 3600.0


class World:
    """One port: `/` answers at once, `/slow` when `go` is set."""

    def __init__(self, port: int, go: asyncio.Event):
        self.port, self.go = port, go
        self._writers: list[asyncio.StreamWriter] = []

    async def silent(self, data: bytes = b"") -> asyncio.StreamReader:
        """A connection that sends this and no more."""
        reader, writer = await asyncio.open_connection(HOST, self.port)
        self._writers.append(writer)
        writer.write(data)
        return reader

    async def get(self, path: str = "/") -> str:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://{HOST}:{self.port}{path}") as response,
        ):
            return await response.text()

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


@contextlib.asynccontextmanager
async def a_port(**limits):
    go, listeners, app = asyncio.Event(), Listeners(), web.Application()
    world = None

    async def quick(_) -> web.Response:
        return web.Response(text="quick")

    async def slow(_) -> web.Response:
        await go.wait()
        return web.Response(text="slow")

    app.router.add_get("/", quick)
    app.router.add_get("/slow", slow)
    try:
        given = {"head_s": LONG_S, "idle_s": LONG_S} | limits
        world = World(await listeners.open(app, HOST, 0, limits=Limits(**given)), go)
        yield world
    finally:
        go.set()
        if world is not None:
            world.close()
        await listeners.close()


async def closed(reader: asyncio.StreamReader) -> bool:
    """Waits for the other end to close, after an answer or without one."""
    with contextlib.suppress(ConnectionError):
        await reader.read()
    return True


@story
async def test_one_that_sends_no_request_in_time_is_closed():
    async with a_port(head_s=0.1) as world:
        readers = [await world.silent(sent) for sent in (b"", b"GET / HTTP/1.1\r\nHo", b"\x00")]
        assert all([await closed(reader) for reader in readers])
        assert await world.get() == "quick"


@story
async def test_one_that_serves_a_request_is_not_closed():
    async with a_port(head_s=0.05, idle_s=0.05) as world:
        answer = asyncio.create_task(world.get("/slow"))
        await asyncio.sleep(0.5)
        world.go.set()
        assert await answer == "slow"


@story
async def test_the_longest_idle_makes_room_for_a_new_one():
    async with a_port(connections_max=3) as world:
        first, second = [await world.silent() for _ in range(2)]
        answer = asyncio.create_task(world.get("/slow"))
        await asyncio.sleep(0.2)
        for _ in range(5):
            assert await world.get() == "quick"
        assert await closed(first)
        assert not second.at_eof() or await closed(second)
        world.go.set()
        assert await answer == "slow"


@story
async def test_beyond_the_maximum_of_busy_ones_a_new_one_is_closed():
    async with a_port(connections_max=2) as world:
        answers = [asyncio.create_task(world.get("/slow")) for _ in range(2)]
        await asyncio.sleep(0.3)
        assert await closed(await world.silent())
        world.go.set()
        assert await asyncio.gather(*answers) == ["slow", "slow"]
        assert await world.get() == "quick"


@story
async def test_an_address_has_a_maximum_of_its_own():
    async with a_port(per_address_max=2) as world:
        readers = [await world.silent() for _ in range(4)]
        assert await closed(readers[0]) and await closed(readers[1])
        assert await world.get() == "quick"


@story
async def test_hundreds_of_silent_ones_do_not_keep_a_client_waiting():
    async with a_port(connections_max=200) as world:
        for _ in range(300):
            await world.silent(b"GET / HT")
        assert [await world.get() for _ in range(20)] == ["quick"] * 20
