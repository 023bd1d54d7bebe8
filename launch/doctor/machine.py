"""Facts about a machine: one frozen value, so that every check is a function of it."""

import dataclasses

from eep_jax.heap.cuda.libcuda import GpuFacts

UNLIMITED = -1
OPTIONAL = ("cuda-bindings", "jax-cuda12-plugin", "jax-cuda13-plugin")  # packages for GPUs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """All inputs of the checks. Sizes are in bytes; UNLIMITED if there is no limit."""

    python: tuple[int, int, int]
    kernel: tuple[int, int]  # of Linux; (0, 0) on other systems
    packages: dict[str, str | None]  # version of each package, None if it is not installed
    jax_error: str = ""  # why JAX could not be used, "" if it could
    jax_backend: str = ""  # cpu or gpu
    jax_devices: int = 0
    cpus: int = 1
    memory_bytes: int = 0
    memory_free_bytes: int = 0  # of the machine, or of the container if that is less
    shm_free_bytes: int = 0  # in /dev/shm
    backup_free_bytes: int | None = None  # in the directory of backups; None: it does not exist
    open_files: int = 0
    memlock_bytes: int = UNLIMITED
    memory_files: bool = True  # memfd_create, shared between processes
    pidfds: bool = True
    ports: dict[str, str] = dataclasses.field(
        default_factory=dict
    )  # address: why it is unusable, or ""
    gpu_error: str = ""  # why GPUs could not be queried, "" if they could
    driver: str = ""  # version of NVIDIA's driver by nvidia-smi; "": none
    cuda: int = 0  # version that the driver supports: 12080 is 12.8
    gpus: tuple[GpuFacts, ...] = ()
    slurm: dict[str, str] = dataclasses.field(default_factory=dict)  # version by command
    slurm_error: str = ""  # why the controller does not answer, "" if it does
    slurm_variables: dict[str, str] = dataclasses.field(default_factory=dict)
