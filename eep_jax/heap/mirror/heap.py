"""Symmetric heap over several hosts: slabs of this host are mapped, others are mirrored.

The slab of a rank on another host is staging memory of this process. Kernels write rows into it and
post flags as anywhere; a thread sends what a changed flag announces, and the peer's process stores
the rows and then posts the flag itself. So kernels need no special case, a rank's memory is written
only by itself and ranks of its host, and an evicted rank is excluded by refusing its frames.
"""

import dataclasses
import functools
import hashlib
import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable

import numpy as np

from eep_jax.config import MIRROR_TRANSPORTS
from eep_jax.errors import HeapError
from eep_jax.heap.heap import check_bytes, check_copy
from eep_jax.heap.mirror.frames import BadFrame, FrameCodec
from eep_jax.heap.mirror.nixl import NixlInbox, NixlStream, rdma_devices
from eep_jax.heap.mirror.sender import MirrorReader, MirrorSender
from eep_jax.heap.mirror.server import NO_NIXL, READ_BYTES_MAX, MirrorServer
from eep_jax.heap.mirror.stream import FrameStream, TcpStream
from eep_jax.heap.mirror.wire import ID_BYTES, Introduction, Purpose, call
from eep_jax.heap.posix_shm import ATTACH_DEADLINE_MS, PosixShmHeap, memory_file
from pallas_kernels.window import WindowLayout

_log = logging.getLogger(__name__)

SCHEME, SEPARATOR = "mirror", "|"
READ_DEADLINE_S = 5.0
READ_BYTES_PER_S_MIN = 10e6  # a slower connection counts as broken


@dataclasses.dataclass(frozen=True, kw_only=True)
class MirrorOptions:
    """Connection of this rank to ranks of other hosts.

    Args:
        host: address of this machine.
        host_id: value of `runtime.control.identity.host_id`.
        token: the run's token.
        layout: that of every rank's window.
        transport: of frames: nixl, tcp, or auto: NIXL between ranks that both have it and RDMA,
            since over TCP it must poll, and gains nothing over sockets.

    Raises:
        ValueError: an empty `host_id`, one with a separator of handles, or another transport.
    """

    host: str
    host_id: str
    token: str
    layout: WindowLayout
    transport: str = "tcp"

    def __post_init__(self):
        if SEPARATOR in self.host_id or not self.host_id:
            raise ValueError(f"{self.host_id=} must not be empty or contain {SEPARATOR!r}")
        if self.transport not in MIRROR_TRANSPORTS:
            raise ValueError(f"{self.transport=} must be one of {MIRROR_TRANSPORTS}")


@dataclasses.dataclass
class _Peer:
    """A rank of another host while it is attached."""

    heap: bytes  # id of its heap, which its frames must come from
    sender: MirrorSender
    reader: MirrorReader
    call: int = 0  # number of its newest connection that sent frames; older ones are refused


class MirrorHeap(PosixShmHeap):
    """Heap over hosts. A handle is `mirror:<host id>|<handle on that host>|<address>|<heap id>`."""

    def __init__(
        self,
        rank: int,
        ranks: int,
        slab_bytes: int,
        options: MirrorOptions,
        writable_bytes: int | None = None,
    ):
        super().__init__(rank, ranks, slab_bytes, writable_bytes)
        self._options, self._id = options, secrets.token_bytes(ID_BYTES)
        self._layout_digest = hashlib.sha256(repr(options.layout).encode()).digest()[:ID_BYTES]
        self._codec = FrameCodec(options.layout, rank)
        self._windows = options.layout.views(self.whole())
        self._peers: dict[int, _Peer] = {}
        self._lock = threading.Lock()  # guards `_peers`; held while a frame is stored
        self.frames_refused = 0
        try:
            self._inbox = self._open_inbox()
            self._mirror = MirrorServer(
                options.host,
                options.token,
                ranks,
                self._refusal,
                self._codec.payload_bytes,
                self._store,
                self._own_bytes,
                self._inbox,
            )
        except HeapError:
            super().close()
            raise

    def export(self) -> str:
        fields = (self._options.host_id, super().export(), self._mirror.address, self._id.hex())
        return f"{SCHEME}:{SEPARATOR.join(fields)}"

    def attach(self, rank: int, handle: str) -> None:
        self._check_peer(rank)
        scheme, _, rest = handle.partition(":")
        fields = rest.split(SEPARATOR)
        if scheme != SCHEME or len(fields) != 4:
            raise HeapError(
                f"handle {handle!r} of rank {rank} is not of the form {SCHEME}:<host>|<handle>|"
                "<address>|<heap>; start all ranks with --mirror_host"
            )
        host, local, address, heap = fields
        if host == self._options.host_id:
            super().attach(rank, local)
            self._forget(rank)
            return
        try:
            self._attach_remote(rank, address, bytes.fromhex(heap))
        except (OSError, ValueError, HeapError) as error:
            raise HeapError(
                f"rank {rank} on host {host} cannot be reached at {address}: {error}"
            ) from error

    def detach(self, rank: int) -> None:
        self._check_peer(rank)
        self._forget(rank)
        super().detach(rank)

    def read(self, rank: int, offset: int, nbytes: int) -> np.ndarray:
        peer = self._peers.get(rank)
        if peer is None:
            return super().read(rank, offset, nbytes)
        check_bytes(self, rank, offset, nbytes)
        if nbytes > READ_BYTES_MAX:
            raise HeapError(f"read of {nbytes} bytes of rank {rank}, at most {READ_BYTES_MAX}")
        return peer.reader.read(offset, nbytes, READ_DEADLINE_S + nbytes / READ_BYTES_PER_S_MIN)

    def copy_in(self, offset: int, rank: int, source_offset: int, nbytes: int) -> None:
        check_copy(self, offset, rank, source_offset, nbytes)
        self.write(offset, self.read(rank, source_offset, nbytes))

    def fill_zero(self, offset: int, nbytes: int) -> None:
        """Zeroes staging slabs as well: flags cleared here must not be sent."""
        super().fill_zero(offset, nbytes)
        for rank in list(self._peers):
            self._bytes(rank, offset, nbytes)[...] = 0

    def is_mapped(self, rank: int) -> bool:
        return rank not in self._peers

    def close(self) -> None:
        if not self._closed:
            self._mirror.close()
            if self._inbox is not None:
                self._inbox.close()
            for rank in list(self._peers):
                self._forget(rank)
        super().close()

    def _open_inbox(self) -> NixlInbox | None:
        """None if frames come over TCP. Raises HeapError if NIXL is required but unavailable."""
        options, codec = self._options, self._codec
        if options.transport == "tcp" or (options.transport == "auto" and not rdma_devices()):
            return None
        try:
            return NixlInbox(options.host, codec.payload_bytes, codec.payload_bytes_max)
        except (ImportError, RuntimeError) as error:
            if options.transport == "nixl":
                raise HeapError(
                    f"no mirror over NIXL: {error}; see serve.mirror_transport"
                ) from error
            _log.info("mirrors over TCP: %s", error)
            return None

    def _attach_remote(self, rank: int, address: str, heap: bytes) -> None:
        def connect(purpose: Purpose) -> socket.socket:
            introduction = self._introduction(purpose, heap)
            return call(address, self._options.token, introduction, ATTACH_DEADLINE_MS / 1000)

        open_stream = functools.partial(self._open_stream, connect)
        stream = open_stream()
        staging = memory_file(f"eep-staging{rank}", self.slab_bytes)
        try:
            self._forget(rank)  # an earlier process of that rank
            self.attach_fd(rank, staging)
        except BaseException:
            stream.close()
            raise
        finally:
            os.close(staging)
        sender = MirrorSender(rank, self._codec, self._windows, self.rank, stream, open_stream)
        reader = MirrorReader(rank, functools.partial(connect, Purpose.READS))
        with self._lock:
            self._peers[rank] = _Peer(heap, sender, reader)

    def _open_stream(self, connect: Callable[[Purpose], socket.socket]) -> FrameStream:
        """NIXL if both ends have it, unless configured. Raises OSError, HeapError."""
        if self._inbox is not None:
            try:
                return NixlStream(connect(Purpose.NIXL), self._options.host)
            except (HeapError, RuntimeError) as error:
                if self._options.transport == "nixl" or NO_NIXL not in str(error):
                    raise HeapError(f"no mirror over NIXL: {error}") from error
        return TcpStream(connect(Purpose.WRITES))

    def _forget(self, rank: int) -> None:
        """Stops exchanging frames with that rank."""
        with self._lock:
            peer = self._peers.pop(rank, None)
        if peer is not None:
            peer.sender.close()
            peer.reader.close()

    def _introduction(self, purpose: Purpose, wanted: bytes) -> Introduction:
        return Introduction(
            purpose=purpose,
            rank=self.rank,
            ranks=self.ranks,
            slab_bytes=self.slab_bytes,
            layout=self._layout_digest,
            heap=self._id,
            wanted=wanted,
        )

    def _refusal(self, caller: Introduction) -> str:
        """Reason to refuse a caller, or ''."""
        if caller.wanted != self._id:
            return f"the process of rank {self.rank} here is a newer one"
        if caller.rank == self.rank or caller.rank >= self.ranks:
            return f"rank {caller.rank} is not a peer of rank {self.rank} of {self.ranks}"
        found = (caller.ranks, caller.slab_bytes, caller.layout)
        if found != (self.ranks, self.slab_bytes, self._layout_digest):
            return (
                f"the slab of rank {self.rank} has {self.slab_bytes} bytes for {self.ranks} ranks, "
                f"rank {caller.rank} expects {caller.slab_bytes} for {caller.ranks}, or another "
                "layout; start all ranks with the same configuration"
            )
        return ""

    def _store(
        self,
        caller: Introduction,
        call: int,
        kind: int,
        number: int,
        items: int,
        payload: memoryview,
    ) -> None:
        """Stores a frame of an attached peer; drops others, which an evicted process may send."""
        with self._lock:
            peer = self._peers.get(caller.rank)
            if peer is None or peer.heap != caller.heap:
                self.frames_refused += 1
                return
            if call < peer.call:
                raise BadFrame("frame over an older connection than its newest")
            peer.call = call
            own = self._windows[self.rank]
            self._codec.store(kind, number, items, payload, own, caller.rank)

    def _own_bytes(self, offset: int, nbytes: int) -> memoryview:
        return memoryview(self._bytes(self.rank, offset, nbytes))
