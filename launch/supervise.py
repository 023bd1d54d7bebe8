"""Entry of the supervisor process. Loads no JAX.

python -m launch.supervise --config=tiny_cpu --run_dir=DIR     # DIR holds the token

In a SLURM job, --environment=slurm makes it listen at its node's address in the cluster's network,
on ports of the job.
"""

import asyncio
import dataclasses

from eep_jax.config import RunConfig
from eep_jax.runtime.supervisor.supervisor import Supervisor
from launch import flags, program
from launch.processes import (
    end_with_parent,
    keep_files_private,
    on_wish_to_stop,
    raise_descriptor_limit,
    set_up_logging,
)


def main() -> int:
    run_dir = flags.required_run_dir()
    keep_files_private()
    raise_descriptor_limit()
    end_with_parent(flags.PARENT_PID.value)
    set_up_logging("supervisor")
    config = with_supervisor_addresses(flags.run_config())
    token, host = flags.read_token(run_dir), flags.HOST_ID.value
    try:
        supervisor = Supervisor(config, run_dir, token, host=host)
    except ValueError as error:  # of a tokenizer, a chat template or keys
        raise flags.UsageError(str(error)) from error
    except OSError as error:
        raise flags.UsageError(
            f"--run_dir={run_dir} cannot be used: {error.filename or ''}: {error.strerror}"
        ) from error
    try:
        asyncio.run(_serve(supervisor))
    except OSError as error:
        program.print_end(str(error.strerror or error))
        return program.EXIT_USAGE
    return 0


def with_supervisor_addresses(config: RunConfig) -> RunConfig:
    """`config` with the listening addresses of flags and environment. Raises UsageError."""
    control = flags.supervisor_address(config)
    http = flags.environment().http(control)
    serve = config.serve
    if control is not None:
        serve = dataclasses.replace(serve, control_host=control.host, control_port=control.port)
    if http is not None:
        host = http.host if flags.HOST.value is None else serve.host
        port = http.port if flags.PORT.value is None else serve.port
        serve = dataclasses.replace(serve, host=host, port=port)
    return dataclasses.replace(config, serve=serve)


async def _serve(supervisor: Supervisor) -> None:
    stop, hurry = asyncio.Event(), asyncio.Event()
    # A second wish waits for no answer.
    on_wish_to_stop(lambda: (hurry if stop.is_set() else stop).set())
    await supervisor.run(stop, hurry=hurry)


cli = program.runner(main)

if __name__ == "__main__":
    cli()
