"""A load generator: keeps streaming completions in flight and notes when each token arrived.

It measures what a client sees, so nothing that goes wrong with a request ends it: a refused, failed
or late request is a Result with an error. For this project's models a token is a byte, so tokens
are counted as the UTF-8 bytes of the text that arrives.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

import aiohttp

DEADLINE_S = 120.0  # for one request, from its start to its last token
RETRY_PAUSE_S = 0.1  # after a failed request, so that a service that is down is not flooded
ERROR_CHARS_MAX = 300

OnToken = Callable[[float, int], None]  # monotonic seconds, how many tokens arrived then


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What one request came to. Times are monotonic seconds."""

    job: int  # index of its body
    text: str  # all that arrived, also before an error
    finish_reason: str | None
    error: str | None
    start_s: float
    end_s: float
    token_times: tuple[float, ...]  # one for each token; tokens of one event share theirs


async def run_load(
    url: str,
    jobs: Sequence[dict],
    concurrency: int,
    until: asyncio.Event,
    on_token: OnToken = lambda now_s, count: None,
    *,
    deadline_s: float = DEADLINE_S,
) -> list[Result]:
    """Keeps `concurrency` requests in flight until the event is set, then lets those finish.

    `url` is the root of the service, `http://127.0.0.1:8000`; `jobs` are bodies of completions,
    taken in turn and around again. Results come in the order in which the requests ended.
    """
    if not jobs:
        raise ValueError("jobs is empty; give at least one request body")
    turns = itertools.takewhile(lambda _: not until.is_set(), itertools.count())
    indices = (turn % len(jobs) for turn in turns)
    return await _run(url, jobs, indices, concurrency, on_token, deadline_s, until)


async def run_once(
    url: str,
    jobs: Sequence[dict],
    concurrency: int,
    on_token: OnToken = lambda now_s, count: None,
    *,
    deadline_s: float = DEADLINE_S,
) -> list[Result]:
    """Sends each job once, `concurrency` at a time; `results[i]` is that of `jobs[i]`."""
    never = asyncio.Event()
    done = await _run(url, jobs, iter(range(len(jobs))), concurrency, on_token, deadline_s, never)
    return sorted(done, key=lambda result: result.job)


def count_tokens(text: str) -> int:
    """Bytes of the text; a replacement character stands for one invalid byte."""
    return len(text.replace("\ufffd", "?").encode())


async def _run(
    url: str,
    jobs: Sequence[dict],
    indices: Iterable[int],
    concurrency: int,
    on_token: OnToken,
    deadline_s: float,
    until: asyncio.Event,
) -> list[Result]:
    if concurrency < 1:
        raise ValueError(f"{concurrency=} must be at least 1")
    results: list[Result] = []

    async def work() -> None:
        for job in indices:
            results.append(await _request(session, endpoint, job, jobs[job], on_token, deadline_s))
            if results[-1].error is not None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(until.wait(), RETRY_PAUSE_S)

    endpoint = f"{url.rstrip('/')}/v1/completions"
    timeout = aiohttp.ClientTimeout(total=deadline_s)
    connector = aiohttp.TCPConnector(limit=concurrency)
    async with (
        aiohttp.ClientSession(timeout=timeout, connector=connector) as session,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(concurrency):
            group.create_task(work())
    return results


async def _request(
    session: aiohttp.ClientSession,
    endpoint: str,
    job: int,
    body: dict,
    on_token: OnToken,
    deadline_s: float,
) -> Result:
    texts: list[str] = []
    token_times: list[float] = []
    finish_reason, error, start_s = None, None, time.monotonic()
    try:
        async with session.post(endpoint, json={**body, "stream": True}) as response:
            async for delta, reason in _deltas(response):
                finish_reason = reason
                now_s, count = time.monotonic(), count_tokens(delta)
                texts.append(delta)
                token_times.extend([now_s] * count)
                on_token(now_s, count)
    except TimeoutError:
        error = f"not finished after {deadline_s:g} s"
    except _BadAnswer as problem:
        error = str(problem)[:ERROR_CHARS_MAX]
    except (aiohttp.ClientError, OSError) as problem:
        error = f"{type(problem).__name__}: {problem}"[:ERROR_CHARS_MAX]
    return Result(
        job=job,
        text="".join(texts),
        finish_reason=finish_reason,
        error=error,
        start_s=start_s,
        end_s=time.monotonic(),
        token_times=tuple(token_times),
    )


class _BadAnswer(Exception):
    """The service answered with an error, or with something that is no stream of completions."""


async def _deltas(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, str | None]]:
    """Yields (text, finish reason) of each event until "[DONE]"."""
    if response.status != 200:
        raise _BadAnswer(f"status {response.status}: {await response.text(errors='replace')}")
    finished = done = False
    try:
        async for line in response.content:  # to its end, so that the connection is used again
            if not line.startswith(b"data: "):
                continue
            data = line.removeprefix(b"data: ").strip()
            done = done or data == b"[DONE]"
            event = {"choices": []} if done else json.loads(data)
            if "error" in event:
                raise _BadAnswer(event["error"]["message"])
            for choice in event["choices"]:
                finished = choice["finish_reason"] is not None
                yield choice["text"], choice["finish_reason"]
    except (ValueError, LookupError, TypeError) as problem:
        raise _BadAnswer(f"an event cannot be read: {problem}") from None
    if not (finished and done):
        raise _BadAnswer("the stream ended before its finish reason and [DONE]")
