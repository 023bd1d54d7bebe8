"""Frame around every handler: ids of requests, the access log, and CORS."""

import logging
import secrets
import time
from collections.abc import Sequence

from aiohttp import web

ID_HEADER = "X-Request-Id"
ID_CHARS_MAX = 128
CORS_METHODS = "GET, POST, OPTIONS"
CORS_AGE_S = 600

_ID = web.RequestKey("id", str)

LOG = logging.getLogger("eep_jax.access")


def add_frame(app: web.Application, *, cors_origins: Sequence[str], access_log: bool) -> None:
    """Adds the frame to an application.

    Args:
      app: the application, with its routes.
      cors_origins: origins whose pages a browser lets read answers, "*" for all; () sends no
        header of CORS.
      access_log: whether a line is logged for every request.
    """
    app.middlewares.insert(0, _named if not access_log else _logged)
    app.on_response_prepare.append(_with_id)
    if cors_origins:
        allowed = frozenset(cors_origins)

        async def with_cors(http: web.Request, response: web.StreamResponse) -> None:
            response.headers.update(_cors_headers(http, allowed))

        app.on_response_prepare.append(with_cors)
        # No route: one for every path would turn a path that does not exist into a 405.
        app.middlewares.insert(1, _preflight)


def request_id(http: web.Request) -> str:
    """The id that the client sent, if it is one, else a new one."""
    if _ID not in http:
        sent = http.headers.get(ID_HEADER, "")
        good = 0 < len(sent) <= ID_CHARS_MAX and sent.isascii() and sent.isprintable()
        http[_ID] = sent if good else secrets.token_hex(16)
    return http[_ID]


@web.middleware
async def _named(http: web.Request, handler) -> web.StreamResponse:
    request_id(http)
    return await handler(http)


@web.middleware
async def _logged(http: web.Request, handler) -> web.StreamResponse:
    started, status = time.monotonic(), "client left"
    try:
        response = await handler(http)
        status = str(response.status)
        return response
    except web.HTTPException as error:
        status = str(error.status)
        raise
    finally:
        took_ms = 1000 * (time.monotonic() - started)
        facts = http.remote, http.method, http.path[:200], status, took_ms, request_id(http)
        LOG.info("%s %r %r %s %.0f ms %s", *facts)


async def _with_id(http: web.Request, response: web.StreamResponse) -> None:
    response.headers[ID_HEADER] = request_id(http)


@web.middleware
async def _preflight(http: web.Request, handler) -> web.StreamResponse:
    if http.method != "OPTIONS":
        return await handler(http)
    asked = http.headers.get("Access-Control-Request-Headers", "*")
    headers = {
        "Access-Control-Allow-Methods": CORS_METHODS,
        "Access-Control-Allow-Headers": asked,
        "Access-Control-Max-Age": str(CORS_AGE_S),
    }
    return web.Response(status=204, headers=headers)


def _cors_headers(http: web.Request, allowed: frozenset[str]) -> dict[str, str]:
    origin = http.headers.get("Origin")
    if origin is None or not ({"*", origin} & allowed):
        return {}
    found = {"Access-Control-Expose-Headers": ID_HEADER}
    if "*" in allowed:
        return found | {"Access-Control-Allow-Origin": "*"}
    return found | {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
