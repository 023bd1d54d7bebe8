"""Starts one process per rank, waits for all within a deadline, and reads what each reported.

Only processes that were started here are ever signalled. GPUs go around: with fewer GPUs than ranks
some share one, and every record says so (`Machine.link`), since nothing crosses NVLink then.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping

from benchmarks.harness import ROOT, cpu_device, gpu_device
from launch.environments.local import (
    cpu_rank_environment,
    gpu_rank_environment,
    gpu_share,
    visible_gpus,
)
from launch.errors import UsageError

# NVLink multicast can put GPUs out of service that others share, so NCCL never uses it here.
NO_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}
TAIL_LINES = 12
JOB = "job.json"


class WorkersFailed(RuntimeError):
    """A worker failed or was late; the message holds the end of its log."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """What the ranks of a benchmark run on."""

    platform: str  # "cpu" or "gpu"
    ranks: int
    gpus: tuple[str, ...] = ()  # those that ranks go around, as CUDA_VISIBLE_DEVICES names them

    @property
    def link(self) -> str:
        """What rows cross: `peer` (NVLink or PCIe), `shared_gpu` (some stay on one), or `cpu`."""
        if self.platform == "cpu":
            return "cpu"
        return "peer" if len(self.gpus) >= self.ranks else "shared_gpu"

    @property
    def device(self) -> str:
        """Such as "2 x NVIDIA H200"; of ranks that share GPUs it says so."""
        if self.platform == "cpu":
            return cpu_device()
        count = min(len(self.gpus), self.ranks)
        name = gpu_device() if count == 1 else f"{count} x {gpu_device()}"
        return name if self.link == "peer" else f"{name}, shared by {self.ranks} ranks"

    @property
    def facts(self) -> dict:
        """For a record's shape."""
        return {"gpus": min(len(self.gpus), self.ranks), "link": self.link}


def machine_of(platform: str, ranks: int | None, gpus: tuple[str, ...] | None) -> Machine:
    """`gpus` None: all that are visible. Ranks: as many as GPUs if not given; 2 on CPU.

    Raises UsageError where there is no GPU, or ranks are none.
    """
    if platform == "cpu":
        found: tuple[str, ...] = ()
    else:
        found = visible_gpus() if gpus is None else gpus
        if not found:
            raise UsageError(
                "no NVIDIA GPU was found; name them with --gpus=0,1, or --platform=cpu"
            )
    ranks = ranks or max(1, len(found)) if platform == "gpu" else ranks or 2
    if ranks < 1:
        raise UsageError(f"--ranks={ranks} must be at least 1")
    return Machine(platform, ranks, found[:ranks])


def fresh_directory(given: str | None) -> pathlib.Path:
    """`given`, emptied of an earlier run of workers, or a temporary one.

    Raises UsageError for a directory that holds something else.
    """
    if given is None:
        return pathlib.Path(tempfile.mkdtemp(prefix="eep-wide-"))
    path = pathlib.Path(given).absolute()
    if path.exists() and not (path / JOB).exists() and any(path.iterdir()):
        raise UsageError(f"--directory={given} holds files that are of no run; name another one")
    shutil.rmtree(path, ignore_errors=True)  # of an earlier run: its ranks must not be met
    path.mkdir(parents=True)
    return path


def environment_of(machine: Machine, rank: int, cache: pathlib.Path, fraction: float) -> dict:
    """Of a worker; `fraction` of its GPU's memory is for JAX, the heap takes of the rest."""
    if machine.platform == "cpu":
        found = cpu_rank_environment()
    else:
        share = gpu_share(rank, machine.ranks, machine.gpus, fraction)
        found = gpu_rank_environment(share, cache)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return os.environ | found | NO_MULTICAST | {"PYTHONPATH": path}


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
    """Runs `python -m module DIRECTORY RANK PID` for every rank, which find `job` in DIRECTORY.
    PID is this process, with which they end; `variables` are added to their environment.

    Raises WorkersFailed for the first that fails, once `deadline_s` are over, or at Ctrl-C; then
    all are killed. What they wrote until then stays in the directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    job = {"ranks": machine.ranks, "platform": machine.platform, "deadline_s": deadline_s} | job
    (directory / JOB).write_text(json.dumps(job))
    ends_s, workers = time.monotonic() + deadline_s, []
    logs = [directory / f"rank{rank}.log" for rank in range(machine.ranks)]
    try:
        for rank, path in enumerate(logs):
            with path.open("wb") as log:
                workers.append(
                    subprocess.Popen(
                        [sys.executable, "-m", module, str(directory), str(rank), str(os.getpid())],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        env=environment_of(machine, rank, directory / "cache", fraction)
                        | dict(variables or {}),
                        cwd=ROOT,
                        start_new_session=True,
                    )
                )
        _await_all(workers, logs, ends_s, deadline_s)
    except KeyboardInterrupt:
        # What was found until now is still to be reported.
        raise WorkersFailed("interrupted") from None
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait(30)


def _await_all(workers, logs, ends_s: float, deadline_s: float) -> None:
    while any(worker.poll() is None for worker in workers):
        if failed := [rank for rank, worker in enumerate(workers) if worker.poll()]:
            time.sleep(0.2)  # the others' last words
            raise WorkersFailed(
                f"rank {failed[0]} ended with {workers[failed[0]].poll()}:\n{tail(logs[failed[0]])}"
            )
        if time.monotonic() > ends_s:
            late = [rank for rank, worker in enumerate(workers) if worker.poll() is None]
            raise WorkersFailed(
                f"ranks {late} were not done after {deadline_s:.0f} s:\n{tail(logs[late[0]])}"
            )
        time.sleep(0.05)
    if failed := [rank for rank, worker in enumerate(workers) if worker.poll()]:
        raise WorkersFailed(
            f"rank {failed[0]} ended with {workers[failed[0]].poll()}:\n{tail(logs[failed[0]])}"
        )


def tail(path: pathlib.Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log; a file that is missing is an empty one."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
