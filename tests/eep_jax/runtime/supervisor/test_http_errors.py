"""Bytes that are no HTTP request get an error in JSON and leave one line in the log."""

import asyncio
import json
import logging

import pytest
from aiohttp import web

from eep_jax.runtime.supervisor.listeners import Listeners
from tests.support.control_world import story

HOST = "127.0.0.1"
BAD = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
    "an unknown version": b"GET / HTTP/9x\r\n\r\n",
    "a header without a colon": b"GET / HTTP/1.1\r\nHost localhost\r\n\r\n",
    "a length that is no number": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: ten\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "a header too long": b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
    "a path too long": b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
    "a URL that is none": b"GET http://[::1 HTTP/1.1\r\nHost: a\r\n\r\n",
    "an expectation": b"GET / HTTP/1.1\r\nHost: a\r\nExpect: tea\r\nConnection: close\r\n\r\n",
    "a failed handler": b"GET /fail HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
}


async def answer_of(sent: bytes) -> tuple[int, str, dict]:
    """Status, head and body of what a port answers to these bytes; it must close after it."""
    app, listeners = web.Application(), Listeners()

    async def quick(_) -> web.Response:
        return web.Response(text="quick")

    async def fail(_) -> web.Response:
        raise ArithmeticError("a secret of the service")

    app.router.add_get("/", quick)
    app.router.add_post("/", quick)
    app.router.add_get("/fail", fail)
    try:
        reader, writer = await asyncio.open_connection(HOST, await listeners.open(app, HOST, 0))
        writer.write(sent)
        head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
        writer.close()
    finally:
        await listeners.close()
    return int(head.split()[1]), head, json.loads(body)


@pytest.mark.parametrize("sent", BAD.values(), ids=BAD)
@story
async def test_a_bad_request_is_answered_in_json_and_logged_in_one_line(sent, caplog):
    status, head, body = await answer_of(sent)
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "application/json" in head and error["message"] and "\n" not in error["message"]
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert "\n" not in record.getMessage() and len(record.getMessage()) < 500
    if status < 500:
        assert error["type"] == "invalid_request_error" and record.exc_info is None
    else:
        assert error["type"] == "server_error" and "secret" not in error["message"]
        assert record.exc_info[0] is ArithmeticError
