"""Symmetric heaps of several ranks in one process on one GPU: for tests and benchmarks."""

import itertools

from eep_jax.errors import HeapError
from eep_jax.heap.cuda.vmm import MappedCudaHeap
from eep_jax.heap.heap import check_slab
from eep_jax.heap.loopback import attach_all

_open_heaps: dict[str, "CudaLoopbackHeap"] = {}
_names = itertools.count()


class CudaLoopbackHeap(MappedCudaHeap):
    """Heap of one rank, with a range of its own; it attaches and detaches as processes do."""

    def __init__(self, rank: int, ranks: int, slab_bytes: int, device: int = 0):
        super().__init__(rank, ranks, slab_bytes, device)
        self._handle = f"cuda-loopback:{next(_names)}"
        _open_heaps[self._handle] = self

    def export(self) -> str:
        return self._handle

    def attach(self, rank: int, handle: str) -> None:
        if handle not in _open_heaps:
            raise HeapError(f"handle {handle!r} of rank {rank} is not open in this process")
        owner = _open_heaps[handle]
        self._check_peer(rank)
        check_slab(self, rank, owner.slab_bytes)
        self._attach_memory(rank, owner.own_handle, owner.control_fd)

    def close(self) -> None:
        _open_heaps.pop(self._handle, None)
        super().close()


def open_all_cuda(ranks: int, slab_bytes: int, device: int = 0) -> list[CudaLoopbackHeap]:
    """One heap per rank, all attached to each other."""
    return attach_all([CudaLoopbackHeap(rank, ranks, slab_bytes, device) for rank in range(ranks)])
