"""The symmetric heap over several hosts: slabs of this host are mapped, others are mirrored.

The slot of a rank on another host is staging memory of this process. Kernels write rows into it
and post flags as they do anywhere; a thread sees a flag change, sends what it announces, and the
peer's process stores the rows and then posts the flag itself. So kernels cannot tell, a rank is
written by nobody but itself and its own host's ranks, and an evicted rank is kept out by refusing
its frames.
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
from eep_jax.heap.mirror.lane import Lane, TcpLane
from eep_jax.heap.mirror.nixl import NixlInbox, NixlLane, rdma_devices
from eep_jax.heap.mirror.sender import MirrorReader, MirrorSender
from eep_jax.heap.mirror.server import NO_NIXL, READ_BYTES_MAX, MirrorServer
from eep_jax.heap.mirror.wire import ID_BYTES, Introduction, Purpose, call
from eep_jax.heap.posix_shm import ATTACH_DEADLINE_MS, PosixShmHeap, memory_file
from pallas_kernels.window import WindowLayout

_log = logging.getLogger(__name__)

SCHEME, SEPARATOR = "mirror", "|"
READ_DEADLINE_S = 5.0
READ_BYTES_PER_S_MIN = 10e6  # slower than this counts as broken


@dataclasses.dataclass(frozen=True, kw_only=True)
class MirrorOptions:
    """How ranks of other hosts and this one reach each other.

    `host` is an address of this machine, `host_id` what `runtime.identity.host_id` says, `token`
    the run's. `transport` of frames: nixl, tcp, or auto: NIXL between ranks that both have it and
    RDMA, for over TCP it must poll, and gains nothing over sockets.
    Raises ValueError for an id that a handle cannot hold, and for other transports.
    """

    host: str
    host_id: str
    token: str
    layout: WindowLayout
    transport: str = "tcp"

    def __post_init__(self):
        if SEPARATOR in self.host_id or not self.host_id:
            raise ValueError(f"host_id={self.host_id!r} must not be empty or hold {SEPARATOR!r}")
        if self.transport not in MIRROR_TRANSPORTS:
            raise ValueError(f"{self.transport=} must be one of {MIRROR_TRANSPORTS}")


@dataclasses.dataclass
class _Peer:
    """A rank of another host while it is attached."""

    heap: bytes  # id of its heap, by which its frames are known
    link: MirrorSender
    reader: MirrorReader
    call: int = 0  # of its connection whose frames count: the newest that sent any


class MirrorHeap(PosixShmHeap):
    """A handle is `mirror:<host id>|<handle on that host>|<address>|<heap id>`."""

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
        self._lock = threading.Lock()  # of `_peers`; held while a frame is stored
        self.frames_refused = 0
        try:
            self._inbox = self._open_inbox()
            self._mirror = MirrorServer(
                options.host,
                options.token,
                ranks,
                self._why_not,
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
            raise HeapError(f"{nbytes} bytes of rank {rank} at once, at most {READ_BYTES_MAX}")
        return peer.reader.read(offset, nbytes, READ_DEADLINE_S + nbytes / READ_BYTES_PER_S_MIN)

    def copy_in(self, offset: int, rank: int, source_offset: int, nbytes: int) -> None:
        check_copy(self, offset, rank, source_offset, nbytes)
        self.write(offset, self.read(rank, source_offset, nbytes))

    def fill_zero(self, offset: int, nbytes: int) -> None:
        """Also in the staging slabs: flags that are cleared at home are none elsewhere."""
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
        """None where frames come over TCP. Raises HeapError where NIXL is wanted and cannot be."""
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

        open_lane = functools.partial(self._open_lane, connect)
        lane = open_lane()
        staging = memory_file(f"eep-staging{rank}", self.slab_bytes)
        try:
            self._forget(rank)  # an earlier process of that rank
            self.attach_fd(rank, staging)
        except BaseException:
            lane.close()
            raise
        finally:
            os.close(staging)
        link = MirrorSender(rank, self._codec, self._windows, self.rank, lane, open_lane)
        reader = MirrorReader(rank, functools.partial(connect, Purpose.READS))
        with self._lock:
            self._peers[rank] = _Peer(heap, link, reader)

    def _open_lane(self, connect: Callable[[Purpose], socket.socket]) -> Lane:
        """NIXL where both ends have it, unless the operator chose. Raises OSError, HeapError."""
        if self._inbox is not None:
            try:
                return NixlLane(connect(Purpose.NIXL), self._options.host)
            except (HeapError, RuntimeError) as error:
                if self._options.transport == "nixl" or NO_NIXL not in str(error):
                    raise HeapError(f"no mirror over NIXL: {error}") from error
        return TcpLane(connect(Purpose.WRITES))

    def _forget(self, rank: int) -> None:
        """Takes no frame of that rank any more, and sends it none."""
        with self._lock:
            peer = self._peers.pop(rank, None)
        if peer is not None:
            peer.link.close()
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

    def _why_not(self, caller: Introduction) -> str:
        """Why a caller's frames and questions make no sense here, or ''."""
        if caller.wanted != self._id:
            return f"rank {self.rank} has another process here by now"
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
        self, caller: Introduction, call: int, kind: int, number: int, items: int, payload
    ) -> None:
        """One frame of an attached peer. Others' are dropped: they may come from the evicted."""
        with self._lock:
            peer = self._peers.get(caller.rank)
            if peer is None or peer.heap != caller.heap:
                self.frames_refused += 1
                return
            if call < peer.call:
                raise BadFrame("it called again since, and this frame is older")
            peer.call = call
            own = self._windows[self.rank]
            self._codec.store(kind, number, items, payload, own, caller.rank)

    def _own_bytes(self, offset: int, nbytes: int) -> memoryview:
        return memoryview(self._bytes(self.rank, offset, nbytes))
