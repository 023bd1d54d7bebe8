"""What was found on a machine: one frozen value, so that every check is a function of it."""

import dataclasses

from eep_jax.heap.cuda.libcuda import GpuFacts

UNLIMITED = -1
OPTIONAL = ("cuda-bindings", "jax-cuda12-plugin", "jax-cuda13-plugin")  # packages for GPUs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """All that the checks read. Sizes are in bytes; UNLIMITED where there is no limit."""

    python: tuple[int, int, int]
    kernel: tuple[int, int]  # of Linux; (0, 0) on other systems
    packages: dict[str, str | None]  # version of each package, None where it is not installed
    jax_error: str = ""  # why JAX could not be used, "" if it could
    jax_backend: str = ""  # what JAX computes on: cpu, gpu
    jax_devices: int = 0
    cpus: int = 1
    memory_bytes: int = 0
    memory_free_bytes: int = 0  # of the machine, or of the container if it may have less
    shm_free_bytes: int = 0  # in /dev/shm
    backup_free_bytes: int | None = None  # where backups of experts go; None: no such directory
    open_files: int = 0
    memlock_bytes: int = UNLIMITED
    memory_files: bool = True  # memfd_create, shared between processes
    pidfds: bool = True
    ports: dict[str, str] = dataclasses.field(default_factory=dict)  # address: why not, or ""
    gpu_error: str = ""  # why GPUs could not be asked, "" if they could
    driver: str = ""  # of NVIDIA, as nvidia-smi says; "" where there is none
    cuda: int = 0  # that the driver supports: 12080 is 12.8
    gpus: tuple[GpuFacts, ...] = ()
    slurm: dict[str, str] = dataclasses.field(default_factory=dict)  # version by command
    slurm_error: str = ""  # why the controller does not answer, "" if it does
    slurm_variables: dict[str, str] = dataclasses.field(default_factory=dict)
