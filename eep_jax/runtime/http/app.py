"""HTTP API of the service: OpenAI completions, models, health, membership and metrics.

`complete` reads and checks a body, submits it, and turns the StreamProgress of its Stream into one
JSON answer or into server-sent events. `apply` takes ranks out for maintenance, and back in. Every
error is JSON.
"""

import asyncio
import dataclasses
import functools
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence

from aiohttp import web

from eep_jax import __version__
from eep_jax.errors import CoverageLost, InvalidMove, QueueFull
from eep_jax.runtime.http.access import AUTHENTICATE, EVERYONE, Access, check_is_json, guard
from eep_jax.runtime.http.chat import parse_chats
from eep_jax.runtime.http.checks import RequestError
from eep_jax.runtime.http.completion import CompletionLimits, parse_requests
from eep_jax.runtime.http.frame import add_frame
from eep_jax.runtime.http.response import Answer, Choice, Failed
from eep_jax.runtime.http.scale_request import parse_scale_request
from eep_jax.runtime.http.tokens import detokenize, tokenize
from eep_jax.runtime.serving.contract import CompletionService, KeyConflict, ServiceUnavailable
from eep_jax.runtime.text.chat_template import ChatTemplate

BODY_DEADLINE_S = 30.0  # for a body to arrive
WRITE_DEADLINE_S = 30.0  # for a client to read one write; then it is disconnected
RETRY_AFTER_S = 1  # Retry-After of a refused request
KEY_CHARS_MAX = 128
KEY_HEADER = "Idempotency-Key"
PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"
SSE_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # proxies must not buffer events
}
CLIENT_GONE_STATUS = 499

LOG = logging.getLogger(__name__)


def build_app(
    service: CompletionService,
    limits: CompletionLimits,
    *,
    template: ChatTemplate | None = None,
    body_bytes_max: int = 1 << 20,
    write_deadline_s: float = WRITE_DEADLINE_S,
    keep_alive_s: float = 0,
    cors_origins: Sequence[str] = (),
    access_log: bool = False,
    info: dict | None = None,
    access: Access = EVERYONE,
    ready_while_changing: bool = False,
) -> web.Application:
    """The HTTP application in front of `service`.

    Its runner needs `handler_cancellation`: a client that leaves cancels its handler.

    Args:
      service: what answers; see contract.CompletionService.
      limits: what a request may ask for.
      template: renders conversations; None refuses chats.
      body_bytes_max: the largest body that is read.
      write_deadline_s: how long a client may take nothing before its connection is aborted.
      keep_alive_s: after so long a silence a stream sends a comment with the cluster's state, so
        that no proxy cuts it; 0 sends none.
      cors_origins, access_log: see frame.add_frame.
      info: what `/server_info` answers beside the version.
      access: who may call what; by default everyone, but no web page of another origin.
      ready_while_changing: whether `/readyz` is 200 during a change of members.
    """
    api = _Api(service, limits, template, body_bytes_max, write_deadline_s, keep_alive_s)
    api.ready_while_changing = ready_while_changing
    api.info = {"version": __version__} | (info or {})
    guarded = guard(dataclasses.replace(access, readers=frozenset(cors_origins)))
    app = web.Application(client_max_size=body_bytes_max, middlewares=[api.errors_as_json, guarded])
    app.router.add_post("/v1/completions", api.complete)
    app.router.add_post("/v1/chat/completions", api.chat)
    app.router.add_get("/v1/models", api.models)
    app.router.add_get("/v1/models/{id:.+}", api.model)
    app.router.add_get("/v1/fault_tolerance/status", api.status)
    app.router.add_post("/v1/fault_tolerance/apply", api.apply)
    app.router.add_get("/health", api.health)
    app.router.add_get("/livez", api.livez)
    app.router.add_get("/readyz", api.readyz)
    app.router.add_get("/metrics", api.metrics)
    app.router.add_post("/tokenize", api.tokenize)
    app.router.add_post("/detokenize", api.detokenize)
    app.router.add_get("/version", api.version)
    app.router.add_get("/server_info", api.server_info)
    app.router.add_get("/ping", api.health)
    app.router.add_post("/ping", api.health)
    add_frame(app, cors_origins=cors_origins, access_log=access_log)
    return app


class _ClientGone(Exception):
    """The client has not read its answer within the deadline, or has disconnected."""


class _Api:
    """The handlers. `http` is the HTTP request, `request` the checked content of its body."""

    def __init__(
        self,
        service: CompletionService,
        limits: CompletionLimits,
        template: ChatTemplate | None,
        body_bytes_max: int,
        write_deadline_s: float,
        keep_alive_s: float,
    ):
        self._service, self._limits, self._template = service, limits, template
        self._keep_alive_s = keep_alive_s or None
        self.info: dict = {}
        self.ready_while_changing = False
        self._body_bytes_max, self._write_deadline_s = body_bytes_max, write_deadline_s
        self._model = {
            "id": limits.model,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "eep-jax",
            "max_model_len": limits.context_tokens,
        }

    async def complete(self, http: web.Request) -> web.StreamResponse:
        return await self._answer(http, parse_requests)

    async def chat(self, http: web.Request) -> web.StreamResponse:
        return await self._answer(http, functools.partial(parse_chats, template=self._template))

    async def _answer(self, http: web.Request, parse) -> web.StreamResponse:
        # In a thread: a long prompt may take a second, in which the event loop serves the ranks.
        requests = await asyncio.to_thread(parse, await _read_json(http), limits=self._limits)
        key = _read_key(http)
        streams = self._service.submit_all(requests, key)
        answer = Answer(requests, streams, self._limits.tokenizer)
        try:
            if answer.request.stream:
                return await self._send_events(http, answer)
            texts = [[] for _ in requests]
            async for choice, delta in answer.deltas():
                texts[choice.request.index].append(delta)
            return web.json_response(answer.whole(["".join(parts) for parts in texts]))
        except _ClientGone:
            if http.transport is not None:
                http.transport.abort()
            return web.Response(status=CLIENT_GONE_STATUS)
        finally:
            # With a key the client may return for the answer, so the request goes on.
            if key is None:
                answer.cancel()

    async def models(self, http: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._model]})

    async def model(self, http: web.Request) -> web.Response:
        if (name := http.match_info["id"]) != self._limits.model:
            message = f"model {name[:80]!r} does not exist; this service has {self._limits.model!r}"
            raise RequestError(404, "model", message, code="model_not_found")
        return web.json_response(self._model)

    async def tokenize(self, http: web.Request) -> web.Response:
        body, how = await _read_json(http), (self._limits, self._template)
        return web.json_response(await asyncio.to_thread(tokenize, body, *how))

    async def detokenize(self, http: web.Request) -> web.Response:
        body = await _read_json(http)
        return web.json_response(await asyncio.to_thread(detokenize, body, self._limits))

    async def version(self, http: web.Request) -> web.Response:
        return web.json_response({"version": __version__})

    async def server_info(self, http: web.Request) -> web.Response:
        return web.json_response(self.info)

    async def health(self, http: web.Request) -> web.Response:
        healthy, facts = self._service.health()
        return web.json_response(facts, status=200 if healthy else 503)

    async def livez(self, http: web.Request) -> web.Response:
        """200 while this process answers; a restart would help no other fault."""
        return web.json_response({"status": "alive"})

    async def readyz(self, http: web.Request) -> web.Response:
        """200 while requests are served without a pause."""
        healthy, facts = self._service.health()
        ready = healthy and (self.ready_while_changing or facts.get("status") != "changing")
        found = {name: facts[name] for name in ("status", "reason") if name in facts}
        return web.json_response({"ready": ready} | found, status=200 if ready else 503)

    async def status(self, http: web.Request) -> web.Response:
        return web.json_response(self._service.status())

    async def apply(self, http: web.Request) -> web.Response:
        check_is_json(http)
        return web.json_response(self._service.apply(parse_scale_request(await _read_json(http))))

    async def metrics(self, http: web.Request) -> web.Response:
        headers = {"Content-Type": PROMETHEUS_TEXT}
        return web.Response(body=self._service.metrics(), headers=headers)

    async def _send_events(self, http: web.Request, answer: "Answer") -> web.StreamResponse:
        """Sends each increment at once; stops reading the stream while the client reads nothing."""
        response = web.StreamResponse(headers=SSE_HEADERS)
        usage = {"usage": None} if answer.request.include_usage else {}
        await response.prepare(http)
        try:
            for opening in answer.opening():
                await self._send(response, json.dumps(opening | usage))
            async for increment in _with_silences(answer.deltas(), self._keep_alive_s):
                if increment is None:
                    await self._bounded(response.write(f": {self._state()}\n\n".encode()))
                    continue
                choice, delta = increment
                if delta or choice.finish_reason:
                    await self._send(response, json.dumps(answer.chunk(choice, delta) | usage))
            if usage:
                await self._send(response, json.dumps(answer.final()))
            await self._send(response, "[DONE]")
        except _ClientGone:
            raise
        except Exception as error:
            # The status line has been sent, so the error can only be an event.
            _, body = _describe(error, http, self._body_bytes_max)
            await self._send(response, json.dumps(body))
        await self._bounded(response.write_eof())
        return response

    async def _send(self, response: web.StreamResponse, data: str) -> None:
        await self._bounded(response.write(f"data: {data}\n\n".encode()))

    def _state(self) -> str:
        """The cluster's state in a word, for a comment."""
        return str(self._service.health()[1].get("status", "waiting"))

    async def _bounded(self, write) -> None:
        """Awaits a write, which blocks while the client's buffer is full. Raises _ClientGone."""
        try:
            async with asyncio.timeout(self._write_deadline_s):
                await write
        except (TimeoutError, ConnectionError):
            raise _ClientGone from None

    @property
    def errors_as_json(self):
        @web.middleware
        async def middleware(http: web.Request, handler) -> web.StreamResponse:
            try:
                return await handler(http)
            except Exception as error:
                if isinstance(error, web.HTTPException) and error.status < 400:
                    raise
                status, body = _describe(error, http, self._body_bytes_max)
                headers = {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else {}
                if status == 401:
                    headers |= AUTHENTICATE
                if isinstance(error, web.HTTPMethodNotAllowed):
                    headers["Allow"] = error.headers["Allow"]
                return web.json_response(body, status=status, headers=headers)

        return middleware


async def _with_silences(deltas: AsyncIterator[tuple[Choice, str]], after_s: float | None):
    """Yields the deltas, and None whenever none has come for `after_s`."""
    waiting = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(anext(deltas))
            done, _ = await asyncio.wait({waiting}, timeout=after_s)
            if not done:
                yield None
                continue
            finished, waiting = waiting, None
            try:
                yield finished.result()
            except StopAsyncIteration:
                return
    finally:
        if waiting is not None:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        await deltas.aclose()


async def _read_json(http: web.Request) -> object:
    try:
        async with asyncio.timeout(BODY_DEADLINE_S):
            data = await http.read()
    except TimeoutError:
        message = f"the body took longer than {BODY_DEADLINE_S:g} s to arrive; send it again"
        raise RequestError(408, None, message) from None
    except web.RequestPayloadError as error:
        message = f"the body cannot be read ({error}); send it in the encoding that its headers say"
        raise RequestError(400, None, message) from None
    try:
        return json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        message = f"the body is not valid JSON ({error}); send one JSON object"
        raise RequestError(400, None, message) from None


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not a JSON value")


def _read_key(http: web.Request) -> str | None:
    key = http.headers.get(KEY_HEADER)
    if key is None or (0 < len(key) <= KEY_CHARS_MAX and key.isascii() and key.isprintable()):
        return key
    message = (
        f"{KEY_HEADER} has {len(key)} characters ({key[:40]!a}); "
        f"send 1 to {KEY_CHARS_MAX} printable ASCII characters, or leave it out"
    )
    raise RequestError(400, KEY_HEADER, message)


def _describe(error: Exception, http: web.Request, body_bytes_max: int) -> tuple[int, dict]:
    """The status and the JSON of an error, in OpenAI's form."""
    param, kind, message = None, "invalid_request_error", str(error)
    match error:
        case RequestError():
            status, param, code = error.status, error.field, error.code
            kind = {401: "authentication_error", 403: "permission_error"}.get(status, kind)
        case KeyConflict():
            status, param, code = 409, KEY_HEADER, "idempotency_key_conflict"
        case InvalidMove():
            status, code = 409, "invalid_move"
        case CoverageLost():
            status, code = 409, "coverage_lost"
        case QueueFull():
            status, kind, code = 429, "rate_limit_error", "queue_full"
        case ServiceUnavailable():
            status, kind, code = 503, "server_error", "service_unavailable"
        case Failed():
            status, kind, code = 500, "server_error", "generation_failed"
        case web.HTTPRequestEntityTooLarge():
            status, code = 413, "body_too_large"
            message = f"the body is larger than {body_bytes_max} bytes; send a shorter prompt"
        case web.HTTPNotFound():
            status, code = 404, "unknown_url"
            message = f"{http.path[:200]} does not exist; completions are at /v1/completions, "
            message += "chats at /v1/chat/completions"
        case web.HTTPMethodNotAllowed():
            status, code = 405, "method_not_allowed"
            message = f"{http.method} is not allowed here; use {error.headers['Allow']}"
        case web.HTTPException():
            status, code = error.status, None
        case _:
            LOG.error("%s %s failed", http.method, http.path, exc_info=error)
            status, kind, code = 500, "server_error", "internal_error"
            message = f"{type(error).__name__} inside the service; its log says more"
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}
