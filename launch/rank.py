"""Entry of a rank process: a first start and a return are the same.

python -m launch.rank --config=tiny_cpu --run_dir=DIR --rank=2     # DIR as given to the supervisor
"""

import contextlib
import logging
import os
import pathlib
import signal
import sys
import time

from eep_jax.config import RunConfig
from eep_jax.library.environment import cpu_environment
from launch import flags, program
from launch.addresses import with_addresses
from launch.environments.environment import Identity
from launch.environments.local import gpu_rank_environment, gpu_share
from launch.processes import end_with_parent, keep_files_private, set_up_logging

# In the run directory: what a rank compiled, for the other ranks and for processes that return.
EXECUTABLES = "executables"  # whole steps; where one cannot be loaded:
FINGERPRINTS = "fingerprints"  # of experts that were found right: see relocation/slot_check.py
COMPILE_CACHE = "compile_cache"  # XLA's own

_log = logging.getLogger("launch.rank")


def main() -> int:
    run_dir, config = flags.required_run_dir(), flags.run_config()
    identity = flags.identity(config)
    rank = identity.rank
    keep_files_private()
    end_with_parent(flags.PARENT_PID.value)
    set_up_logging(f"rank{rank}")
    os.environ.update(_environment(config, identity, run_dir))
    config = with_addresses(config, run_dir)

    from eep_jax.runtime.control.rank_client import client_of

    link = client_of(
        config,
        rank,
        run_dir,
        flags.read_token(run_dir),
        address=str(flags.supervisor_address(config) or ""),
        host=flags.HOST_ID.value,
        mirrored=bool(config.serve.mirror_host),
    )
    link.on_turned_away = _end_turned_away
    # From here on the supervisor knows this process, while JAX is still loading.
    link.start()
    try:
        agent = build_agent(config, rank, link, run_dir)
    except Exception as error:
        # The supervisor shows the reason; the traceback, or the error of usage, goes to the log.
        link.fail(f"it could not start: {error or repr(error)}")
        raise
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    status = agent.run()
    link.stop()
    # Threads of XLA may be inside a callback; nothing here needs an orderly teardown.
    with contextlib.suppress(OSError):  # of a full disk
        sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)


def _end_turned_away(reason: str) -> None:
    """At once: there is no use in loading and compiling for this run, nor in another try."""
    program.print_end(reason)
    os._exit(program.EXIT_USAGE)


def _environment(config: RunConfig, identity: Identity, run_dir: pathlib.Path) -> dict[str, str]:
    if config.platform == "cpu":
        return cpu_environment()
    fraction = config.device.memory_fraction
    share = gpu_share(identity.local_rank, identity.local_ranks, flags.gpus(), fraction)
    return gpu_rank_environment(share, run_dir / COMPILE_CACHE)


def require_backend(platform: str) -> None:
    """Raises UsageError where JAX does not compute on what the configuration says."""
    import jax

    try:
        found = repr(jax.default_backend())
    except RuntimeError as error:
        found = f"nothing: {error}"
    if found != repr(platform):
        raise flags.UsageError(
            f"the configuration is for platform {platform!r}, JAX computes on {found}. For an "
            "NVIDIA GPU install the extra cuda13 (driver 580 or newer) or cuda12: "
            "pip install '.[cuda13]'"
        )


def build_agent(config, rank: int, link, run_dir: pathlib.Path):
    """Loads JAX and the weights, opens the heap, and puts the parts of a rank together."""
    started = time.monotonic()
    from eep_jax.runtime.rank.start_timer import StartTimer

    watch = StartTimer()
    import jax

    # Small steps: handing them to another thread costs more than it hides.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    from eep_jax.engine.engine import Engine
    from eep_jax.engine.executables import ExecutableStore, step_facts
    from eep_jax.relocation.rates import Rates
    from eep_jax.runtime.rank.assemble import assemble_agent, layout_of, open_slab
    from eep_jax.storage.random_checkpoint import open_checkpoint

    watch.phase("imports")
    require_backend(config.platform)
    watch.phase("device")
    checkpoint, layout = open_checkpoint(config), layout_of(config)
    heap = open_slab(config, rank, layout, mirror_options(config, layout.window))
    watch.phase("heap")
    dense = checkpoint.read_dense()
    watch.phase("weights")
    store = ExecutableStore(run_dir / EXECUTABLES, step_facts(config))
    engine = Engine(config, rank, heap, layout, dense, store)
    watch.phase("engine")
    check = open_check(engine, store, checkpoint, run_dir / FINGERPRINTS)
    watch.phase("check")
    rates = Rates()
    backups = open_backups(config, rank, checkpoint, rates, heap)
    agent = assemble_agent(
        engine, checkpoint, link, rates=rates, backups=backups, check=check, start=watch
    )
    _log.info("loaded after %.1f s", time.monotonic() - started)
    watch.phase("sources")
    return agent


def mirror_options(config: RunConfig, layout):
    """How ranks of other hosts are reached; None without --mirror_host."""
    from eep_jax.heap.mirror.heap import MirrorOptions
    from eep_jax.runtime.control.identity import host_id

    if not config.serve.mirror_host:
        return None
    return MirrorOptions(
        host=config.serve.mirror_host,
        host_id=host_id(flags.HOST_ID.value),
        token=flags.read_token(flags.required_run_dir()),
        layout=layout,
        transport=config.serve.mirror_transport,
    )


def open_check(engine, store, checkpoint, directory: pathlib.Path):
    """What checks slots of the engine's bank on its device; compiled before anybody serves."""
    from eep_jax.relocation.slot_check import SlotCheck

    obtain = lambda lower, arguments: store.obtain(FINGERPRINTS, lower, arguments, 0)
    return SlotCheck(engine.heap, engine.bank.layout, checkpoint.content_name, directory, obtain)


def open_backups(config, rank: int, checkpoint, rates, heap):
    """The rank's backup store, if it is to keep one. Without one it serves all the same."""
    from eep_jax.relocation.backup_store import BackupOptions, BackupStore
    from eep_jax.relocation.source_reader import NoBackups
    from eep_jax.runtime.rank.scratch_dir import open_scratch

    cluster, serve = config.cluster, config.serve
    if not cluster.backup_bytes:
        return None
    try:
        scratch = open_scratch(pathlib.Path(cluster.backup_dir), "backup")
        options = BackupOptions(
            rank=rank,
            directory=scratch.path,
            bytes_max=cluster.backup_bytes,
            host=serve.backup_host,
            token=flags.read_token(flags.required_run_dir()),
            fetch_deadline_ms=cluster.fetch_deadline_ms,
        )
        return BackupStore(checkpoint, options, rates, heap)
    except OSError as error:
        problem = (
            f"{error}; see cluster.backup_dir={cluster.backup_dir} and "
            f"serve.backup_host={serve.backup_host}"
        )
        _log.error("no backups: %s", problem)
        return NoBackups(problem)


cli = program.runner(main)

if __name__ == "__main__":
    cli()
