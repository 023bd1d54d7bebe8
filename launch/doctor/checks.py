"""Findings about a machine for a configuration: functions of `(machine, config)`, pure."""

from collections.abc import Iterator

from eep_jax.config import RunConfig
from launch.doctor.device_checks import check_gpus, check_memory
from launch.doctor.finding import Finding, Level, dotted, either, limit, numbers, size
from launch.doctor.machine import OPTIONAL, UNLIMITED, Machine
from launch.environments.slurm import SlurmEnvironment
from launch.errors import UsageError

PYTHON_MIN = (3, 12)
JAX_MIN, JAX_BELOW = (0, 11, 2), (0, 13)
KERNEL_MIN = (5, 3)  # pidfd_open
OPEN_FILES_MIN = 1_024  # descriptors: slabs, sockets, checkpoints
SLURM_MIN = (21, 8)  # srun --overlap, and steps that leave the rest of a job alone


def check(machine: Machine, config: RunConfig, gpus: int = 0) -> tuple[Finding, ...]:
    """All findings; `gpus` is the number of the machine's GPUs that ranks use, 0: all."""
    groups = (
        _python(machine),
        _jax(machine, config),
        _system(machine, config),
        _ports(machine),
        check_gpus(machine, config, gpus or len(machine.gpus)),
        check_memory(machine, config, gpus or len(machine.gpus)),
        _slurm(machine, config),
    )
    return tuple(finding for group in groups for finding in group)


def _python(machine: Machine) -> Iterator[Finding]:
    text, wanted = dotted(machine.python), dotted(PYTHON_MIN)
    yield either(machine.python >= PYTHON_MIN, "Python", text, f"install Python {wanted} or newer")
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
    yield either(right, "JAX", version or "not installed", f"pip install . brings {wanted}")
    if version != machine.packages.get("jaxlib"):
        found = f"{machine.packages.get('jaxlib')} beside JAX {version}"
        yield Finding(Level.WARN, "jaxlib", found, "install the same version of both")
    if machine.jax_error:
        yield Finding(
            Level.FAIL,
            "JAX runs",
            machine.jax_error,
            "fix what it says, or run pip install . again",
        )
    elif machine.jax_backend == config.platform or config.platform == "cpu":
        found = f"on {machine.jax_backend}, devices: {machine.jax_devices}"
        yield Finding(Level.OK, "JAX runs", found)
    else:
        yield Finding(
            Level.FAIL,
            "JAX runs",
            f"on {machine.jax_backend}, the configuration needs {config.platform}",
            "pip install '.[cuda13]' (driver 580 or newer) or '.[cuda12]', or take a "
            "configuration of platform cpu",
        )


def _system(machine: Machine, config: RunConfig) -> Iterator[Finding]:
    yield either(
        machine.kernel >= KERNEL_MIN and machine.pidfds,
        "Linux",
        dotted(machine.kernel) if any(machine.kernel) else "another system",
        f"deaths are detected through pidfds: Linux {dotted(KERNEL_MIN)} or newer",
    )
    yield either(
        machine.memory_files,
        "shared memory",
        f"memfd_create {'works' if machine.memory_files else 'is refused'}, "
        f"{size(machine.shm_free_bytes)} free in /dev/shm",
        "slabs of the heap are memory files: allow memfd_create (seccomp profile of the container)",
    )
    yield from _backups(machine, config)
    ranks = config.cluster.ranks
    wanted = OPEN_FILES_MIN + 8 * ranks
    enough = machine.open_files == UNLIMITED or machine.open_files >= wanted
    fix = f"ulimit -n {wanted}: {ranks} ranks exchange descriptors of their slabs"
    yield either(enough, "open files", limit(machine.open_files), fix, Level.WARN)
    if config.platform == "gpu":
        pages = machine.memlock_bytes == UNLIMITED or machine.memlock_bytes >= 64 << 10
        fix = "ulimit -l unlimited: the control page of the heap is registered with the driver"
        yield either(pages, "locked memory", size(machine.memlock_bytes), fix, Level.WARN)
    cores = f"{machine.cpus} for {ranks} ranks"
    fix = "ranks take turns: enough to try it out, but slow"
    yield either(machine.cpus >= ranks, "CPU cores", cores, fix, Level.WARN)


def _backups(machine: Machine, config: RunConfig) -> Iterator[Finding]:
    cluster = config.cluster
    if not cluster.backup_bytes:
        return
    free, wanted = machine.backup_free_bytes, cluster.backup_bytes * cluster.ranks
    if free is None:
        fix = "create it, or set cluster.backup_dir; without it ranks keep no backups"
        yield Finding(Level.WARN, "backups", f"no directory {cluster.backup_dir}", fix)
        return
    found = f"{size(free)} free in {cluster.backup_dir}, {size(wanted)} for all ranks"
    fix = "lower cluster.backup_bytes, or give the container more: docker run --shm-size=..."
    yield either(free >= wanted, "backups", found, fix, Level.WARN)


def _ports(machine: Machine) -> Iterator[Finding]:
    for address, problem in sorted(machine.ports.items()):
        fix = "stop the process there, or choose another: --port, serve.control_port (0: any free)"
        yield either(not problem, f"port {address}", problem or "free", fix)


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
    yield either(right, "SLURM", found, fix, Level.WARN)
    fix = "see SLURM_CONF, munge and slurmctld; only jobs need them"
    error = machine.slurm_error
    yield either(not error, "SLURM controller", error or "answers", fix, Level.WARN)
    if inside:
        yield from _job(machine, config)


def _job(machine: Machine, config: RunConfig) -> Iterator[Finding]:
    environment, ranks = SlurmEnvironment(machine.slurm_variables), config.cluster.ranks
    try:
        tasks = environment.tasks
        fix = f"submit with --ntasks={ranks}, or add --override=cluster.ranks={tasks}"
        yield either(tasks == ranks, "SLURM tasks", f"{tasks} for {ranks} ranks", fix, Level.WARN)
        nodes = len(environment.nodes)
        right = nodes == 1 or config.platform == "cpu"
        fix = "GPU ranks must share one node: submit with --nodes=1"
        yield either(right, "SLURM nodes", f"{nodes} for platform {config.platform}", fix)
        found = str(environment.supervisor("", config.serve.control_port))
        yield Finding(Level.OK, "SLURM supervisor", found)
    except UsageError as error:
        yield Finding(Level.FAIL, "SLURM job", str(error), "see launch/slurm/serve.sbatch")
