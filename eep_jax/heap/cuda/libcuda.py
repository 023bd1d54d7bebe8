"""The CUDA driver: the only module that calls it. Every refusal is a HeapError in words.

`cuda.bindings` is loaded with the first device, so the heap imports on machines without a GPU.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from eep_jax.errors import HeapError

_module = None


def driver():
    """The module `cuda.bindings.driver`. Raises HeapError where it or the driver is missing."""
    global _module
    if _module is None:
        try:
            _module = _load()
        except Exception as error:  # cuda.pathfinder has its own types for a missing library
            raise HeapError(
                f"device memory needs cuda-bindings and the CUDA driver: {error}; on a machine "
                "with an NVIDIA GPU run pip install eep-jax[cuda13] (or [cuda12])"
            ) from error
    return _module


def _load():
    import cuda.bindings.driver as module

    module.cuGetErrorName(module.CUresult.CUDA_SUCCESS)  # loads the library of the driver, too
    return module


class Device:
    """The primary context of one GPU (the one JAX uses), and what the heap does with its memory.

    All methods may be called from any thread. `what` says for whom, in the words of an error:
    "rank 0, slot 2". Raises HeapError naming the call, the error of the driver, and `what`.
    """

    def __init__(self, ordinal: int, what: str):
        """`ordinal` counts within CUDA_VISIBLE_DEVICES."""
        self.ordinal, self._cu = ordinal, driver()
        self._call("cuInit", 0, what=what)
        self._device = self._call("cuDeviceGet", ordinal, what=what)
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device, what=what)
        try:
            kind = self._cu.CUstream_flags.CU_STREAM_NON_BLOCKING
            self._stream = self._enter("cuStreamCreate", kind, what=what)
        except HeapError:
            self._call("cuDevicePrimaryCtxRelease", self._device, what=what)
            raise

    def close(self) -> None:
        self._enter("cuStreamDestroy", self._stream, what="close")
        self._call("cuDevicePrimaryCtxRelease", self._device, what="close")

    def granularity(self, what: str) -> int:
        """Sizes and addresses of mappings are multiples of these bytes."""
        options = self._cu.CUmemAllocationGranularity_flags
        recommended = options.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        return int(
            self._enter("cuMemGetAllocationGranularity", self._properties(), recommended, what=what)
        )

    def reserve(self, nbytes: int, what: str) -> int:
        """An address range with nothing behind it."""
        return int(self._enter("cuMemAddressReserve", nbytes, 0, 0, 0, what=what, wanted=nbytes))

    def free_range(self, address: int, nbytes: int, what: str) -> None:
        self._enter("cuMemAddressFree", address, nbytes, what=what)

    def create(self, nbytes: int, what: str):
        """Physical memory of this GPU that can be exported; a handle to be released."""
        return self._enter("cuMemCreate", nbytes, self._properties(), 0, what=what, wanted=nbytes)

    def release(self, handle, what: str) -> None:
        """Gives up a handle. The memory lives as long as a mapping of it, here or elsewhere."""
        self._enter("cuMemRelease", handle, what=what)

    def export_fd(self, handle, what: str) -> int:
        return int(
            self._enter("cuMemExportToShareableHandle", handle, self._fd_type(), 0, what=what)
        )

    def import_fd(self, fd: int, what: str):
        """The memory behind another process's descriptor; a handle to be released."""
        return self._enter("cuMemImportFromShareableHandle", fd, self._fd_type(), what=what)

    def map(self, address: int, nbytes: int, handle, what: str) -> None:
        """Maps a handle's memory; unreadable until `allow`."""
        self._enter("cuMemMap", address, nbytes, 0, handle, 0, what=what)

    def allow(self, address: int, nbytes: int, what: str) -> None:
        """Lets this GPU read and write the mappings in a range."""
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
        """Begins a copy from pinned host memory; see `record` and `finish`."""
        self._enter("cuMemcpyHtoDAsync", address, host_address, nbytes, self._stream, what=what)

    def copy(self, copies: Sequence[tuple[int, int, int]], what: str) -> None:
        """Copies (target, source, bytes) of device memory, of this GPU or of a mapped peer.

        All are on their way before the first is waited for.
        """
        for target, source, nbytes in copies:
            self._enter("cuMemcpyDtoDAsync", target, source, nbytes, self._stream, what=what)
        self.finish(what)

    def new_event(self, what: str):
        flags = self._cu.CUevent_flags.CU_EVENT_DISABLE_TIMING
        return self._enter("cuEventCreate", flags, what=what)

    def record(self, event, what: str) -> None:
        """The event happens once all that was begun so far is done."""
        self._enter("cuEventRecord", event, self._stream, what=what)

    def wait(self, event, what: str) -> None:
        self._enter("cuEventSynchronize", event, what=what)

    def free_event(self, event, what: str) -> None:
        self._enter("cuEventDestroy", event, what=what)

    def allocate_pinned(self, nbytes: int, what: str) -> int:
        """Host memory that the GPU copies from by itself."""
        return int(self._enter("cuMemHostAlloc", nbytes, 0, what=what))

    def free_pinned(self, host_address: int, what: str) -> None:
        self._enter("cuMemFreeHost", host_address, what=what)

    def zero(self, address: int, nbytes: int, what: str) -> None:
        self._enter("cuMemsetD8Async", address, 0, nbytes, self._stream, what=what)
        self.finish(what)

    def register(self, host_address: int, nbytes: int, what: str) -> int:
        """Pins host memory; returns the address at which kernels reach it."""
        flags = self._cu.CU_MEMHOSTREGISTER_DEVICEMAP | self._cu.CU_MEMHOSTREGISTER_PORTABLE
        self._enter("cuMemHostRegister", host_address, nbytes, flags, what=what)
        try:
            return int(self._enter("cuMemHostGetDevicePointer", host_address, 0, what=what))
        except HeapError:
            self.unregister(host_address, what)
            raise

    def register_source(self, host_address: int, nbytes: int, what: str) -> None:
        """Pins host memory that may be mapped for reading alone, for `begin_upload` from there."""
        flags = self._cu.CU_MEMHOSTREGISTER_READ_ONLY
        self._enter("cuMemHostRegister", host_address, nbytes, flags, what=what)

    def unregister(self, host_address: int, what: str) -> None:
        self._enter("cuMemHostUnregister", host_address, what=what)

    def allocate(self, nbytes: int, what: str) -> int:
        """Ordinary device memory of this process alone."""
        return int(self._enter("cuMemAlloc", nbytes, what=what, wanted=nbytes))

    def free(self, address: int, what: str) -> None:
        self._enter("cuMemFree", address, what=what)

    def store_word(self, address: int, value: int, what: str) -> None:
        """Stores a uint32 in device memory beside running kernels, without waiting for it."""
        self._enter("cuStreamWriteValue32", self._stream, address, value, 0, what=what)

    def memory(self, what: str) -> tuple[int, int]:
        """Free and total bytes of the GPU."""
        free, total = self._enter("cuMemGetInfo", what=what)
        return int(free), int(total)

    def finish(self, what: str) -> None:
        """Waits until all that was begun is done."""
        # XLA's streams do not block on the default one, so order is kept here: it is done.
        self._enter("cuStreamSynchronize", self._stream, what=what)

    def _enter(self, name: str, *arguments, what: str, wanted: int = 0):
        """A call inside the context, whichever thread this is."""
        self._call("cuCtxSetCurrent", self._context, what=what)
        return self._call(name, *arguments, what=what, wanted=wanted)

    def _call(self, name: str, *arguments, what: str, wanted: int = 0):
        error, *values = getattr(self._cu, name)(*arguments)
        if error != self._cu.CUresult.CUDA_SUCCESS:
            raise HeapError(self._sentence(name, error, what, wanted))
        return values[0] if len(values) == 1 else tuple(values)

    def _sentence(self, name: str, error, what: str, wanted: int) -> str:
        label, text = (
            _text(describe(error), error)
            for describe in (self._cu.cuGetErrorName, self._cu.cuGetErrorString)
        )
        said = f"{name} of {what} failed: {label} ({text})"
        if error == self._cu.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            said += self._advice(wanted)
        return said

    def _advice(self, wanted: int) -> str:
        status, *found = self._cu.cuMemGetInfo()
        known = status == self._cu.CUresult.CUDA_SUCCESS
        free = f"{int(found[0])} of {int(found[1])} bytes are free" if known else "free: unknown"
        return (
            f"; wanted {wanted} bytes, {free}: lower --device_memory_fraction "
            "(XLA_PYTHON_CLIENT_MEM_FRACTION), cluster.slots_per_rank, or "
            "engine.batch_rows and engine.prefill_tokens"
        )

    def _properties(self):
        properties = self._cu.CUmemAllocationProp()
        properties.type = self._cu.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location = self._location()
        properties.requestedHandleTypes = self._fd_type()
        return properties

    def _location(self):
        location = self._cu.CUmemLocation()
        location.type = self._cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        location.id = self.ordinal
        return location

    def _fd_type(self):
        types = self._cu.CUmemAllocationHandleType
        return types.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


def _text(described, error) -> str:
    """What cuGetErrorName or cuGetErrorString returned, or the number where they know none."""
    status, text = described
    return text.decode() if int(status) == 0 and text else f"error {int(error)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuFacts:
    """What one GPU is and can do, without taking any of its memory."""

    name: str
    total_bytes: int
    capability: tuple[int, int]  # (9, 0) is Hopper
    maps_memory: bool  # cuMemCreate and cuMemMap
    exports_fds: bool  # its memory travels as a file descriptor
    peers: tuple[int, ...]  # ordinals of the GPUs whose memory it can reach


def survey() -> tuple[int, tuple[GpuFacts, ...]]:
    """The CUDA version of the driver (12080 is 12.8), and the facts of each visible GPU.

    Creates no context. Raises HeapError where the bindings or the driver are missing.
    """
    cu = driver()
    what = "a survey of the GPUs"
    attribute = cu.CUdevice_attribute

    def has(device, name: str) -> int:
        wanted = getattr(attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(_checked(cu, "cuDeviceGetAttribute", wanted, device, what=what))

    _checked(cu, "cuInit", 0, what=what)
    version = int(_checked(cu, "cuDriverGetVersion", what=what))
    count = int(_checked(cu, "cuDeviceGetCount", what=what))
    devices = [_checked(cu, "cuDeviceGet", ordinal, what=what) for ordinal in range(count)]
    found = []
    for device in devices:
        peers = [
            ordinal
            for ordinal, peer in enumerate(devices)
            if int(peer) != int(device)
            and _checked(cu, "cuDeviceCanAccessPeer", device, peer, what=what)
        ]
        facts = GpuFacts(
            name=_checked(cu, "cuDeviceGetName", 256, device, what=what)
            .split(b"\0")[0]
            .decode(errors="replace"),
            total_bytes=int(_checked(cu, "cuDeviceTotalMem", device, what=what)),
            capability=tuple(has(device, f"COMPUTE_CAPABILITY_{n}") for n in ("MAJOR", "MINOR")),
            maps_memory=bool(has(device, "VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED")),
            exports_fds=bool(has(device, "HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED")),
            peers=tuple(peers),
        )
        found.append(facts)
    return version, tuple(found)


def _checked(cu, name: str, *arguments, what: str):
    error, *values = getattr(cu, name)(*arguments)
    if error != cu.CUresult.CUDA_SUCCESS:
        label = _text(cu.cuGetErrorName(error), error)
        raise HeapError(f"{name} of {what} failed: {label}")
    return values[0] if values else None
