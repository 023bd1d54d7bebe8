"""What is right, doubtful or wrong on a machine for a configuration: `(machine, config)`, pure."""

import dataclasses
import enum
import math
from collections.abc import Iterator

from eep_jax.config import RunConfig
from launch.doctor.machine import UNLIMITED, Machine
from launch.environments.slurm import SlurmEnvironment
from launch.errors import UsageError
from pallas_kernels.window import WindowLayout, round_up

PYTHON_MIN = (3, 12)
JAX_MIN, JAX_BELOW = (0, 11, 2), (0, 13)
KERNEL_MIN = (5, 3)  # pidfd_open
CUDA_12, CUDA_13 = 12_080, 13_000  # that cuda-bindings of the two extras need of a driver
HOPPER = (9, 0)
OPEN_FILES_MIN = 1_024  # descriptors: slabs, sockets, checkpoints
CONTEXT_BYTES = 600 << 20  # of CUDA, per rank on a GPU
PROCESS_BYTES = 400 << 20  # of host memory: Python, JAX and its compiler
SLURM_MIN = (21, 8)  # srun --overlap, and steps that leave the rest of a job alone
WIDTH_MULTIPLE = 64  # channels that the bank of a GPU pads experts to
OPTIONAL = ("cuda-bindings", "jax-cuda12-plugin", "jax-cuda13-plugin")
ITEM_BYTES = {"float32": 4, "bfloat16": 2}


class Level(enum.Enum):
    OK, WARN, FAIL = "OK", "WARN", "FAIL"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the table. `fix` says what to do, for all that is not OK."""

    level: Level
    subject: str
    found: str
    fix: str = ""


@dataclasses.dataclass(frozen=True)
class Needs:
    """Bytes of one rank."""

    window: int
    bank: int
    dense: int
    cache: int

    @property
    def slab(self) -> int:
        return self.window + self.bank


def check(machine: Machine, config: RunConfig, gpus: int = 0) -> tuple[Finding, ...]:
    """All findings; `gpus` is how many of the machine's GPUs the ranks go around, 0: all."""
    groups = (
        _python(machine),
        _jax(machine, config),
        _system(machine, config),
        _ports(machine),
        _gpus(machine, config, gpus or len(machine.gpus)),
        _memory(machine, config, gpus or len(machine.gpus)),
        _slurm(machine, config),
    )
    return tuple(finding for group in groups for finding in group)


def needs(config: RunConfig) -> Needs:
    """What a rank of this configuration holds; what its steps compute with comes on top."""
    model, engine, cluster = config.model, config.engine, config.cluster
    item = ITEM_BYTES[engine.dtype]
    window = WindowLayout(
        ranks=cluster.ranks,
        tokens=engine.tokens_max,
        choices=model.experts_per_token,
        hidden=model.hidden,
        combine=engine.combine,
        row_dtype=engine.dtype,
        dispatch_dtype=engine.dispatch_dtype,
    )
    layers, matrices, width, hidden = model.expert_shape
    width = round_up(width, WIDTH_MULTIPLE) if engine.dtype == "bfloat16" else width
    return Needs(
        window=window.window_bytes,
        bank=cluster.slots_per_rank * math.prod((layers, matrices, width, hidden)) * item,
        dense=model.dense_parameters * item,
        cache=model.cache_elements * engine.batch_slots * engine.context_tokens * item,
    )


def _python(machine: Machine) -> Iterator[Finding]:
    text, wanted = dotted(machine.python), dotted(PYTHON_MIN)
    yield _either(machine.python >= PYTHON_MIN, "Python", text, f"install Python {wanted} or newer")
    missing = [n for n, v in machine.packages.items() if v is None and n not in OPTIONAL]
    if missing:
        yield Finding(Level.FAIL, "packages", f"without {', '.join(missing)}", "pip install .")
    else:
        count = len(machine.packages) - len(OPTIONAL)
        yield Finding(Level.OK, "packages", f"{count} of {count} installed")


def _jax(machine: Machine, config: RunConfig) -> Iterator[Finding]:
    version = machine.packages.get("jax")
    right = version is not None and JAX_MIN <= numbers(version) < JAX_BELOW
    wanted = f"{dotted(JAX_MIN)} or newer, below {dotted(JAX_BELOW)}"
    yield _either(right, "JAX", version or "not installed", f"pip install . brings {wanted}")
    if version != machine.packages.get("jaxlib"):
        found = f"{machine.packages.get('jaxlib')} beside JAX {version}"
        yield Finding(Level.WARN, "jaxlib", found, "install the same version of both")
    if machine.jax_error:
        yield Finding(
            Level.FAIL, "JAX runs", machine.jax_error, "mend what it says, or pip install . anew"
        )
    elif machine.jax_backend == config.platform or config.platform == "cpu":
        found = f"on {machine.jax_backend}, {machine.jax_devices} devices"
        yield Finding(Level.OK, "JAX runs", found)
    else:
        yield Finding(
            Level.FAIL,
            "JAX runs",
            f"on {machine.jax_backend}, the configuration is for {config.platform}",
            "pip install '.[cuda13]' (driver 580 or newer) or '.[cuda12]', or take a "
            "configuration of platform cpu",
        )


def _system(machine: Machine, config: RunConfig) -> Iterator[Finding]:
    yield _either(
        machine.kernel >= KERNEL_MIN and machine.pidfds,
        "Linux",
        dotted(machine.kernel) if any(machine.kernel) else "another system",
        f"ends of processes are seen through pidfds: Linux {dotted(KERNEL_MIN)} or newer",
    )
    yield _either(
        machine.memory_files,
        "shared memory",
        f"memfd_create {'works' if machine.memory_files else 'is refused'}, "
        f"{_size(machine.shm_free_bytes)} free in /dev/shm",
        "slabs of the heap are memory files: allow memfd_create (seccomp profile of the container)",
    )
    yield from _backups(machine, config)
    ranks = config.cluster.ranks
    wanted = OPEN_FILES_MIN + 8 * ranks
    enough = machine.open_files == UNLIMITED or machine.open_files >= wanted
    fix = f"ulimit -n {wanted}: {ranks} ranks exchange descriptors of their slabs"
    yield _either(enough, "open files", _limit(machine.open_files), fix, Level.WARN)
    if config.platform == "gpu":
        pages = machine.memlock_bytes == UNLIMITED or machine.memlock_bytes >= 64 << 10
        fix = "ulimit -l unlimited: the control page of the heap is registered with the driver"
        yield _either(pages, "locked memory", _size(machine.memlock_bytes), fix, Level.WARN)
    cores = f"{machine.cpus} for {ranks} ranks"
    fix = "ranks take turns: good for trying it out, not for speed"
    yield _either(machine.cpus >= ranks, "CPU cores", cores, fix, Level.WARN)


def _backups(machine: Machine, config: RunConfig) -> Iterator[Finding]:
    cluster = config.cluster
    if not cluster.backup_bytes:
        return
    free, wanted = machine.backup_free_bytes, cluster.backup_bytes * cluster.ranks
    if free is None:
        fix = "make it, or set cluster.backup_dir; without it ranks keep no backups"
        yield Finding(Level.WARN, "backups", f"no directory {cluster.backup_dir}", fix)
        return
    found = f"{_size(free)} free in {cluster.backup_dir}, {_size(wanted)} for all ranks"
    fix = "lower cluster.backup_bytes, or give the container more: docker run --shm-size=..."
    yield _either(free >= wanted, "backups", found, fix, Level.WARN)


def _ports(machine: Machine) -> Iterator[Finding]:
    for address, problem in sorted(machine.ports.items()):
        fix = "end what listens there, or choose another: --port, serve.control_port (0: any free)"
        yield _either(not problem, f"port {address}", problem or "free", fix)


def _gpus(machine: Machine, config: RunConfig, gpus: int) -> Iterator[Finding]:
    if config.platform != "gpu":
        found = f"{len(machine.gpus)}, the configuration needs none"
        yield Finding(Level.OK, "GPUs", found)
        return
    if machine.gpu_error or not machine.gpus:
        found = machine.gpu_error or "none is visible"
        fix = (
            "install the driver of NVIDIA and the extra cuda13 or cuda12; see CUDA_VISIBLE_DEVICES"
        )
        yield Finding(Level.FAIL, "GPUs", found, fix)
        return
    names = ", ".join(sorted({gpu.name for gpu in machine.gpus}))
    found = f"{len(machine.gpus)}: {names}; {config.cluster.ranks} ranks on {gpus} of them"
    fix = "ranks that share a GPU take turns: good for trying it out, not for speed"
    yield _either(config.cluster.ranks <= gpus, "GPUs", found, fix, Level.WARN)
    plugin = CUDA_13 if machine.packages.get("jax-cuda13-plugin") else CUDA_12
    found = (
        f"{machine.driver or 'unknown'}, CUDA {machine.cuda // 1000}.{machine.cuda % 1000 // 10}"
    )
    fix = "update the driver (580 or newer for cuda13), or install the extra cuda12 instead"
    yield _either(machine.cuda >= plugin, "GPU driver", found, fix)
    wrong = {
        "compute capability": [g for g, x in enumerate(machine.gpus) if x.capability != HOPPER],
        "virtual memory": [g for g, x in enumerate(machine.gpus) if not x.maps_memory],
        "file descriptors": [g for g, x in enumerate(machine.gpus) if not x.exports_fds],
    }
    fixes = {
        "compute capability": "the kernels are for Hopper (9.0): H100, H200; choose with --gpus",
        "virtual memory": "the heap needs cuMemMap: no vGPU or MIG slice without it",
        "file descriptors": "slabs travel as file descriptors: a Linux driver that exports them",
    }
    for subject, which in wrong.items():
        found = f"not on GPUs {which}" if which else "as needed on all"
        yield _either(not which, f"GPU {subject}", found, fixes[subject])
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
    yield _either(not apart, "GPU peer access", found, fix)


def _memory(machine: Machine, config: RunConfig, gpus: int) -> Iterator[Finding]:
    needed, ranks = needs(config), config.cluster.ranks
    if config.platform == "cpu":
        backups = config.cluster.backup_bytes
        rank = needed.slab + needed.dense + needed.cache + backups + PROCESS_BYTES
        found = (
            f"{_size(rank)} x {ranks} ranks, {_size(machine.memory_free_bytes)} of "
            f"{_size(machine.memory_bytes)} free"
        )
        fix = "fewer ranks on this machine, or lower cluster.slots_per_rank, engine.batch_slots"
        yield _either(rank * ranks <= machine.memory_free_bytes, "memory", found, fix)
        return
    if not machine.gpus:
        return
    total, sharing = min(gpu.total_bytes for gpu in machine.gpus), math.ceil(ranks / gpus)
    fraction = config.device.memory_fraction
    jax = int(total * fraction / sharing)
    found = f"{_size(needed.dense + needed.cache)} of {_size(jax)} that JAX has per rank"
    fix = "raise device.memory_fraction, or lower engine.batch_slots or engine.context_tokens"
    yield _either(needed.dense + needed.cache <= jax, "GPU memory, model", found, fix)
    rest = int(total * (1 - fraction))
    # Each rank has a slab, and one more stands for absent peers.
    heap = sharing * (2 * needed.slab + CONTEXT_BYTES)
    found = f"{_size(heap)} of {_size(rest)} that JAX leaves, {sharing} ranks on a GPU"
    fix = "lower device.memory_fraction or cluster.slots_per_rank, or give the ranks more GPUs"
    yield _either(heap <= rest, "GPU memory, heap", found, fix)


def _slurm(machine: Machine, config: RunConfig) -> Iterator[Finding]:
    inside = "SLURM_JOB_ID" in machine.slurm_variables
    if not machine.slurm:
        level = Level.FAIL if inside else Level.OK
        fix = "in a job, sbatch, srun and scontrol must be on PATH" if inside else ""
        yield Finding(level, "SLURM", "not installed", fix)
        return
    if not any(machine.slurm.values()):
        fix = "set SLURM_CONF or write slurm.conf, if this machine is part of a cluster"
        found = f"installed, but without a configuration: {machine.slurm_error}"
        yield Finding(Level.FAIL if inside else Level.WARN, "SLURM", found, fix)
        return
    missing = sorted({"sbatch", "srun", "scontrol"} - set(machine.slurm))
    version = min(machine.slurm.values(), key=numbers)
    right = not missing and numbers(version) >= SLURM_MIN
    found = f"{version}" + (f", without {', '.join(missing)}" if missing else "")
    fix = f"launch/slurm needs sbatch, srun and scontrol of {dotted(SLURM_MIN)} or newer"
    yield _either(right, "SLURM", found, fix, Level.WARN)
    fix = "see SLURM_CONF, munge and slurmctld; only jobs need them"
    error = machine.slurm_error
    yield _either(not error, "SLURM controller", error or "answers", fix, Level.WARN)
    if inside:
        yield from _job(machine, config)


def _job(machine: Machine, config: RunConfig) -> Iterator[Finding]:
    environment, ranks = SlurmEnvironment(machine.slurm_variables), config.cluster.ranks
    try:
        tasks = environment.tasks
        fix = f"submit with --ntasks={ranks}, or add --override=cluster.ranks={tasks}"
        yield _either(tasks == ranks, "SLURM tasks", f"{tasks} for {ranks} ranks", fix, Level.WARN)
        nodes = len(environment.nodes)
        right = nodes == 1 or config.platform == "cpu"
        fix = "GPU ranks must share one node: submit with --nodes=1"
        yield _either(right, "SLURM nodes", f"{nodes} for platform {config.platform}", fix)
        found = str(environment.supervisor("", config.serve.control_port))
        yield Finding(Level.OK, "SLURM supervisor", found)
    except UsageError as error:
        yield Finding(Level.FAIL, "SLURM job", str(error), "see launch/slurm/serve.sbatch")


def _either(right: bool, subject: str, found: str, fix: str, wrong: Level = Level.FAIL) -> Finding:
    return Finding(Level.OK, subject, found) if right else Finding(wrong, subject, found, fix)


def numbers(version: str) -> tuple[int, ...]:
    """`slurm-wlm 22.05.8` is (22, 5, 8); what is no number ends it."""
    found = []
    for part in version.split()[-1].split(".") if version.split() else []:
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        found.append(int(digits))
    return tuple(found)


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _limit(value: int) -> str:
    return "unlimited" if value == UNLIMITED else str(value)


def _size(nbytes: int) -> str:
    if nbytes == UNLIMITED:
        return "unlimited"
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"
