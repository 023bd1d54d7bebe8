"""Wrapper of the CUDA driver, the only module that calls it. Every failure is a HeapError.

`cuda.bindings` is loaded with the first device, so the heap imports on machines without a GPU.
"""

import dataclasses
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from eep_jax.errors import HeapError

_module: ModuleType | None = None


def driver() -> Any:
    """The module `cuda.bindings.driver`. Raises HeapError if it or the driver is missing."""
    global _module
    if _module is None:
        try:
            _module = _load()
        except Exception as error:  # cuda.pathfinder has error types of its own
            raise HeapError(
                f"device memory needs cuda-bindings and the CUDA driver: {error}; on a machine "
                "with an NVIDIA GPU run pip install eep-jax[cuda13] (or [cuda12])"
            ) from error
    return _module


def _load() -> ModuleType:
    import cuda.bindings.driver as module

    module.cuGetErrorName(module.CUresult.CUDA_SUCCESS)  # loads the driver library, too
    return module


class Device:
    """The primary context of one GPU, which JAX shares, with the memory operations of the heap.

    Thread-safe. `what` names the subject of a call in errors: "rank 0, slab 2". All methods raise
    HeapError with the call, the error of the driver, and `what`.
    """

    def __init__(self, ordinal: int, what: str):
        """`ordinal` counts within CUDA_VISIBLE_DEVICES."""
        self.ordinal, self._cu = ordinal, driver()
        _call(self._cu, "cuInit", 0, what=what)
        self._device = _call(self._cu, "cuDeviceGet", ordinal, what=what)
        self._context = _call(self._cu, "cuDevicePrimaryCtxRetain", self._device, what=what)
        try:
            kind = self._cu.CUstream_flags.CU_STREAM_NON_BLOCKING
            self._stream = self._enter("cuStreamCreate", kind, what=what)
        except HeapError:
            _call(self._cu, "cuDevicePrimaryCtxRelease", self._device, what=what)
            raise

    def close(self) -> None:
        self._enter("cuStreamDestroy", self._stream, what="close")
        _call(self._cu, "cuDevicePrimaryCtxRelease", self._device, what="close")

    def granularity(self, what: str) -> int:
        """Bytes of which sizes and addresses of mappings are multiples."""
        options = self._cu.CUmemAllocationGranularity_flags
        recommended = options.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        return int(
            self._enter("cuMemGetAllocationGranularity", self._properties(), recommended, what=what)
        )

    def reserve(self, nbytes: int, what: str) -> int:
        """Reserves an address range without memory behind it."""
        return int(self._enter("cuMemAddressReserve", nbytes, 0, 0, 0, what=what, wanted=nbytes))

    def free_range(self, address: int, nbytes: int, what: str) -> None:
        self._enter("cuMemAddressFree", address, nbytes, what=what)

    def create(self, nbytes: int, what: str) -> Any:
        """Allocates exportable physical memory of this GPU; returns a handle to release."""
        return self._enter("cuMemCreate", nbytes, self._properties(), 0, what=what, wanted=nbytes)

    def release(self, handle: Any, what: str) -> None:
        """Releases a handle. The memory lives as long as a mapping of it, here or elsewhere."""
        self._enter("cuMemRelease", handle, what=what)

    def export_fd(self, handle: Any, what: str) -> int:
        return int(
            self._enter("cuMemExportToShareableHandle", handle, self._fd_type(), 0, what=what)
        )

    def import_fd(self, fd: int, what: str) -> Any:
        """Imports memory behind another process's descriptor; returns a handle to release."""
        return self._enter("cuMemImportFromShareableHandle", fd, self._fd_type(), what=what)

    def map(self, address: int, nbytes: int, handle: Any, what: str) -> None:
        """Maps a handle's memory; not accessible before `allow`."""
        self._enter("cuMemMap", address, nbytes, 0, handle, 0, what=what)

    def allow(self, address: int, nbytes: int, what: str) -> None:
        """Gives this GPU read and write access to the mappings in a range."""
        access = self._cu.CUmemAccessDesc()
        access.location = self._location()
        access.flags = self._cu.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._enter("cuMemSetAccess", address, nbytes, [access], 1, what=what)

    def unmap(self, address: int, nbytes: int, what: str) -> None:
        """Unmaps a range that consists of whole mappings."""
        self._enter("cuMemUnmap", address, nbytes, what=what)

    def download(self, address: int, into: np.ndarray, what: str) -> None:
        """Copies device memory into a contiguous host array."""
        self._enter(
            "cuMemcpyDtoHAsync", into.ctypes.data, address, into.nbytes, self._stream, what=what
        )
        self.finish(what)

    def upload(self, address: int, data: np.ndarray, what: str) -> None:
        """Copies a contiguous host array into device memory."""
        self._enter(
            "cuMemcpyHtoDAsync", address, data.ctypes.data, data.nbytes, self._stream, what=what
        )
        self.finish(what)

    def begin_upload(self, address: int, host_address: int, nbytes: int, what: str) -> None:
        """Enqueues a copy from pinned host memory; see `record` and `finish`."""
        self._enter("cuMemcpyHtoDAsync", address, host_address, nbytes, self._stream, what=what)

    def copy(self, copies: Sequence[tuple[int, int, int]], what: str) -> None:
        """Copies (target, source, bytes) of device memory, of this GPU or of a mapped peer.

        All are enqueued before the wait for the first.
        """
        for target, source, nbytes in copies:
            self._enter("cuMemcpyDtoDAsync", target, source, nbytes, self._stream, what=what)
        self.finish(what)

    def new_event(self, what: str) -> Any:
        flags = self._cu.CUevent_flags.CU_EVENT_DISABLE_TIMING
        return self._enter("cuEventCreate", flags, what=what)

    def record(self, event: Any, what: str) -> None:
        """Records the event behind everything enqueued so far."""
        self._enter("cuEventRecord", event, self._stream, what=what)

    def wait(self, event: Any, what: str) -> None:
        self._enter("cuEventSynchronize", event, what=what)

    def free_event(self, event: Any, what: str) -> None:
        self._enter("cuEventDestroy", event, what=what)

    def allocate_pinned(self, nbytes: int, what: str) -> int:
        """Allocates pinned host memory."""
        return int(self._enter("cuMemHostAlloc", nbytes, 0, what=what))

    def free_pinned(self, host_address: int, what: str) -> None:
        self._enter("cuMemFreeHost", host_address, what=what)

    def zero(self, address: int, nbytes: int, what: str) -> None:
        self._enter("cuMemsetD8Async", address, 0, nbytes, self._stream, what=what)
        self.finish(what)

    def register(self, host_address: int, nbytes: int, what: str) -> int:
        """Pins host memory; returns its device address."""
        flags = self._cu.CU_MEMHOSTREGISTER_DEVICEMAP | self._cu.CU_MEMHOSTREGISTER_PORTABLE
        self._enter("cuMemHostRegister", host_address, nbytes, flags, what=what)
        try:
            return int(self._enter("cuMemHostGetDevicePointer", host_address, 0, what=what))
        except HeapError:
            self.unregister(host_address, what)
            raise

    def register_source(self, host_address: int, nbytes: int, what: str) -> None:
        """Pins host memory, which may be mapped read-only, as a source of `begin_upload`."""
        flags = self._cu.CU_MEMHOSTREGISTER_READ_ONLY
        self._enter("cuMemHostRegister", host_address, nbytes, flags, what=what)

    def unregister(self, host_address: int, what: str) -> None:
        self._enter("cuMemHostUnregister", host_address, what=what)

    def allocate(self, nbytes: int, what: str) -> int:
        """Allocates ordinary device memory, private to this process."""
        return int(self._enter("cuMemAlloc", nbytes, what=what, wanted=nbytes))

    def free(self, address: int, what: str) -> None:
        self._enter("cuMemFree", address, what=what)

    def store_word(self, address: int, value: int, what: str) -> None:
        """Enqueues the store of a uint32 in device memory, concurrent with running kernels."""
        self._enter("cuStreamWriteValue32", self._stream, address, value, 0, what=what)

    def memory(self, what: str) -> tuple[int, int]:
        """Free and total bytes of the GPU."""
        free, total = self._enter("cuMemGetInfo", what=what)
        return int(free), int(total)

    def finish(self, what: str) -> None:
        """Waits for everything enqueued."""
        # XLA's streams do not synchronise with this one: order needs a wait on the host.
        self._enter("cuStreamSynchronize", self._stream, what=what)

    def _enter(self, name: str, *arguments: Any, what: str, wanted: int = 0) -> Any:
        """Calls the driver with the context current on this thread."""
        _call(self._cu, "cuCtxSetCurrent", self._context, what=what)
        return _call(self._cu, name, *arguments, what=what, wanted=wanted)

    def _properties(self) -> Any:
        properties = self._cu.CUmemAllocationProp()
        properties.type = self._cu.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location = self._location()
        properties.requestedHandleTypes = self._fd_type()
        return properties

    def _location(self) -> Any:
        location = self._cu.CUmemLocation()
        location.type = self._cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        location.id = self.ordinal
        return location

    def _fd_type(self) -> Any:
        types = self._cu.CUmemAllocationHandleType
        return types.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


def _call(cu: Any, name: str, *arguments: Any, what: str, wanted: int = 0) -> Any:
    """Result of a driver call. Raises HeapError, which advises if `wanted` bytes were not free."""
    error, *values = getattr(cu, name)(*arguments)
    if error == cu.CUresult.CUDA_SUCCESS:
        return values[0] if len(values) == 1 else tuple(values)
    texts = []
    for describe in (cu.cuGetErrorName, cu.cuGetErrorString):
        status, text = describe(error)
        texts.append(text.decode() if int(status) == 0 and text else f"error {int(error)}")
    message = f"{name} of {what} failed: {texts[0]} ({texts[1]})"
    if error == cu.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        status, *found = cu.cuMemGetInfo()
        known = status == cu.CUresult.CUDA_SUCCESS
        free = f"{int(found[0])} of {int(found[1])} bytes are free" if known else "free: unknown"
        message += (
            f"; wanted {wanted} bytes, {free}: lower --device_memory_fraction "
            "(XLA_PYTHON_CLIENT_MEM_FRACTION), cluster.slots_per_rank, or "
            "engine.batch_rows and engine.prefill_tokens"
        )
    raise HeapError(message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuFacts:
    """Properties of one GPU, queried without allocating memory."""

    name: str
    total_bytes: int
    capability: tuple[int, int]  # (9, 0) is Hopper
    maps_memory: bool  # cuMemCreate and cuMemMap
    exports_fds: bool  # exports its memory as a file descriptor
    peers: tuple[int, ...]  # ordinals of the GPUs whose memory it can reach


def survey() -> tuple[int, tuple[GpuFacts, ...]]:
    """The CUDA version of the driver (12080 is 12.8), and the properties of each visible GPU.

    Creates no context. Raises HeapError if the bindings or the driver are missing.
    """
    cu = driver()
    what = "a survey of the GPUs"
    attribute = cu.CUdevice_attribute

    def has(device: Any, name: str) -> int:
        wanted = getattr(attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(_call(cu, "cuDeviceGetAttribute", wanted, device, what=what))

    _call(cu, "cuInit", 0, what=what)
    version = int(_call(cu, "cuDriverGetVersion", what=what))
    count = int(_call(cu, "cuDeviceGetCount", what=what))
    devices = [_call(cu, "cuDeviceGet", ordinal, what=what) for ordinal in range(count)]
    found = []
    for device in devices:
        peers = [
            ordinal
            for ordinal, peer in enumerate(devices)
            if int(peer) != int(device)
            and _call(cu, "cuDeviceCanAccessPeer", device, peer, what=what)
        ]
        facts = GpuFacts(
            name=_call(cu, "cuDeviceGetName", 256, device, what=what)
            .split(b"\0")[0]
            .decode(errors="replace"),
            total_bytes=int(_call(cu, "cuDeviceTotalMem", device, what=what)),
            capability=tuple(has(device, f"COMPUTE_CAPABILITY_{n}") for n in ("MAJOR", "MINOR")),
            maps_memory=bool(has(device, "VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED")),
            exports_fds=bool(has(device, "HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED")),
            peers=tuple(peers),
        )
        found.append(facts)
    return version, tuple(found)
