"""Interface of the symmetric heap: each rank's slab, at a fixed address in every process."""

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from eep_jax.errors import HeapError

# Host memory of the control words (abort, doorbell, wake), the first regions of a window.
CONTROL_BYTES = 4096


@runtime_checkable
class SymmetricHeap(Protocol):
    """One slab per rank in one contiguous address range, `base + rank * slab_bytes`.

    The range is reserved once. A slab of a rank that is not attached is backed by a local dummy, so
    every address can be read and written at any time; the contents of a dummy are undefined.
    Attaching and detaching change the memory behind an address, never the address.

    `read`, `write`, `fill_zero`, `copy_in` and `post_abort` are thread-safe and synchronous, but
    not ordered with a step: call the first four while no step of this rank runs. They raise
    HeapError for bytes outside the slab.
    """

    rank: int
    ranks: int
    slab_bytes: int  # the size requested, rounded up as the device requires, alike on all ranks
    base: int
    device: str  # that holds the slabs: "cpu" or "cuda"
    device_ordinal: int  # as JAX counts devices of that kind

    def export(self) -> str:
        """Handle by which other processes attach this rank's slab while this process lives."""

    def attach(self, rank: int, handle: str) -> None:
        """Maps the memory behind `handle` as the slab of `rank`, in place of the present one.

        Raises HeapError naming the rank; the slab is then the former one, or the dummy.
        """

    def detach(self, rank: int) -> None:
        """Replaces the slab of `rank` by the dummy; its memory is no longer reachable from here."""

    def is_mapped(self, rank: int) -> bool:
        """Whether the slab of `rank` is mapped here, rather than staging for one on another host.

        `read` of the latter is a request over the network with a deadline, and raises HeapError
        when that fails.
        """

    def control(self) -> np.ndarray:
        """The control pages, uint8 `[R CONTROL_BYTES]`: host memory shared by all processes."""

    def control_address(self) -> int:
        """Address at which kernels read this rank's control page; the abort word comes first."""

    def post_abort(self, epoch: int) -> None:
        """Copies the abort word to where kernels read it, if that is not the control page.

        Call it after storing the word in `control()`. Does not wait for the device.
        """

    def read(self, rank: int, offset: int, nbytes: int) -> np.ndarray:
        """Copy of these bytes of any rank's slab in host memory, uint8 `[nbytes]`."""

    def write(self, offset: int, array: np.ndarray) -> None:
        """Copies an array's bytes into the own slab."""

    def write_all(self, writes: Iterable[tuple[int, np.ndarray]]) -> None:
        """`write` of each (offset, array), consumed one by one; a device waits once for all."""

    def pin(self, array: np.ndarray) -> bool:
        """Pins a contiguous host array for fast repeated `write`s; returns whether it did.

        It stays pinned until `unpin`, which must precede the release of its pages. Slow: call it
        off the critical path. Both are thread-safe.
        """

    def unpin(self, array: np.ndarray) -> None:
        """Undoes `pin` of the same array; no write may still read from it."""

    def fill_zero(self, offset: int, nbytes: int) -> None:
        """Zeroes these bytes of the own slab."""

    def copy_in(self, offset: int, rank: int, source_offset: int, nbytes: int) -> None:
        """Copies from any rank's slab into the own one at `offset`; the two must not overlap."""

    def copy_in_all(self, copies: Sequence[tuple[int, int, int, int]]) -> None:
        """`copy_in` of each (offset, rank, source_offset, nbytes); a device waits once for all."""

    def whole(self) -> np.ndarray:
        """The range, uint8 `[R slab_bytes]`. Raises HeapError if the slabs are device memory."""

    def close(self) -> None:
        """Stops exporting the slab. The range stays mapped, because arrays may alias it."""


@runtime_checkable
class AddressRange(Protocol):
    """Slabs of equal size in one range of addresses: the arithmetic part of a heap."""

    rank: int
    ranks: int
    slab_bytes: int
    base: int


def check_rank(rank: int, ranks: int) -> None:
    """Raises HeapError unless `rank` is in `0..ranks - 1`."""
    if not 0 <= rank < ranks:
        raise HeapError(f"rank {rank} is not in 0..{ranks - 1}")


def check_peer(heap: AddressRange, rank: int) -> None:
    """Raises HeapError unless `rank` is in range and not the heap's own."""
    if rank == heap.rank or not 0 <= rank < heap.ranks:
        raise HeapError(f"rank {rank} is not a peer of rank {heap.rank} of {heap.ranks}")


def check_slab(heap: AddressRange, rank: int, found_bytes: int) -> None:
    """Raises HeapError unless a slab to attach has the size of the own one."""
    if found_bytes != heap.slab_bytes:
        raise HeapError(
            f"the slab of rank {rank} has {found_bytes} bytes, rank {heap.rank} expects "
            f"{heap.slab_bytes}; start all ranks with the same configuration"
        )


def check_bytes(heap: AddressRange, rank: int, offset: int, nbytes: int) -> int:
    """Address of these bytes. Raises HeapError unless they lie in the slab of `rank`."""
    check_rank(rank, heap.ranks)
    if offset < 0 or nbytes < 0 or offset + nbytes > heap.slab_bytes:
        raise HeapError(
            f"{nbytes} bytes at offset {offset} are not in the slab of rank {rank}, "
            f"which has {heap.slab_bytes} bytes"
        )
    return heap.base + rank * heap.slab_bytes + offset


def check_copy(
    heap: AddressRange, offset: int, rank: int, source_offset: int, nbytes: int
) -> tuple[int, int]:
    """(target address, source address) of a `copy_in`. Raises HeapError if they overlap."""
    target = check_bytes(heap, heap.rank, offset, nbytes)
    source = check_bytes(heap, rank, source_offset, nbytes)
    if abs(target - source) < nbytes:
        raise HeapError(
            f"{nbytes} bytes at offset {source_offset} of rank {rank} overlap those at {offset}"
        )
    return target, source
