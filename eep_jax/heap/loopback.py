"""Symmetric heaps of several ranks in one process: for tests, and for kernels on one device."""

import itertools

from eep_jax.errors import HeapError
from eep_jax.heap.heap import SymmetricHeap
from eep_jax.heap.posix_shm import MappedHeap

_open_heaps: dict[str, "LoopbackHeap"] = {}
_names = itertools.count()


class LoopbackHeap(MappedHeap):
    """Heap of one rank, with a range of its own; it attaches and detaches as processes do."""

    def __init__(self, rank: int, ranks: int, slab_bytes: int):
        super().__init__(rank, ranks, slab_bytes)
        self._handle = f"loopback:{next(_names)}"
        _open_heaps[self._handle] = self

    def export(self) -> str:
        return self._handle

    def attach(self, rank: int, handle: str) -> None:
        if handle not in _open_heaps:
            raise HeapError(f"handle {handle!r} of rank {rank} is not open in this process")
        self.attach_fd(rank, _open_heaps[handle].own_fd)

    def close(self) -> None:
        _open_heaps.pop(self._handle, None)
        super().close()


def open_all(ranks: int, slab_bytes: int) -> list[LoopbackHeap]:
    """One heap per rank, all attached to each other."""
    return attach_all([LoopbackHeap(rank, ranks, slab_bytes) for rank in range(ranks)])


def attach_all[H: SymmetricHeap](heaps: list[H]) -> list[H]:
    """Attaches every heap of one process to every other one."""
    for heap in heaps:
        for peer in heaps:
            if peer is not heap:
                heap.attach(peer.rank, peer.export())
    return heaps
