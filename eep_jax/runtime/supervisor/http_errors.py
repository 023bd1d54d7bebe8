"""Errors below the application, of the parser above all: JSON in OpenAI's form, one log line."""

import json
import logging

from aiohttp import web

_log = logging.getLogger(__name__)

MESSAGE_CHARS_MAX = 300


class ErrorsAsJson(web.RequestHandler):
    """The protocol of a connection; aiohttp's own answers with plain text and logs tracebacks."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what is no request, or to a request whose handler failed unexpectedly."""
        text = one_line(message or f"{type(exc).__name__} inside the service; its log says more")
        of_service = exc if status >= 500 else None
        _log.warning("%s: answered with %d: %a", request.remote, status, text, exc_info=of_service)
        if request.writer.output_size > 0:
            raise ConnectionError("a part of the answer is sent already")
        response = error_response(status, text)
        response.force_close()
        return response

    async def finish_response(self, request, resp, start_time):
        """Sends an answer; one that was raised before the application's middlewares as JSON."""
        if isinstance(resp, web.HTTPException) and resp.status >= 400:
            text = one_line(resp.text or resp.reason)
            _log.warning("%s: answered with %d: %a", request.remote, resp.status, text)
            resp = error_response(resp.status, text)
            resp.force_close()  # the body of the request was not read
        return await super().finish_response(request, resp, start_time)


def error_response(status: int, message: str) -> web.Response:
    """An error in OpenAI's form.

    Args:
      status: of HTTP; from 500 on it is the service's fault.
      message: one line.
    """
    kind = "server_error" if status >= 500 else "invalid_request_error"
    code = "internal_error" if status >= 500 else "bad_http"
    body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return web.Response(status=status, text=json.dumps(body), content_type="application/json")


def one_line(text: str) -> str:
    r"""A message of the parser in one line, without the mark below the bad place.

    >>> one_line("Bad status line:\n\n  b'GET'\n    ^")
    "Bad status line: b'GET'"
    """
    words = " ".join(text.split()).removesuffix("^").rstrip()
    return words if len(words) <= MESSAGE_CHARS_MAX else words[:MESSAGE_CHARS_MAX] + "..."
