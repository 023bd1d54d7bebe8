"""Address of the supervisor, read from its run directory or given; connections to it."""

import contextlib
import errno
import json
import os
import pathlib
from collections.abc import AsyncIterator

import aiohttp

from eep_jax.config import ServeConfig

# Names of files in a run directory.
ENDPOINT = "endpoint.json"  # addresses of the control channel and of HTTP
JOURNAL = "journal.jsonl"

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
RETRY_MS = 150
CONNECT_TIMEOUT_MS = 3_000


def find_supervisor(endpoint_file: pathlib.Path, address: str = "") -> str:
    """The URL of the control channel: at `address` (host:port) if given, else from the file.

    Read the file before each connection: every supervisor rewrites it. Raises OSError, ValueError
    or LookupError while the file is missing or incomplete.
    """
    if not address:
        endpoint = json.loads(endpoint_file.read_text())
        host = endpoint["host"]
        address = f"[{host}]:{endpoint['port']}" if ":" in host else f"{host}:{endpoint['port']}"
    return f"http://{address}/control"


def write_endpoint(
    endpoint_file: pathlib.Path, serve: ServeConfig, control_port: int, http_port: int
) -> None:
    """Writes the addresses of this process atomically."""
    endpoint = {
        "host": serve.control_host,
        "port": control_port,
        "http_host": serve.host,
        "http_port": http_port,
        "pid": os.getpid(),
    }
    text, fresh = json.dumps(endpoint) + "\n", endpoint_file.with_name(endpoint_file.name + ".new")
    try:
        _write(fresh, text, os.O_CREAT | os.O_TRUNC)
        os.replace(fresh, endpoint_file)
    except OSError as error:
        with contextlib.suppress(OSError):
            fresh.unlink()
        if error.errno not in NO_ROOM or not endpoint_file.exists():
            raise
        _write(endpoint_file, text, 0)  # over the old one, for which there is room


def _write(path: pathlib.Path, text: str, how: int) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CLOEXEC | how, 0o600), "w") as file:
        file.write(text)
        file.truncate()


class EndpointWatch:
    """Notices that the file names another supervisor than the one connected to.

    A supervisor that hangs keeps its connections open; its successor is found by the file alone.
    """

    def __init__(self, endpoint_file: pathlib.Path, address: str, url: str):
        self._file, self._address, self._url = endpoint_file, address, url
        self._seen: tuple[int, int] | None = None

    def has_moved(self) -> bool:
        if self._address:
            return False
        try:
            found = self._file.stat()
            seen = (found.st_ino, found.st_mtime_ns)
            if seen == self._seen:
                return False
            moved = find_supervisor(self._file) != self._url
        except (OSError, ValueError, LookupError, TypeError):
            return False
        self._seen = seen
        return moved


def ports_before(endpoint_file: pathlib.Path) -> tuple[int, int]:
    """(control, HTTP) ports of the previous supervisor; 0 if unknown."""
    try:
        endpoint = json.loads(endpoint_file.read_text())
        return int(endpoint["port"]), int(endpoint["http_port"])
    except (OSError, ValueError, LookupError, TypeError):
        return 0, 0


@contextlib.asynccontextmanager
async def connect(
    endpoint_file: pathlib.Path, address: str, token: str, message_bytes_max: int
) -> AsyncIterator[tuple[aiohttp.ClientWebSocketResponse, str]]:
    """Opens one connection to the control channel; yields its socket and the URL.

    Raises what `find_supervisor` does, and aiohttp.ClientError if the connection fails or takes
    longer than CONNECT_TIMEOUT_MS.
    """
    url = find_supervisor(endpoint_file, address)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_MS / 1000)
    headers = {"Authorization": f"Bearer {token}"}
    async with (
        aiohttp.ClientSession(timeout=timeout, headers=headers) as session,
        session.ws_connect(url, max_msg_size=message_bytes_max) as socket,
    ):
        yield socket, url
