"""Round-tagged flag words: how a rank says that its rows are there, and how it waits for others'.

A flag holds the round itself, never a count of arrivals, so a late write of a rank that was evicted
can satisfy no wait. A round is a uint32: 12 bits of the epoch, 20 bits that count within it.
"""

import ctypes
import platform
import threading
import time

import numpy as np

ROUND_BITS = 20
ROUND_MASK = (1 << ROUND_BITS) - 1
EPOCH_MASK = (1 << (32 - ROUND_BITS)) - 1
# Cleared flags are zero. Counting starts at two, so that no first round of an epoch is zero.
FIRST_COUNT = 2

WAIT_SLICE_NS = 1_000_000  # how often a sleeping wait looks at the abort word

_FUTEX_CALL = {"x86_64": 202, "aarch64": 98}.get(platform.machine())
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
_libc = ctypes.CDLL(None, use_errno=True)
_fence = threading.Lock()


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def first_round(epoch: int) -> int:
    """The round at which an epoch starts. Epoch 3 starts at `3 << 20 | 2`."""
    return (epoch & EPOCH_MASK) << ROUND_BITS | FIRST_COUNT


def next_round(current, steps: int = 1):
    """`steps` rounds later in the same epoch; wraps within its 20 bits. Numpy or jax uint32."""
    low, high = np.uint32(ROUND_MASK), np.uint32(EPOCH_MASK << ROUND_BITS)
    return (current & high) | (((current & low) + np.uint32(steps)) & low)


def parity(current: int) -> int:
    """Which half of the double-buffered regions a round uses."""
    return current & 1


def post(flag: np.ndarray, value: int) -> None:
    """Release-stores `value` in a one-element view and wakes whoever sleeps on it."""
    # Taking and releasing a lock orders all earlier stores before the flag, on every processor.
    with _fence:
        pass
    flag[...] = value
    if _FUTEX_CALL:
        everyone = ctypes.c_int(2**31 - 1)
        _libc.syscall(_FUTEX_CALL, ctypes.c_void_p(flag.ctypes.data), _FUTEX_WAKE, everyone)


def sleep_on(flag: np.ndarray, seen: int, timeout_ns: int) -> None:
    """Sleeps until the flag is posted, holds something else than `seen`, or the time is over."""
    if not _FUTEX_CALL:
        time.sleep(min(timeout_ns, 100_000) / 1e9)
        return
    limit = _Timespec(timeout_ns // 1_000_000_000, timeout_ns % 1_000_000_000)
    address = ctypes.c_void_p(flag.ctypes.data)
    value = ctypes.c_uint32(seen)
    _libc.syscall(_FUTEX_CALL, address, _FUTEX_WAIT, value, ctypes.byref(limit))


def wait_round(
    flags: np.ndarray, wanted: int, ranks, abort: np.ndarray, epoch: int, deadline_ns: int
) -> tuple[list[int], bool]:
    """Waits until `flags[r] == wanted` for all of `ranks`.

    Returns (ranks that did not come before `deadline_ns` of the monotonic clock, whether the wait
    was aborted because an epoch above `epoch` is being prepared). Never waits past the deadline.
    """
    missing = []
    for rank in ranks:
        while (seen := int(flags[rank])) != wanted:
            if int(abort[0]) > epoch:
                return missing, True
            left_ns = deadline_ns - time.monotonic_ns()
            if left_ns <= 0:
                missing.append(rank)
                break
            sleep_on(flags[rank : rank + 1], seen, min(left_ns, WAIT_SLICE_NS))
    with _fence:
        pass
    return missing, False
