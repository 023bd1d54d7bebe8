"""Copies in host memory at the speed of memory, whatever dtype and order the values have."""

import math

import numpy as np

ALIGNMENT = 64  # bytes from which JAX on CPU takes an array without copying it
_COLUMNS = 64  # that are turned at once, so that both sides stay in the cache
_PLAIN = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}


def copy_values(out: np.ndarray, values: np.ndarray) -> None:
    """`out[...] = values`, converted to the dtype of `out` as `astype` does."""
    if values.dtype == out.dtype and values.itemsize in _PLAIN:
        # NumPy's own types are copied faster, and without holding on to the interpreter.
        plain = _PLAIN[values.itemsize]
        out, values = out.view(plain), values.view(plain)
    if values.ndim != 2 or values.flags.c_contiguous:
        np.copyto(out, values, casting="unsafe")
        return
    room = _spread_room(values)
    for start in range(0, out.shape[1], _COLUMNS):
        part = slice(start, start + _COLUMNS)
        found = values[:, part]
        if room is not None:
            spread = room[: found.shape[1]].T
            np.copyto(spread.T, found.T)
            found = spread
        np.copyto(out[:, part], found, casting="unsafe")


def _spread_room(values: np.ndarray) -> np.ndarray | None:
    """Where a few columns stay in the cache together; None where they do as they are.

    Values that are a multiple of a large power of two apart share few places in it.
    """
    if not values.T.flags.c_contiguous or math.gcd(values.strides[1], 4096) <= 512:
        return None
    pad = 64 // values.itemsize
    return np.empty((_COLUMNS, values.shape[0] + pad), values.dtype)[:, : values.shape[0]]


def empty_aligned(shape: tuple[int, ...], dtype) -> np.ndarray:
    """A new array, not filled, whose address is a multiple of ALIGNMENT."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    room = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + nbytes].view(dtype).reshape(shape)
