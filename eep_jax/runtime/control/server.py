"""The supervisor's end of the control channel: authenticated WebSockets, one per rank process."""

import asyncio
import dataclasses
import hmac
import logging
from collections.abc import Callable

from aiohttp import WSCloseCode, WSMsgType, web

from eep_jax.errors import ProtocolError
from eep_jax.runtime.control import messages
from eep_jax.runtime.control.codec import Encoder, decode

_log = logging.getLogger(__name__)

OUTGOING_MAX = 4_096
HELLO_TIMEOUT_S = 10.0
WRITE_DEADLINE_S = 5.0  # for the other end to read one message


@dataclasses.dataclass(eq=False)
class Connection:
    """Connection of a rank process or a launcher. `incarnation` is 0 until the rank has one.

    Messages that a rank sent without a connection are lost. So its tokens count, and it is assigned
    requests, only once it is `settled`: its Held listed the requests and tokens that it has.
    """

    hello: messages.Hello | messages.HostHello
    incarnation: int
    outgoing: asyncio.Queue
    settled: bool = False

    @property
    def who(self) -> str:
        if isinstance(self.hello, messages.HostHello):
            return f"the launcher of host {self.hello.host}"
        return f"rank {self.hello.rank}"

    def send(self, message) -> None:
        """Queues a message; closes the connection if the other end does not read."""
        try:
            self.outgoing.put_nowait(message)
        except asyncio.QueueFull:
            _log.error("%s does not read its channel; closing it", self.who)
            self.close()

    def close(self) -> None:
        while self.outgoing.full():
            self.outgoing.get_nowait()
        self.outgoing.put_nowait(None)


class ControlServer:
    """Accepts connections with the token; passes their messages on, decoded and in order."""

    def __init__(
        self,
        token: str,
        message_bytes_max: int,
        on_message: Callable[[Connection, object], None],
        on_closed: Callable[[Connection], None],
    ):
        """`on_message` may raise ProtocolError to refuse a message and close its connection."""
        self._token, self._bytes_max, self._encoder = token, message_bytes_max, Encoder()
        self._on_message, self._on_closed = on_message, on_closed

    def build_app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/control", self._serve)
        return app

    async def _serve(self, http: web.Request) -> web.StreamResponse:
        given = http.headers.get("Authorization", "").encode(errors="replace")
        if not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
            _log.warning("refused a control connection from %s: wrong token", http.remote)
            raise web.HTTPUnauthorized(text="the control channel needs the run's token\n")
        socket = web.WebSocketResponse(max_msg_size=self._bytes_max, timeout=2.0)
        await socket.prepare(http)
        connection: Connection | None = None
        writer: asyncio.Task | None = None
        try:
            first = await socket.receive(timeout=HELLO_TIMEOUT_S)
            hello = self._decode(first)
            if not isinstance(hello, messages.Hello | messages.HostHello):
                raise ProtocolError(f"the first message is {type(hello).__name__}, expected Hello")
            incarnation = getattr(hello, "incarnation", 0)
            connection = Connection(hello, incarnation, asyncio.Queue(OUTGOING_MAX))
            abort = http.transport.abort
            writer = asyncio.create_task(self._write(socket, connection, abort))
            self._on_message(connection, hello)
            async for frame in socket:
                self._on_message(connection, self._decode(frame))
        except (ProtocolError, TimeoutError) as error:
            who = connection.who if connection else http.remote
            _log.warning("refused a message of %s: %s", who, str(error) or "no Hello in time")
            await socket.close(code=WSCloseCode.POLICY_VIOLATION, message=str(error).encode()[:120])
        finally:
            if writer is not None:
                writer.cancel()
            if connection is not None:
                self._on_closed(connection)
        return socket

    async def _write(self, socket: web.WebSocketResponse, connection: Connection, abort) -> None:
        try:
            while (message := await connection.outgoing.get()) is not None:
                async with asyncio.timeout(WRITE_DEADLINE_S):
                    await socket.send_bytes(self._encoder.encode(message))
            await socket.close()
        except ConnectionError:
            pass  # _serve sees the same end, and logs it
        except (TimeoutError, ProtocolError) as error:
            reason = error if str(error) else f"it took nothing for {WRITE_DEADLINE_S:g} s"
            _log.error("closing the channel of %s: %s", connection.who, reason)
            abort()  # an orderly close would wait behind the unread data

    def _decode(self, frame):
        if frame.type is WSMsgType.ERROR:  # too large, or a malformed WebSocket frame
            raise ProtocolError(f"cannot read it: {frame.data}")
        if frame.type is not WSMsgType.BINARY:
            raise ProtocolError(f"a {frame.type.name} frame, expected a binary one")
        return decode(frame.data, messages.TO_SUPERVISOR, self._bytes_max)
