"""A cluster of this project under load: started, harmed as a plan says, and ended."""

import asyncio
import contextlib
import dataclasses
import signal
import time
from collections.abc import Sequence

from benchmarks.harness import Unfit
from benchmarks.serving.fault_plan import Phase
from eep_jax.config import RunConfig
from launch import flags
from launch.cluster import LocalCluster, events_since, rank_name
from launch.console import say
from launch.load import Pace, Sample, Target, run
from launch.timeline import Summary, summarise

CHANGE_DEADLINE_S = 180.0  # for the start of all ranks, an eviction, or a return


@dataclasses.dataclass(frozen=True, kw_only=True)
class Played:
    """A phase of a plan as it was carried out. Times are monotonic seconds."""

    phase: Phase
    begin_s: float
    settled_s: float  # all its ranks serve
    end_s: float
    kills: tuple[tuple[int, float], ...]  # rank and when the signal was sent


def own_cluster(
    config: RunConfig,
    run_dir: str | None = None,
    *,
    respawn_delay_ms: int = -1,
    more: Sequence[str] = (),
) -> LocalCluster:
    """A cluster with the flags of this process, and `more`; its HTTP port is free unless given."""
    arguments = flags.forwarded() + (["--port=0"] if flags.PORT.value is None else [])
    cluster = config.cluster
    return LocalCluster(
        [*arguments, *more], cluster.ranks, run_dir, respawn_delay_ms, cluster.joiner_nice
    )


@contextlib.asynccontextmanager
async def started(
    cluster: LocalCluster, deadline_s: float = CHANGE_DEADLINE_S, *, stops: bool = True
):
    """The cluster with all ranks serving; `stops`: all its processes end with the body."""
    if not cluster.children or cluster.children["supervisor"].process.poll() is not None:
        cluster.start()
    watch = asyncio.create_task(cluster.watch())
    everyone = Phase(tuple(range(cluster.ranks)))
    try:
        await cluster.wait_for(serves(everyone), deadline_s, "the start of all ranks")
        yield
    finally:
        watch.cancel()  # else it would bring the supervisor back
        await asyncio.gather(watch, return_exceptions=True)
        if stops:
            await asyncio.to_thread(cluster.stop)


async def unharmed(target: Target, jobs: Sequence[dict], concurrency: int = 12) -> list[Sample]:
    """Every request once, by job: the truth. Raises Unfit if one is lost."""
    samples = await run(target, jobs, Pace(concurrency=concurrency), count=len(jobs))
    if lost := [s.error for s in samples if s.error is not None]:
        raise Unfit(f"a request was lost while nothing was wrong: {lost[0]}")
    return sorted(samples, key=lambda sample: sample.job)


@dataclasses.dataclass
class Load:
    """Tokens as they arrive, (monotonic s, how many); the samples, once the load has ended."""

    tokens: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    samples: list[Sample] = dataclasses.field(default_factory=list)

    @property
    def times(self) -> list[float]:
        """One for each token."""
        return [at_s for at_s, count in self.tokens for _ in range(count)]


@contextlib.asynccontextmanager
async def under_load(target: Target, jobs: Sequence[dict], pace: Pace):
    """Keeps requests coming while the body runs, then waits for their answers."""
    load, enough = Load(), asyncio.Event()
    note = lambda at_s, count: load.tokens.append((at_s, count))
    running = asyncio.create_task(run(target, jobs, pace, until=enough, on_token=note))
    try:
        yield load
    finally:
        enough.set()
        load.samples += await running


async def status_of(cluster: LocalCluster) -> dict:
    """The supervisor's status. Raises ClusterFailed where it does not answer."""
    return await cluster.wait_for(lambda status: True, 10.0, "a status")


def serves(phase: Phase, without: Sequence[int] = ()):
    """A check that exactly the ranks of a phase, less `without`, serve in the committed epoch."""
    wanted = set(phase.present) - set(without)

    def check(status: dict) -> bool:
        inside = {
            r["rank"]
            for r in status["ranks"]
            if r["state"] == "active" and r["mode"] == "serving" and r["epoch"] == status["epoch"]
        }
        active = {r["rank"] for r in status["ranks"] if r["state"] == "active"}
        return status["state"] == "serving" and inside == active == wanted

    return check


async def play(
    cluster: LocalCluster,
    phases: Sequence[Phase],
    *,
    phase_s: float,
    kill_after_s: float,
    number: signal.Signals,
) -> list[Played]:
    """Carries out a plan. A phase lasts `phase_s` from when its ranks serve.

    Ranks that are back are started at its beginning; `kill_after_s` later those to be killed get
    signal `number`, all at once. Raises ClusterFailed where a change does not happen.
    """
    played = []
    for index, phase in enumerate(phases):
        begin_s = time.monotonic()
        for rank in phase.back:
            await _bring_back(cluster, rank)
        what = f"phase {index} [{phase.label}]"
        await cluster.wait_for(serves(phase), CHANGE_DEADLINE_S, f"the beginning of {what}", 20)
        settled_s = time.monotonic()
        say(what + (f", ranks {list(phase.back)} are back" if phase.back else ""))
        kills = []
        if phase.killed:
            await asyncio.sleep(kill_after_s)
            kills = [(rank, cluster.kill(rank_name(rank), number)) for rank in phase.killed]
            say(f"ranks {list(phase.killed)}: {number.name}", "bold red")
            without = serves(phase, phase.killed)
            await cluster.wait_for(without, CHANGE_DEADLINE_S, f"an eviction in {what}", 20)
        await asyncio.sleep(max(0.0, settled_s + phase_s - time.monotonic()))
        spans = {"begin_s": begin_s, "settled_s": settled_s, "end_s": time.monotonic()}
        played.append(Played(phase=phase, kills=tuple(kills), **spans))
    return played


async def _bring_back(cluster: LocalCluster, rank: int) -> None:
    """A new process of the rank. One that was only stopped is ended first."""
    process = cluster.children[rank_name(rank)].process
    if process.poll() is None:
        process.kill()
        await asyncio.to_thread(process.wait, 30)
    cluster.start_rank(rank)


def serves_again(victim: int):
    """A check that a rank has left and the others serve."""

    def check(status: dict) -> bool:
        return status["ranks"][victim]["state"] != "active" and status["state"] == "serving"

    return check


def marks_of(kill_s: float, rank: int, status: dict) -> dict[str, float]:
    """Times at which the supervisor noticed, resumed the others, and let the rank in again."""
    events, marks = events_since(status, kill_s), {"kill": kill_s}
    inside = lambda e: str(rank) in e["members"]
    for name, kind, wanted in (
        ("detected", "dead", lambda e: e.get("rank") == rank),
        ("resumed", "commit", lambda e: not inside(e)),
        ("return_start", "prepare", lambda e: rank in e["admitted"]),
        ("returned", "commit", inside),
    ):
        after_s = marks.get("resumed", kill_s) if name == "returned" else kill_s
        found = next(
            (e["at_s"] for e in events if e["kind"] == kind and e["at_s"] >= after_s and wanted(e)),
            None,
        )
        if found is not None:
            marks[name] = max(found, *marks.values())
    return marks


def summary_of(
    kill_s: float, rank: int, times: Sequence[float], status: dict, until_s: float
) -> tuple[Summary, dict[str, float]]:
    """The cost of one kill, and its marks: see `launch.timeline`."""
    marks = marks_of(kill_s, rank, status)
    return summarise([t for t in times if t <= until_s], marks), marks
