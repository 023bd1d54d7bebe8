"""Processes on this machine: environment variables, and assignment of GPUs."""

import dataclasses
import os
import pathlib
import subprocess

from launch.environments.environment import Address, Identity, check_rank, parse_address

GPU_XLA_FLAGS = (
    # Few graph launches per step; Pallas kernels are custom calls.
    "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL",
    "--xla_gpu_graph_min_graph_size=1",
)
NVIDIA_SMI_DEADLINE_S = 30.0


class LocalEnvironment:
    """Ranks started by `launch.local` or by hand, identified by flags and the run directory."""

    def identity(
        self, ranks: int, rank: int | None, local_rank: int | None, local_ranks: int | None
    ) -> Identity:
        rank = check_rank(rank, ranks)
        return Identity(
            rank=rank,
            local_rank=rank if local_rank is None else local_rank,
            local_ranks=ranks if local_ranks is None else local_ranks,
        )

    def supervisor(self, given: str, control_port: int) -> Address | None:
        return parse_address(given) if given else None

    def http(self, supervisor: Address | None) -> None:
        return None


@dataclasses.dataclass(frozen=True)
class GpuShare:
    """One rank's part of this machine's GPUs."""

    gpu: str  # as CUDA_VISIBLE_DEVICES names it
    memory_fraction: float  # of that GPU, for JAX's allocator


def gpu_share(rank: int, ranks: int, gpus: tuple[str, ...], memory_fraction: float) -> GpuShare:
    """Assigns ranks to GPUs in turn; ranks of one GPU get equal parts of `memory_fraction`.

    Rank 2 of 4 on two GPUs shares the first GPU with rank 0, and has half of the fraction.

    Raises:
        ValueError: `gpus` is empty.
    """
    if not gpus:
        raise ValueError("no NVIDIA GPU to share")
    index = rank % len(gpus)
    sharing = len(range(index, ranks, len(gpus)))
    return GpuShare(gpus[index], memory_fraction / sharing)


def gpu_rank_environment(share: GpuShare, cache_dir: pathlib.Path) -> dict[str, str]:
    """Variables that a GPU rank needs before it loads JAX.

    Only its own GPU is visible: peers' slabs are mapped by address, on any GPU. Compilations go to
    `cache_dir`, from which the rank's next process loads them. The user's XLA_FLAGS and cache
    settings stay.
    """
    kept = {
        "JAX_COMPILATION_CACHE_DIR": str(cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    return {name: os.environ.get(name) or value for name, value in kept.items()} | {
        "JAX_PLATFORMS": "cuda,cpu",
        "CUDA_VISIBLE_DEVICES": share.gpu,
        "XLA_FLAGS": add_flags(os.environ.get("XLA_FLAGS", ""), GPU_XLA_FLAGS),
        "XLA_CLIENT_MEM_FRACTION": f"{share.memory_fraction:.4f}",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "",  # its old name; JAX refuses both at once
    }


def add_flags(user: str, wanted: tuple[str, ...]) -> str:
    """`user` plus those of `wanted` that it does not set."""
    known = {word.partition("=")[0] for word in user.split()}
    return " ".join([*user.split(), *(f for f in wanted if f.partition("=")[0] not in known)])


def visible_gpus() -> tuple[str, ...]:
    """The GPUs in CUDA_VISIBLE_DEVICES, else all that nvidia-smi lists; may be empty."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return parse_gpus(named)
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=NVIDIA_SMI_DEADLINE_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    lines = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]
    return tuple(str(index) for index in range(len(lines)))


def parse_gpus(text: str) -> tuple[str, ...]:
    """`0, 2` is `("0", "2")`. Like CUDA, ignores what follows a -1."""
    names = [name.strip() for name in text.split(",")]
    if "-1" in names:
        names = names[: names.index("-1")]
    return tuple(name for name in names if name)
