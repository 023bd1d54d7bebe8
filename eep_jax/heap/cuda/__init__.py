"""The symmetric heap on NVIDIA GPUs.

A slab is CUDA virtual memory (`cuMemCreate`, `cuMemMap`), exported to other ranks of the host as
a file descriptor; window and bank share one allocation, hence one access mode. Its control page is
host memory, registered with the driver so that kernels read it.

`libcuda` is the only module that calls the driver, `vmm` the heap, `staging` the uploads through
pinned memory, `loopback` the heap of several ranks in one process.
"""
