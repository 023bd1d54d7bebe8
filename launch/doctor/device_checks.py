"""Findings about GPUs and memory: functions of `(machine, config)`, pure."""

import math
from collections.abc import Iterator

from eep_jax.config import RunConfig
from eep_jax.models.memory import memory_per_rank
from launch.doctor.finding import Finding, Level, either, size
from launch.doctor.machine import Machine

CUDA_12, CUDA_13 = 12_080, 13_000  # least CUDA version of the driver for the two extras
HOPPER = (9, 0)
PROCESS_BYTES = 400 << 20  # of host memory: Python, JAX and its compiler


def check_gpus(machine: Machine, config: RunConfig, gpus: int) -> Iterator[Finding]:
    if config.platform != "gpu":
        found = f"{len(machine.gpus)}, the configuration needs none"
        yield Finding(Level.OK, "GPUs", found)
        return
    if machine.gpu_error or not machine.gpus:
        found = machine.gpu_error or "none is visible"
        fix = "install NVIDIA's driver, and the extra cuda13 or cuda12"
        yield Finding(Level.FAIL, "GPUs", found, fix)
        return
    names = ", ".join(sorted({gpu.name for gpu in machine.gpus}))
    found = f"{len(machine.gpus)}: {names}; {config.cluster.ranks} ranks on {gpus} of them"
    fix = "ranks that share a GPU take turns: enough to try it out, but slow"
    yield either(config.cluster.ranks <= gpus, "GPUs", found, fix, Level.WARN)
    plugin = CUDA_13 if machine.packages.get("jax-cuda13-plugin") else CUDA_12
    found = (
        f"{machine.driver or 'unknown'}, CUDA {machine.cuda // 1000}.{machine.cuda % 1000 // 10}"
    )
    fix = "update the driver (580 or newer for cuda13), or install the extra cuda12 instead"
    yield either(machine.cuda >= plugin, "GPU driver", found, fix)
    wrong = {
        "compute capability": [g for g, x in enumerate(machine.gpus) if x.capability != HOPPER],
        "virtual memory": [g for g, x in enumerate(machine.gpus) if not x.maps_memory],
        "file descriptors": [g for g, x in enumerate(machine.gpus) if not x.exports_fds],
    }
    fixes = {
        "compute capability": "the kernels are for Hopper (9.0): H100, H200; choose with --gpus",
        "virtual memory": "the heap needs cuMemMap: no vGPU or MIG slice without it",
        "file descriptors": "slabs are file descriptors: use a Linux driver that exports them",
    }
    for subject, which in wrong.items():
        found = f"not on GPUs {which}" if which else "available on all"
        yield either(not which, f"GPU {subject}", found, fixes[subject])
    yield from _peers(machine)


def _peers(machine: Machine) -> Iterator[Finding]:
    everyone = set(range(len(machine.gpus)))
    apart = [
        (mine, peer)
        for mine, gpu in enumerate(machine.gpus)
        for peer in sorted(everyone - {mine} - set(gpu.peers))
    ]
    fix = "ranks write to each other's GPUs: see nvidia-smi topo -p2p r; or choose with --gpus"
    found = f"none between {apart[:4]}" if apart else f"all of {len(everyone)} reach each other"
    yield either(not apart, "GPU peer access", found, fix)


def check_memory(machine: Machine, config: RunConfig, gpus: int) -> Iterator[Finding]:
    needed, ranks = memory_per_rank(config), config.cluster.ranks
    if config.platform == "cpu":
        backups = config.cluster.backup_bytes
        rank = needed.total + backups + PROCESS_BYTES
        found = (
            f"{size(rank)} x {ranks} ranks, {size(machine.memory_free_bytes)} of "
            f"{size(machine.memory_bytes)} free"
        )
        fix = "fewer ranks on this machine, or lower cluster.slots_per_rank, engine.batch_rows"
        yield either(rank * ranks <= machine.memory_free_bytes, "memory", found, fix)
        return
    if not machine.gpus:
        return
    total, sharing = min(gpu.total_bytes for gpu in machine.gpus), math.ceil(ranks / gpus)
    fraction = config.device.memory_fraction
    jax = int(total * fraction / sharing)
    found = f"{size(needed.jax)} of {size(jax)} that JAX has per rank"
    fix = "raise device.memory_fraction, or lower engine.kv_pages"
    yield either(needed.jax <= jax, "GPU memory, model", found, fix)
    rest = int(total * (1 - fraction))
    heap = sharing * (needed.heap + needed.context)
    found = f"{size(heap)} of {size(rest)} that JAX leaves, {sharing} ranks on a GPU"
    fix = "lower device.memory_fraction or cluster.slots_per_rank, or give the ranks more GPUs"
    yield either(heap <= rest, "GPU memory, heap", found, fix)
