"""The frame of every answer: an id, CORS, a line in the log; and the small endpoints."""

import asyncio
import contextlib
import logging

import pytest
from aiohttp import ClientTimeout
from aiohttp.test_utils import TestClient, TestServer

from eep_jax import __version__
from eep_jax.runtime.http.app import build_app
from eep_jax.runtime.http.completion import CompletionLimits
from eep_jax.runtime.text.chat_template import ChatTemplate
from tests.support.fake_service import FakeService, spell

LIMITS = CompletionLimits(model="org/tiny", context_tokens=64)
TEMPLATE = ChatTemplate("<{{ messages[0].content }}>", {})
BODY = {"model": "org/tiny", "prompt": "Hi"}
PAGE = {"Origin": "https://page.example"}
DEADLINE_S = 60.0


@contextlib.asynccontextmanager
async def serving(**options):
    service = FakeService(spell("ab"))
    server = TestServer(build_app(service, LIMITS, template=TEMPLATE, **options))
    async with TestClient(server, timeout=ClientTimeout(total=DEADLINE_S)) as client:
        yield client


def test_an_id_is_taken_or_made_for_answers_streams_and_errors():
    async def story():
        async with serving() as client:
            for path, sent in (
                ("/v1/completions", BODY),
                ("/v1/completions", BODY | {"stream": True}),
                ("/v1/completions", {}),
                ("/nowhere", {}),
            ):
                answer = await client.post(path, json=sent, headers={"X-Request-Id": "mine-7"})
                assert answer.headers["X-Request-Id"] == "mine-7"
                answer = await client.post(path, json=sent, headers={"X-Request-Id": "x" * 129})
                assert len(answer.headers["X-Request-Id"]) == 32

    asyncio.run(story())


@pytest.mark.parametrize(
    ("origins", "allowed"),
    [
        ((), None),
        (("*",), "*"),
        (("https://page.example",), "https://page.example"),
        (("https://other.example",), None),
    ],
)
def test_pages_of_these_origins_may_read_answers(origins, allowed):
    async def story():
        async with serving(cors_origins=origins) as client:
            answer = await client.post("/v1/completions", json=BODY, headers=PAGE)
            assert answer.headers.get("Access-Control-Allow-Origin") == allowed
            refused = await client.post("/v1/completions", json={}, headers=PAGE)
            assert refused.status == (400 if allowed else 403)  # a foreign page's, see access.py
            assert refused.headers.get("Access-Control-Allow-Origin") == allowed
            asks = PAGE | {"Access-Control-Request-Headers": "authorization, content-type"}
            before = await client.options("/v1/completions", headers=asks)
            assert before.status == (204 if origins else 403)
            if allowed:
                assert "authorization" in before.headers["Access-Control-Allow-Headers"]
                assert "POST" in before.headers["Access-Control-Allow-Methods"]
                assert (await client.get("/nowhere", headers=PAGE)).status == 404
                missing = await client.get("/v1/completions", headers=PAGE)
                assert missing.status == 405 and "POST" in missing.headers["Allow"]

    asyncio.run(story())


def test_a_line_is_logged_for_every_request_where_that_is_asked_for(caplog):
    async def story(access_log: bool):
        async with serving(access_log=access_log) as client:
            await client.post("/v1/completions", json=BODY, headers={"X-Request-Id": "mine-7"})
            await client.get("/nowhere\n")

    with caplog.at_level(logging.INFO, "eep_jax.access"):
        asyncio.run(story(False))
        assert not [r for r in caplog.records if r.name == "eep_jax.access"]
        asyncio.run(story(True))
    lines = [r.getMessage() for r in caplog.records if r.name == "eep_jax.access"]
    assert "'POST' '/v1/completions' 200" in lines[0] and lines[0].endswith(" ms mine-7")
    assert "404" in lines[1] and "\n" not in lines[1]


def test_text_becomes_tokens_and_tokens_text():
    async def story():
        async with serving() as client:
            post = lambda path, **sent: client.post(path, json=sent)
            found = await (await post("/tokenize", prompt="Hi", model="org/tiny")).json()
            assert found == {
                "count": 3,
                "max_model_len": 64,
                "tokens": [0, 72, 105],
                "token_strs": None,
            }
            found = await (await post("/tokenize", prompt="Hi", add_special_tokens=False)).json()
            assert found["tokens"] == [72, 105]
            said = [{"role": "user", "content": "Hi"}]
            found = await (await post("/tokenize", messages=said)).json()
            assert found["tokens"] == list(b"<Hi>")
            found = await (await post("/detokenize", tokens=list("é!".encode()))).json()
            assert found == {"prompt": "é!"}
            for path, sent, field in (
                ("/tokenize", {}, "prompt"),
                ("/tokenize", {"prompt": "a", "messages": said}, "prompt"),
                ("/tokenize", {"prompt": ["a"]}, "prompt"),
                ("/tokenize", {"prompt": "a\ud800"}, "prompt"),
                ("/tokenize", {"messages": [3]}, "messages[0]"),
                ("/tokenize", {"prompt": "a", "model": 3}, "model"),
                ("/tokenize", {"prompt": "a", "other": 3}, "other"),
                ("/detokenize", {"tokens": [256]}, "tokens"),
                ("/detokenize", {"tokens": "a"}, "tokens"),
            ):
                refused = await post(path, **sent)
                assert refused.status == 400, (path, sent)
                assert (await refused.json())["error"]["param"] == field

    asyncio.run(story())


def test_the_small_endpoints():
    async def story():
        async with serving(info={"config": {"name": "tiny"}}) as client:
            assert await (await client.get("/version")).json() == {"version": __version__}
            info = await (await client.get("/server_info")).json()
            assert info == {"version": __version__, "config": {"name": "tiny"}}
            for call in (client.get, client.post):
                assert (await call("/ping")).status == 200

    asyncio.run(story())
