"""Symmetric heap on CPU: anonymous shared memory, mapped at fixed addresses.

The kernel frees a slab (`memfd_create`) with the last process that maps it: nothing is left behind,
even if every process is killed.
"""

import ctypes
import mmap
import os
from collections.abc import Iterable, Sequence

import numpy as np

from eep_jax.errors import HeapError
from eep_jax.heap.fd_passing import FdServer, close_all, receive_fds
from eep_jax.heap.heap import (
    CONTROL_BYTES,
    check_bytes,
    check_copy,
    check_peer,
    check_rank,
    check_slab,
)
from pallas_kernels.window import round_up

_PROT_NONE, _MAP_FIXED, _MAP_NORESERVE = 0, 0x10, 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]

ATTACH_DEADLINE_MS = 3_000


class MappedHeap:
    """Reserves the range and maps files into it; subclasses pass the files between ranks."""

    device = "cpu"
    device_ordinal = 0

    def __init__(self, rank: int, ranks: int, slab_bytes: int, writable_bytes: int | None = None):
        """A peer's slab is read-only beyond `writable_bytes`, rounded up to pages (None: all)."""
        check_rank(rank, ranks)
        if slab_bytes <= 0 or slab_bytes % mmap.PAGESIZE:
            raise HeapError(f"{slab_bytes=} must be a positive multiple of {mmap.PAGESIZE}")
        self.rank, self.ranks, self.slab_bytes = rank, ranks, slab_bytes
        self._writable_bytes = slab_bytes
        if writable_bytes is not None:
            self._writable_bytes = min(round_up(writable_bytes, mmap.PAGESIZE), slab_bytes)
        self._closed = False
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self.base = _mmap(None, ranks * slab_bytes, _PROT_NONE, flags, -1, 0, "reserve the range")
        self.own_fd = memory_file(f"eep-rank{rank}", slab_bytes)
        self._dummy = memory_file(f"eep-dummy{rank}", slab_bytes)
        for each in range(ranks):
            self._map(each, self.own_fd if each == rank else self._dummy)

    def detach(self, rank: int) -> None:
        self._check_peer(rank)
        self._map(rank, self._dummy)

    def is_mapped(self, rank: int) -> bool:
        return True

    def control(self) -> np.ndarray:
        return self.whole()[:, :CONTROL_BYTES]

    def control_address(self) -> int:
        return self.base + self.rank * self.slab_bytes

    def post_abort(self, epoch: int) -> None:
        """No effect: steps read the control page itself."""

    def read(self, rank: int, offset: int, nbytes: int) -> np.ndarray:
        return self._bytes(rank, offset, nbytes).copy()

    def write(self, offset: int, array: np.ndarray) -> None:
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._bytes(self.rank, offset, data.size)[...] = data

    def write_all(self, writes: Iterable[tuple[int, np.ndarray]]) -> None:
        for offset, array in writes:
            self.write(offset, array)

    def pin(self, array: np.ndarray) -> bool:
        return False  # a write is a single copy by this CPU already

    def unpin(self, array: np.ndarray) -> None:
        """No effect: nothing is pinned."""

    def fill_zero(self, offset: int, nbytes: int) -> None:
        self._bytes(self.rank, offset, nbytes)[...] = 0

    def copy_in(self, offset: int, rank: int, source_offset: int, nbytes: int) -> None:
        check_copy(self, offset, rank, source_offset, nbytes)
        source = self._bytes(rank, source_offset, nbytes)
        self._bytes(self.rank, offset, nbytes)[...] = source

    def copy_in_all(self, copies: Sequence[tuple[int, int, int, int]]) -> None:
        for copy in copies:
            check_copy(self, *copy)
        for copy in copies:
            self.copy_in(*copy)

    def whole(self) -> np.ndarray:
        flat = (ctypes.c_uint8 * (self.ranks * self.slab_bytes)).from_address(self.base)
        return np.ctypeslib.as_array(flat).reshape(self.ranks, self.slab_bytes)

    def close(self) -> None:
        """Idempotent. Attach and detach raise HeapError afterwards."""
        if not self._closed:
            self._closed = True
            for fd in (self.own_fd, self._dummy):
                os.close(fd)

    def attach_fd(self, rank: int, fd: int) -> None:
        """Maps this memory file as the slab of `rank`; the caller may close the descriptor."""
        self._check_peer(rank)
        check_slab(self, rank, os.fstat(fd).st_size)
        self._map(rank, fd)

    def _bytes(self, rank: int, offset: int, nbytes: int) -> np.ndarray:
        check_bytes(self, rank, offset, nbytes)
        return self.whole()[rank, offset : offset + nbytes]

    def _check_peer(self, rank: int) -> None:
        if self._closed:
            raise HeapError(f"the heap of rank {self.rank} is closed; rank {rank} stays as it is")
        check_peer(self, rank)

    def _map(self, rank: int, fd: int) -> None:
        writable = self.slab_bytes if rank == self.rank else self._writable_bytes
        both, what = mmap.PROT_READ | mmap.PROT_WRITE, f"map the slab of rank {rank}"
        for begin, end, protection in (
            (0, writable, both),
            (writable, self.slab_bytes, mmap.PROT_READ),
        ):
            if begin < end:
                address = self.base + rank * self.slab_bytes + begin
                flags = mmap.MAP_SHARED | _MAP_FIXED
                _mmap(address, end - begin, protection, flags, fd, begin, what)


class PosixShmHeap(MappedHeap):
    """Heap shared by processes of one host. A handle is `unix:<socket name>`."""

    def __init__(self, rank: int, ranks: int, slab_bytes: int, writable_bytes: int | None = None):
        super().__init__(rank, ranks, slab_bytes, writable_bytes)
        self._server: FdServer | None = None

    def export(self) -> str:
        if self._server is None:
            self._server = FdServer([self.own_fd])
        return f"unix:{self._server.name}"

    def attach(self, rank: int, handle: str) -> None:
        _, fds = receive_slab(rank, handle, "unix", 1)
        try:
            self.attach_fd(rank, *fds)
        finally:
            close_all(fds)

    def close(self) -> None:
        if self._server is not None and not self._closed:
            self._server.close()
        super().close()


def receive_slab(rank: int, handle: str, scheme: str, count: int) -> tuple[bytes, list[int]]:
    """Message and descriptors of `handle`, `<scheme>:<socket name>`. Raises HeapError."""
    found, _, name = handle.partition(":")
    if found != scheme or not name:
        raise HeapError(
            f"handle {handle!r} of rank {rank} is not of the form {scheme}:<socket name>"
        )
    try:
        return receive_fds(name, count, ATTACH_DEADLINE_MS)
    except OSError as error:
        raise HeapError(f"rank {rank} does not export its slab at {handle}: {error}") from error


def memory_file(name: str, size: int) -> int:
    """Descriptor of new anonymous shared memory."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


def _mmap(
    address: int | None, size: int, protection: int, flags: int, fd: int, at: int, what: str
) -> int:
    found = _libc.mmap(address, size, protection, flags, fd, at)
    if found is None or found == _MAP_FAILED:
        raise HeapError(f"cannot {what} ({size} bytes): {os.strerror(ctypes.get_errno())}")
    return found
