"""The symmetric heap on CUDA: physical memory mapped at fixed addresses of a reserved range.

A slab travels to other processes as a file descriptor (ranks of one NVLink or PCIe host). Its
control page, which hosts watch, is host memory beside it; the slab's first page is unused.
"""

import contextlib
import itertools
import logging
import threading

import numpy as np

from eep_jax.errors import HeapError
from eep_jax.heap.cuda.libcuda import Device
from eep_jax.heap.cuda.staging import PinnedUpload
from eep_jax.heap.fd_passing import FdServer, close_all, receive_fds
from eep_jax.heap.heap import (
    CONTROL_BYTES,
    check_bytes,
    check_copy,
    check_peer,
    check_rank,
    check_slab,
    socket_of,
)
from eep_jax.heap.posix_shm import ATTACH_DEADLINE_MS, MappedHeap
from pallas_kernels.window import round_up

# One dummy of this size stands, repeatedly, for every page of every dead peer: small enough to
# cost nothing, large enough that a slab of 10 GB is refilled with 320 calls.
DUMMY_BYTES_MAX = 32 << 20
STAGED_BYTES_MIN = 4 << 20  # smaller arrays go to the GPU at once

_log = logging.getLogger(__name__)


class MappedCudaHeap:
    """Reserves the range and maps handles into it; how they travel is left to subclasses.

    `slab_bytes` is rounded up to what the GPU can map. Attach and detach while no kernel runs.
    """

    device = "cuda"

    def __init__(self, rank: int, ranks: int, slab_bytes: int, device: int = 0):
        """`device` counts within CUDA_VISIBLE_DEVICES. Raises HeapError; then nothing is kept."""
        check_rank(rank, ranks)
        if slab_bytes <= 0:
            raise HeapError(f"{slab_bytes=} must be positive")
        self.rank, self.ranks, self.device_ordinal = rank, ranks, device
        self._closed = self._released = False
        self._pinned: PinnedUpload | None = None
        self._staging_tried, self._staging_lock = False, threading.Lock()
        self._abort_word: int | None = None  # in device memory, if hosts' pages are out of reach
        self._aborted_epoch, self._abort_lock = 0, threading.Lock()
        with contextlib.ExitStack() as range_, contextlib.ExitStack() as service:
            self._open(slab_bytes, range_)
            self._open_control(service)
            self._range, self._service = range_.pop_all(), service.pop_all()

    def _open(self, slab_bytes: int, undo: contextlib.ExitStack) -> None:
        """Reserves the range and fills every slot. What is done is registered to be undone."""
        what, own = f"rank {self.rank}", f"rank {self.rank}, slot {self.rank}"
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
        self._mapped = [0] * self.ranks  # bytes at the start of a slot that have memory behind them
        self._is_dummy = [False] * self.ranks
        undo.callback(self._unmap_all)
        self._map(self.rank, self.own_handle)
        for slot in range(self.ranks):
            if slot != self.rank:
                self._map_dummy(slot)
        self._gpu.zero(self._slot(self.rank), self.slab_bytes, own)
        if self.ranks > 1:
            self._gpu.zero(self._slot((self.rank + 1) % self.ranks), self._dummy_bytes, what)

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
        """Raises HeapError; after a failure of the driver call it again, and run no step before."""
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
            raise HeapError(f"the heap of rank {self.rank} is closed: no kernel may read its words")
        return self._control_address

    @property
    def control_fd(self) -> int:
        """The memory file of the own control page."""
        return self._control.own_fd

    def post_abort(self, epoch: int) -> None:
        """Where the page could not be registered, stores the word in device memory instead."""
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
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        address, what = self._address(self.rank, offset, data.nbytes), self._what
        if data.nbytes >= STAGED_BYTES_MIN and (staging := self._staging()) is not None:
            staging.upload(address, data, what(self.rank, offset, data.nbytes))
        elif data.nbytes:
            self._gpu.upload(address, data, what(self.rank, offset, data.nbytes))

    def write_all(self, writes) -> None:
        if (staging := self._staging()) is None:
            for offset, array in writes:
                self.write(offset, array)
            return
        copies = itertools.starmap(self._addressed, writes)  # each is made when its turn comes
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
        """Pinned buffers, made at the first use; None where the driver pins none."""
        with self._staging_lock:
            if not self._staging_tried:
                self._staging_tried = True
                try:
                    self._pinned = PinnedUpload(self._gpu, f"the uploads of rank {self.rank}")
                    self._range.callback(self._pinned.close)
                except HeapError as error:
                    _log.warning("experts go to the GPU through pageable memory: %s", error)
            return self._pinned

    def fill_zero(self, offset: int, nbytes: int) -> None:
        address = self._address(self.rank, offset, nbytes)
        if nbytes:
            self._gpu.zero(address, nbytes, self._what(self.rank, offset, nbytes))

    def copy_in(self, offset: int, rank: int, source_offset: int, nbytes: int) -> None:
        self.copy_in_all([(offset, rank, source_offset, nbytes)])

    def copy_in_all(self, copies) -> None:
        self._check_open_range()
        checked = [(*check_copy(self, *copy), copy[3]) for copy in copies]
        if checked:
            more = f" and {len(checked) - 1} copies more" if len(checked) > 1 else ""
            _, rank, source_offset, nbytes = copies[0]
            self._gpu.copy(checked, self._what(rank, source_offset, nbytes) + more)

    def whole(self) -> np.ndarray:
        raise HeapError(
            f"the slabs of rank {self.rank} are device memory: use read, write, fill_zero and "
            "copy_in, control() for the words that hosts watch, and device_array for JAX"
        )

    def close(self) -> None:
        """May be called twice. No kernel may read the control words after it."""
        with self._abort_lock:
            if not self._closed:
                self._closed = True
                self._service.close()

    def release(self) -> None:
        """Gives back the range and its memory. No array may alias the heap any more."""
        self.close()
        if not self._released:
            self._released = True
            self._range.close()

    def _attach_memory(self, rank: int, handle, control_fd: int) -> None:
        """Maps a peer's slab and control page; if that fails the slot holds the dummies."""
        self._unmap(rank)
        try:
            self._map(rank, handle)
            self._control.attach_fd(rank, control_fd)
        except HeapError:
            self.detach(rank)
            raise

    def _map(self, slot: int, handle) -> None:
        what = f"rank {self.rank}, slot {slot}"
        self._gpu.map(self._slot(slot), self.slab_bytes, handle, what)
        self._mapped[slot] = self.slab_bytes
        self._gpu.allow(self._slot(slot), self.slab_bytes, what)

    def _map_dummy(self, slot: int) -> None:
        what = f"the dummy of rank {self.rank} in slot {slot}"
        for done in range(0, self.slab_bytes, self._dummy_bytes):
            self._gpu.map(self._slot(slot) + done, self._dummy_bytes, self._dummy, what)
            self._mapped[slot] = done + self._dummy_bytes
        self._gpu.allow(self._slot(slot), self.slab_bytes, what)
        self._is_dummy[slot] = True

    def _unmap(self, slot: int) -> None:
        if self._mapped[slot]:
            what = f"rank {self.rank}, slot {slot}"
            self._gpu.unmap(self._slot(slot), self._mapped[slot], what)
        self._mapped[slot], self._is_dummy[slot] = 0, False

    def _unmap_all(self) -> None:
        for slot in range(self.ranks):
            self._unmap(slot)

    def _slot(self, slot: int) -> int:
        return self.base + slot * self.slab_bytes

    def _address(self, rank: int, offset: int, nbytes: int) -> int:
        self._check_open_range()
        return check_bytes(self, rank, offset, nbytes)

    def _check_open_range(self) -> None:
        if self._released:
            raise HeapError(f"the heap of rank {self.rank} is released: its memory is gone")

    def _check_peer(self, rank: int) -> None:
        if self._closed:
            raise HeapError(f"the heap of rank {self.rank} is closed; rank {rank} stays as it is")
        check_peer(self, rank)

    def _what(self, rank: int, offset: int, nbytes: int) -> str:
        return f"rank {self.rank}, slot {rank}, {nbytes} bytes at offset {offset}"


class CudaVmmHeap(MappedCudaHeap):
    """The heap between processes of one host. A handle is `cuda:<socket name>`.

    Who mapped a slab keeps it, whatever becomes of the process that exported it.
    """

    def __init__(self, rank: int, ranks: int, slab_bytes: int, device: int = 0):
        super().__init__(rank, ranks, slab_bytes, device)
        self._server: FdServer | None = None

    def export(self) -> str:
        if self._closed:
            raise HeapError(f"the heap of rank {self.rank} is closed; open another one to export")
        if self._server is None:
            fd = self._gpu.export_fd(self.own_handle, f"the slab of rank {self.rank}")
            self._service.callback(close_all, [fd])
            self._server = FdServer([fd, self.control_fd], b"%d" % self.slab_bytes)
            self._service.callback(self._server.close)
        return f"cuda:{self._server.name}"

    def attach(self, rank: int, handle: str) -> None:
        """Raises HeapError naming the rank; the slot then holds what it held, or the dummy."""
        name, what = socket_of(handle, "cuda", rank), f"rank {self.rank}, slot {rank}"
        self._check_peer(rank)
        try:
            said, fds = receive_fds(name, 2, ATTACH_DEADLINE_MS)
        except OSError as error:
            raise HeapError(
                f"rank {rank} does not hand out its slab at {handle}: {error}"
            ) from error
        try:
            check_slab(self, rank, int(said) if said.isdigit() else 0)
            slab_fd, control_fd = fds
            imported = self._gpu.import_fd(slab_fd, what)
            try:
                self._attach_memory(rank, imported, control_fd)
            finally:
                # The mapping keeps the memory; the handle would keep it for longer.
                self._gpu.release(imported, what)
        finally:
            close_all(fds)
