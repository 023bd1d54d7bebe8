"""The heap for the platform that JAX computes on."""

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
    """The heap of one rank process. `platform` as `jax.default_backend()` says: cpu, gpu, cuda.

    `mirror` is how ranks of other hosts are reached; None where there are none. Beyond its first
    `writable_bytes` a peer's slab is mapped read-only on a CPU; CUDA gives one access to all of an
    allocation, and the window, which peers write, is in the same one. On a GPU it takes
    device 0 of CUDA_VISIBLE_DEVICES, which must be the one JAX uses. Raises HeapError for other
    platforms, for a mirror on a GPU, and where memory cannot be had.
    """
    if platform == "cpu":
        if mirror is not None:
            return MirrorHeap(rank, ranks, slab_bytes, mirror, writable_bytes)
        return PosixShmHeap(rank, ranks, slab_bytes, writable_bytes)
    if platform in ("gpu", "cuda"):
        if mirror is not None:
            raise HeapError(
                "GPU ranks must share one host: the mirror forwards host memory only; leave "
                "--mirror_host away, or take a configuration of platform cpu"
            )
        from eep_jax.heap.cuda.vmm import CudaVmmHeap

        return CudaVmmHeap(rank, ranks, slab_bytes)
    raise HeapError(f"there is no heap for platform {platform!r}, only for cpu and gpu")
