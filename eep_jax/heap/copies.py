"""Copies in host memory at the speed of memory, whatever dtype and order the values have."""

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
    for start in range(0, out.shape[1], _COLUMNS):
        part = slice(start, start + _COLUMNS)
        np.copyto(out[:, part], values[:, part], casting="unsafe")


def empty_aligned(shape: tuple[int, ...], dtype) -> np.ndarray:
    """A new array, not filled, whose address is a multiple of ALIGNMENT."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    room = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + nbytes].view(dtype).reshape(shape)
