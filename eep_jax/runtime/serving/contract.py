"""Contract between the HTTP front and the service behind it: requests, streams, errors."""

import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Protocol, runtime_checkable

from eep_jax.coordination.scaling import ScaleRequest
from eep_jax.engine.request import NO_SHAPING, Shaping
from eep_jax.errors import EepError


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """A checked request: every value is within its limits."""

    prompt: tuple[int, ...]  # begins with BOS if the model has one
    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    model: str
    cache_salt: str = ""  # only requests with equal salts share cached prefixes
    shaping: Shaping = NO_SHAPING
    chat: bool = False  # the answer is a message of its own; else it continues the prompt
    # Of a chat: the messages and template arguments behind `prompt`, as JSON.
    conversation: str = ""
    echo: str = ""  # text of the prompt, which the answer begins with
    index: int = 0  # among the `choices` that one HTTP request asked for
    choices: int = 1


class ServiceUnavailable(EepError):
    """No rank can take the request now, for the reason given. A later retry may succeed."""


class KeyConflict(EepError):
    """The Idempotency-Key was used with another body."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamProgress:
    """New tokens of a request. The last increment has a `finish_reason` or an `error`."""

    tokens: tuple[int, ...] = ()  # without the end-of-text token
    finish_reason: str | None = None  # "length", or "stop" at the end of text
    error: str | None = None
    degraded: tuple[int, ...] = ()  # experts without a replica when these tokens were computed


@runtime_checkable
class Stream(Protocol):
    """One reader of a request, from its first token on."""

    id: str  # "cmpl-" and a unique part
    created: int  # seconds since 1970

    def __aiter__(self) -> AsyncIterator[StreamProgress]: ...

    def cancel(self) -> None:
        """Ends the request. Idempotent, and without effect after its end."""


@runtime_checkable
class CompletionService(Protocol):
    """The service behind the HTTP API. No method blocks."""

    def submit_all(self, requests: Sequence[CompletionRequest], key: str | None) -> list[Stream]:
        """Starts the requests, or reads those with this key again from their first token.

        Raises QueueFull, ServiceUnavailable, or KeyConflict, and then has started none.
        """

    def apply(self, request: ScaleRequest) -> dict:
        """Takes ranks out or back in. Raises InvalidMove or CoverageLost if that is impossible."""

    def health(self) -> tuple[bool, dict]: ...

    def status(self) -> dict: ...

    def metrics(self) -> bytes: ...
