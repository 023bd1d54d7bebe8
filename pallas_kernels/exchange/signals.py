"""Flags that hold rounds: a rank posts that its rows are written, and waits for others' flags.

A flag holds the round itself, never a count of arrivals, so a late write of an evicted rank
satisfies no wait. A round is a uint32: 12 bits of the epoch, 20 bits that count within it.
"""

import ctypes
import platform
import threading
import time
from collections.abc import Iterable

import numpy as np

ROUND_BITS = 20
ROUND_MASK = (1 << ROUND_BITS) - 1
EPOCH_MASK = (1 << (32 - ROUND_BITS)) - 1
# Cleared flags are zero. Counting starts at two, so that no first round of an epoch is zero.
FIRST_COUNT = 2

WAIT_SLICE_NS = 1_000_000  # between two polls of the abort word by a sleeping wait

# The same number on all processors; since Linux 5.16.
_FUTEX_WAITV_CALL, _FUTEX_32_BITS, _WAITV_MAX, _ENOSYS = 449, 2, 128, 38
POLL_NS = 100_000  # if the kernel cannot sleep on several words at once

_FUTEX_CALL = {"x86_64": 202, "aarch64": 98}.get(platform.machine())
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
_libc = ctypes.CDLL(None, use_errno=True)
_fence = threading.Lock()


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Waiter(ctypes.Structure):
    _fields_ = (
        ("value", ctypes.c_uint64),
        ("address", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    )


def first_round(epoch: int) -> int:
    """First round of an epoch. Epoch 3 starts at `3 << 20 | 2`."""
    return (epoch & EPOCH_MASK) << ROUND_BITS | FIRST_COUNT


def next_round[U](current: U, steps: int = 1) -> U:
    """`steps` rounds later in the same epoch; wraps within 20 bits. NumPy or JAX uint32."""
    low, high = np.uint32(ROUND_MASK), np.uint32(EPOCH_MASK << ROUND_BITS)
    return (current & high) | (((current & low) + np.uint32(steps)) & low)


def parity(current: int) -> int:
    """Half of the double-buffered regions that a round uses."""
    return current & 1


def post(flag: np.ndarray, value: int) -> None:
    """Store-release of `value` in a one-element view; wakes all sleepers."""
    # Taking and releasing a lock orders all earlier stores before the flag, on every processor.
    with _fence:
        pass
    flag[...] = value
    if _FUTEX_CALL:
        everyone = ctypes.c_int(2**31 - 1)
        _libc.syscall(_FUTEX_CALL, ctypes.c_void_p(flag.ctypes.data), _FUTEX_WAKE, everyone)


def sleep_on(flag: np.ndarray, seen: int, timeout_ns: int) -> None:
    """Sleeps until the flag is posted, differs from `seen`, or the timeout expires."""
    if not _FUTEX_CALL:
        time.sleep(min(timeout_ns, 100_000) / 1e9)
        return
    limit = _Timespec(timeout_ns // 1_000_000_000, timeout_ns % 1_000_000_000)
    address = ctypes.c_void_p(flag.ctypes.data)
    value = ctypes.c_uint32(seen)
    _libc.syscall(_FUTEX_CALL, address, _FUTEX_WAIT, value, ctypes.byref(limit))


class AnyFlag:
    """Sleeps on several flags at once; writers post them as usual.

    `flags` are at most 128 views of one uint32 each; they must outlive this object.
    """

    def __init__(self, flags: list[np.ndarray]) -> None:
        if len(flags) > _WAITV_MAX:
            raise ValueError(f"{len(flags)} flags to sleep on, at most {_WAITV_MAX}")
        self._flags, self._can_wait = flags, _FUTEX_CALL is not None
        addresses = [flag.ctypes.data for flag in flags]
        self._waiters = (_Waiter * len(flags))(
            *(_Waiter(0, address, _FUTEX_32_BITS, 0) for address in addresses)
        )

    def values(self) -> list[int]:
        """Load-acquire of all flags: writes before a flag's post can be read after."""
        found = [int(flag[0]) for flag in self._flags]
        with _fence:
            pass
        return found

    def sleep(self, seen: list[int], timeout_ns: int) -> None:
        """Sleeps until a flag is posted, differs from `seen`, or the timeout expires."""
        if not self._can_wait:
            time.sleep(min(timeout_ns, POLL_NS) / 1e9)
            return
        for waiter, value in zip(self._waiters, seen, strict=True):
            waiter.value = value
        ends_ns = time.monotonic_ns() + timeout_ns
        limit = _Timespec(ends_ns // 1_000_000_000, ends_ns % 1_000_000_000)
        found = _libc.syscall(
            _FUTEX_WAITV_CALL,
            ctypes.byref(self._waiters),
            ctypes.c_uint(len(self._flags)),
            ctypes.c_uint(0),
            ctypes.byref(limit),
            ctypes.c_int(time.CLOCK_MONOTONIC),
        )
        if found < 0 and ctypes.get_errno() == _ENOSYS:
            self._can_wait = False


def wait_round(
    flags: np.ndarray,
    wanted: int,
    ranks: Iterable[int],
    abort: np.ndarray,
    epoch: int,
    deadline_ns: int,
) -> tuple[list[int], bool]:
    """Waits until `flags[r] == wanted` for all of `ranks`.

    Returns (ranks whose flag did not come before `deadline_ns` of the monotonic clock, whether the
    wait was aborted because an epoch above `epoch` is being prepared). Load-acquire; never waits
    past the deadline.
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
