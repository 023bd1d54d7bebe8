"""Limits of the connections to one port, so that silent and slow ones shut nobody out.

A connection is idle until the head of a request has arrived, and again after the answer. An idle
one is closed after a deadline. At the maximum, of all or of one address, the connection that has
been idle for longest makes room for a new one; only if each serves a request is the new one closed.
"""

import asyncio
import collections
import dataclasses
import logging
from collections.abc import Callable

from aiohttp import web

from eep_jax.runtime.supervisor.http_errors import ErrorsAsJson

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one port.

    Args:
      connections_max: at the same time.
      per_address_max: of them, from one address.
      head_s: seconds for the head of a first request to arrive.
      idle_s: the same, after an answer.
    """

    connections_max: int = 4096
    per_address_max: int = 4096
    head_s: float = 10.0
    idle_s: float = 75.0


class LimitedRunner(web.AppRunner):
    """An AppRunner whose ports keep to limits, and answer in JSON to what is no HTTP."""

    def __init__(self, app: web.Application, limits: Limits, **options):
        self._connections = _Connections(limits)
        app.middlewares.append(self._connections.middleware)
        self._idle_s = limits.idle_s
        super().__init__(app, **options)

    @property
    def server(self):
        """What asyncio calls for the protocol of a new connection."""
        inner = super().server
        return inner and (lambda: _Guard(self._connections, lambda: self._protocol(inner)))

    def _protocol(self, inner: web.Server) -> ErrorsAsJson:
        loop = asyncio.get_running_loop()
        return ErrorsAsJson(inner, loop=loop, keepalive_timeout=self._idle_s, access_log=None)


class _Connections:
    """The open connections of a port."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._of_address: collections.Counter[str] = collections.Counter()
        self._by_transport: dict[asyncio.BaseTransport, _Guard] = {}
        self._idle: dict[_Guard, None] = {}  # the longest idle first

    def admit(self, guard: "_Guard") -> bool:
        """Takes in a new connection, if need be in the place of an idle one."""
        limits, address = self._limits, guard.address
        if self._of_address[address] >= limits.per_address_max and not self._evict(address):
            _log.warning("too many connections of %s at once: a new one is closed", address)
            return False
        if len(self._by_transport) >= limits.connections_max and not self._evict(None):
            _log.warning("%d connections, the maximum: a new one is closed", limits.connections_max)
            return False
        self._of_address[address] += 1
        self._by_transport[guard.transport] = guard
        self._rest(guard, limits.head_s)
        return True

    def drop(self, guard: "_Guard") -> None:
        """Forgets a connection that has ended, or is being closed."""
        if self._by_transport.pop(guard.transport, None) is None:
            return
        self._wake(guard)
        self._of_address[guard.address] -= 1
        if not self._of_address[guard.address]:
            del self._of_address[guard.address]

    @web.middleware
    async def middleware(self, http: web.Request, handler) -> web.StreamResponse:
        """A connection that serves a request is not idle."""
        guard = self._by_transport.get(http.transport)
        if guard is not None:
            self._wake(guard)
        try:
            return await handler(http)
        finally:
            if guard is not None and guard.transport in self._by_transport:
                # The server closes it after its own, shorter time if nothing comes at all.
                self._rest(guard, self._limits.idle_s + self._limits.head_s)

    def _rest(self, guard: "_Guard", deadline_s: float) -> None:
        self._idle[guard] = None
        loop = asyncio.get_running_loop()
        guard.timer = loop.call_later(deadline_s, self._expire, guard)

    def _wake(self, guard: "_Guard") -> None:
        self._idle.pop(guard, None)
        if guard.timer is not None:
            guard.timer.cancel()

    def _expire(self, guard: "_Guard") -> None:
        _log.warning("a connection was closed: no request arrived in time")
        self._close(guard)

    def _evict(self, address: str | None) -> bool:
        """Closes the connection, of one address or of any, that has been idle for longest."""
        found = (g for g in self._idle if address is None or g.address == address)
        guard = next(found, None)
        if guard is not None:
            self._close(guard)
        return guard is not None

    def _close(self, guard: "_Guard") -> None:
        self.drop(guard)
        guard.transport.abort()


class _Guard(asyncio.Protocol):
    """Passes everything on to the protocol behind it, once the connection is admitted."""

    def __init__(self, connections: _Connections, make: Callable[[], asyncio.Protocol]):
        self._connections, self._make = connections, make
        self._inner: asyncio.Protocol | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.transport: asyncio.Transport | None = None
        self.address = ""

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.address = str((transport.get_extra_info("peername") or ("",))[0])
        if not self._connections.admit(self):
            transport.abort()
            return
        self._inner = self._make()
        self._inner.connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._connections.drop(self)
        if self._inner is not None:
            self._inner.connection_lost(error)

    def data_received(self, data: bytes) -> None:
        if self._inner is not None:
            self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received() if self._inner is not None else None

    def pause_writing(self) -> None:
        if self._inner is not None:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        if self._inner is not None:
            self._inner.resume_writing()
