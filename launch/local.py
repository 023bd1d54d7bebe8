"""Runs supervisor and ranks on this machine; --demo measures a failure and a return.

python -m launch.local --config=tiny_cpu            # serves until Ctrl-C
python -m launch.local --config=tiny_cpu --demo     # kills a rank under load, prints what it cost
"""

import asyncio
import contextlib
import pathlib

import aiohttp
from absl import flags as absl_flags

from eep_jax.errors import RunDirError
from eep_jax.runtime.http.access import exposure
from launch import flags, program
from launch.cluster import ClusterFailed, LocalCluster, is_whole
from launch.console import progress, say
from launch.processes import on_wish_to_stop

RESPAWN_DELAY = absl_flags.DEFINE_integer(
    "respawn_delay_ms",
    1_000,
    "Delay before a dead rank is restarted, in milliseconds; negative: never restarted.",
)
DEMO = absl_flags.DEFINE_boolean(
    "demo", False, "Runs the demonstration, then ends. Needs the extra `plots`."
)
DEMO_OUT = absl_flags.DEFINE_string("demo_out", ".", "Directory for timeline.png of --demo.")
PROBLEMS_POLL_S = 1.0
START_MARGIN_S = 60.0  # beyond what the first epoch waits for all ranks


def main() -> int:
    config = flags.run_config()
    arguments = flags.forwarded()
    if DEMO.value:
        program.require_extra("matplotlib", "plots", "--demo")
        _make_out_directory()
        if config.serve.api_key_file:
            raise flags.UsageError("--demo asks without a key; leave --api_key_file out")
    if DEMO.value and flags.PORT.value is None:
        arguments.append("--port=0")  # a demonstration should not fail for a port in use
    try:
        cluster = LocalCluster(
            arguments,
            config.cluster.ranks,
            flags.RUN_DIR.value,
            RESPAWN_DELAY.value,
            config.cluster.joiner_nice,
        )
    except OSError as error:
        raise flags.UsageError(
            f"the run directory cannot be used: {error.filename}: {error.strerror}; give another "
            "--run_dir"
        ) from error
    try:
        return asyncio.run(_run(cluster, config))
    finally:
        cluster.stop(drain_s=config.serve.shutdown_timeout_s)


def _make_out_directory() -> None:
    """Called before the measurement: the plot is written at its end."""
    try:
        pathlib.Path(DEMO_OUT.value).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise flags.UsageError(
            f"--demo_out={DEMO_OUT.value!r} cannot be a directory: {error.strerror}"
        ) from error


async def _run(cluster: LocalCluster, config) -> int:
    stop = asyncio.Event()
    on_wish_to_stop(stop.set)
    work = asyncio.create_task(_work(cluster, config))
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if not work.done():
        say("ending all processes")
        work.cancel()
    stopped.cancel()
    try:
        return await work
    except asyncio.CancelledError:
        return 130 if DEMO.value else 0
    except (ClusterFailed, RunDirError) as error:
        say(f"failed: {error}", "red")
        return 1


async def _work(cluster: LocalCluster, config) -> int:
    say(
        f"starting a supervisor and {config.cluster.ranks} ranks of {config.name}; "
        f"run directory {cluster.run_dir}"
    )
    cluster.report = lambda text: say(text, "yellow")
    cluster.start()
    watch = asyncio.create_task(cluster.watch())
    problems = asyncio.create_task(_show_problems(cluster))
    try:
        await _wait_until_whole(cluster, config)
        if DEMO.value:
            from launch.demo import run_demo  # draws with matplotlib, which serving does not need

            return await run_demo(cluster, config, DEMO_OUT.value)
        _print_how_to_use(cluster, config)
        await watch
        raise ClusterFailed(cluster.failure or "the watch ended")
    finally:
        for task in (watch, problems):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(watch, problems, return_exceptions=True)


async def _show_problems(cluster: LocalCluster) -> None:
    """Prints each problem of the status once, and when all are solved."""
    shown, before = set(), set()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2.0)) as session:
        while True:
            await asyncio.sleep(PROBLEMS_POLL_S)
            if (status := await cluster.status(session)) is None:
                continue
            found = set(status["problems"])
            for problem in sorted(found & before - shown):  # seen twice, so it lasts
                say(problem, "yellow")
            if shown and not found | before and is_whole(status):
                say("all problems are solved", "green")
            shown = (shown | found & before) if found | before else set()
            before = found


async def _wait_until_whole(cluster: LocalCluster, config) -> None:
    with progress("ranks ready", config.cluster.ranks) as show:

        def whole(status: dict) -> bool:
            if not status["epoch"] and status["blocked"] and status["experts"]["unsupplied"]:
                raise ClusterFailed(f"the cluster cannot start: {status['blocked']}")
            show(sum(r["mode"] in ("offered", "ready", "serving") for r in status["ranks"]))
            return is_whole(status)

        deadline_s = config.cluster.formation_ms / 1000 + START_MARGIN_S
        await cluster.wait_for(whole, deadline_s, "the start of all ranks")


def _print_how_to_use(cluster: LocalCluster, config) -> None:
    pids = {name: child.process.pid for name, child in sorted(cluster.children.items())}
    say(f"serving {config.model.name} on {cluster.url}", "bold green")
    if warning := exposure(config.serve):
        say(warning, "yellow")
    say("processes: " + ", ".join(f"{name} {pid}" for name, pid in pids.items()))
    say(f"logs: {cluster.run_dir}/logs")
    body = (
        f'{{"model": "{config.model.name}", "prompt": "In the beginning", '
        '"max_tokens": 200, "stream": true}'
    )
    say(f"try:  curl -N {cluster.url}/v1/completions -d '{body}'")
    say(
        f"then: kill -9 {pids['rank2'] if 'rank2' in pids else pids['rank0']}, "
        "and watch it continue. Ctrl-C ends everything."
    )


cli = program.runner(main)

if __name__ == "__main__":
    cli()
