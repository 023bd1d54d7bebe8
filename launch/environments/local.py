"""Processes on this machine: their environment variables, and which GPU is whose."""

import dataclasses
import os
import pathlib
import subprocess

from launch.environments.environment import Address, Identity, check_rank, parse_address

GPU_XLA_FLAGS = (
    # A whole step becomes few graph launches; kernels of Pallas are custom calls.
    "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL",
    "--xla_gpu_graph_min_graph_size=1",
)
NVIDIA_SMI_DEADLINE_S = 30.0


class LocalEnvironment:
    """Ranks that `launch.local` or a person starts by hand: flags and the run directory say all."""

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


def cpu_rank_environment() -> dict[str, str]:
    """Variables a CPU rank needs before it loads JAX.

    One computing thread per rank: ranks share the cores, and a rank's sums must not depend on how
    many threads it was given.
    """
    single = "--xla_cpu_multi_thread_eigen=false"
    flags = os.environ.get("XLA_FLAGS", "")
    return {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags if single in flags else f"{flags} {single}".strip(),
        "OMP_NUM_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        # What XLA:CPU loaded from a cache on disk lacks functions once it is kept again: a rank
        # that returned could not run the step that its last process kept. Steps are kept anyway.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }


@dataclasses.dataclass(frozen=True)
class GpuShare:
    """One rank's part of this machine's GPUs."""

    gpu: str  # as CUDA_VISIBLE_DEVICES names it
    memory_fraction: float  # of that GPU, for JAX's allocator


def gpu_share(rank: int, ranks: int, gpus: tuple[str, ...], memory_fraction: float) -> GpuShare:
    """Ranks go around the GPUs; those on one GPU have equal parts of `memory_fraction`.

    Rank 2 of 4 on two GPUs has the first GPU with rank 0, and half of the fraction. Raises
    ValueError without a GPU.
    """
    if not gpus:
        raise ValueError("no NVIDIA GPU to share")
    index = rank % len(gpus)
    sharing = len(range(index, ranks, len(gpus)))
    return GpuShare(gpus[index], memory_fraction / sharing)


def gpu_rank_environment(share: GpuShare, cache_dir: pathlib.Path) -> dict[str, str]:
    """Variables a GPU rank needs before it loads JAX.

    It sees its own GPU alone: peers' slabs are mapped by address, whichever GPU they are on. What
    is compiled goes to `cache_dir`, so that the next process of the rank loads it. What the user
    has set of XLA_FLAGS and of the cache stays.
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
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "",  # its old name; JAX refuses to have both
    }


def add_flags(user: str, wanted: tuple[str, ...]) -> str:
    """`user` and those of `wanted` that it does not set: the user's value of a flag wins."""
    known = {word.partition("=")[0] for word in user.split()}
    return " ".join([*user.split(), *(f for f in wanted if f.partition("=")[0] not in known)])


def visible_gpus() -> tuple[str, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES names, else all that nvidia-smi lists; may be none."""
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
    """`0, 2` is `("0", "2")`. As CUDA reads it, what follows a -1 is not there."""
    names = [name.strip() for name in text.split(",")]
    if "-1" in names:
        names = names[: names.index("-1")]
    return tuple(name for name in names if name)
