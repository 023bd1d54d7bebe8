"""The symmetric heap on CPU: shared memory of the operating system, mapped at fixed addresses.

Slabs are anonymous shared memory (`memfd_create`), which the kernel frees with the last process
that maps it: nothing can be left behind, even if every process is killed.
"""

import ctypes
import mmap
import os

import numpy as np

from eep_jax.errors import HeapError
from eep_jax.heap.fd_passing import FdServer, receive_fd

_PROT_NONE, _MAP_FIXED, _MAP_NORESERVE = 0, 0x10, 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]

ATTACH_DEADLINE_MS = 3_000


class MappedHeap:
    """Reserves the range and maps files into it; how files travel is left to subclasses."""

    def __init__(self, rank: int, ranks: int, slab_bytes: int):
        if not 0 <= rank < ranks:
            raise HeapError(f"rank {rank} is not in 0..{ranks - 1}")
        if slab_bytes <= 0 or slab_bytes % mmap.PAGESIZE:
            raise HeapError(f"{slab_bytes=} must be a positive multiple of {mmap.PAGESIZE}")
        self.rank, self.ranks, self.slab_bytes = rank, ranks, slab_bytes
        self._closed = False
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self.base = _mmap(None, ranks * slab_bytes, _PROT_NONE, flags, -1, "reserve the range")
        self._own = _memory_file(f"eep-rank{rank}", slab_bytes)
        self._dummy = _memory_file(f"eep-dummy{rank}", slab_bytes)
        for slot in range(ranks):
            self._map(slot, self._own if slot == rank else self._dummy)

    def detach(self, rank: int) -> None:
        self._check_peer(rank)
        self._map(rank, self._dummy)

    def whole(self) -> np.ndarray:
        flat = (ctypes.c_uint8 * (self.ranks * self.slab_bytes)).from_address(self.base)
        return np.ctypeslib.as_array(flat).reshape(self.ranks, self.slab_bytes)

    def close(self) -> None:
        """May be called twice. Nothing can be attached or detached after it."""
        if not self._closed:
            self._closed = True
            for fd in (self._own, self._dummy):
                os.close(fd)

    def _attach_fd(self, rank: int, fd: int) -> None:
        self._check_peer(rank)
        found = os.fstat(fd).st_size
        if found != self.slab_bytes:
            raise HeapError(
                f"the slab of rank {rank} has {found} bytes, rank {self.rank} expects "
                f"{self.slab_bytes}; start all ranks with the same configuration"
            )
        self._map(rank, fd)

    def _check_peer(self, rank: int) -> None:
        if self._closed:
            raise HeapError(f"the heap of rank {self.rank} is closed; rank {rank} stays as it is")
        if rank == self.rank or not 0 <= rank < self.ranks:
            raise HeapError(f"rank {rank} is not a peer of rank {self.rank} of {self.ranks}")

    def _map(self, rank: int, fd: int) -> None:
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        address = self.base + rank * self.slab_bytes
        what = f"map the slab of rank {rank}"
        _mmap(address, self.slab_bytes, protection, mmap.MAP_SHARED | _MAP_FIXED, fd, what)


class PosixShmHeap(MappedHeap):
    """The heap between processes of one host. A handle is `unix:<socket name>`."""

    def __init__(self, rank: int, ranks: int, slab_bytes: int):
        super().__init__(rank, ranks, slab_bytes)
        self._server: FdServer | None = None

    def export(self) -> str:
        if self._server is None:
            self._server = FdServer(self._own)
        return f"unix:{self._server.name}"

    def attach(self, rank: int, handle: str) -> None:
        scheme, _, name = handle.partition(":")
        if scheme != "unix" or not name:
            raise HeapError(
                f"handle {handle!r} of rank {rank} is not of the form unix:<socket name>"
            )
        try:
            fd = receive_fd(name, ATTACH_DEADLINE_MS)
        except OSError as error:
            raise HeapError(
                f"rank {rank} does not hand out its slab at {handle}: {error}"
            ) from error
        try:
            self._attach_fd(rank, fd)
        finally:
            os.close(fd)

    def close(self) -> None:
        if self._server is not None and not self._closed:
            self._server.close()
        super().close()


def _memory_file(name: str, size: int) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


def _mmap(address, size: int, protection: int, flags: int, fd: int, what: str) -> int:
    found = _libc.mmap(address, size, protection, flags, fd, 0)
    if found is None or found == _MAP_FAILED:
        raise HeapError(f"cannot {what} ({size} bytes): {os.strerror(ctypes.get_errno())}")
    return found
