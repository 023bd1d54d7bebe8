"""Choice of the heap for the platform that JAX computes on."""

from eep_jax.errors import HeapError
from eep_jax.heap.heap import SymmetricHeap
from eep_jax.heap.mirror.heap import MirrorHeap, MirrorOptions
from eep_jax.heap.posix_shm import PosixShmHeap


def open_heap(
    rank: int,
    ranks: int,
    slab_bytes: int,
    platform: str,
    mirror: MirrorOptions | None = None,
    writable_bytes: int | None = None,
) -> SymmetricHeap:
    """Opens the heap of one rank process.

    Args:
        rank: this process's rank, below `ranks`.
        ranks: number of slabs.
        slab_bytes: size of a slab; on CPU a multiple of the page size.
        platform: as `jax.default_backend()` returns it: cpu, gpu or cuda. A GPU is device 0 of
            CUDA_VISIBLE_DEVICES, which must be the one that JAX uses.
        mirror: access to ranks of other hosts; None if all share this host.
        writable_bytes: on CPU a peer's slab is read-only beyond these. CUDA has one access mode
            for a whole allocation, which includes the window that peers write.

    Raises:
        HeapError: another platform, a mirror on a GPU, or memory that cannot be allocated.
    """
    if platform == "cpu":
        if mirror is not None:
            return MirrorHeap(rank, ranks, slab_bytes, mirror, writable_bytes)
        return PosixShmHeap(rank, ranks, slab_bytes, writable_bytes)
    if platform in ("gpu", "cuda"):
        if mirror is not None:
            raise HeapError(
                "GPU ranks must share one host: the mirror forwards host memory only; omit "
                "--mirror_host, or use a configuration of platform cpu"
            )
        from eep_jax.heap.cuda.vmm import CudaVmmHeap

        return CudaVmmHeap(rank, ranks, slab_bytes)
    raise HeapError(f"no heap for platform {platform!r}; expected cpu or gpu")
