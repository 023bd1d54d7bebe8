"""The symmetric heap: every rank's slab of memory at a fixed address in every process."""

from typing import Protocol

import numpy as np


class SymmetricHeap(Protocol):
    """One slab per rank in one contiguous address range, `base + rank * slab_bytes`.

    The range is reserved once. Slots of ranks that are not attached hold a local dummy, so every
    address may be read and written at any time; what a dummy holds means nothing. Attaching and
    detaching change what is behind an address, never the address.
    """

    rank: int
    ranks: int
    slab_bytes: int
    base: int

    def export(self) -> str:
        """A handle with which other processes attach this rank's slab while this process lives."""

    def attach(self, rank: int, handle: str) -> None:
        """Maps the slab behind `handle` at the slot of `rank`. Raises HeapError naming the rank."""

    def detach(self, rank: int) -> None:
        """Puts the dummy in the slot of `rank`; its memory is no longer reachable from here."""

    def whole(self) -> np.ndarray:
        """The range as host memory, uint8 `[R slab_bytes]`, where the host can reach it."""

    def close(self) -> None:
        """Stops handing out the slab. The range stays mapped: arrays may still alias it."""
