"""A supervisor that comes back listens where it did, if nobody else took the port."""

import asyncio

import aiohttp
import pytest
from aiohttp import web

from eep_jax.config import ServeConfig
from eep_jax.runtime.control.endpoint import find_supervisor, ports_before, write_endpoint
from eep_jax.runtime.supervisor.listeners import Listeners
from tests.support.control_world import story

HOST = "127.0.0.1"


def an_app(text: str) -> web.Application:
    app = web.Application()

    async def answer(_) -> web.Response:
        return web.Response(text=text)

    app.router.add_get("/", answer)
    return app


async def read(port: int) -> str:
    timeout = aiohttp.ClientTimeout(total=10)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.get(f"http://{HOST}:{port}/") as response,
    ):
        return await response.text()


@story
async def test_a_port_of_before_is_taken_again_unless_another_is_asked_for_or_has_it():
    listeners, again = Listeners(), Listeners()
    try:
        first = await listeners.open(an_app("first"), HOST, 0)
        other = await listeners.open(an_app("other"), HOST, 0, before=first)
        assert other != first and await read(other) == "other"
        await listeners.stop()
        assert await again.open(an_app("second"), HOST, 0, before=first) == first
        assert await read(first) == "second"
        assert await again.open(an_app("third"), HOST, other, before=first) == other
        with pytest.raises(OSError, match=f"cannot listen on {HOST}:{first}: .*another port"):
            await again.open(an_app("x"), HOST, first)
    finally:
        await listeners.close()
        await again.close()


@story
async def test_calls_that_are_being_answered_go_on_after_stop():
    listeners, called, answer = Listeners(), asyncio.Event(), asyncio.Event()
    app = web.Application()

    async def slow(_) -> web.Response:
        called.set()
        await answer.wait()
        return web.Response(text="done")

    app.router.add_get("/", slow)
    try:
        port = await listeners.open(app, HOST, 0)
        reading = asyncio.create_task(read(port))
        await called.wait()
        await listeners.stop()
        with pytest.raises(aiohttp.ClientConnectionError):
            await read(port)
        answer.set()
        assert await reading == "done"
    finally:
        await listeners.close()


@pytest.mark.parametrize("cancels", [False, True])
@story
async def test_a_client_that_leaves_cancels_its_handler_if_so_opened(cancels):
    listeners, called, leave = Listeners(), asyncio.Event(), asyncio.Event()
    app, ends = web.Application(), asyncio.Queue()

    async def wait(_) -> web.Response:
        called.set()
        try:
            await leave.wait()
            ends.put_nowait("left")
        except asyncio.CancelledError:
            ends.put_nowait("cancelled")
            raise
        return web.Response()

    app.router.add_get("/", wait)
    try:
        port = await listeners.open(app, HOST, 0, cancel_handlers=cancels)
        _, writer = await asyncio.open_connection(HOST, port)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await called.wait()
        writer.close()
        if not cancels:
            await asyncio.sleep(0.1)
            leave.set()
        assert await ends.get() == ("cancelled" if cancels else "left")
    finally:
        await listeners.close()


def test_what_was_written_is_found(tmp_path):
    file = tmp_path / "endpoint.json"
    assert ports_before(file) == (0, 0)
    write_endpoint(file, ServeConfig(control_host="::1"), 71, 72)
    assert ports_before(file) == (71, 72)
    assert find_supervisor(file) == "http://[::1]:71/control"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3", '{"port": "x", "http_port": 1}'])
def test_a_file_that_is_not_whole_says_nothing(tmp_path, text):
    file = tmp_path / "endpoint.json"
    file.write_text(text)
    assert ports_before(file) == (0, 0)
