"""Frames over NIXL: written by UCX into memory of the peer, RDMA where there is any, else TCP.

A peer writes into landing memory that is its alone, never into a window: what it wrote is checked
and stored by this process, as a frame off a socket is. NIXL delivers the frame's header after its
payload. It needs the package `nixl-cu12` or `nixl-cu13` (not its dependencies), on CPUs as well.

UCX asks nobody for a token: whoever reaches its port may write into landing memory, as with RDMA
anywhere. A frame counts only with the number that the authenticated connection was told.
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
from collections.abc import Callable

import numpy as np

from eep_jax.heap.mirror import lane
from eep_jax.heap.mirror.frames import HEADER, BadFrame, Kind
from eep_jax.heap.mirror.wire import end_connection, receive
from pallas_kernels.signals import parity
from pallas_kernels.window import round_up

_log = logging.getLogger(__name__)

PACKAGES = ("nixl_cu13", "nixl_cu12")
PAGE_BYTES = 4096
PLACES = 5  # of landing memory: rows and results for both parities of the round, and wakes
POLL_BUSY_S, POLL_IDLE_S, BUSY_S = 50e-6, 1e-3, 0.05
OFFER_BYTES_MAX = 1 << 20
IDLE_S, LEAVE_S = 1.0, 2.0
_OFFER = struct.Struct("<IQQQ")  # length of the metadata, secret, address, bytes of a place
_SECRET = struct.Struct("<Q")


_environment = threading.Lock()
# A thread that Python ends inside of NIXL would take the process down with an error.
_inside: "weakref.WeakSet[NixlInbox | NixlLane]" = weakref.WeakSet()


@atexit.register
def _leave_nixl() -> None:
    for user in list(_inside):
        user.leave()


def load_nixl():
    """NIXL's Python API. Raises ImportError naming what was tried."""
    tried = []
    for package in PACKAGES:
        try:
            return importlib.import_module(f"{package}._api")
        except ImportError as error:
            tried.append(f"{package}: {error}")
    raise ImportError(
        f"NIXL is not installed ({'; '.join(tried)}): pip install --no-deps nixl-cu12"
    )


def new_agent(host: str):
    """A NIXL agent with UCX, for one thread at a time, whose TCP uses the interface of `host`.

    What the user has set of UCX_TLS and UCX_NET_DEVICES stays. Raises ImportError, or RuntimeError
    where UCX does not start.
    """
    api = load_nixl()
    logging.getLogger("nixl").setLevel(logging.WARNING)
    # Hosts share no memory; and UCX would take namespaces of one machine for one host.
    wanted = {"UCX_TLS": "^sm", "UCX_NET_DEVICES": ",".join(_devices(host))}
    config = api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
    try:
        with _variables(wanted | {"UCX_LOG_LEVEL": "error"}):
            agent = api.nixl_agent(f"eep-{os.getpid()}-{secrets.token_hex(8)}", config)
    except Exception as error:  # NIXL has a class for each of its troubles
        raise RuntimeError(f"NIXL does not start: {error!r}") from error
    if "UCX" not in agent.backends:
        raise RuntimeError("NIXL has no UCX backend here")
    return agent


@contextlib.contextmanager
def _variables(wanted: dict[str, str]):
    """Sets those that are not set while UCX reads them, and not for other processes."""
    with _environment:
        missing = {name: value for name, value in wanted.items() if name not in os.environ}
        os.environ.update(missing)
        try:
            yield
        finally:
            for name in missing:
                del os.environ[name]


def rdma_devices() -> list[str]:
    """The first port of each RDMA device of this host, as UCX names it."""
    return sorted(f"{path.name}:1" for path in pathlib.Path("/sys/class/infiniband").glob("*"))


def _devices(host: str) -> list[str]:
    """The network interface with this address, and all RDMA devices, as UCX names them."""
    found = rdma_devices()
    for _, name in socket.if_nameindex():
        with contextlib.suppress(OSError):
            if _address_of(name) == host:
                found.append(name)
    return found or ["all"]


def _address_of(interface: str) -> str:
    """The IPv4 address of an interface. Raises OSError where it has none."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", interface.encode()[:15])
        return socket.inet_ntoa(fcntl.ioctl(probe, 0x8915, request)[20:24])  # SIOCGIFADDR


@dataclasses.dataclass
class _Landing:
    """Memory that one caller writes into, and who that is."""

    memory: np.ndarray  # uint8 [PLACES place_bytes]
    registered: object
    take: Callable[[int, int, int, memoryview], None]
    connection: socket.socket


class NixlInbox:
    """Takes frames of all callers from a thread of its own, until it is closed."""

    def __init__(self, host: str, payload_bytes: Callable[[int, int], int], payload_bytes_max: int):
        """Raises ImportError or RuntimeError as `new_agent`."""
        self._agent = new_agent(host)
        self._payload_bytes = payload_bytes
        self._place_bytes = round_up(payload_bytes_max, PAGE_BYTES)
        self._lock, self._closed = threading.Lock(), False  # of the agent and of what follows
        self._landings: dict[int, _Landing] = {}
        self._called = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="mirror-nixl", daemon=True)
        self._thread.start()
        _inside.add(self)

    def serve(self, connection: socket.socket, take) -> None:
        """Offers landing memory to the caller; returns when its connection ends.

        `take(kind, round, items, payload)` is called for each of its frames.
        """
        secret = secrets.randbits(63)
        memory = np.zeros(PLACES * self._place_bytes + PAGE_BYTES, np.uint8)
        memory = memory[-memory.ctypes.data % PAGE_BYTES :][: PLACES * self._place_bytes]
        with self._lock:
            place = [(memory.ctypes.data, memory.nbytes, 0, "landing")]
            registered = self._agent.register_memory(place, "DRAM")
            metadata = self._agent.get_agent_metadata()
            self._landings[secret] = _Landing(memory, registered, take, connection)
        self._called.set()
        try:
            sizes = (len(metadata), secret, memory.ctypes.data, self._place_bytes)
            connection.sendall(_OFFER.pack(*sizes) + metadata)
            receive(connection, 1, None)
        finally:
            with self._lock:
                # From here on UCX refuses what still comes: the memory's key is void.
                landing = self._landings.pop(secret)
                self._agent.deregister_memory(landing.registered)

    def close(self) -> None:
        """May be called twice."""
        self._closed = True
        self._called.set()
        self._thread.join(LEAVE_S)

    def leave(self) -> None:
        """The process ends: no thread is in NIXL any more, and none will be."""
        self.close()
        self._lock.acquire(timeout=LEAVE_S)

    def _poll(self) -> None:
        busy_until_s = 0.0
        while not self._closed:
            if not self._landings:
                self._called.wait(IDLE_S)  # nobody can have sent anything
                self._called.clear()
                continue
            with self._lock:
                came = self._agent.get_new_notifs()
                for messages in came.values():
                    for message in messages:
                        self._take(message)
            now_s = time.monotonic()
            if came:
                busy_until_s = now_s + BUSY_S
            else:
                time.sleep(POLL_BUSY_S if now_s < busy_until_s else POLL_IDLE_S)

    def _take(self, message: bytes) -> None:
        if len(message) != _SECRET.size + HEADER.size:
            return  # of no rank
        landing = self._landings.get(_SECRET.unpack_from(message)[0])
        if landing is None:
            return  # of a caller that is gone
        kind, number, items, length = HEADER.unpack_from(message, _SECRET.size)
        try:
            if length != self._payload_bytes(kind, items):
                raise BadFrame(f"a frame of {length} bytes, of kind {kind} with {items} items")
            start = _place(kind, number) * self._place_bytes
            landing.take(kind, number, items, memoryview(landing.memory)[start : start + length])
        except BadFrame as error:
            _log.error("closing a mirror over NIXL: %s", error)
            end_connection(landing.connection)


class NixlLane:
    """Frames into the landing memory that the peer offered over `connection`."""

    def __init__(self, connection: socket.socket, host: str):
        """Raises OSError where no offer comes, RuntimeError where NIXL cannot follow it."""
        self.connection, self._ended = connection, False
        self._using = threading.Lock()  # while a thread is inside of NIXL
        try:
            self._open(connection, host)
        except BaseException:
            connection.close()
            raise
        _inside.add(self)

    def _open(self, connection: socket.socket, host: str) -> None:
        """Takes the peer's offer."""
        ends_s = time.monotonic() + lane.SEND_DEADLINE_S
        head = receive(connection, _OFFER.size, ends_s)
        length, self._secret, self._remote, self._place_bytes = _OFFER.unpack(head)
        if length > OFFER_BYTES_MAX:
            raise ConnectionError(f"an offer of {length} bytes, at most {OFFER_BYTES_MAX}")
        metadata = receive(connection, length, ends_s)
        connection.settimeout(None)
        self._agent = new_agent(host)
        self._memory = np.zeros(PLACES * self._place_bytes, np.uint8)
        place = [(self._memory.ctypes.data, self._memory.nbytes, 0, "frames")]
        try:
            peer = self._agent.add_remote_agent(bytes(metadata))
            self._registered = self._agent.register_memory(place, "DRAM")
        except Exception as error:
            raise RuntimeError(f"NIXL does not take the peer's offer: {error!r}") from error
        self._peer = peer.decode() if isinstance(peer, bytes) else peer

    def send(self, pieces: list) -> None:
        header, *payload = pieces
        kind, number, _, length = HEADER.unpack(header)
        message = _SECRET.pack(self._secret) + header
        try:
            start = _place(kind, number) * self._place_bytes
            done = start
            for piece in payload:
                self._memory[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
                done += len(piece)
            # At least a byte: UCX says when a write is done, and works on it until then.
            with self._using:
                self._write(start, max(1, length), message)
        except OSError:
            raise
        except Exception as error:  # NIXL has a class for each of its troubles
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
        """The process ends: no thread is in NIXL any more, and none will be."""
        self.end()
        self._using.acquire(timeout=LEAVE_S)

    def _write(self, start: int, length: int, message: bytes) -> None:
        agent, ends_s = self._agent, time.monotonic() + lane.SEND_DEADLINE_S
        here = agent.get_xfer_descs([(self._memory.ctypes.data + start, length, 0)], "DRAM")
        there = agent.get_xfer_descs([(self._remote + start, length, 0)], "DRAM")
        handle = agent.initialize_xfer("WRITE", here, there, self._peer, message)
        try:
            state = agent.transfer(handle)
            while state == "PROC":
                if self._ended or time.monotonic() > ends_s:
                    raise TimeoutError("the peer took no frame in time")
                time.sleep(0)
                state = agent.check_xfer_state(handle)
            if state != "DONE":
                raise ConnectionError(f"NIXL says {state}")
        finally:
            agent.release_xfer_handle(handle)


def _place(kind: int, number: int) -> int:
    return PLACES - 1 if kind == Kind.WAKE else (kind - 1) * 2 + parity(number)
