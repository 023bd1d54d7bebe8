"""Entry of a host's launcher: starts the ranks of this host, and brings dead ones back.

    python -m launch.node --config=tiny_cpu --supervisor=10.0.0.1:7777 --mirror_host=auto \\
        --ranks=2,3 --run_dir=DIR     # DIR, of this host, holds the token; or EEP_TOKEN does

In a SLURM job every task is one, for the rank of its number: `srun python -m launch.node
--environment=slurm --config=tiny_cpu --run_dir=DIR`.

It also is the supervisor's eye and hand on this host: it says when a rank's process ends, within
milliseconds, and ends those that were evicted. The ranks of a launcher that is killed die with it.
Several launchers of one host are fine: in a SLURM step each task may be one, for its own rank.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import pathlib
import signal
import socket
import sys
import tempfile
import time

from absl import flags as absl_flags

from eep_jax.config import ClusterConfig, RunConfig
from eep_jax.runtime.control.endpoint import ENDPOINT
from eep_jax.runtime.control.identity import host_id
from eep_jax.runtime.control.launcher_client import LauncherClient, LauncherClientOptions
from launch import flags, program
from launch.addresses import with_addresses
from launch.cluster import QUICK_DEATH_S, Child, LocalCluster, rank_name
from launch.environments.environment import Identity
from launch.errors import UsageError
from launch.processes import end_with_parent, set_up_logging

RANKS = absl_flags.DEFINE_list(
    "ranks", None, "The ranks of this host, such as 2,3. Default: --rank, or the task's in SLURM."
)
RESPAWN_DELAY = absl_flags.DEFINE_integer(
    "rank_respawn_delay_ms", 1_000, "How long a dead rank stays dead; negative: for good."
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
        for name in self._own_ranks:
            self._spawn(name)

    def _command(self, name: str) -> list[str]:
        identity = self._own_ranks[name]
        place = f"--local_rank={identity.local_rank}", f"--local_ranks={identity.local_ranks}"
        return [*super()._command(name), *place]

    def _look_after(self, child: Child) -> None:
        lived_s = time.monotonic() - child.started_s
        self.was_healthy |= child.process.poll() is None and lived_s > QUICK_DEATH_S
        super()._look_after(child)

    def let_in(self, processes) -> None:
        """The supervisor knows these: from now on a death is nothing that restarting cannot cure"""
        pids = {child.process.pid for child in self.children.values()}
        self.was_healthy = self.was_healthy or any(p.pid in pids for p in processes)


def main() -> int:
    set_up_logging("node")
    end_with_parent(flags.PARENT_PID.value)
    config = flags.run_config()
    ranks, address = own_ranks(config), flags.supervisor_address(config)
    run_dir = pathlib.Path(flags.RUN_DIR.value or tempfile.mkdtemp(prefix="eep-node-")).absolute()
    run_dir.mkdir(parents=True, exist_ok=True)
    token = flags.read_token(run_dir)
    if address is None and not flags.RUN_DIR.value:
        raise UsageError(
            "where is the supervisor? Give --supervisor=HOST:PORT, or --run_dir=DIR if this host "
            "shares the supervisor's run directory"
        )
    with_addresses(config, run_dir)  # refuses what its ranks would refuse
    locks = [only_launcher(token, identity.rank) for identity in ranks]
    os.environ[flags.TOKEN_VARIABLE] = token  # for the ranks, which have no other way to it
    nice = config.cluster.joiner_nice
    host_ranks = HostRanks(flags.forwarded(), ranks, str(run_dir), RESPAWN_DELAY.value, nice)
    host_ranks.tell = _log.warning
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
    try:
        return asyncio.run(_work(host_ranks, link))
    finally:
        host_ranks.stop()
        for lock in locks:
            lock.close()


def own_ranks(config: RunConfig) -> tuple[Identity, ...]:
    """--ranks as identities, else that of this process. Raises UsageError for none."""
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
    """Keeps others of this run and host from starting `rank`, too, until it is closed.

    Raises UsageError where one does. Two launchers would start processes against each other.
    """
    run = hashlib.sha256(token.encode()).hexdigest()[:16]
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        lock.bind(f"\0eep-launcher-{run}-{rank}")
    except OSError as error:
        lock.close()
        raise UsageError(
            f"rank {rank} of this run has a launcher on this host already, which brings it back"
        ) from error
    return lock


async def _work(host_ranks: HostRanks, link: LauncherClient) -> int:
    """Until the run is over, a signal comes, or the ranks cannot be started."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
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
