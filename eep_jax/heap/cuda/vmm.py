"""Symmetric heap on CUDA: physical memory mapped at fixed addresses of a reserved range.

Other processes of the host import a slab by its file descriptor, over NVLink or PCIe. Its control
page, which hosts poll, is host memory beside it; the slab's first page is unused.
"""

import contextlib
import itertools
import logging
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from eep_jax.errors import HeapError
from eep_jax.heap.cuda.libcuda import Device
from eep_jax.heap.cuda.staging import PinnedUpload
from eep_jax.heap.fd_passing import FdServer, close_all
from eep_jax.heap.heap import (
    CONTROL_BYTES,
    check_bytes,
    check_copy,
    check_peer,
    check_rank,
    check_slab,
)
from eep_jax.heap.posix_shm import MappedHeap, receive_slab
from pallas_kernels.window import round_up

# One dummy of this size is mapped repeatedly over the slab of every absent peer: small enough to
# cost nothing, large enough that 320 calls cover a slab of 10 GB.
DUMMY_BYTES_MAX = 32 << 20
STAGED_BYTES_MIN = 4 << 20  # smaller arrays are uploaded without staging

_log = logging.getLogger(__name__)


class MappedCudaHeap:
    """Reserves the range and maps handles into it; subclasses pass the handles between ranks.

    `slab_bytes` is rounded up to the GPU's granularity. Attach and detach while no kernel runs.
    """

    device = "cuda"

    def __init__(self, rank: int, ranks: int, slab_bytes: int, device: int = 0):
        """`device` counts within CUDA_VISIBLE_DEVICES. Raises HeapError after undoing all of it."""
        check_rank(rank, ranks)
        if slab_bytes <= 0:
            raise HeapError(f"{slab_bytes=} must be positive")
        self.rank, self.ranks, self.device_ordinal = rank, ranks, device
        self._closed = self._released = False
        self._pinned: PinnedUpload | None = None
        self._staging_tried, self._staging_lock = False, threading.Lock()
        self._abort_word: int | None = None  # in device memory, if no host page can be registered
        self._aborted_epoch, self._abort_lock = 0, threading.Lock()
        with contextlib.ExitStack() as range_, contextlib.ExitStack() as service:
            self._open(slab_bytes, range_)
            self._open_control(service)
            self._range, self._service = range_.pop_all(), service.pop_all()

    def _open(self, slab_bytes: int, undo: contextlib.ExitStack) -> None:
        """Reserves the range and maps every slab; registers the reverse of each step at `undo`."""
        what, own = f"rank {self.rank}", self._what(self.rank)
        self._gpu = Device(self.device_ordinal, what)
        undo.callback(self._gpu.close)
        page = self._gpu.granularity(what)
        small = slab_bytes <= DUMMY_BYTES_MAX
        self._dummy_bytes = page if small else round_up(DUMMY_BYTES_MAX, page)
        self.slab_bytes = round_up(slab_bytes, self._dummy_bytes)
        self.base = self._gpu.reserve(self.ranks * self.slab_bytes, what)
        undo.callback(self._gpu.free_range, self.base, self.ranks * self.slab_bytes, what)
        self.own_handle = self._gpu.create(self.slab_bytes, f"the slab of rank {self.rank}")
        undo.callback(self._gpu.release, self.own_handle, own)
        self._dummy = self._gpu.create(self._dummy_bytes, f"the dummy of rank {self.rank}")
        undo.callback(self._gpu.release, self._dummy, f"the dummy of rank {self.rank}")
        self._mapped = [0] * self.ranks  # leading bytes of each slab with memory behind them
        self._is_dummy = [False] * self.ranks
        undo.callback(self._unmap_all)
        self._map(self.rank, self.own_handle)
        for rank in range(self.ranks):
            if rank != self.rank:
                self._map_dummy(rank)
        self._gpu.zero(self._slab_of(self.rank), self.slab_bytes, own)
        if self.ranks > 1:
            self._gpu.zero(self._slab_of((self.rank + 1) % self.ranks), self._dummy_bytes, what)

    def _open_control(self, undo: contextlib.ExitStack) -> None:
        what = f"the control page of rank {self.rank}"
        self._control = MappedHeap(self.rank, self.ranks, CONTROL_BYTES)
        undo.callback(self._control.close)
        page = self._control.base + self.rank * CONTROL_BYTES
        try:
            self._control_address = self._gpu.register(page, CONTROL_BYTES, what)
            undo.callback(self._gpu.unregister, page, what)
        except HeapError:
            # Some drivers (containers with locked memory limits) refuse to pin shared memory.
            self._control_address = self._gpu.allocate(CONTROL_BYTES, what)
            undo.callback(self._gpu.free, self._control_address, what)
            self._gpu.zero(self._control_address, CONTROL_BYTES, what)
            self._abort_word = self._control_address

    def detach(self, rank: int) -> None:
        """After a HeapError of the driver, repeat it before the next step."""
        self._check_peer(rank)
        self._control.detach(rank)
        if not self._is_dummy[rank]:
            self._unmap(rank)
            self._map_dummy(rank)

    def is_mapped(self, rank: int) -> bool:
        return True

    def control(self) -> np.ndarray:
        return self._control.whole()

    def control_address(self) -> int:
        if self._closed:
            raise HeapError(
                f"the heap of rank {self.rank} is closed; kernels must not read its words"
            )
        return self._control_address

    @property
    def control_fd(self) -> int:
        """Descriptor of the own control page."""
        return self._control.own_fd

    def post_abort(self, epoch: int) -> None:
        """Stores the word in device memory if the control page could not be registered."""
        with self._abort_lock:
            if self._abort_word is not None and not self._closed and epoch > self._aborted_epoch:
                self._gpu.store_word(self._abort_word, epoch, f"the abort word of rank {self.rank}")
                self._aborted_epoch = epoch

    def read(self, rank: int, offset: int, nbytes: int) -> np.ndarray:
        address = self._address(rank, offset, nbytes)
        found = np.empty(nbytes, np.uint8)
        if nbytes:
            self._gpu.download(address, found, self._what(rank, offset, nbytes))
        return found

    def write(self, offset: int, array: np.ndarray) -> None:
        address, data = self._addressed(offset, array)
        what = self._what(self.rank, offset, data.nbytes)
        if data.nbytes >= STAGED_BYTES_MIN and (staging := self._staging()) is not None:
            staging.upload(address, data, what)
        elif data.nbytes:
            self._gpu.upload(address, data, what)

    def write_all(self, writes: Iterable[tuple[int, np.ndarray]]) -> None:
        if (staging := self._staging()) is None:
            for offset, array in writes:
                self.write(offset, array)
            return
        copies = itertools.starmap(self._addressed, writes)  # lazily, one array at a time
        staging.upload_all(copies, f"the uploads of rank {self.rank}")

    def pin(self, array: np.ndarray) -> bool:
        staging = self._staging()
        return staging is not None and staging.pin(array)

    def unpin(self, array: np.ndarray) -> None:
        if self._pinned is not None and not self._released:
            self._pinned.unpin(array)

    def _addressed(self, offset: int, array: np.ndarray) -> tuple[int, np.ndarray]:
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return self._address(self.rank, offset, data.nbytes), data

    def _staging(self) -> PinnedUpload | None:
        """Pinned buffers, allocated on first use; None if the driver refuses."""
        with self._staging_lock:
            if not self._staging_tried:
                self._staging_tried = True
                try:
                    self._pinned = PinnedUpload(self._gpu, f"the uploads of rank {self.rank}")
                    self._range.callback(self._pinned.close)
                except HeapError as error:
                    _log.warning("uploads use pageable memory: %s", error)
            return self._pinned

    def fill_zero(self, offset: int, nbytes: int) -> None:
        address = self._address(self.rank, offset, nbytes)
        if nbytes:
            self._gpu.zero(address, nbytes, self._what(self.rank, offset, nbytes))

    def copy_in(self, offset: int, rank: int, source_offset: int, nbytes: int) -> None:
        self.copy_in_all([(offset, rank, source_offset, nbytes)])

    def copy_in_all(self, copies: Sequence[tuple[int, int, int, int]]) -> None:
        self._check_open_range()
        checked = [(*check_copy(self, *copy), copy[3]) for copy in copies]
        if checked:
            more = f" and {len(checked) - 1} more copies" if len(checked) > 1 else ""
            _, rank, source_offset, nbytes = copies[0]
            self._gpu.copy(checked, self._what(rank, source_offset, nbytes) + more)

    def whole(self) -> np.ndarray:
        raise HeapError(
            f"the slabs of rank {self.rank} are device memory: use read, write, fill_zero and "
            "copy_in, control() for the control words, and device_array for JAX"
        )

    def close(self) -> None:
        """Idempotent. Kernels must not read the control words afterwards."""
        with self._abort_lock:
            if not self._closed:
                self._closed = True
                self._service.close()

    def release(self) -> None:
        """Frees the range and its memory. No array may alias the heap."""
        self.close()
        if not self._released:
            self._released = True
            self._range.close()

    def _attach_memory(self, rank: int, handle: Any, control_fd: int) -> None:
        """Maps a peer's slab and control page, or on a failure the dummies."""
        self._unmap(rank)
        try:
            self._map(rank, handle)
            self._control.attach_fd(rank, control_fd)
        except HeapError:
            self.detach(rank)
            raise

    def _map(self, rank: int, handle: Any) -> None:
        self._gpu.map(self._slab_of(rank), self.slab_bytes, handle, self._what(rank))
        self._mapped[rank] = self.slab_bytes
        self._gpu.allow(self._slab_of(rank), self.slab_bytes, self._what(rank))

    def _map_dummy(self, rank: int) -> None:
        what = f"the dummy of rank {self.rank} in slab {rank}"
        for done in range(0, self.slab_bytes, self._dummy_bytes):
            self._gpu.map(self._slab_of(rank) + done, self._dummy_bytes, self._dummy, what)
            self._mapped[rank] = done + self._dummy_bytes
        self._gpu.allow(self._slab_of(rank), self.slab_bytes, what)
        self._is_dummy[rank] = True

    def _unmap(self, rank: int) -> None:
        if self._mapped[rank]:
            self._gpu.unmap(self._slab_of(rank), self._mapped[rank], self._what(rank))
        self._mapped[rank], self._is_dummy[rank] = 0, False

    def _unmap_all(self) -> None:
        for rank in range(self.ranks):
            self._unmap(rank)

    def _slab_of(self, rank: int) -> int:
        """Address of the slab of `rank`."""
        return self.base + rank * self.slab_bytes

    def _address(self, rank: int, offset: int, nbytes: int) -> int:
        self._check_open_range()
        return check_bytes(self, rank, offset, nbytes)

    def _check_open_range(self) -> None:
        if self._released:
            raise HeapError(f"the heap of rank {self.rank} is released, and its memory freed")

    def _check_peer(self, rank: int) -> None:
        if self._closed:
            raise HeapError(f"the heap of rank {self.rank} is closed; rank {rank} stays as it is")
        check_peer(self, rank)

    def _what(self, rank: int, offset: int = 0, nbytes: int = 0) -> str:
        part = f", {nbytes} bytes at offset {offset}" if nbytes else ""
        return f"rank {self.rank}, slab {rank}{part}"


class CudaVmmHeap(MappedCudaHeap):
    """Heap shared by processes of one host. A handle is `cuda:<socket name>`.

    A mapped slab outlives the process that exported it.
    """

    def __init__(self, rank: int, ranks: int, slab_bytes: int, device: int = 0):
        super().__init__(rank, ranks, slab_bytes, device)
        self._server: FdServer | None = None

    def export(self) -> str:
        if self._closed:
            raise HeapError(f"the heap of rank {self.rank} is closed; open a new one to export")
        if self._server is None:
            fd = self._gpu.export_fd(self.own_handle, f"the slab of rank {self.rank}")
            self._service.callback(close_all, [fd])
            self._server = FdServer([fd, self.control_fd], b"%d" % self.slab_bytes)
            self._service.callback(self._server.close)
        return f"cuda:{self._server.name}"

    def attach(self, rank: int, handle: str) -> None:
        self._check_peer(rank)
        (size, fds), what = receive_slab(rank, handle, "cuda", 2), self._what(rank)
        try:
            check_slab(self, rank, int(size) if size.isdigit() else 0)
            slab_fd, control_fd = fds
            imported = self._gpu.import_fd(slab_fd, what)
            try:
                self._attach_memory(rank, imported, control_fd)
            finally:
                # The mapping keeps the memory alive; the handle would, beyond the mapping.
                self._gpu.release(imported, what)
        finally:
            close_all(fds)
