"""Starter of a benchmark's processes: one for each rank, with a deadline, a log, and a GPU.

Only processes that were started here are ever signalled. GPUs go around: with fewer GPUs than ranks
some share one, and every record says so (`Machine.link`), since nothing crosses NVLink then.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping

from absl import flags as absl_flags

from benchmarks.harness import ROOT, Unfit, cpu_device, gpu_device
from eep_jax.config import RunConfig
from eep_jax.library.environment import cpu_environment
from eep_jax.runtime.rank.scratch_dir import open_scratch
from launch import flags
from launch.environments.local import (
    gpu_rank_environment,
    gpu_share,
    parse_gpus,
    visible_gpus,
)
from launch.errors import UsageError
from launch.processes import end_with_parent

# NVLink multicast can put GPUs out of service that others share, so NCCL never uses it here.
NO_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}
TAIL_LINES = 12
JOB = "job.json"
STEP_DEADLINE_MS = 60_000  # no rank is killed here: a slow machine is not a failure


class WorkersFailed(Unfit):
    """A worker failed or was late; the message holds the end of its log."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """Platform and GPUs of a benchmark's ranks."""

    platform: str  # "cpu" or "gpu"
    ranks: int
    gpus: tuple[str, ...] = ()  # those that ranks go around, as CUDA_VISIBLE_DEVICES names them

    @property
    def link(self) -> str:
        """The way of rows: `peer` (NVLink or PCIe), `shared_gpu` (some stay on one), or `cpu`."""
        if self.platform == "cpu":
            return "cpu"
        return "peer" if len(self.gpus) >= self.ranks else "shared_gpu"

    @property
    def device(self) -> str:
        """Such as "2 x NVIDIA H200"; with shared GPUs it names the number of ranks."""
        if self.platform == "cpu":
            return cpu_device()
        count = min(len(self.gpus), self.ranks)
        name = gpu_device() if count == 1 else f"{count} x {gpu_device()}"
        return name if self.link == "peer" else f"{name}, shared by {self.ranks} ranks"

    @property
    def facts(self) -> dict:
        """For a record's shape."""
        return {"gpus": min(len(self.gpus), self.ranks), "link": self.link}


def machine_of(platform: str, ranks: int | None, gpus: tuple[str, ...] | None = None) -> Machine:
    """The machine of a run.

    Args:
        platform: "cpu" or "gpu".
        ranks: How many; if not given one for each GPU, or two on CPU.
        gpus: Names as in CUDA_VISIBLE_DEVICES; if not given those of --gpus, else all visible ones.

    Raises:
        UsageError: There is no GPU, or `ranks` is below 1.
    """
    found: tuple[str, ...] = ()
    if platform == "gpu":
        if gpus is None and flags.GPUS.value is not None:
            gpus = parse_gpus(flags.GPUS.value)
        found = visible_gpus() if gpus is None else gpus
        if not found:
            raise UsageError(
                "no NVIDIA GPU was found; name them with --gpus=0,1, or --platform=cpu"
            )
    if ranks is None:
        ranks = len(found) or 2
    if ranks < 1:
        raise UsageError(f"--ranks={ranks} must be at least 1")
    return Machine(platform, ranks, found[:ranks])


def with_ranks(config: RunConfig, ranks: int | None) -> RunConfig:
    """The configuration on so many ranks, with slots for all replicas. Raises UsageError."""
    cluster, ranks = config.cluster, ranks or config.cluster.ranks
    if ranks < 1:
        raise UsageError(f"--ranks={ranks} must be at least 1")
    redundancy = min(cluster.redundancy, ranks)
    needed = -(-config.model.experts * redundancy // ranks)
    changed = dataclasses.replace(
        cluster,
        ranks=ranks,
        redundancy=redundancy,
        slots_per_rank=max(cluster.slots_per_rank, needed),
    )
    engine = dataclasses.replace(config.engine, step_deadline_ms=STEP_DEADLINE_MS)
    return dataclasses.replace(config, cluster=changed, engine=engine)


def free_port() -> int:
    """A port that is not in use now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@dataclasses.dataclass
class RunDirectory:
    """Logs and reports of workers; a temporary one stays if `kept` is set."""

    path: pathlib.Path
    kept: bool = False


@contextlib.contextmanager
def run_directory(given: str | None = None) -> Iterator[RunDirectory]:
    """`given`, emptied of an earlier run of workers, or a temporary directory.

    A temporary one stays after an exception, for its logs say why. Otherwise it is removed, also
    if this process is killed. Raises UsageError for a directory that holds something else.
    """
    if given is not None:
        yield RunDirectory(_emptied(given))
        return
    scratch = open_scratch(tempfile.gettempdir(), "bench")
    found = RunDirectory(scratch.path)
    try:
        yield found
    except Exception:
        found.kept = True
        raise
    finally:
        scratch.keep() if found.kept else scratch.remove()


def _emptied(given: str) -> pathlib.Path:
    path = pathlib.Path(given).absolute()
    if path.exists() and not (path / JOB).exists() and any(path.iterdir()):
        raise UsageError(f"--directory={given} holds files that are of no run; name another one")
    shutil.rmtree(path, ignore_errors=True)  # of an earlier run: its ranks must not be met
    path.mkdir(parents=True)
    return path


def environment_of(machine: Machine, rank: int, cache: pathlib.Path, fraction: float) -> dict:
    """Variables of a worker; `fraction` of its GPU's memory is for JAX, the rest for the heap."""
    if machine.platform == "cpu":
        found = cpu_environment()
    else:
        share = gpu_share(rank, machine.ranks, machine.gpus, fraction)
        found = gpu_rank_environment(share, cache)
    return found | NO_MULTICAST


def start(
    arguments: list[str], log: pathlib.Path, environment: Mapping[str, str], **pipes
) -> subprocess.Popen:
    """Starts `python -m ARGUMENTS` in a session of its own; `pipes` replace log and input."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stderr=file,
            env=os.environ | {"PYTHONPATH": path} | dict(environment),
            cwd=ROOT,
            start_new_session=True,
            **({"stdin": subprocess.DEVNULL, "stdout": file} | pipes),
        )


def start_worker(
    module: str,
    machine: Machine,
    rank: int,
    directory: pathlib.Path,
    *,
    fraction: float,
    variables: Mapping[str, str] | None = None,
    **pipes,
) -> subprocess.Popen:
    """Starts `python -m MODULE DIRECTORY RANK PID`: see `worker`. Its log is `rankRANK.log`."""
    environment = environment_of(machine, rank, directory / "cache", fraction)
    arguments = [module, str(directory), str(rank), str(os.getpid())]
    log = directory / f"rank{rank}.log"
    return start(arguments, log, environment | dict(variables or {}), **pipes)


def write_job(directory: pathlib.Path, machine: Machine, deadline_s: float, job: dict) -> None:
    """Writes what the workers of this directory are given, the flags of this process included."""
    directory.mkdir(parents=True, exist_ok=True)
    common = {"ranks": machine.ranks, "platform": machine.platform, "deadline_s": deadline_s}
    (directory / JOB).write_text(json.dumps(common | job))


def run_workers(
    module: str,
    machine: Machine,
    job: dict,
    directory: pathlib.Path,
    *,
    deadline_s: float,
    fraction: float = 0.6,
    variables: Mapping[str, str] | None = None,
) -> None:
    """Runs a worker for every rank and waits for all of them.

    What they wrote stays in the directory, also after a failure or Ctrl-C.

    Args:
        module: Its process calls `worker`.
        machine: Platform, ranks and GPUs.
        job: For all workers, as JSON.
        directory: For the job, logs and reports.
        deadline_s: For all of it.
        fraction: The part of a GPU's memory that JAX takes, split between ranks that share it.
        variables: Added to the environment.

    Raises:
        WorkersFailed: The first that failed, or those that were late; all others are killed.
    """
    write_job(directory, machine, deadline_s, job)
    ends_s, workers = time.monotonic() + deadline_s, []
    logs = [directory / f"rank{rank}.log" for rank in range(machine.ranks)]
    for log in logs:
        log.unlink(missing_ok=True)
    try:
        for rank in range(machine.ranks):
            more = {"fraction": fraction, "variables": variables}
            workers.append(start_worker(module, machine, rank, directory, **more))
        _await_all(workers, logs, ends_s, deadline_s)
    except KeyboardInterrupt:
        # What was found until now is still to be reported.
        raise WorkersFailed("interrupted") from None
    finally:
        for process in workers:
            if process.poll() is None:
                process.kill()
                process.wait(30)


def _await_all(workers, logs, ends_s: float, deadline_s: float) -> None:
    while True:
        running = [rank for rank, process in enumerate(workers) if process.poll() is None]
        if failed := [rank for rank, process in enumerate(workers) if process.poll()]:
            time.sleep(0.2)  # for the others' last words
            status, log = workers[failed[0]].poll(), tail(logs[failed[0]])
            raise WorkersFailed(f"rank {failed[0]} ended with {status}:\n{log}")
        if not running:
            return
        if time.monotonic() > ends_s:
            late = f"ranks {running} were not done after {deadline_s:.0f} s"
            raise WorkersFailed(f"{late}:\n{tail(logs[running[0]])}")
        time.sleep(0.05)


def tail(path: pathlib.Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log; "" if there is no such file."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


# Inside a worker.


def worker(body: Callable[[pathlib.Path, int, dict], None]) -> None:
    """Entry point of a worker: runs `body(directory, rank, job)` and ends the process.

    It ends at once, also after an error: leaving in order could wait for a kernel that waits for a
    peer, and threads of XLA may be inside a callback.
    """
    try:
        directory, rank, parent_pid = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
        end_with_parent(int(parent_pid))
        body(directory, rank, json.loads((directory / JOB).read_text()))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def config_of(job: dict) -> RunConfig:
    """The configuration of the process that wrote the job, by its flags (`flags.forwarded`)."""
    absl_flags.FLAGS(["worker", *job["flags"]])
    return flags.run_config()


class Out:
    """Lines of JSON in a file; each is on disk before `write` returns."""

    def __init__(self, path: pathlib.Path):
        self._path = path

    def write(self, **facts) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")
