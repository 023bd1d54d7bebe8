"""Host to GPU at the speed of the bus: two pinned buffers, one filled while the other is copied.

A copy out of ordinary memory goes through a buffer of the driver's, filled by one thread. Here
several threads fill, and filling and copying go on at the same time.
"""

import concurrent.futures
import ctypes
import logging
import os
import threading

import numpy as np

from eep_jax.errors import HeapError
from eep_jax.heap.libcuda import Device

_log = logging.getLogger(__name__)

CHUNK_BYTES = 16 << 20  # a bus of 50 GB/s takes a third of a millisecond
BUFFERS = 2
THREADS_MAX = 8
PART_BYTES_MIN = 1 << 20  # what is worth a thread's while


class PinnedUpload:
    """Copies host arrays into device memory. May be called from any thread; one copy at a time."""

    def __init__(self, device: Device, what: str, chunk_bytes: int = CHUNK_BYTES):
        """Pins `BUFFERS` buffers. Raises HeapError where the driver pins nothing."""
        self._device, self._what, self._chunk_bytes = device, what, chunk_bytes
        self._lock = threading.Lock()
        self._addresses, self._events = [], []
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

    def upload(self, address: int, data: np.ndarray, what: str) -> None:
        """Copies a contiguous uint8 array to a device address; it is there on return."""
        with self._lock:
            for number, begin in enumerate(range(0, data.nbytes, self._chunk_bytes)):
                chunk = data[begin : begin + self._chunk_bytes]
                turn = number % BUFFERS
                if number >= BUFFERS:  # Invariant: nobody fills what the GPU still reads.
                    self._device.wait(self._events[turn], what)
                self._fill(self._buffers[turn][: chunk.nbytes], chunk)
                host = self._addresses[turn]
                self._device.begin_upload(address + begin, host, chunk.nbytes, what)
                self._device.record(self._events[turn], what)
            for event in self._events:
                self._device.wait(event, what)

    def close(self) -> None:
        for event in self._events:
            self._device.free_event(event, self._what)
        for address in self._addresses:
            self._device.free_pinned(address, self._what)
        self._addresses, self._events = [], []
        if threads := getattr(self, "_threads", None):
            threads.shutdown()

    def _fill(self, buffer: np.ndarray, chunk: np.ndarray) -> None:
        parts = max(1, min(self._parts, chunk.nbytes // PART_BYTES_MIN))
        pairs = zip(np.array_split(buffer, parts), np.array_split(chunk, parts), strict=True)
        if parts == 1:
            np.copyto(buffer, chunk)
        else:  # NumPy lets go of the interpreter while it copies
            list(self._threads.map(lambda pair: np.copyto(*pair), pairs))


def _view(address: int, nbytes: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
