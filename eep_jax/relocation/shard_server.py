"""Shards from peer to peer: Orbax's P2P service, restricted to members of the run.

Orbax answers every connection on all interfaces, so its node never listens here: a server of ours
accepts on one chosen interface, has the other end prove that it knows the token, and only then
hands the connection to Orbax's handler.
"""

import contextlib
import functools
import logging
import pathlib
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Callable

import numpy as np
from orbax.checkpoint.experimental.emergency.p2p import protocol, service

from eep_jax.handshake import admit, enter
from eep_jax.relocation.shards import PROCESS

_log = logging.getLogger(__name__)

HANDSHAKE_S = 2.0
SERVE_S = 120.0  # for a client to request one file and receive it
RECEIVE_WAIT_S = 0.2  # between two checks of the deadline
RECEIVE_BYTES = 8 << 20
CONNECTIONS_MAX = 64
FILES_MAX = 64  # in a shard, which has about ten


class ShardServer:
    """Serves `<directory>/<expert>/` to members, at `address`, which is `host:port`."""

    def __init__(
        self,
        directory: pathlib.Path,
        host: str,
        token: str,
        mapped: Callable[[pathlib.Path], np.ndarray | None] = lambda path: None,
    ):
        """`mapped` returns a file's bytes, uint8, if they are mapped: they are sent from there."""
        self._node = service.P2PNode(directory)
        # Bound to all interfaces; no connection was accepted yet.
        self._node.server.server_close()
        self._node.server = _MembersOnly(host, token, self._node, mapped)
        self._node.port = self._node.server.server_address[1]
        self._node.start()
        self.address = f"{host}:{self._node.port}"

    def close(self) -> None:
        self._node.stop()


class _MembersOnly(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = CONNECTIONS_MAX  # by default 5: then clients retry after seconds

    def __init__(self, host: str, token: str, node: service.P2PNode, mapped):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._token, self._mapped = token, mapped
        self._free = threading.BoundedSemaphore(CONNECTIONS_MAX)
        super().__init__((host, 0), functools.partial(service.NodeHandler, service=node))

    def process_request(self, request, client_address):
        if not self._free.acquire(blocking=False):
            _log.warning("refused %s: %d connections are open", client_address, CONNECTIONS_MAX)
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def finish_request(self, request, client_address):
        try:
            admit(request, self._token, HANDSHAKE_S)
        except OSError as error:
            _log.warning("refused a backup connection from %s: %s", client_address[0], error)
            return
        # Without a timeout in Python, a file is sent by one system call.
        request.settimeout(None)
        end = threading.Timer(SERVE_S, _shut_down, (request,))
        end.daemon = True
        end.start()
        try:
            super().finish_request(_FromMemory(request, self._mapped), client_address)
        finally:
            end.cancel()

    def handle_error(self, request, client_address):
        _log.warning("serving a shard to %s failed", client_address, exc_info=True)


class _FromMemory:
    """A connection that sends a mapped file from its mapping.

    The kernel's `sendfile` proceeds page by page over files in memory, which takes both ends twice
    as long.
    """

    def __init__(self, connection: socket.socket, mapped):
        self._connection, self._mapped = connection, mapped

    def __getattr__(self, name: str):
        return getattr(self._connection, name)

    def sendfile(self, file) -> int:
        found = self._mapped(pathlib.Path(file.name))
        if found is None:
            return self._connection.sendfile(file)
        self._connection.sendall(found)
        return found.nbytes


def receive_file(address: str, name: str, into: np.ndarray, token: str, ends_s: float) -> None:
    """Receives the file `name`, as `<expert>/...`, from the ShardServer at `address` into memory.

    Raises ValueError unless the file has as many bytes as `into`; else like `fetch_shard`.
    """
    view, done = memoryview(into.reshape(-1).view(np.uint8)), 0
    with _connection(address, token, ends_s) as connection:
        protocol.TCPMessage.send_json(connection, protocol.OP_DOWNLOAD_FILE, {"rel_path": name})
        opcode, found = protocol.TCPMessage.recv(connection)
        if opcode != protocol.OP_FILE_STREAM or found != into.nbytes:
            raise ValueError(f"{address} has {found} bytes as {name}, expected {into.nbytes}")
        # One system call receives many bytes; it returns now and then while none arrive.
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(RECEIVE_WAIT_S))
        while done < into.nbytes:
            _remaining(ends_s)
            part = view[done : done + RECEIVE_BYTES]
            try:
                received = connection.recv_into(part, len(part), socket.MSG_WAITALL)
            except BlockingIOError:
                continue
            if not received:
                left = into.nbytes - done
                raise ConnectionError(f"the server closed with {left} bytes of {name} to come")
            done += received


def fetch_shard(
    address: str, expert: int, into: pathlib.Path, token: str, ends_s: float, bytes_max: int
) -> pathlib.Path:
    """Copies an expert's shard from the ShardServer at `address`, file by file.

    Args:
        address: `host:port` of the server.
        expert: The number of the expert.
        into: Directory to copy to, which need not exist.
        token: The run's token.
        ends_s: The deadline, on the monotonic clock.
        bytes_max: The most bytes that the shard may have.

    Returns:
        The copied shard, `into/<expert>`.

    Raises:
        LookupError: The server has no such shard.
        ValueError: The shard is too large, or malformed.
        OSError: The server is gone, does not know the token, or misses the deadline.
    """
    request = {"step": expert, "process_index": PROCESS}
    with _connection(address, token, ends_s) as connection:
        protocol.TCPMessage.send_json(connection, protocol.OP_GET_MANIFEST, request)
        opcode, files = protocol.TCPMessage.recv(connection)
    if opcode != protocol.OP_RESPONSE_JSON or not files:
        raise LookupError(f"{address} has no backup of expert {expert}")
    sizes = _checked(files, expert, bytes_max)
    for name, size in sizes.items():
        target = into / name
        target.parent.mkdir(parents=True, exist_ok=True)
        content = np.empty(size, np.uint8)
        receive_file(address, name, content, token, ends_s)
        content.tofile(target)
    return into / str(expert)


def _checked(files, expert: int, bytes_max: int) -> dict[str, int]:
    """Size by name. Raises ValueError unless all files are the expert's and the total fits."""
    try:
        sizes = {str(pathlib.PurePosixPath(f["rel_path"])): int(f["size"]) for f in files}
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"malformed manifest of expert {expert}: {files!r:.100}") from error
    for name in sizes:
        parts = pathlib.PurePosixPath(name).parts
        if parts[:1] != (str(expert),) or ".." in parts:
            raise ValueError(f"a file outside of expert {expert}: {name!r:.100}")
    if len(sizes) > FILES_MAX or min(sizes.values()) < 0 or sum(sizes.values()) > bytes_max:
        raise ValueError(
            f"{len(sizes)} files of {sum(sizes.values())} bytes for expert {expert}, at most "
            f"{FILES_MAX} files of {bytes_max} bytes are allowed"
        )
    return sizes


def _connection(address: str, token: str, ends_s: float) -> socket.socket:
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)), min(_remaining(ends_s), HANDSHAKE_S))
    try:
        enter(connection, token, min(_remaining(ends_s), HANDSHAKE_S))
        protocol.optimize_socket(connection)
        connection.settimeout(_remaining(ends_s))
    except BaseException:
        connection.close()
        raise
    return connection


def _timeval(seconds: float) -> bytes:
    """`struct timeval`: two longs, seconds and microseconds."""
    return struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))


def _shut_down(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it was closed already
        connection.shutdown(socket.SHUT_RDWR)


def _remaining(ends_s: float) -> float:
    remaining_s = ends_s - time.monotonic()
    if remaining_s <= 0:
        raise TimeoutError("the deadline of the fetch has passed")
    return remaining_s
