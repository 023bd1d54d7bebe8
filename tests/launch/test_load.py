"""The load generator notes every token, and an unlucky request never ends it."""

import asyncio
import contextlib
import functools
import json

import pytest
from aiohttp import web

from launch.load import count_bytes, run_load, run_once

DEADLINE_S = 15.0


def story(coroutine_function):
    """Runs an async test under a deadline."""

    @functools.wraps(coroutine_function)
    def test(*args, **kwargs):
        asyncio.run(asyncio.wait_for(coroutine_function(*args, **kwargs), DEADLINE_S))

    return test


@contextlib.asynccontextmanager
async def service(handler):
    """The URL of a service whose completions are `handler`'s."""
    app = web.Application()
    app.router.add_post("/v1/completions", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0]
    try:
        yield f"http://{host}:{port}/"
    finally:
        await runner.cleanup()


def event(text: str, finish: str | None = None) -> str:
    choice = {"text": text, "finish_reason": finish}
    return f"data: {json.dumps({'choices': [choice]})}\n\n"


def streaming(*parts: str):
    """A handler that sends these parts."""

    async def handler(http: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(http)
        for part in parts:
            await response.write(part.encode())
        return response

    return handler


async def echo(http: web.Request) -> web.StreamResponse:
    """Answers with the prompt."""
    body = await http.json()
    assert body["stream"] is True
    return await streaming(event(body["prompt"]), event("", "length"), "data: [DONE]\n\n")(http)


def jobs(*prompts: str) -> list[dict]:
    return [{"prompt": prompt} for prompt in prompts]


class TestRunOnce:
    @story
    async def test_every_job_is_answered_once_in_the_order_of_the_jobs(self):
        async with service(echo) as url:
            results = await run_once(url, jobs("a", "bb", "ccc"), 2)
        assert [(r.job, r.text, r.finish_reason, r.error) for r in results] == [
            (0, "a", "length", None),
            (1, "bb", "length", None),
            (2, "ccc", "length", None),
        ]

    @story
    async def test_tokens_are_counted_as_bytes_and_reported_as_they_come(self):
        counted = []
        async with service(echo) as url:
            (result,) = await run_once(url, jobs("añ€"), 1, lambda at_s, n: counted.append(n))
        assert sum(counted) == len(result.token_times) == 6
        assert result.start_s <= result.token_times[0] <= result.token_times[-1] <= result.end_s

    @pytest.mark.parametrize(
        ("handler", "error"),
        [
            (streaming(event("a"), event("", "length")), "ended before"),
            (streaming(event("a"), "data: [DONE]\n\n"), "ended before"),
            (streaming(event("a"), "data: {\n\n"), "cannot be read"),
            (streaming(event("a"), 'data: {"choices": [{}]}\n\n'), "cannot be read"),
            (streaming(event("a"), 'data: {"error": {"message": "it broke"}}\n\n'), "it broke"),
        ],
    )
    @story
    async def test_what_goes_wrong_is_the_result_with_the_text_until_then(self, handler, error):
        async with service(handler) as url:
            (result,) = await run_once(url, jobs("x"), 1)
        assert error in result.error and result.text == "a"

    @story
    async def test_a_refusal_is_the_result(self):
        async def refuse(_):
            return web.json_response({"error": {"message": "full"}}, status=429)

        async with service(refuse) as url:
            (result,) = await run_once(url, jobs("x"), 1)
        assert "status 429" in result.error and "full" in result.error

    @story
    async def test_nobody_there_is_a_result(self):
        async with service(echo) as url:
            pass
        (result,) = await run_once(url, jobs("x"), 1)
        assert result.error and not result.text

    @story
    async def test_a_late_answer_is_a_result(self):
        async def hang(_):
            await asyncio.sleep(60)

        async with service(hang) as url:
            (result,) = await run_once(url, jobs("x"), 1, deadline_s=0.1)
        assert result.error == "not finished after 0.1 s"


class TestRunLoad:
    @story
    async def test_jobs_go_around_until_it_is_told_to_end_and_all_finish(self):
        enough, served, most, now = asyncio.Event(), [], [], []

        async def handler(http):
            body = await http.json()
            served.append(body["prompt"])
            now.append(1)
            most.append(len(now))
            await asyncio.sleep(0.002)
            now.pop()
            if len(served) >= 20:
                enough.set()
            done = [event(body["prompt"], "stop"), "data: [DONE]\n\n"]
            return await streaming(*done)(http)

        async with service(handler) as url:
            results = await run_load(url, jobs("a", "b", "c"), 3, enough)
        assert len(results) == len(served) >= 20
        assert all(r.error is None and r.text == "abc"[r.job] for r in results)
        assert max(map(served.count, "abc")) - min(map(served.count, "abc")) <= 3
        assert max(most) <= 3

    @story
    async def test_a_service_that_is_down_is_not_flooded_and_a_failure_ends_nothing(self):
        enough, tries = asyncio.Event(), []

        async def flaky(http):
            tries.append(1)
            if len(tries) >= 3:
                enough.set()
            return web.Response(status=503) if len(tries) < 3 else await echo(http)

        async with service(flaky) as url:
            results = await run_load(url, jobs("x"), 1, enough)
        assert [r.error is None for r in results] == [False, False, True]
        assert (
            results[1].start_s - results[0].end_s >= 0.05
        )  # it paused; no upper bound is promised

    @pytest.mark.parametrize(("bodies", "concurrency"), [([], 1), (jobs("x"), 0)])
    @story
    async def test_nothing_to_do_is_the_callers_mistake(self, bodies, concurrency):
        with pytest.raises(ValueError):
            await run_load("http://127.0.0.1:1", bodies, concurrency, asyncio.Event())


def test_a_replacement_character_stands_for_one_byte():
    assert [count_bytes(t) for t in ("", "ab", "é", "\ufffd", "a\ufffd\ufffd€")] == [0, 2, 2, 1, 6]
