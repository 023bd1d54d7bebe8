"""Uploads from host to GPU at the bandwidth of the bus, through pinned memory.

Long-lived memory, such as backups, is pinned in place and read by the GPU directly. All other
arrays go through two pinned buffers, one filled by several threads while the other is uploaded; an
upload of pageable memory would use a buffer of the driver, filled by one thread.
"""

import concurrent.futures
import ctypes
import logging
import os
import threading
from collections.abc import Iterable, Iterator

import numpy as np

from eep_jax.errors import HeapError
from eep_jax.heap.cuda.libcuda import Device

_log = logging.getLogger(__name__)

CHUNK_BYTES = 16 << 20  # a bus of 50 GB/s takes a third of a millisecond
BUFFERS = 2
THREADS_MAX = 8
PART_BYTES_MIN = 1 << 20  # per thread that fills a buffer
# Pinned by one call, which blocks other calls of the driver for about a millisecond.
PIECE_BYTES = 16 << 20


class PinnedUpload:
    """Copies host arrays into device memory. Thread-safe; uploads are serialised."""

    def __init__(self, device: Device, what: str, chunk_bytes: int = CHUNK_BYTES):
        """Allocates `BUFFERS` pinned buffers. Raises HeapError if the driver refuses."""
        self._device, self._what, self._chunk_bytes = device, what, chunk_bytes
        self._lock = threading.Lock()
        self._addresses, self._events = [], []
        self._pinned: dict[int, np.ndarray] = {}  # whole arrays, by address
        try:
            for _ in range(BUFFERS):
                self._addresses.append(device.allocate_pinned(chunk_bytes, what))
                self._events.append(device.new_event(what))
        except HeapError:
            self.close()
            raise
        self._buffers = [_view(address, chunk_bytes) for address in self._addresses]
        threads = max(1, min(THREADS_MAX, len(os.sched_getaffinity(0)) // 2))
        self._threads = concurrent.futures.ThreadPoolExecutor(threads, "upload")
        self._parts = threads

    def pin(self, array: np.ndarray) -> bool:
        """Pins the pages of a contiguous array until `unpin`; returns whether it did."""
        begun = []
        try:
            for begin, nbytes in _pieces(array.nbytes):
                self._device.register_source(array.ctypes.data + begin, nbytes, self._what)
                begun.append(array.ctypes.data + begin)
        except HeapError as error:
            for address in begun:
                self._device.unregister(address, self._what)
            _log.warning("cannot pin %d bytes, uploads of them are staged: %s", array.nbytes, error)
            return False
        with self._lock:
            self._pinned[array.ctypes.data] = array
        return True

    def unpin(self, array: np.ndarray) -> None:
        """Unpins an array passed to `pin`; no effect for others."""
        with self._lock:  # Invariant: no upload reads from it.
            if self._pinned.pop(array.ctypes.data, None) is None:
                return
        for begin, _ in _pieces(array.nbytes):
            self._device.unregister(array.ctypes.data + begin, self._what)

    def upload(self, address: int, data: np.ndarray, what: str) -> None:
        """Copies a contiguous uint8 array to a device address; complete on return."""
        self.upload_all([(address, data)], what)

    def upload_all(self, copies: Iterable[tuple[int, np.ndarray]], what: str) -> None:
        """`upload` of each; all are enqueued before the wait."""
        with self._lock:
            turn, direct = 0, []
            try:
                for address, data in copies:
                    if self._is_pinned(data):
                        direct.append(data)  # kept alive until it was read
                        self._begin_direct(address, data, what)
                    else:
                        turn = self._begin_staged(address, data, turn, what)
            finally:
                self._device.finish(what)

    def close(self) -> None:
        for array in list(self._pinned.values()):
            self.unpin(array)
        for event in self._events:
            self._device.free_event(event, self._what)
        for address in self._addresses:
            self._device.free_pinned(address, self._what)
        self._addresses, self._events = [], []
        if threads := getattr(self, "_threads", None):
            threads.shutdown()

    def _is_pinned(self, data: np.ndarray) -> bool:
        whole = self._pinned.get(data.ctypes.data)
        return whole is not None and data.nbytes <= whole.nbytes

    def _begin_direct(self, address: int, data: np.ndarray, what: str) -> None:
        """Copies piece by piece: no copy may span pages that were pinned by two calls."""
        for begin, nbytes in _pieces(data.nbytes):
            self._device.begin_upload(address + begin, data.ctypes.data + begin, nbytes, what)

    def _begin_staged(self, address: int, data: np.ndarray, turn: int, what: str) -> int:
        """Enqueues the chunks of an array; returns the turn of the next chunk."""
        for begin in range(0, data.nbytes, self._chunk_bytes):
            chunk, buffer = data[begin : begin + self._chunk_bytes], turn % BUFFERS
            if turn >= BUFFERS:  # Invariant: the GPU has read what is overwritten.
                self._device.wait(self._events[buffer], what)
            self._fill(self._buffers[buffer][: chunk.nbytes], chunk)
            self._device.begin_upload(address + begin, self._addresses[buffer], chunk.nbytes, what)
            self._device.record(self._events[buffer], what)
            turn += 1
        return turn

    def _fill(self, buffer: np.ndarray, chunk: np.ndarray) -> None:
        parts = max(1, min(self._parts, chunk.nbytes // PART_BYTES_MIN))
        pairs = zip(np.array_split(buffer, parts), np.array_split(chunk, parts), strict=True)
        if parts == 1:
            np.copyto(buffer, chunk)
        else:  # NumPy releases the GIL while it copies
            list(self._threads.map(lambda pair: np.copyto(*pair), pairs))


def _pieces(nbytes: int) -> Iterator[tuple[int, int]]:
    """(begin, bytes) of each piece of an array, or of a prefix of it."""
    for begin in range(0, nbytes, PIECE_BYTES):
        yield begin, min(PIECE_BYTES, nbytes - begin)


def _view(address: int, nbytes: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
