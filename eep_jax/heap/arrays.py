"""Heap memory as `jax.Array`, without a copy."""

import jax
import numpy as np
from jaxtyping import Array, UInt8

from eep_jax.errors import HeapError
from eep_jax.heap.heap import SymmetricHeap

XLA_ALIGNMENT_BYTES = 64


def heap_array(heap: SymmetricHeap) -> UInt8[Array, "R B"]:
    """The whole range, imported once; it stays right over every attach and detach."""
    return import_host(heap.whole())


def import_host(memory: np.ndarray) -> jax.Array:
    """`memory` as an array of the CPU device at the same address.

    Pass it to jit neither donated nor aliased: XLA would copy it. Raises HeapError where JAX cannot
    take the memory as it is.
    """
    if memory.ctypes.data % XLA_ALIGNMENT_BYTES:
        raise HeapError(f"address {memory.ctypes.data:#x} is not aligned to {XLA_ALIGNMENT_BYTES}")
    array = jax.dlpack.from_dlpack(memory, copy=False)
    if array.unsafe_buffer_pointer() != memory.ctypes.data:
        raise HeapError("JAX copied the heap instead of importing it; writes would be lost")
    return array
