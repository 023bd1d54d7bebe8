"""The symmetric heap: every rank's slab of memory at a fixed address in every process."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from eep_jax.errors import HeapError

# Host memory for the words that hosts watch: abort, bell and wake, the first regions of a window.
CONTROL_BYTES = 4096


class SymmetricHeap(Protocol):
    """One slab per rank in one contiguous address range, `base + rank * slab_bytes`.

    The range is reserved once. Slots of ranks that are not attached hold a local dummy, so every
    address may be read and written at any time; what a dummy holds means nothing. Attaching and
    detaching change what is behind an address, never the address.

    `read`, `write`, `fill_zero`, `copy_in` and `post_abort` may be called from any thread. They
    move bytes now, in no order with a step: call the first four while no step of this rank runs.
    Those raise HeapError for bytes outside the slab.
    """

    rank: int
    ranks: int
    slab_bytes: int  # at least what was asked for: devices round up, on all ranks alike
    base: int
    device: str  # "cpu" or "cuda": where the slabs are
    device_ordinal: int  # as JAX counts devices of that kind

    def export(self) -> str:
        """A handle with which other processes attach this rank's slab while this process lives."""

    def attach(self, rank: int, handle: str) -> None:
        """Maps the slab behind `handle` at the slot of `rank`, in place of what was there.

        Raises HeapError naming the rank; the slot then holds what it held before, or the dummy.
        """

    def detach(self, rank: int) -> None:
        """Puts the dummy in the slot of `rank`; its memory is no longer reachable from here."""

    def is_mapped(self, rank: int) -> bool:
        """Whether the slot of `rank` is the slab itself, or staging for one on another host.

        `read` of the latter goes over a network, within a deadline, and raises HeapError if it
        cannot.
        """

    def control(self) -> np.ndarray:
        """The control pages, uint8 `[R CONTROL_BYTES]`: host memory that all processes share."""

    def control_address(self) -> int:
        """Where a kernel reads this rank's own abort word, at the start of its control page."""

    def post_abort(self, epoch: int) -> None:
        """Carries the abort word to where kernels read it, if that is not the control page.

        Call it after storing the word in `control()`. Never waits for the device.
        """

    def read(self, rank: int, offset: int, nbytes: int) -> np.ndarray:
        """A copy of these bytes of any rank's slab in host memory, uint8 `[nbytes]`."""

    def write(self, offset: int, array: np.ndarray) -> None:
        """Copies an array's bytes into the own slab."""

    def write_all(self, writes: Iterable[tuple[int, np.ndarray]]) -> None:
        """`write` of each (offset, array), taken one by one; a device waits for all together."""

    def pin(self, array: np.ndarray) -> bool:
        """Prepares host memory for being written from, fast and often; whether it did.

        The array is contiguous. What is prepared stays until `unpin`, which must come before its
        pages are given up. Takes time: call it while nobody waits. Both may be called from any
        thread.
        """

    def unpin(self, array: np.ndarray) -> None:
        """Undoes `pin` of the same array, once no write reads from it any more."""

    def fill_zero(self, offset: int, nbytes: int) -> None:
        """Zeroes these bytes of the own slab."""

    def copy_in(self, offset: int, rank: int, source_offset: int, nbytes: int) -> None:
        """Copies from any rank's slab into the own one at `offset`; the two must not overlap."""

    def copy_in_all(self, copies: Sequence[tuple[int, int, int, int]]) -> None:
        """`copy_in` of each (offset, rank, source_offset, nbytes); a device does all together."""

    def whole(self) -> np.ndarray:
        """The range as host memory, uint8 `[R slab_bytes]`. Raises HeapError where it is none."""

    def close(self) -> None:
        """Stops handing out the slab. The range stays mapped: arrays may still alias it."""


def check_rank(rank: int, ranks: int) -> None:
    """Raises HeapError unless `rank` is one of `ranks`."""
    if not 0 <= rank < ranks:
        raise HeapError(f"rank {rank} is not in 0..{ranks - 1}")


def check_peer(heap: SymmetricHeap, rank: int) -> None:
    """Raises HeapError unless `rank` is another one than the heap's own."""
    if rank == heap.rank or not 0 <= rank < heap.ranks:
        raise HeapError(f"rank {rank} is not a peer of rank {heap.rank} of {heap.ranks}")


def check_slab(heap: SymmetricHeap, rank: int, found_bytes: int) -> None:
    """Raises HeapError unless a slab to be attached is as large as the own one."""
    if found_bytes != heap.slab_bytes:
        raise HeapError(
            f"the slab of rank {rank} has {found_bytes} bytes, rank {heap.rank} expects "
            f"{heap.slab_bytes}; start all ranks with the same configuration"
        )


def check_bytes(heap: SymmetricHeap, rank: int, offset: int, nbytes: int) -> int:
    """The address of these bytes. Raises HeapError unless they lie in the slab of `rank`."""
    check_rank(rank, heap.ranks)
    if offset < 0 or nbytes < 0 or offset + nbytes > heap.slab_bytes:
        raise HeapError(
            f"{nbytes} bytes at offset {offset} are not in the slab of rank {rank}, "
            f"which has {heap.slab_bytes} bytes"
        )
    return heap.base + rank * heap.slab_bytes + offset


def check_copy(
    heap: SymmetricHeap, offset: int, rank: int, source_offset: int, nbytes: int
) -> tuple[int, int]:
    """Returns (target address, source address) of a `copy_in`. Raises HeapError as it says."""
    target = check_bytes(heap, heap.rank, offset, nbytes)
    source = check_bytes(heap, rank, source_offset, nbytes)
    if abs(target - source) < nbytes:
        raise HeapError(
            f"{nbytes} bytes at offset {source_offset} of rank {rank} overlap those at {offset}"
        )
    return target, source


def socket_of(handle: str, scheme: str, rank: int) -> str:
    """The socket name in a handle `<scheme>:<socket name>`. Raises HeapError naming the rank."""
    found, _, name = handle.partition(":")
    if found != scheme or not name:
        raise HeapError(
            f"handle {handle!r} of rank {rank} is not of the form {scheme}:<socket name>"
        )
    return name
