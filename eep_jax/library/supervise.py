"""Supervisor of a run without a serving engine, and the files by which ranks find it. No JAX.

python -m eep_jax.library.supervise DIR     # DIR as made by write_run
"""

import asyncio
import dataclasses
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys

from eep_jax.config import ClusterConfig, DeviceConfig, EngineConfig, RunConfig, ServeConfig
from eep_jax.errors import RunDirError
from eep_jax.model_config import model_from_values
from eep_jax.runtime.control.run_dir import (
    TOKEN_FILE,
    check_run_dir,
    make_private_file,
    make_run_dir,
    make_token,
    read_token,
)
from eep_jax.runtime.supervisor.run_files import check_can_open
from eep_jax.runtime.supervisor.supervisor import Supervisor

CONFIG_FILE, LOG_FILE = "run.json", "supervisor.log"
WITH_PARENT = "--with-parent"
_PARTS = {
    "cluster": ClusterConfig,
    "engine": EngineConfig,
    "serve": ServeConfig,
    "device": DeviceConfig,
}


def write_run(run_dir: str | os.PathLike, config: RunConfig) -> pathlib.Path:
    """Writes the configuration that processes of a run read, and a token unless there is one."""
    root = make_run_dir(run_dir)
    (root / CONFIG_FILE).write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n")
    make_token(root)
    return root


def read_run(run_dir: str | os.PathLike) -> tuple[RunConfig, str]:
    """(configuration, token) of a run. Raises ValueError if `run_dir` is not a run directory."""
    root = pathlib.Path(run_dir)
    try:
        fields = json.loads((root / CONFIG_FILE).read_text())
        token = read_token(root)
        parts = {name: kind(**_with_tuples(fields[name])) for name, kind in _PARTS.items()}
        parts["model"] = model_from_values(fields["model"])
        return RunConfig(**(fields | parts)), token
    except (OSError, ValueError, KeyError, TypeError, RunDirError) as error:
        raise ValueError(
            f"{str(root)!r} is not a run directory: {error!r}; expected {CONFIG_FILE} and "
            f"{TOKEN_FILE}, as start_supervisor or write_run writes them"
        ) from error


def _with_tuples(fields: dict) -> dict:
    """JSON has only lists, a configuration only tuples."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}


def start_supervisor(run_dir: str | os.PathLike, config: RunConfig) -> subprocess.Popen:
    """Starts the supervisor of a run, which ends with this process.

    Args:
        run_dir: Directory for configuration, token, journal and `supervisor.log`; made if missing.
        config: The run, from `run_config`.

    Returns:
        The process. Its `terminate()` ends all ranks, too.

    Raises:
        OSError: The directory cannot be written.
        RunDirError: Other users can write to it, it is in use, or holds a run of another
            configuration.

    Example:
        >>> import tempfile
        >>> from eep_jax import MoEConfig, run_config, start_supervisor
        >>> moe = MoEConfig(hidden=8, expert_hidden=4, experts=4, experts_per_token=2)
        >>> config = run_config(moe, layers=1, ranks=1, slots_per_rank=4, tokens_max=4)
        >>> with start_supervisor(tempfile.mkdtemp(), config) as supervisor:
        ...     supervisor.terminate()
    """
    check_can_open(make_run_dir(run_dir), config)  # before its configuration is replaced
    root = write_run(run_dir, config)
    command = [sys.executable, "-m", "eep_jax.library.supervise", str(root), WITH_PARENT]
    make_private_file(root / LOG_FILE)
    with (root / LOG_FILE).open("ab") as log:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)


def main(arguments: list[str]) -> int:
    if not arguments or arguments[1:] not in ([], [WITH_PARENT]):
        print("usage: python -m eep_jax.library.supervise DIR", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("eep_jax").setLevel(logging.INFO)
    try:
        config, token = read_run(arguments[0])
        check_run_dir(pathlib.Path(arguments[0]))
        supervisor = Supervisor(config, pathlib.Path(arguments[0]), token)
        asyncio.run(_serve(supervisor, with_parent=len(arguments) > 1))
    except (OSError, ValueError, RunDirError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


async def _serve(supervisor: Supervisor, with_parent: bool) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    if with_parent:  # its end of the pipe closes when it ends, however it ends
        loop.add_reader(sys.stdin.fileno(), stop.set)
    try:
        await supervisor.run(stop)
    finally:
        if with_parent:
            loop.remove_reader(sys.stdin.fileno())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
