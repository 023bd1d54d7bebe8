"""Zero-copy import of heap memory as `jax.Array`, by DLPack capsules built with ctypes.

NumPy exports neither bfloat16 nor device memory by DLPack, so the capsule of `dlpack.h` (version 0)
is filled in here. Do not pass the arrays to jit donated or aliased: XLA would copy them.
"""

import ctypes
import math

import jax
import numpy as np
from jaxtyping import Array, UInt8, UInt32

from eep_jax.errors import HeapError
from eep_jax.heap.heap import CONTROL_BYTES, SymmetricHeap, check_bytes
from pallas_kernels.window import Region

XLA_ALIGNMENT_BYTES = 64

_DEVICE_TYPES = {"cpu": 1, "cuda": 2}
_TYPE_CODES = {"i": 0, "u": 1, "f": 2}  # by numpy's kind
_BFLOAT = 4


def heap_argument(heap: SymmetricHeap) -> UInt8[Array, "N B"]:
    """Heap argument of a step: the whole range on CPU, the head of the range on a GPU.

    XLA counts all arguments as memory of its own allocator, and rematerializes where they exceed
    it; kernels need the address alone.
    """
    if heap.device == "cpu":
        return heap_array(heap)
    return _import(heap, heap.base, np.dtype(np.uint8), (1, CONTROL_BYTES))


def heap_array(heap: SymmetricHeap) -> UInt8[Array, "R B"]:
    """The whole range, imported once; it stays valid over every attach and detach."""
    return _import(heap, heap.base, np.dtype(np.uint8), (heap.ranks, heap.slab_bytes))


def device_array(heap: SymmetricHeap, region: Region, rank: int | None = None) -> jax.Array:
    """A region of the slab of `rank` (default: the own one), in its dtype and shape.

    Raises HeapError if the region is not inside the slab or JAX cannot import it without a copy.
    """
    rank = heap.rank if rank is None else rank
    address = check_bytes(heap, rank, region.offset, region.bytes)
    return _import(heap, address, region.dtype, region.shape)


def control_array(heap: SymmetricHeap) -> UInt32[Array, "W"]:
    """The own control page as kernels read it, uint32 words; the abort word comes first."""
    words = (CONTROL_BYTES // 4,)
    return _import(heap, heap.control_address(), np.dtype(np.uint32), words)


def _import(
    heap: SymmetricHeap, address: int, dtype: np.dtype, shape: tuple[int, ...]
) -> jax.Array:
    device = (_DEVICE_TYPES[heap.device], heap.device_ordinal)
    return import_memory(address, dtype, shape, device)


def import_memory(
    address: int, dtype: np.dtype, shape: tuple[int, ...], device: tuple[int, int] = (1, 0)
) -> jax.Array:
    """The memory at `address` as an array. `device`: DLPack's (type, ordinal), (1, 0) is the CPU.

    The memory must outlive the array. Raises HeapError if JAX cannot import it without a copy.
    """
    if address % XLA_ALIGNMENT_BYTES:
        raise HeapError(f"address {address:#x} is not aligned to {XLA_ALIGNMENT_BYTES}")
    array = jax.dlpack.from_dlpack(_Memory(address, dtype, shape, device), copy=False)
    if math.prod(shape) and array.unsafe_buffer_pointer() != address:
        raise HeapError(
            f"JAX copied {shape} of {dtype} at {address:#x} instead of importing it; writes would "
            "be lost"
        )
    return array


class _Memory:
    """Exporter of the two methods of the DLPack protocol."""

    def __init__(
        self, address: int, dtype: np.dtype, shape: tuple[int, ...], device: tuple[int, int]
    ):
        self._address, self._shape, self._device = address, shape, _Device(*device)
        code = _BFLOAT if dtype.name == "bfloat16" else _TYPE_CODES.get(dtype.kind)
        if code is None:
            raise HeapError(f"no array of {dtype} can be imported from the heap")
        self._type = _DataType(code, dtype.itemsize * 8, 1)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device.type, self._device.id

    def __dlpack__(self, stream: int | None = None, **_) -> object:
        # One malloc block holds the struct and its shape, freed by C: the deleter may run after
        # the interpreter ended. No stream is synchronised: whoever writes memory waits for it.
        head = ctypes.sizeof(_Managed)
        block = _libc.malloc(head + 8 * max(1, len(self._shape)))
        if not block:
            raise MemoryError("no memory for a DLPack capsule")
        sizes = (ctypes.c_int64 * len(self._shape)).from_address(block + head)
        sizes[:] = self._shape
        managed = _Managed.from_address(block)
        managed.tensor = _Tensor(
            data=self._address,
            device=self._device,
            dimensions=len(self._shape),
            type=self._type,
            shape=block + head,
            strides=None,  # compact, rows first
            byte_offset=0,
        )
        managed.context = None
        managed.deleter = ctypes.cast(_libc.free, ctypes.c_void_p)
        return _new_capsule(block, b"dltensor", None)


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("dimensions", ctypes.c_int32),
        ("type", _DataType),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (
        ("tensor", _Tensor),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


_libc = ctypes.CDLL(None)
_libc.malloc.restype, _libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
