"""Launcher of one host: starts its ranks, restarts dead ones, and watches their processes.

    python -m launch.node --config=tiny_cpu --supervisor=10.0.0.1:7777 --mirror_host=auto \\
        --ranks=2,3 --run_dir=DIR     # the token is in DIR on this host, or in EEP_TOKEN

In a SLURM job every task is a launcher, of the rank of its number: `srun python -m launch.node
--environment=slurm --config=tiny_cpu --run_dir=DIR`.

It reports the end of a rank's process to the supervisor within milliseconds, and kills evicted
processes. If a launcher is killed, its ranks die with it. A host may have several launchers: in a
SLURM step each task may be one, for its own rank.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import socket
import sys
import tempfile
import time

from absl import flags as absl_flags

from eep_jax.config import ClusterConfig, RunConfig
from eep_jax.runtime.control.endpoint import ENDPOINT
from eep_jax.runtime.control.identity import host_id
from eep_jax.runtime.control.launcher_client import LauncherClient, LauncherClientOptions
from eep_jax.runtime.control.run_dir import make_run_dir
from eep_jax.runtime.rank.scratch_dir import open_scratch
from launch import flags, program
from launch.addresses import with_addresses
from launch.cluster import QUICK_DEATH_S, Child, ClusterFailed, LocalCluster, rank_name
from launch.environments.environment import Identity
from launch.errors import UsageError
from launch.processes import (
    end_with_parent,
    keep_files_private,
    on_wish_to_stop,
    set_up_logging,
)

RANKS = absl_flags.DEFINE_list(
    "ranks",
    None,
    "Ranks of this host, such as 2,3. If not given, --rank, or the task's rank in SLURM.",
)
RESPAWN_DELAY = absl_flags.DEFINE_integer(
    "rank_respawn_delay_ms",
    1_000,
    "Delay before a dead rank is restarted, in milliseconds; negative: never restarted.",
)

_log = logging.getLogger("launch.node")


class HostRanks(LocalCluster):
    """The ranks of one host as children of this process, without a supervisor."""

    def __init__(
        self,
        arguments: list[str],
        ranks: tuple[Identity, ...],
        run_dir: str,
        delay_ms: int,
        joiner_nice: int = ClusterConfig.joiner_nice,
    ):
        super().__init__(arguments, len(ranks), run_dir, delay_ms, joiner_nice)
        self._own_ranks = {rank_name(identity.rank): identity for identity in ranks}

    def start(self) -> None:
        self._spawn_all(self._own_ranks)

    def _command(self, name: str) -> list[str]:
        identity = self._own_ranks[name]
        place = f"--local_rank={identity.local_rank}", f"--local_ranks={identity.local_ranks}"
        return [*super()._command(name), *place]

    def _look_after(self, child: Child) -> None:
        lived_s = time.monotonic() - child.started_s
        self.was_healthy |= child.process.poll() is None and lived_s > QUICK_DEATH_S
        super()._look_after(child)

    def let_in(self, processes) -> None:
        """The supervisor admitted these processes: a later death is cured by a restart."""
        pids = {child.process.pid for child in self.children.values()}
        self.was_healthy = self.was_healthy or any(p.pid in pids for p in processes)


def main() -> int:
    keep_files_private()
    set_up_logging("node")
    end_with_parent(flags.PARENT_PID.value)
    config = flags.run_config()
    ranks, address = own_ranks(config), flags.supervisor_address(config)
    if address is None and not flags.RUN_DIR.value:
        raise UsageError(
            "the supervisor's address is unknown: give --supervisor=HOST:PORT, or --run_dir=DIR if "
            "this host shares the supervisor's run directory"
        )
    scratch = None if flags.RUN_DIR.value else open_scratch(tempfile.gettempdir(), "node")
    run_dir = make_run_dir(flags.RUN_DIR.value or scratch.path)
    token = flags.read_token(run_dir)
    with_addresses(config, run_dir)  # fails where its ranks would fail
    locks = [only_launcher(token, identity.rank) for identity in ranks]
    os.environ[flags.TOKEN_VARIABLE] = token  # for its ranks
    nice = config.cluster.joiner_nice
    host_ranks = HostRanks(flags.forwarded(), ranks, str(run_dir), RESPAWN_DELAY.value, nice)
    host_ranks.report = _log.warning
    link = LauncherClient(
        LauncherClientOptions(
            endpoint_file=run_dir / ENDPOINT,
            address=str(address or ""),
            token=token,
            host=host_id(flags.HOST_ID.value),
            run=config.name,
            heartbeat_ms=config.cluster.heartbeat_ms,
            message_bytes_max=config.serve.message_bytes_max,
        ),
        host_ranks.let_in,
    )
    status = 1
    try:
        status = asyncio.run(_work(host_ranks, link))
    except ClusterFailed as error:
        print(f"error: {error}", file=sys.stderr)
    finally:
        host_ranks.stop()
        for lock in locks:
            lock.close()
        if scratch is not None:
            scratch.keep() if status else scratch.remove()
    return status


def own_ranks(config: RunConfig) -> tuple[Identity, ...]:
    """Identities of --ranks, else that of this process. Raises UsageError."""
    ranks = config.cluster.ranks
    if RANKS.value is None:
        return (flags.identity(config),)
    if not all(text.isdecimal() and int(text) < ranks for text in RANKS.value):
        raise UsageError(f"--ranks={','.join(RANKS.value)} must name ranks of 0..{ranks - 1}: 2,3")
    own = sorted({int(text) for text in RANKS.value})
    return tuple(
        Identity(rank=rank, local_rank=place, local_ranks=len(own))
        for place, rank in enumerate(own)
    )


def only_launcher(token: str, rank: int) -> socket.socket:
    """A lock against other launchers of `rank` on this host, until it is closed.

    Two launchers would keep starting processes against each other.

    Raises:
        UsageError: Another launcher holds the lock.
    """
    run = hashlib.sha256(token.encode()).hexdigest()[:16]
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        lock.bind(f"\0eep-launcher-{run}-{rank}")
    except OSError as error:
        lock.close()
        raise UsageError(
            f"rank {rank} of this run already has a launcher on this host, which restarts it"
        ) from error
    return lock


async def _work(host_ranks: HostRanks, link: LauncherClient) -> int:
    """Runs until the run is over, a signal comes, or the ranks cannot be started."""
    stop = asyncio.Event()
    on_wish_to_stop(stop.set)
    host_ranks.start()
    _log.info("started %s; logs are in %s/logs", sorted(host_ranks.children), host_ranks.run_dir)
    tasks = [
        asyncio.create_task(stop.wait()),
        asyncio.create_task(link.run()),
        asyncio.create_task(host_ranks.watch()),
    ]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)
    problem = host_ranks.failure or link.refused
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    return 0


cli = program.runner(main)

if __name__ == "__main__":
    cli()
