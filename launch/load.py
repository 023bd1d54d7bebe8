"""Load generator that streams completions from any OpenAI-compatible server.

It measures what a client sees: a request that is refused, fails or is late is a Sample with an
error and does not end the load.
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
IN_FLIGHT_MAX = 1_000  # with a request rate; beyond it requests wait for a connection

OnToken = Callable[[float, int], None]  # monotonic seconds, how many tokens arrived then


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One request as the client saw it. Times are monotonic seconds."""

    job: int  # index of its body
    text: str  # all that arrived, also before an error
    finish_reason: str | None
    error: str | None
    refused: bool  # the server answered with an error status and began no stream
    start_s: float
    end_s: float
    pieces: tuple[tuple[float, int], ...]  # (time, tokens) of each event with text
    prompt_tokens: int
    output_tokens: int

    @property
    def token_times(self) -> tuple[float, ...]:
        """One for each token; tokens of one event have the same."""
        return tuple(at_s for at_s, count in self.pieces for _ in range(count))

    @property
    def ttft_s(self) -> float:
        """From the request to its first token."""
        return self.pieces[0][0] - self.start_s

    @property
    def e2e_s(self) -> float:
        return self.pieces[-1][0] - self.start_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token after the first; None if there is only one."""
        if self.output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        """Inter-token latencies: times between successive pieces."""
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
    """Address of the service, and how its answers are read."""

    url: str  # root of the service, http://127.0.0.1:8000
    deadline_s: float = 120.0  # for one request, from its start to its last token
    bytes_per_token: float = 1.0  # this project's models: a token is a byte
    may_be_empty: bool = False  # else an answer without text is an error


async def run_load(
    url: str,
    jobs: Sequence[dict],
    concurrency: int,
    until: asyncio.Event,
    on_token: OnToken = lambda at_s, count: None,
) -> list[Sample]:
    """Keeps `concurrency` requests in flight until the event is set, and awaits their answers."""
    target, pace = Target(url=url, may_be_empty=True), Pace(concurrency=concurrency)
    return await run(target, jobs, pace, until=until, on_token=on_token)


async def run_once(
    url: str,
    jobs: Sequence[dict],
    concurrency: int,
    on_token: OnToken = lambda at_s, count: None,
    *,
    deadline_s: float = Target.deadline_s,
) -> list[Sample]:
    """Sends each job once, `concurrency` at a time; `samples[i]` is that of `jobs[i]`."""
    target = Target(url=url, deadline_s=deadline_s, may_be_empty=True)
    pace = Pace(concurrency=concurrency)
    done = await run(target, jobs, pace, count=len(jobs), on_token=on_token)
    return sorted(done, key=lambda sample: sample.job)


async def run(
    target: Target,
    jobs: Sequence[dict],
    pace: Pace,
    *,
    count: int | None = None,
    until: asyncio.Event | None = None,
    on_token: OnToken = lambda at_s, count: None,
) -> list[Sample]:
    """Sends requests and waits for their answers.

    Args:
        target: The service.
        jobs: Bodies of completions, taken in turn and around again.
        pace: When requests are sent.
        count: How many are sent; or
        until: An event that ends the sending.
        on_token: Called as tokens arrive.

    Returns:
        The samples in the order in which requests ended.

    Raises:
        ValueError: There is no job, or not exactly one of `count` and `until`.
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


async def _complete(session, endpoint: str, job: int, body: dict, target: Target, on_token):
    """One request, as a Sample."""
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
    if error is None and not stream.pieces and not target.may_be_empty:
        error = "the answer has no text"
    counted = sum(tokens for _, tokens in stream.pieces)
    return Sample(
        job=job,
        text="".join(stream.texts),
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
    """The server answered with an error, or with a malformed stream of completions."""


class _Stream:
    """Parser of the events of one answer; keeps what came before an error."""

    def __init__(self, target: Target, on_token: OnToken):
        self._target, self._on_token = target, on_token
        self.texts: list[str] = []
        self.pieces: list[tuple[float, int]] = []
        self.usage: dict = {}
        self.finish_reason: str | None = None
        self.refused = False
        self._bytes = self._counted = 0

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
            if text := choice["text"]:
                self._piece(text)

    def _piece(self, text: str) -> None:
        at_s = time.monotonic()
        self.texts.append(text)
        self._bytes += count_bytes(text)
        total = max(self._counted + 1, round(self._bytes / self._target.bytes_per_token))
        self.pieces.append((at_s, total - self._counted))
        self._on_token(at_s, total - self._counted)
        self._counted = total


def count_bytes(text: str) -> int:
    """Bytes of the text in UTF-8; a replacement character stands for one invalid byte."""
    return len(text.replace("\ufffd", "?").encode())
