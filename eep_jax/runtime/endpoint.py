"""Where the supervisor listens, as its run directory says or as told, and a connection to it."""

import contextlib
import json
import pathlib
from collections.abc import AsyncIterator

import aiohttp

RETRY_MS = 150
CONNECT_TIMEOUT_MS = 3_000


def find_supervisor(endpoint_file: pathlib.Path, address: str = "") -> str:
    """The URL of the control channel: at `address` (host:port) if given, else as the file says.

    The file is read anew each time: every supervisor rewrites it. Raises OSError, ValueError or
    LookupError while there is none, or none that is whole.
    """
    if not address:
        endpoint = json.loads(endpoint_file.read_text())
        host = endpoint["host"]
        address = f"[{host}]:{endpoint['port']}" if ":" in host else f"{host}:{endpoint['port']}"
    return f"http://{address}/control"


@contextlib.asynccontextmanager
async def connect(
    endpoint_file: pathlib.Path, address: str, token: str, message_bytes_max: int
) -> AsyncIterator[tuple[aiohttp.ClientWebSocketResponse, str]]:
    """One connection to the control channel: its socket, and the URL. Whoever has the token may.

    Raises what `find_supervisor` does, and aiohttp.ClientError where nobody answers in
    CONNECT_TIMEOUT_MS.
    """
    url = find_supervisor(endpoint_file, address)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_MS / 1000)
    headers = {"Authorization": f"Bearer {token}"}
    async with (
        aiohttp.ClientSession(timeout=timeout, headers=headers) as session,
        session.ws_connect(url, max_msg_size=message_bytes_max) as socket,
    ):
        yield socket, url
