"""Host to GPU at the speed of the bus: out of memory that the driver has pinned.

Memory that stays, such as backups, is pinned where it is, and the GPU copies from there. Anything
else goes through two pinned buffers, one filled by several threads while the other is copied; a
copy out of ordinary memory would go through one of the driver's, filled by one thread.
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
PART_BYTES_MIN = 1 << 20  # what is worth a thread's while
# Pinned by one call, which holds up other calls of the driver for about a millisecond.
PIECE_BYTES = 16 << 20


class PinnedUpload:
    """Copies host arrays into device memory. May be called from any thread; one copy at a time."""

    def __init__(self, device: Device, what: str, chunk_bytes: int = CHUNK_BYTES):
        """Pins `BUFFERS` buffers. Raises HeapError where the driver pins nothing."""
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
        """Has the driver pin the pages of a contiguous array, until `unpin`; whether it did."""
        begun = []
        try:
            for begin, nbytes in _pieces(array.nbytes):
                self._device.register_source(array.ctypes.data + begin, nbytes, self._what)
                begun.append(array.ctypes.data + begin)
        except HeapError as error:
            for address in begun:
                self._device.unregister(address, self._what)
            _log.warning("%d bytes are not pinned, and are copied twice: %s", array.nbytes, error)
            return False
        with self._lock:
            self._pinned[array.ctypes.data] = array
        return True

    def unpin(self, array: np.ndarray) -> None:
        """Gives up an array that `pin` was called with; does nothing for others."""
        with self._lock:  # Invariant: nobody copies from it any more.
            if self._pinned.pop(array.ctypes.data, None) is None:
                return
        for begin, _ in _pieces(array.nbytes):
            self._device.unregister(array.ctypes.data + begin, self._what)

    def upload(self, address: int, data: np.ndarray, what: str) -> None:
        """Copies a contiguous uint8 array to a device address; it is there on return."""
        self.upload_all([(address, data)], what)

    def upload_all(self, copies: Iterable[tuple[int, np.ndarray]], what: str) -> None:
        """`upload` of each; all are on their way before one is waited for."""
        with self._lock:
            turn, direct = 0, []
            try:
                for address, data in copies:
                    if self._is_pinned(data):
                        direct.append(data)  # kept until it was read
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
        """No copy reads from two pieces, which the driver pinned one by one."""
        for begin, nbytes in _pieces(data.nbytes):
            self._device.begin_upload(address + begin, data.ctypes.data + begin, nbytes, what)

    def _begin_staged(self, address: int, data: np.ndarray, turn: int, what: str) -> int:
        """Returns the turn of the next chunk."""
        for begin in range(0, data.nbytes, self._chunk_bytes):
            chunk, buffer = data[begin : begin + self._chunk_bytes], turn % BUFFERS
            if turn >= BUFFERS:  # Invariant: nobody fills what the GPU still reads.
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
        else:  # NumPy lets go of the interpreter while it copies
            list(self._threads.map(lambda pair: np.copyto(*pair), pairs))


def _pieces(nbytes: int) -> Iterator[tuple[int, int]]:
    """(begin, bytes) of each piece of an array, or of a part that begins where it does."""
    for begin in range(0, nbytes, PIECE_BYTES):
        yield begin, min(PIECE_BYTES, nbytes - begin)


def _view(address: int, nbytes: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
