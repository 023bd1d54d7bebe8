"""Contract between the HTTP front and the service behind it: requests, streams, errors."""

import dataclasses
from collections.abc import AsyncIterator
from typing import Protocol, runtime_checkable

from eep_jax.coordination.scaling import ScaleRequest
from eep_jax.errors import EepError


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """A request that was checked: every value is within its limits."""

    prompt: tuple[int, ...]  # begins with BOS if the model has one
    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    model: str
    chat: bool = False  # the answer is a message; else it goes on from the prompt
    conversation: str = ""  # of a chat: what `prompt` was made from, as JSON


class ServiceUnavailable(EepError):
    """No rank can take the request now; the message says why. Trying again later may help."""


class KeyConflict(EepError):
    """This Idempotency-Key was used with another body."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamProgress:
    """What is new in a request. The last one has a `finish_reason` or an `error`."""

    tokens: tuple[int, ...] = ()  # without the end-of-text token
    finish_reason: str | None = None  # "length", or "stop" at the end of text
    error: str | None = None
    degraded: tuple[int, ...] = ()  # experts that were dropped from these tokens


@runtime_checkable
class Stream(Protocol):
    """One reading of a request, from its first token."""

    id: str  # "cmpl-" and what tells requests apart
    created: int  # seconds since 1970

    def __aiter__(self) -> AsyncIterator[StreamProgress]: ...

    def cancel(self) -> None:
        """No further tokens are wanted. Harmless when repeated or after the end."""


@runtime_checkable
class CompletionService(Protocol):
    """What stands behind the API. No method blocks."""

    def submit(self, request: CompletionRequest, key: str | None) -> Stream:
        """Starts a request, or reads the one that has this key again, from its first token.

        Raises QueueFull, ServiceUnavailable, or KeyConflict.
        """

    def apply(self, request: ScaleRequest) -> dict:
        """Takes ranks out or back. Raises InvalidMove or CoverageLost where that cannot be."""

    def health(self) -> tuple[bool, dict]: ...

    def status(self) -> dict: ...

    def metrics(self) -> bytes: ...
