"""A CUDA driver over host memory: as strict as the real one about mappings, handles and contexts.

Physical memory is a memory file, a mapping is a mapping of it, so what a heap does can be seen in
the process's own memory; bytes without access end the process, as on a GPU they end the context.
"""

import ctypes
import enum
import mmap
import os
import threading
from types import SimpleNamespace

from eep_jax.heap.cuda import libcuda

PAGE_BYTES = 4096
TOTAL_BYTES = 1 << 30
_NONE, _READ_WRITE, _FIXED, _ANONYMOUS = 0, 3, 0x10, 0x4022

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_DEVICE = 101
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_NOT_SUPPORTED = 801


OK = (CUresult.CUDA_SUCCESS,)
INVALID = (CUresult.CUDA_ERROR_INVALID_VALUE,)


class _Memory:
    """Physical memory: lives while a handle or a mapping of this process refers to it."""

    def __init__(self, fd: int, nbytes: int, imported: bool):
        self.fd, self.nbytes, self.imported = fd, nbytes, imported
        self.handles, self.mappings = 1, 0


class FakeCuda:
    """Stands for the module `cuda.bindings.driver`. `fail` makes the n-th call of a name fail."""

    CUresult = CUresult
    CUmemAllocationProp = CUmemLocation = CUmemAccessDesc = SimpleNamespace
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)
    CUmemAllocationHandleType = SimpleNamespace(CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR=1)
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_RECOMMENDED=1)
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)
    CUevent_flags = SimpleNamespace(CU_EVENT_DISABLE_TIMING=2)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    # An attribute stands for what a device answers to it.
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=9,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=0,
        CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED=1,
        CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED=1,
    )
    CU_MEMHOSTREGISTER_PORTABLE, CU_MEMHOSTREGISTER_DEVICEMAP = 1, 2
    CU_MEMHOSTREGISTER_READ_ONLY = 8

    def __init__(self, page_bytes: int = PAGE_BYTES, total_bytes: int = TOTAL_BYTES):
        self.page_bytes, self.total_bytes = page_bytes, total_bytes
        self.calls: list[str] = []
        self.memories: list[_Memory] = []  # with a handle or a mapping
        self.mappings: dict[int, tuple[int, _Memory]] = {}  # address: (bytes, memory)
        self.readable: set[int] = set()  # addresses of mappings with access
        self.ranges: dict[int, int] = {}
        self.registered: dict[int, int] = {}
        self.allocated: dict[int, ctypes.Array] = {}
        self.pinned: dict[int, ctypes.Array] = {}
        self.events: dict[int, list] = {}  # copies that were begun and are seen after a wait
        self.begun: list[tuple[int, int, int]] = []
        self.streams: set[int] = set()
        self.contexts = 0
        self._current = threading.local()
        self._failing: dict[str, tuple[int, CUresult]] = {}
        self._lock = threading.RLock()

    def fail(self, name: str, nth: int = 1, error=CUresult.CUDA_ERROR_NOT_SUPPORTED) -> None:
        """The nth call of `name` from now on returns this error, and only that one."""
        self._failing[name] = (nth, error)

    def kept(self) -> dict[str, int]:
        """All that must be given back: what a leak would raise."""
        return {
            "memories": len(self.memories),
            "handles": sum(memory.handles for memory in self.memories),
            "mappings": len(self.mappings),
            "ranges": len(self.ranges),
            "registered": len(self.registered),
            "allocated": len(self.allocated),
            "pinned": len(self.pinned),
            "events": len(self.events),
            "streams": len(self.streams),
            "contexts": self.contexts,
        }

    def __getattribute__(self, name: str):
        found = super().__getattribute__(name)
        if not name.startswith("cu") or name in ("cuGetErrorName", "cuGetErrorString"):
            return found

        def call(*arguments):
            with self._lock:
                self.calls.append(name)
                left, error = self._failing.get(name, (0, None))
                if left == 1:
                    del self._failing[name]
                    return (error,)
                if left:
                    self._failing[name] = (left - 1, error)
                outside = name.startswith(("cuInit", "cuD", "cuCtxSetCurrent"))
                if not outside and getattr(self._current, "context", None) is None:
                    return (CUresult.CUDA_ERROR_INVALID_CONTEXT,)
                return found(*arguments)

        return call

    def cuGetErrorName(self, error):
        return CUresult.CUDA_SUCCESS, CUresult(error).name.encode()

    def cuGetErrorString(self, error):
        return CUresult.CUDA_SUCCESS, b"text of " + str(int(error)).encode()

    def cuInit(self, flags):
        return OK

    def cuDriverGetVersion(self):
        return *OK, 13_000

    def cuDeviceGetCount(self):
        return *OK, 1

    def cuDeviceGetName(self, length, device):
        return *OK, b"NVIDIA H100".ljust(length, b"\0")

    def cuDeviceTotalMem(self, device):
        return *OK, self.total_bytes

    def cuDeviceGetAttribute(self, attribute, device):
        return *OK, attribute

    def cuDeviceGet(self, ordinal):
        return (*OK, ordinal) if ordinal == 0 else (CUresult.CUDA_ERROR_INVALID_DEVICE,)

    def cuDevicePrimaryCtxRetain(self, device):
        self.contexts += 1
        return *OK, "primary"

    def cuDevicePrimaryCtxRelease(self, device):
        self.contexts -= 1
        return OK if self.contexts >= 0 else INVALID

    def cuCtxSetCurrent(self, context):
        self._current.context = context
        return OK

    def cuStreamCreate(self, flags):
        stream = max(self.streams, default=0) + 1
        self.streams.add(stream)
        return *OK, stream

    def cuStreamDestroy(self, stream):
        self.streams.remove(stream)
        return OK

    def cuStreamSynchronize(self, stream):
        self._finish()
        return OK if stream in self.streams else INVALID

    def cuEventCreate(self, flags):
        event = max(self.events, default=0) + 1
        self.events[event] = []
        return *OK, event

    def cuEventDestroy(self, event):
        return OK if self.events.pop(event, None) is not None else INVALID

    def cuEventRecord(self, event, stream):
        if event not in self.events or stream not in self.streams:
            return INVALID
        self.events[event] = list(self.begun)
        return OK

    def cuEventSynchronize(self, event):
        if event not in self.events:
            return INVALID
        for copy in self.events[event]:
            if copy in self.begun:
                self.begun.remove(copy)
                ctypes.memmove(*copy)
        return OK

    def cuMemHostAlloc(self, nbytes, flags):
        block = (ctypes.c_uint8 * nbytes)()
        self.pinned[ctypes.addressof(block)] = block
        return *OK, ctypes.addressof(block)

    def cuMemFreeHost(self, address):
        return OK if self.pinned.pop(address, None) is not None else INVALID

    def _finish(self):
        for copy in self.begun:
            ctypes.memmove(*copy)
        self.begun = []

    def cuMemGetInfo(self):
        return *OK, self._free_bytes(), self.total_bytes

    def cuMemGetAllocationGranularity(self, properties, option):
        return *OK, self.page_bytes

    def cuMemAddressReserve(self, nbytes, alignment, address, flags):
        if nbytes % self.page_bytes:
            return INVALID
        block = _libc.mmap(None, nbytes + self.page_bytes, _NONE, _ANONYMOUS, -1, 0)
        found = block + -block % self.page_bytes
        self.ranges[found] = nbytes
        return *OK, found

    def cuMemAddressFree(self, address, nbytes):
        mapped = any(address <= start < address + nbytes for start in self.mappings)
        if self.ranges.get(address) != nbytes or mapped:
            return INVALID
        del self.ranges[address]
        _libc.munmap(address, nbytes)  # what was needed to align it stays
        return OK

    def cuMemCreate(self, nbytes, properties, flags):
        if nbytes % self.page_bytes or properties.location.id != 0:
            return INVALID
        if nbytes > self._free_bytes():
            return (CUresult.CUDA_ERROR_OUT_OF_MEMORY,)
        fd = os.memfd_create("fake-cuda", os.MFD_CLOEXEC)
        os.ftruncate(fd, nbytes)
        # Fresh device memory is not zero.
        os.pwrite(fd, b"\xa5" * min(nbytes, 1 << 16), 0)
        self.memories.append(_Memory(fd, nbytes, imported=False))
        return *OK, self.memories[-1]

    def cuMemRelease(self, memory):
        if memory.handles == 0:
            return INVALID
        memory.handles -= 1
        self._free_if_unused(memory)
        return OK

    def cuMemExportToShareableHandle(self, memory, kind, flags):
        return (*OK, os.dup(memory.fd)) if memory.handles else INVALID

    def cuMemImportFromShareableHandle(self, fd, kind):
        try:
            copy = os.dup(fd)
        except OSError:
            return INVALID
        self.memories.append(_Memory(copy, os.fstat(copy).st_size, imported=True))
        return *OK, self.memories[-1]

    def cuMemMap(self, address, nbytes, offset, memory, flags):
        reserved = any(s <= address and address + nbytes <= s + n for s, n in self.ranges.items())
        taken = any(s < address + nbytes and address < s + n for s, (n, _) in self.mappings.items())
        aligned = address % self.page_bytes == nbytes % self.page_bytes == 0
        whole = nbytes == memory.nbytes and offset == 0 and memory.handles
        if not (reserved and aligned and whole) or taken:
            return INVALID
        _libc.mmap(address, nbytes, _NONE, mmap.MAP_SHARED | _FIXED, memory.fd, 0)
        self.mappings[address] = (nbytes, memory)
        memory.mappings += 1
        return OK

    def cuMemSetAccess(self, address, nbytes, descriptions, count):
        inside = self._mappings_in(address, nbytes)
        if inside is None or len(descriptions) != count or descriptions[0].location.id != 0:
            return INVALID
        _libc.mprotect(address, nbytes, _READ_WRITE)
        self.readable.update(inside)
        return OK

    def cuMemUnmap(self, address, nbytes):
        inside = self._mappings_in(address, nbytes)
        if inside is None:
            return INVALID
        for start in inside:
            _, memory = self.mappings.pop(start)
            self.readable.discard(start)
            memory.mappings -= 1
            self._free_if_unused(memory)
        _libc.mmap(address, nbytes, _NONE, _ANONYMOUS | _FIXED, -1, 0)
        return OK

    def cuMemcpyDtoHAsync(self, host, source, nbytes, stream):
        return self._move(host, source, nbytes, stream, source)

    def cuMemcpyHtoDAsync(self, target, host, nbytes, stream):
        """From pinned memory it is done as late as it may be; other memory is read at once."""
        pinned = {a: len(b) for a, b in self.pinned.items()} | self.registered
        touched = [(a, n) for a, n in pinned.items() if a < host + nbytes and host < a + n]
        if not touched:
            return self._move(target, host, nbytes, stream, target)
        if len(touched) > 1 or not touched[0][0] <= host <= sum(touched[0]) - nbytes:
            return INVALID  # from one that was pinned by itself into what is beside it
        if not self._accessible(target, nbytes) or stream not in self.streams:
            return INVALID
        self.begun.append((target, host, nbytes))
        return OK

    def cuMemcpyDtoDAsync(self, target, source, nbytes, stream):
        return self._move(target, source, nbytes, stream, target, source)

    def cuMemsetD8Async(self, address, value, nbytes, stream):
        if not self._accessible(address, nbytes) or stream not in self.streams:
            return INVALID
        ctypes.memset(address, value, nbytes)
        return OK

    def cuMemHostRegister(self, address, nbytes, flags):
        if flags not in (3, 8) or address in self.registered:
            return INVALID
        self.registered[address] = nbytes
        return OK

    def cuMemHostGetDevicePointer(self, address, flags):
        return (*OK, address) if address in self.registered else INVALID

    def cuMemHostUnregister(self, address):
        found = self.registered.pop(address, 0)
        is_read = any(host < address + found and address < host + n for _, host, n in self.begun)
        return OK if found and not is_read else INVALID

    def cuMemAlloc(self, nbytes):
        block = (ctypes.c_uint8 * (nbytes + 256))()
        address = ctypes.addressof(block) + -ctypes.addressof(block) % 256
        self.allocated[address] = block
        return *OK, address

    def cuMemFree(self, address):
        return OK if self.allocated.pop(address, None) is not None else INVALID

    def cuStreamWriteValue32(self, stream, address, value, flags):
        if address not in self.allocated or stream not in self.streams:
            return INVALID
        ctypes.c_uint32.from_address(address).value = value
        return OK

    def _move(self, target, source, nbytes, stream, *on_device):
        if not all(self._accessible(a, nbytes) for a in on_device) or stream not in self.streams:
            return INVALID
        ctypes.memmove(target, source, nbytes)
        return OK

    def _free_bytes(self) -> int:
        return self.total_bytes - sum(m.nbytes for m in self.memories if not m.imported)

    def _accessible(self, address: int, nbytes: int) -> bool:
        if any(a <= address and address + nbytes <= a + len(b) for a, b in self.allocated.items()):
            return True
        spans = [(s, n) for s, (n, _) in self.mappings.items() if s in self.readable]
        covered = sum(max(0, min(s + n, address + nbytes) - max(s, address)) for s, n in spans)
        return covered == nbytes

    def _mappings_in(self, address: int, nbytes: int) -> list[int] | None:
        """Starts of the mappings that make up this range; None if they are not whole ones."""
        starts = [s for s in self.mappings if address <= s < address + nbytes]
        covered = sum(self.mappings[s][0] for s in starts)
        last = max(starts, default=0)
        ends = starts and last + self.mappings[last][0] == address + nbytes
        return starts if covered == nbytes and ends else None

    def _free_if_unused(self, memory: _Memory) -> None:
        if memory.handles == memory.mappings == 0:
            self.memories.remove(memory)
            os.close(memory.fd)


def put_fake_driver(monkeypatch, **sizes) -> FakeCuda:
    """A FakeCuda in the place of the driver, for one test."""
    fake = FakeCuda(**sizes)
    monkeypatch.setattr(libcuda, "_module", fake)
    return fake
