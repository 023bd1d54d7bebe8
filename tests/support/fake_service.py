"""A CompletionService whose streams follow a script, and that remembers what it was asked."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Iterable

from eep_jax.coordination.scaling import ScaleRequest
from eep_jax.errors import QueueFull
from eep_jax.runtime.http.completion import CompletionRequest
from eep_jax.runtime.serving.contract import KeyConflict, ServiceUnavailable, StreamProgress

CREATED_S = 1_700_000_000


def spell(text: str, finish_reason: str | None = "length") -> tuple[StreamProgress, ...]:
    """One StreamProgress for each byte; the last one has the finish reason."""
    steps = [StreamProgress(tokens=(byte,)) for byte in text.encode()]
    return (*steps[:-1], dataclasses.replace(steps[-1], finish_reason=finish_reason))


class FakeStream:
    """Yields the script. Waits where it holds an Event, raises where it holds an exception."""

    def __init__(self, name: str, script: Iterable[StreamProgress | asyncio.Event | Exception]):
        self.id, self.created = name, CREATED_S
        self.cancelled = asyncio.Event()
        self.num_read = self.num_cancelled = 0
        self._script = script

    async def __aiter__(self) -> AsyncIterator[StreamProgress]:
        for step in self._script:
            if isinstance(step, asyncio.Event):
                await step.wait()
            elif isinstance(step, Exception):
                raise step
            else:
                self.num_read += 1
                yield step

    def cancel(self) -> None:
        self.cancelled.set()
        self.num_cancelled += 1


class FakeService:
    """Answers every request with the same script; `refusal` is raised instead if it is set."""

    def __init__(self, script: Iterable = (), refusal: Exception | None = None):
        self.script, self.refusal = script, refusal
        self.scripts: list[Iterable] = []  # of the next streams, before `script`
        self.submitted: list[tuple[CompletionRequest, str | None]] = []
        self.streams: list[FakeStream] = []
        self.submitting = asyncio.Event()
        self.healthy = True
        self.scale_requests: list[ScaleRequest] = []
        self._by_key: dict[str, CompletionRequest] = {}

    def submit(self, request: CompletionRequest, key: str | None) -> FakeStream:
        if self.refusal is not None:
            raise self.refusal
        if key is not None and self._by_key.setdefault(key, request) != request:
            raise KeyConflict(f"key {key!r} belongs to another body; use a new key")
        self.submitted.append((request, key))
        script = self.scripts.pop(0) if self.scripts else self.script
        self.streams.append(FakeStream(f"cmpl-r{len(self.streams)}", script))
        self.submitting.set()
        return self.streams[-1]

    def submit_all(self, requests, key: str | None) -> list[FakeStream]:
        return [self.submit(request, key) for request in requests]

    def apply(self, request: ScaleRequest) -> dict:
        if self.refusal is not None:
            raise self.refusal
        self.scale_requests.append(request)
        return {"epoch_planned": 8}

    def health(self) -> tuple[bool, dict]:
        return self.healthy, {"active_ranks": 3 if self.healthy else 0}

    def status(self) -> dict:
        return {"epoch": 7}

    def metrics(self) -> bytes:
        return b"# TYPE eep_epoch gauge\neep_epoch 7.0\n"


full_service = lambda: FakeService(refusal=QueueFull("8 requests wait, the most; try again later"))
down_service = lambda: FakeService(refusal=ServiceUnavailable("no rank is active; wait for one"))
