"""What the bus to a GPU can do: one copy of each array, out of memory that is pinned already."""

import ctypes

import numpy as np

from eep_jax.heap.cuda.libcuda import Device

WHAT = "the benchmark"


class PinnedCopy:
    """`sources` are copied into pinned memory once; `copy` copies them from there to the GPU."""

    def __init__(self, sources: list[np.ndarray]):
        self._device, self._bytes = Device(0, WHAT), [source.nbytes for source in sources]
        self._event = self._device.new_event(WHAT)
        self._target = self._device.allocate(max(self._bytes), WHAT)
        self._hosts = [self._device.allocate_pinned(nbytes, WHAT) for nbytes in self._bytes]
        for address, source in zip(self._hosts, sources, strict=True):
            ctypes.memmove(address, source.ctypes.data, source.nbytes)

    def copy(self) -> None:
        for address, nbytes in zip(self._hosts, self._bytes, strict=True):
            self._device.begin_upload(self._target, address, nbytes, WHAT)
        self._device.record(self._event, WHAT)
        self._device.wait(self._event, WHAT)

    def close(self) -> None:
        for address in self._hosts:
            self._device.free_pinned(address, WHAT)
        self._device.free(self._target, WHAT)
        self._device.free_event(self._event, WHAT)
        self._device.close()
