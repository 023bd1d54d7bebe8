"""Streams completions from any OpenAI-compatible server and notes when each piece arrived.

What goes wrong with a request never ends the load: it is a Sample with an error.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import random
import time
from collections.abc import Callable, Sequence

import aiohttp

RETRY_PAUSE_S = 0.1  # after a request that failed, so that a server that is down is not flooded
ERROR_CHARS_MAX = 300
IN_FLIGHT_MAX = 1_000  # with a request rate; more arrive later than they should

OnToken = Callable[[float, int], None]  # monotonic seconds, how many tokens arrived then


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """What one request came to. Times are monotonic seconds."""

    job: int  # index of its body
    text: str
    finish_reason: str | None
    error: str | None
    refused: bool  # the server answered with an error status and began no stream
    start_s: float
    end_s: float
    pieces: tuple[tuple[float, int], ...]  # (time, tokens) of each event with text
    prompt_tokens: int
    output_tokens: int

    @property
    def ttft_s(self) -> float:
        """From the request to its first token."""
        return self.pieces[0][0] - self.start_s

    @property
    def e2e_s(self) -> float:
        return self.pieces[-1][0] - self.start_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token after the first; None where there is only one."""
        if self.output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        """Times between pieces that follow each other: inter-token latencies."""
        times = [at_s for at_s, _ in self.pieces]
        return [later - earlier for earlier, later in itertools.pairwise(times)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pace:
    """When requests are sent: `concurrency` always in flight, or `rate` per second on average.

    With a rate they arrive as a Poisson process, whether earlier ones were answered or not.
    """

    concurrency: int | None = None
    rate: float | None = None
    seed: int = 0

    def __post_init__(self):
        if (self.concurrency is None) == (self.rate is None):
            raise ValueError(f"{self.concurrency=} and {self.rate=}: give exactly one of them")
        if self.concurrency is not None and self.concurrency < 1:
            raise ValueError(f"{self.concurrency=} must be at least 1")
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise ValueError(f"{self.rate=} requests per second must be above 0 and finite")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """Where requests go, and how tokens are counted where the server does not say."""

    url: str  # root of the service, http://127.0.0.1:8000
    deadline_s: float = 120.0  # for one request
    bytes_per_token: float = 1.0  # this project's models: a token is a byte


async def run(
    target: Target,
    jobs: Sequence[dict],
    pace: Pace,
    *,
    count: int | None = None,
    until: asyncio.Event | None = None,
    on_token: OnToken = lambda at_s, count: None,
) -> list[Sample]:
    """Sends `count` requests, or until the event is set, and waits for their answers.

    `jobs` are bodies, taken in turn and around again. Results come in the order of their ends.
    Raises ValueError where there is no job, or neither `count` nor `until`.
    """
    if not jobs:
        raise ValueError("jobs is empty; give at least one request body")
    if (count is None) == (until is None):
        raise ValueError("give either a count of requests or an event that ends them")
    stop = until or asyncio.Event()
    turns = range(count) if count is not None else itertools.count()
    indices = (n % len(jobs) for n in itertools.takewhile(lambda _: not stop.is_set(), turns))
    samples: list[Sample] = []
    endpoint = f"{target.url.rstrip('/')}/v1/completions"

    async def one(job: int) -> None:
        samples.append(await _complete(session, endpoint, job, jobs[job], target, on_token))
        if samples[-1].error is not None:
            await _sleep(RETRY_PAUSE_S, stop)

    timeout = aiohttp.ClientTimeout(total=target.deadline_s)
    connector = aiohttp.TCPConnector(limit=pace.concurrency or IN_FLIGHT_MAX)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        if pace.rate is None:
            await _closed_loop(indices, one, pace.concurrency)
        else:
            await _poisson(indices, one, pace, stop)
    return samples


async def _closed_loop(indices, one, concurrency: int) -> None:
    async def work() -> None:
        for job in indices:
            await one(job)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(work())


async def _poisson(indices, one, pace: Pace, stop: asyncio.Event) -> None:
    arrivals, next_s = random.Random(pace.seed), time.monotonic()
    async with asyncio.TaskGroup() as group:
        for job in indices:
            group.create_task(one(job))
            # From the last planned arrival, not from now: being late does not lower the rate.
            next_s += arrivals.expovariate(pace.rate)
            await _sleep(max(0.0, next_s - time.monotonic()), stop)


async def _sleep(seconds: float, stop: asyncio.Event) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), seconds)


async def _complete(
    session: aiohttp.ClientSession,
    endpoint: str,
    job: int,
    body: dict,
    target: Target,
    on_token: OnToken,
) -> Sample:
    stream = _Stream(target, on_token)
    error, start_s = None, time.monotonic()
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with session.post(endpoint, json=asked) as response:
            await stream.read(response)
    except TimeoutError:
        error = f"not finished after {target.deadline_s:g} s"
    except BadAnswer as problem:
        error = str(problem)
    except (aiohttp.ClientError, OSError) as problem:
        error = f"{type(problem).__name__}: {problem}"
    if error is None and not stream.pieces:
        error = "the answer has no text"
    text = "".join(stream.texts)
    counted = sum(tokens for _, tokens in stream.pieces)
    return Sample(
        job=job,
        text=text,
        finish_reason=stream.finish_reason,
        error=None if error is None else error[:ERROR_CHARS_MAX],
        refused=stream.refused,
        start_s=start_s,
        end_s=time.monotonic(),
        pieces=tuple(stream.pieces),
        prompt_tokens=stream.usage.get("prompt_tokens", 0),
        output_tokens=stream.usage.get("completion_tokens", counted),
    )


class BadAnswer(Exception):
    """The server answered with an error, or with something that is no stream of completions."""


class _Stream:
    """The events of one answer, as far as they came."""

    def __init__(self, target: Target, on_token: OnToken):
        self._target, self._on_token = target, on_token
        self.texts: list[str] = []
        self.pieces: list[tuple[float, int]] = []
        self.usage: dict = {}
        self.finish_reason: str | None = None
        self.refused = False
        self._bytes = self._told = 0

    async def read(self, response: aiohttp.ClientResponse) -> None:
        """Takes all events until the end. Raises BadAnswer."""
        if response.status != 200:
            self.refused = True
            raise BadAnswer(f"status {response.status}: {await response.text(errors='replace')}")
        done = False
        try:
            async for line in response.content:  # to its end, so the connection is used again
                data = line.removeprefix(b"data:").strip()
                if not line.startswith(b"data:"):
                    continue
                if data == b"[DONE]":
                    done = True
                    continue
                self._take(json.loads(data))
        except (ValueError, LookupError, TypeError, AttributeError) as problem:
            raise BadAnswer(f"an event cannot be read: {problem}") from None
        if not done or self.finish_reason is None:
            raise BadAnswer("the stream ended before its finish reason and [DONE]")

    def _take(self, event: dict) -> None:
        if "error" in event:
            raise BadAnswer(str(event["error"].get("message", event["error"])))
        self.usage = event.get("usage") or self.usage
        for choice in event["choices"]:
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            if text := choice.get("text"):
                self._piece(text)

    def _piece(self, text: str) -> None:
        at_s = time.monotonic()
        self.texts.append(text)
        # A replacement character stands for one invalid byte.
        self._bytes += len(text.replace("\ufffd", "?").encode())
        total = max(self._told + 1, round(self._bytes / self._target.bytes_per_token))
        self.pieces.append((at_s, total - self._told))
        self._on_token(at_s, total - self._told)
        self._told = total
