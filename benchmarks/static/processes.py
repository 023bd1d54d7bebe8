"""Starting the processes of a static mesh: configuration, environment, addresses."""

import dataclasses
import os
import pathlib
import socket
import subprocess
import sys

from eep_jax.config import RunConfig
from launch import flags
from launch.environments.local import (
    cpu_rank_environment,
    gpu_rank_environment,
    gpu_share,
)

STEP_DEADLINE_MS = 60_000  # nobody dies here on purpose: a slow machine is no failure


def with_ranks(config: RunConfig, ranks: int | None) -> RunConfig:
    """The configuration on so many ranks, with slots for all replicas. Raises UsageError."""
    cluster, ranks = config.cluster, ranks or config.cluster.ranks
    if ranks < 1:
        raise flags.UsageError(f"--ranks={ranks} must be at least 1")
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


def rank_environment(config: RunConfig, rank: int, directory: pathlib.Path) -> dict[str, str]:
    """As a rank of `launch` has it: the same threads, the same flags of XLA."""
    if config.platform == "cpu":
        return cpu_rank_environment()
    ranks, fraction = config.cluster.ranks, config.device.memory_fraction
    share = gpu_share(rank, ranks, flags.gpus(), fraction)
    return gpu_rank_environment(share, directory / "compile_cache")


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(module: str, rank: int, log: pathlib.Path, *arguments: str, **pipes) -> subprocess.Popen:
    """A Python process of this project with the same flags, that ends with this one."""
    root = str(pathlib.Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", module, f"--rank={rank}", f"--parent_pid={os.getpid()}"]
    command += flags.forwarded()
    with log.open("ab") as file:
        return subprocess.Popen(
            [*command, *arguments],
            stderr=file,
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,
            **({"stdin": subprocess.DEVNULL, "stdout": file} | pipes),
        )
