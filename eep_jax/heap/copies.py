"""Copies in host memory at memory bandwidth, for any dtype and axis order of the values."""

import math

import numpy as np
from numpy.typing import DTypeLike

ALIGNMENT = 64  # bytes; JAX on CPU imports an array so aligned without a copy
_COLUMNS = 64  # transposed at once, so that both sides stay in the cache
_PLAIN = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}


def copy_values(out: np.ndarray, values: np.ndarray) -> None:
    """`out[...] = values`, converted to the dtype of `out` as by `astype`."""
    if values.dtype == out.dtype and values.itemsize in _PLAIN:
        # NumPy's own types are copied faster, and without holding the GIL.
        plain = _PLAIN[values.itemsize]
        out, values = out.view(plain), values.view(plain)
    if values.ndim != 2 or values.flags.c_contiguous:
        np.copyto(out, values, casting="unsafe")
        return
    scratch = _padded_columns(values)
    for start in range(0, out.shape[1], _COLUMNS):
        part = slice(start, start + _COLUMNS)
        found = values[:, part]
        if scratch is not None:
            spread = scratch[: found.shape[1]].T
            np.copyto(spread.T, found.T)
            found = spread
        np.copyto(out[:, part], found, casting="unsafe")


def _padded_columns(values: np.ndarray) -> np.ndarray | None:
    """Padded scratch buffer for columns that would evict each other; None if not needed.

    Values a multiple of a large power of two apart map to few sets of the cache.
    """
    if not values.T.flags.c_contiguous or math.gcd(values.strides[1], 4096) <= 512:
        return None
    pad = 64 // values.itemsize
    return np.empty((_COLUMNS, values.shape[0] + pad), values.dtype)[:, : values.shape[0]]


def empty_aligned(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """A new uninitialised array whose address is a multiple of ALIGNMENT."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    scratch = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -scratch.ctypes.data % ALIGNMENT
    return scratch[start : start + nbytes].view(dtype).reshape(shape)
