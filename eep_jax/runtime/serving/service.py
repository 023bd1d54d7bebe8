"""The completions service on top of the request table: what HTTP clients talk to."""

import asyncio
import dataclasses
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence

from eep_jax.engine.request import NOT_FINITE, Request
from eep_jax.runtime.serving.contract import (
    CompletionRequest,
    KeyConflict,
    ServiceUnavailable,
    StreamProgress,
)
from eep_jax.runtime.serving.request_table import Entry, RequestTable

# Ends of a request that no client asked for.
ERRORS = {
    "cancelled": "the request was cancelled",
    NOT_FINITE: "the model's logits were no numbers (NaN or infinite) behind the tokens so far; "
    "the weights or the prompt cause that, and a repetition gives the same",
}


class CompletionFrontend:
    """Turns completion requests into entries of the table, and entries into streams of progress."""

    def __init__(
        self,
        table: RequestTable,
        end_tokens: frozenset[int],
        unavailable: Callable[[], str],
        accepted: Callable[[Entry], None],
        cancelled: Callable[[Entry], None],
    ):
        """Wires the frontend.

        Args:
          table: holds the requests.
          end_tokens: tokens that end a text, and are no part of it.
          unavailable: returns why no request can be accepted now, or ''.
          accepted: called with an entry after it was added to the table.
          cancelled: called with an entry after it was cancelled in the table.
        """
        self._table, self._end_tokens, self._unavailable = table, end_tokens, unavailable
        self._accepted, self._cancelled = accepted, cancelled
        self._readers: dict[str, set[asyncio.Event]] = {}
        self._refusal = self._end = ""

    def submit_all(
        self, requests: Sequence[CompletionRequest], key: str | None
    ) -> "list[EntryStream]":
        """Raises QueueFull, ServiceUnavailable or KeyConflict; see contract.CompletionService."""
        keys = [_key_of(request, key) for request in requests]
        new = sum(own is None or self._table.by_key(own) is None for own in keys)
        if new > 1:
            self._table.check_room(new)
        return [self._submit(*pair) for pair in zip(requests, keys, strict=True)]

    def _submit(self, request: CompletionRequest, key: str | None) -> "EntryStream":
        body = _asked(request)
        if key is not None and (known := self._table.by_key(key)) is not None:
            if known.body != body:
                raise KeyConflict(
                    f"Idempotency-Key {key!r} was used for another request; "
                    "use a new key for a new one"
                )
            return EntryStream(self, known)
        if reason := self._refusal or self._unavailable():
            raise ServiceUnavailable(reason)
        seed = secrets.randbits(64) if request.seed is None else request.seed & (2**64 - 1)
        rank_request = Request(
            id=f"cmpl-{secrets.token_hex(12)}",
            prompt=request.prompt,
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=seed,
            cache_salt=request.cache_salt,
            shaping=request.shaping,
        )
        entry = self._table.submit(Entry(rank_request, key=key, body=body, created=time.time()))
        self._accepted(entry)
        return EntryStream(self, entry)

    @property
    def reading(self) -> int:
        """Streams that clients read now."""
        return sum(len(events) for events in self._readers.values())

    def drain(self, reason: str) -> None:
        """Refuses new requests from now on; those that were accepted go on."""
        self._refusal = reason

    def end_all(self, reason: str) -> None:
        """Ends every stream with an error; their requests stay in the table."""
        self._end = reason
        for request_id in list(self._readers):
            self.changed(request_id)

    def changed(self, request_id: str) -> None:
        """Wakes all readers of a request."""
        for event in self._readers.get(request_id, ()):
            event.set()

    async def read(self, entry: Entry) -> AsyncIterator[StreamProgress]:
        """Yields the entry's tokens from the first on. Buffers nothing beyond the entry."""
        event = asyncio.Event()
        self._readers.setdefault(entry.request.id, set()).add(event)
        sent, ends = 0, self._end_tokens.union(entry.request.shaping.stop_token_ids)
        try:
            while True:
                event.clear()
                new, finish = entry.produced[sent:], entry.finish
                sent += len(new)
                degraded = tuple(sorted(entry.degraded))
                if finish == "stop" and new and new[-1] in ends:
                    new = new[:-1]
                if finish in ERRORS:
                    yield StreamProgress(tokens=tuple(new), error=ERRORS[finish])
                    return
                if new or finish:
                    reason = finish or None
                    yield StreamProgress(tokens=tuple(new), finish_reason=reason, degraded=degraded)
                if finish:
                    return
                if len(entry.produced) == sent and not entry.finish:
                    if self._end:
                        yield StreamProgress(error=self._end)
                        return
                    await event.wait()
        finally:
            readers = self._readers.get(entry.request.id, set())
            readers.discard(event)
            if not readers:
                self._readers.pop(entry.request.id, None)

    def cancel(self, entry: Entry) -> None:
        if self._table.cancel(entry.request.id) is not None:
            self._cancelled(entry)
            self.changed(entry.request.id)


class EntryStream:
    """One client's stream of an entry."""

    def __init__(self, frontend: CompletionFrontend, entry: Entry):
        self._frontend, self._entry = frontend, entry
        self.id, self.created = entry.request.id, int(entry.created)

    def __aiter__(self) -> AsyncIterator[StreamProgress]:
        return self._frontend.read(self._entry)

    def cancel(self) -> None:
        self._frontend.cancel(self._entry)


def _key_of(request: CompletionRequest, key: str | None) -> str | None:
    """The key of one of several choices; no client can send one with a line break."""
    return f"{key}\n{request.index}" if key is not None and request.index else key


def _asked(request: CompletionRequest) -> str:
    """The fields that a repeated key must equal: all that affect the tokens, as JSON."""
    fields = dataclasses.asdict(request) | {"stream": None, "include_usage": None}
    if request.conversation:
        fields["prompt"] = None  # a template may have written today's date into it
    return json.dumps(fields)
