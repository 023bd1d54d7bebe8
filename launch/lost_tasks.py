"""Lists ranks of a SLURM job whose task was killed, so that the batch script starts another.

A task restarts its rank itself, unless the task was killed too. Then this prints `RANK NODE
LOCAL_RANK LOCAL_RANKS`, repeatedly with growing intervals while the rank has no process.

python -m launch.lost_tasks --environment=slurm --run_dir=DIR     # in a batch script; never ends
"""

import asyncio
import dataclasses
import json
import pathlib
import time

import aiohttp
from absl import flags as absl_flags

from eep_jax.runtime.control.admin_key import admin_headers
from eep_jax.runtime.control.endpoint import ENDPOINT
from launch import flags, program
from launch.environments.slurm import SlurmEnvironment
from launch.processes import end_with_parent

LOST_AFTER = absl_flags.DEFINE_float(
    "lost_after_s", 15.0, "Time without a process of a rank after which its task counts as lost."
)
POLL_S = 1.0
ANSWER_S = 5.0
AGAIN_MAX_S = 300.0


@dataclasses.dataclass
class LostTasks:
    """Ranks without a process: since when, and the number of tasks requested for each."""

    lost_after_s: float
    away_since_s: dict[int, float] = dataclasses.field(default_factory=dict)
    tries: dict[int, int] = dataclasses.field(default_factory=dict)

    def lost(self, now_s: float, away: set[int]) -> list[int]:
        """Ranks that need a new task now, given those without a process."""
        for rank in set(self.away_since_s) - away:
            del self.away_since_s[rank]
            self.tries.pop(rank, None)
        found = []
        for rank in sorted(away):
            tries = self.tries.get(rank, 0)
            wait_s = min(self.lost_after_s * 2**tries, AGAIN_MAX_S)
            if now_s - self.away_since_s.setdefault(rank, now_s) >= wait_s:
                found.append(rank)
                self.away_since_s[rank], self.tries[rank] = now_s, tries + 1
        return found


def ranks_away(status: dict) -> set[int]:
    """Ranks without a process in a supervisor's status, after the first epoch."""
    if status["epoch"] == 0:
        return set()  # they may still be starting
    return {rank["rank"] for rank in status["ranks"] if rank["pid"] is None}


def main() -> int:
    run_dir = flags.required_run_dir()
    end_with_parent(flags.PARENT_PID.value)
    environment = flags.environment()
    if not isinstance(environment, SlurmEnvironment):
        raise flags.UsageError("only SLURM jobs have tasks; add --environment=slurm")
    places = {place.rank: place for place in environment.places()}
    asyncio.run(_watch(run_dir, places, LostTasks(LOST_AFTER.value)))
    return 0


async def _watch(run_dir: pathlib.Path, places: dict, tasks: LostTasks) -> None:
    timeout = aiohttp.ClientTimeout(total=ANSWER_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        while True:
            status = await _status(session, run_dir)
            if status is not None:
                for rank in tasks.lost(time.monotonic(), ranks_away(status)):
                    if rank in places:
                        print(*places[rank], flush=True)
            await asyncio.sleep(POLL_S)


async def _status(session: aiohttp.ClientSession, run_dir: pathlib.Path) -> dict | None:
    """The supervisor's status; None while it does not answer."""
    try:
        at = json.loads((run_dir / ENDPOINT).read_text())
        url = f"http://{at['http_host']}:{at['http_port']}/v1/fault_tolerance/status"
        async with session.get(url, headers=admin_headers(run_dir)) as response:
            return await response.json()
    except (aiohttp.ClientError, OSError, ValueError, LookupError, TimeoutError):
        return None


cli = program.runner(main)

if __name__ == "__main__":
    cli()
