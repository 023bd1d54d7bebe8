"""Four GPU ranks on one or more GPUs, serving the small trained byte-level MoE of this repository.

Per rank, in bfloat16: experts 8 slots x 288 KiB = 2.3 MiB, window 0.5 MiB, dense weights 0.5 MiB,
KV cache 8 MiB. Most of what a rank takes of a GPU is its CUDA context, about 0.6 GiB, and its share
of `memory_fraction`, which JAX reserves at once.
"""

import dataclasses

from eep_jax.config import DeviceConfig, EngineConfig, RunConfig

from . import tiny_cpu


def get_config() -> RunConfig:
    """`tiny_cpu` with the shapes and the dtype of the GPU data plane.

    Ranks may take turns on one GPU: a peer's part of a step may come late by several time slices,
    so deadlines are long, and an engine that waits for one does not count as stuck.
    """
    cpu = tiny_cpu.get_config()
    return dataclasses.replace(
        cpu,
        name="tiny_gpu",
        platform="gpu",
        cluster=dataclasses.replace(cpu.cluster, stall_ms=45_000, formation_ms=300_000),
        engine=EngineConfig(
            batch_rows=16,
            prefill_tokens=32,
            context_tokens=512,
            row_tile=16,  # a decode step is one tile, without a loop
            step_deadline_ms=10_000,
            dtype="bfloat16",
        ),
        device=DeviceConfig(memory_fraction=0.4),
    )
