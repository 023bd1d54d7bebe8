"""Frames over NIXL: UCX writes them into memory of the peer, by RDMA if available, else TCP.

Each peer writes into landing memory of its own, never into a window: this process checks and stores
the frame, as it does a frame from a socket. NIXL delivers the header after the payload. Needs the
package `nixl-cu12` or `nixl-cu13` (without dependencies), on CPUs as well.

UCX does not authenticate: any process that reaches its port may write into landing memory, as with
RDMA in general. A frame counts only with the secret sent over the authenticated connection.
"""

import atexit
import contextlib
import dataclasses
import importlib
import logging
import os
import pathlib
import secrets
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np

from eep_jax.heap.mirror import stream
from eep_jax.heap.mirror.frames import HEADER, BadFrame, Kind
from eep_jax.heap.mirror.wire import end_connection, receive
from pallas_kernels.exchange.signals import parity
from pallas_kernels.window import round_up

_log = logging.getLogger(__name__)

PACKAGES = ("nixl_cu13", "nixl_cu12")
PAGE_BYTES = 4096
BUFFERS = 5  # of landing memory: rows and results for both parities of the round, and wakes
POLL_BUSY_S, POLL_IDLE_S, BUSY_S = 50e-6, 1e-3, 0.05
OFFER_BYTES_MAX = 1 << 20
IDLE_S, LEAVE_S = 1.0, 2.0
_OFFER = struct.Struct("<IQQQ")  # length of the metadata, secret, address, bytes of a buffer
_SECRET = struct.Struct("<Q")


_environment = threading.Lock()
# Closed at exit: a thread that Python ends inside NIXL would crash the process.
_inside: "weakref.WeakSet[NixlInbox | NixlStream]" = weakref.WeakSet()


@atexit.register
def _leave_nixl() -> None:
    for user in list(_inside):
        user.leave()


def load_nixl() -> ModuleType:
    """NIXL's Python API. Raises ImportError naming the packages tried."""
    tried = []
    for package in PACKAGES:
        try:
            return importlib.import_module(f"{package}._api")
        except ImportError as error:
            tried.append(f"{package}: {error}")
    raise ImportError(
        f"NIXL is not installed ({'; '.join(tried)}): pip install --no-deps nixl-cu12"
    )


def new_agent(host: str) -> Any:
    """A NIXL agent with UCX, whose TCP uses the interface of `host`. Not thread-safe.

    UCX_TLS and UCX_NET_DEVICES keep the user's values. Raises ImportError, or RuntimeError if UCX
    does not start.
    """
    api = load_nixl()
    logging.getLogger("nixl").setLevel(logging.WARNING)
    # Hosts share no memory, but UCX would take network namespaces of one machine for one host.
    wanted = {"UCX_TLS": "^sm", "UCX_NET_DEVICES": ",".join(_devices(host))}
    config = api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
    try:
        with _variables(wanted | {"UCX_LOG_LEVEL": "error"}):
            agent = api.nixl_agent(f"eep-{os.getpid()}-{secrets.token_hex(8)}", config)
    except Exception as error:  # NIXL has many error classes
        raise RuntimeError(f"NIXL does not start: {error!r}") from error
    if "UCX" not in agent.backends:
        raise RuntimeError("this NIXL has no UCX backend")
    return agent


@contextlib.contextmanager
def _variables(wanted: dict[str, str]) -> Iterator[None]:
    """Sets the missing ones temporarily, while UCX reads them."""
    with _environment:
        missing = {name: value for name, value in wanted.items() if name not in os.environ}
        os.environ.update(missing)
        try:
            yield
        finally:
            for name in missing:
                del os.environ[name]


def rdma_devices() -> list[str]:
    """First port of each RDMA device of this host, by its UCX name."""
    return sorted(f"{path.name}:1" for path in pathlib.Path("/sys/class/infiniband").glob("*"))


def _devices(host: str) -> list[str]:
    """The network interface with this address, and all RDMA devices, by their UCX names."""
    found = rdma_devices()
    for _, name in socket.if_nameindex():
        with contextlib.suppress(OSError):
            if _address_of(name) == host:
                found.append(name)
    return found or ["all"]


def _address_of(interface: str) -> str:
    """IPv4 address of an interface. Raises OSError if it has none."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", interface.encode()[:15])
        return socket.inet_ntoa(fcntl.ioctl(probe, 0x8915, request)[20:24])  # SIOCGIFADDR


@dataclasses.dataclass
class _Landing:
    """Memory that one caller writes into, with the destination of its frames."""

    memory: np.ndarray  # uint8 [BUFFERS buffer_bytes]
    registered: Any
    store: Callable[[int, int, int, memoryview], None]
    connection: socket.socket


class NixlInbox:
    """Receives frames of all callers in a thread of its own, until `close`."""

    def __init__(self, host: str, payload_bytes: Callable[[int, int], int], payload_bytes_max: int):
        """Raises ImportError or RuntimeError like `new_agent`."""
        self._agent = new_agent(host)
        self._payload_bytes = payload_bytes
        self._buffer_bytes = round_up(payload_bytes_max, PAGE_BYTES)
        self._lock, self._closed = threading.Lock(), False  # guards the agent and `_landings`
        self._landings: dict[int, _Landing] = {}
        self._connected = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="mirror-nixl", daemon=True)
        self._thread.start()
        _inside.add(self)

    def serve(
        self, connection: socket.socket, store: Callable[[int, int, int, memoryview], None]
    ) -> None:
        """Offers landing memory to the caller, until its connection ends.

        Calls `store(kind, round, items, payload)` for each of its frames.
        """
        secret = secrets.randbits(63)
        memory = np.zeros(BUFFERS * self._buffer_bytes + PAGE_BYTES, np.uint8)
        memory = memory[-memory.ctypes.data % PAGE_BYTES :][: BUFFERS * self._buffer_bytes]
        with self._lock:
            region = [(memory.ctypes.data, memory.nbytes, 0, "landing")]
            registered = self._agent.register_memory(region, "DRAM")
            metadata = self._agent.get_agent_metadata()
            self._landings[secret] = _Landing(memory, registered, store, connection)
        self._connected.set()
        try:
            sizes = (len(metadata), secret, memory.ctypes.data, self._buffer_bytes)
            connection.sendall(_OFFER.pack(*sizes) + metadata)
            receive(connection, 1, None)
        finally:
            with self._lock:
                # From here on UCX refuses writes: the key of the memory is void.
                landing = self._landings.pop(secret)
                self._agent.deregister_memory(landing.registered)

    def close(self) -> None:
        """Idempotent."""
        self._closed = True
        self._connected.set()
        self._thread.join(LEAVE_S)

    def leave(self) -> None:
        """Keeps all threads out of NIXL, from now until the process exits."""
        self.close()
        self._lock.acquire(timeout=LEAVE_S)

    def _poll(self) -> None:
        busy_until_s = 0.0
        while not self._closed:
            if not self._landings:
                self._connected.wait(IDLE_S)  # no peer can send anything
                self._connected.clear()
                continue
            with self._lock:
                came = self._agent.get_new_notifs()
                for messages in came.values():
                    for message in messages:
                        self._receive(message)
            now_s = time.monotonic()
            if came:
                busy_until_s = now_s + BUSY_S
            else:
                time.sleep(POLL_BUSY_S if now_s < busy_until_s else POLL_IDLE_S)

    def _receive(self, message: bytes) -> None:
        if len(message) != _SECRET.size + HEADER.size:
            return  # not of a rank
        landing = self._landings.get(_SECRET.unpack_from(message)[0])
        if landing is None:
            return  # of a closed connection
        kind, number, items, length = HEADER.unpack_from(message, _SECRET.size)
        try:
            if length != self._payload_bytes(kind, items):
                raise BadFrame(f"frame of {length} bytes for {items} items of kind {kind}")
            start = _buffer(kind, number) * self._buffer_bytes
            landing.store(kind, number, items, memoryview(landing.memory)[start : start + length])
        except BadFrame as error:
            _log.error("closing a mirror over NIXL: %s", error)
            end_connection(landing.connection)


class NixlStream:
    """Sends frames into the landing memory that the peer offers over `connection`."""

    def __init__(self, connection: socket.socket, host: str):
        """Raises OSError without an offer, RuntimeError if NIXL cannot use it."""
        self.connection, self._ended = connection, False
        self._using = threading.Lock()  # held while a thread is inside NIXL
        try:
            self._open(connection, host)
        except BaseException:
            connection.close()
            raise
        _inside.add(self)

    def _open(self, connection: socket.socket, host: str) -> None:
        """Reads and accepts the peer's offer."""
        ends_s = time.monotonic() + stream.SEND_DEADLINE_S
        head = receive(connection, _OFFER.size, ends_s)
        length, self._secret, self._remote, self._buffer_bytes = _OFFER.unpack(head)
        if length > OFFER_BYTES_MAX:
            raise ConnectionError(f"offer of {length} bytes, at most {OFFER_BYTES_MAX}")
        metadata = receive(connection, length, ends_s)
        connection.settimeout(None)
        self._agent = new_agent(host)
        self._memory = np.zeros(BUFFERS * self._buffer_bytes, np.uint8)
        region = [(self._memory.ctypes.data, self._memory.nbytes, 0, "frames")]
        try:
            peer = self._agent.add_remote_agent(bytes(metadata))
            self._registered = self._agent.register_memory(region, "DRAM")
        except Exception as error:
            raise RuntimeError(f"NIXL refuses the peer's offer: {error!r}") from error
        self._peer = peer.decode() if isinstance(peer, bytes) else peer

    def send(self, pieces: list[bytes | memoryview]) -> None:
        header, *payload = pieces
        kind, number, _, length = HEADER.unpack(header)
        message = _SECRET.pack(self._secret) + header
        try:
            start = _buffer(kind, number) * self._buffer_bytes
            done = start
            for piece in payload:
                self._memory[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
                done += len(piece)
            # At least a byte, because UCX progresses and reports writes only.
            with self._using:
                self._write(start, max(1, length), message)
        except OSError:
            raise
        except Exception as error:  # NIXL has many error classes
            raise ConnectionError(f"NIXL: {error!r}") from error

    def end(self) -> None:
        self._ended = True
        end_connection(self.connection)

    def close(self) -> None:
        agent, self._agent = self._agent, None
        if agent is not None:
            with self._using, contextlib.suppress(Exception):  # the peer may be gone
                agent.deregister_memory(self._registered)
                agent.remove_remote_agent(self._peer)
        self.connection.close()

    def leave(self) -> None:
        """Keeps all threads out of NIXL, from now until the process exits."""
        self.end()
        self._using.acquire(timeout=LEAVE_S)

    def _write(self, start: int, length: int, message: bytes) -> None:
        agent, ends_s = self._agent, time.monotonic() + stream.SEND_DEADLINE_S
        here = agent.get_xfer_descs([(self._memory.ctypes.data + start, length, 0)], "DRAM")
        there = agent.get_xfer_descs([(self._remote + start, length, 0)], "DRAM")
        handle = agent.initialize_xfer("WRITE", here, there, self._peer, message)
        try:
            state = agent.transfer(handle)
            while state == "PROC":
                if self._ended or time.monotonic() > ends_s:
                    raise TimeoutError("the peer accepted no frame in time")
                time.sleep(0)
                state = agent.check_xfer_state(handle)
            if state != "DONE":
                raise ConnectionError(f"NIXL reports state {state}")
        finally:
            agent.release_xfer_handle(handle)


def _buffer(kind: int, number: int) -> int:
    return BUFFERS - 1 if kind == Kind.WAKE else (kind - 1) * 2 + parity(number)
