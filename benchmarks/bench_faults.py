"""Cost of one SIGKILL: elastic ranks, JAX's own shrink-and-re-jit, and a full restart.

    python -m benchmarks.bench_faults --config=tiny_cpu --out=benchmarks/results/faults.jsonl

Each system serves the same requests, as many at a time, over HTTP; a rank is killed in the midst;
the load goes on until tokens flow again and for some seconds more.

1. Every request once, unharmed: that system's own truth.
2. The load, the kill, the time until the next token, and every request that was lost or answered
   otherwise than in 1.

Static sharding is the fastest exchange of `bench_static` (`--exchange`). The killed rank is not the
one that hosts JAX's coordinator: that would end the baselines for good.
"""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from absl import flags as absl_flags

from benchmarks import command
from benchmarks.harness import Record, Sheet, Unfit
from benchmarks.processes import Machine, machine_of, run_directory, with_ranks
from benchmarks.serving import statistics as stats
from benchmarks.serving.own_cluster import (
    Load,
    marks_of,
    own_cluster,
    serves_again,
    started,
    under_load,
    unharmed,
)
from benchmarks.serving.recovered import recovered_after
from benchmarks.serving.series import SERIES, add_cdf, add_timeline
from benchmarks.serving.workload import TEXT, Workload, make_jobs
from benchmarks.static.front import StaticService
from eep_jax.config import RunConfig
from eep_jax.placement.placement import EMPTY
from launch import flags
from launch.cluster import ClusterFailed, events_since, is_whole, rank_name
from launch.console import say
from launch.load import Pace, Target
from launch.timeline import Summary, summarise

SYSTEMS = ("elastic", "rejit", "restart")
AIMS = {"restart": 1 / 20, "rejit": 1 / 3}  # elastic's pause over theirs
DEADLINE_S = 240.0  # for a start, or for serving again


def define() -> None:
    command.define()
    f = absl_flags
    f.DEFINE_integer("ranks", None, "How many ranks; without it as configured.", 2)
    f.DEFINE_integer("victim", None, "Rank to kill, never 0; without it the middle one.", 1)
    f.DEFINE_integer("concurrency", 12, "Requests kept in flight.", 1)
    f.DEFINE_integer("output_len", 64, "Tokens of each answer.", 1)
    f.DEFINE_float("before_s", 5.0, "Load before the kill.", 0.5)
    f.DEFINE_float("after_s", 5.0, "Load after service is back.", 0.5)
    f.DEFINE_list("systems", list(SYSTEMS), "Which of them.")
    f.DEFINE_string("exchange", "all_to_all", "Exchange of the static ranks, see bench_static.")
    f.DEFINE_bool("rejoin", True, "Wait for the return of the killed elastic rank.")
    f.DEFINE_bool(
        "await_backups", False, "Kill once others have backups of what only the victim has."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """One system, harmed once."""

    load: Load
    truth: dict[int, str]
    marks: dict[str, float]
    status: dict | None = None  # of the elastic supervisor, at the end

    @property
    def summary(self) -> Summary:
        return summarise(self.load.times, self.marks)

    @property
    def counts(self) -> stats.Counts:
        return stats.count(self.load.samples, self.truth)


class Harmed:
    """A system under load: a service at `url`, a way to kill, and when it served again."""

    def __init__(self, url: str, kill, again, status: dict | None = None):
        self.url, self.kill, self.again, self.status = url, kill, again, status


def main() -> int:
    values = absl_flags.FLAGS
    systems = command.among("systems", SYSTEMS)
    config = flags.run_config()
    if values.ranks:
        config = with_ranks(config, values.ranks)
    victim = values.victim or max(1, config.cluster.ranks // 2)
    if victim >= config.cluster.ranks:
        raise flags.UsageError(f"--victim={victim} must be in 1..{config.cluster.ranks - 1}")
    gpus = flags.gpus() if config.platform == "gpu" else ()
    machine = machine_of(config.platform, config.cluster.ranks, gpus)
    sheet = Sheet("faults", machine.device, machine.ranks, _shape(config) | machine.facts)
    outcomes: dict[str, Outcome] = {}
    for name in systems:
        try:
            outcomes[name] = asyncio.run(_harm(name, config, machine, victim))
        except (ClusterFailed, RuntimeError, TimeoutError, OSError, Unfit) as error:
            # The others are measured all the same.
            say(f"{name}: no result: {error!r}", "bold red")
        except KeyboardInterrupt:
            say(f"{name}: no result: interrupted; what was measured before is kept", "bold red")
            break
        else:
            _report(name, outcomes[name])
    if not outcomes:
        return 1
    _add_records(sheet, outcomes)
    _print(sheet.records)
    command.keep(sheet.records)
    if len(outcomes) < len(systems):
        return 1
    return int("elastic" in outcomes and stats.broken(outcomes["elastic"].counts, config))


async def _harm(name: str, config: RunConfig, machine: Machine, victim: int) -> Outcome:
    values = absl_flags.FLAGS
    workload = Workload(output_tokens=values.output_len, distinct=16)
    jobs = make_jobs(workload, config.model.name, TEXT.read_text(encoding="utf-8"))
    say(f"{name}: starting {config.cluster.ranks} ranks")
    opened = (
        _elastic(config, victim) if name == "elastic" else _static(name, config, machine, victim)
    )
    async with opened as system:
        target, pace = Target(url=system.url), Pace(concurrency=values.concurrency)
        truth = {s.job: s.text for s in await unharmed(target, jobs, values.concurrency)}
        async with under_load(target, jobs, pace) as load:
            await asyncio.sleep(values.before_s)
            marks = {"kill": system.kill()}
            say(f"{name}: killed rank {victim} (SIGKILL)", "bold red")
            marks |= await asyncio.wait_for(system.again(marks["kill"]), DEADLINE_S)
            await asyncio.sleep(values.after_s)
    return Outcome(load=load, truth=truth, marks=marks, status=system.status)


@asynccontextmanager
async def _elastic(config: RunConfig, victim: int) -> AsyncIterator[Harmed]:
    values, more = absl_flags.FLAGS, []
    if values.ranks:
        cluster = config.cluster
        for field in ("ranks", "slots_per_rank", "redundancy"):
            more.append(f"--override=cluster.{field}={getattr(cluster, field)}")
    delay_ms = 1_000 if values.rejoin else -1
    cluster = own_cluster(config, respawn_delay_ms=delay_ms, more=more)

    async def again(kill_s: float) -> dict[str, float]:
        await cluster.wait_for(serves_again(victim), DEADLINE_S, "serving again", 20)
        if values.rejoin:
            await cluster.wait_for(is_whole, DEADLINE_S, f"the return of rank {victim}")
        harmed.status = await cluster.wait_for(has_record(kill_s), 30.0, "the record of the repair")
        return marks_of(kill_s, victim, harmed.status)

    async with started(cluster):
        if values.await_backups:
            what = f"a backup of every expert of rank {victim} alone"
            await cluster.wait_for(backed_up(victim), DEADLINE_S, what)
        harmed = Harmed(cluster.url, lambda: cluster.kill(rank_name(victim)), again)
        yield harmed


def backed_up(victim: int):
    """A check that others hold backups of all experts that the victim alone has in slots."""

    def check(status: dict) -> bool:
        rows = status["experts"]["placement"]
        elsewhere = set().union(*(row for rank, row in enumerate(rows) if rank != victim))
        needed = set(rows[victim]) - elsewhere - {EMPTY}
        kept = (set(r["backups"]) for r in status["ranks"] if r["rank"] != victim)
        return needed <= set().union(*kept)

    return check


def has_record(kill_s: float):
    """A check that the supervisor has its record of the repair after a kill."""
    return lambda status: repair_of(status, kill_s) is not None


def repair_of(status: dict, kill_s: float) -> dict | None:
    """The first change without a rank after the kill: seconds by phase, bytes by source."""
    events = (e for e in events_since(status, kill_s) if e["kind"] == "repair")
    return next((e for e in events if e["change"] == "repair"), None)


@asynccontextmanager
async def _service(name: str, config: RunConfig, machine: Machine) -> AsyncIterator[StaticService]:
    exchange = absl_flags.FLAGS.exchange
    with run_directory() as directory:
        async with StaticService(config, machine, name, exchange, directory.path) as service:
            yield service


@asynccontextmanager
async def _static(
    name: str, config: RunConfig, machine: Machine, victim: int
) -> AsyncIterator[Harmed]:
    async with _service(name, config, machine) as service:

        async def serving() -> None:
            try:
                await asyncio.wait_for(service.serving.wait(), DEADLINE_S)
            except TimeoutError:
                tail = service.log_tail()
                raise RuntimeError(f"not serving after {DEADLINE_S:.0f} s:\n{tail}") from None

        async def again(kill_s: float) -> dict[str, float]:
            while not any(kind == "detected" for kind, at_s in service.events if at_s >= kill_s):
                await asyncio.sleep(0.005)
            await serving()
            found: dict[str, float] = {}
            for kind, at_s in service.events:
                if at_s >= kill_s:
                    found.setdefault(kind, at_s)
            if name == "restart":  # all ranks are new
                found |= {"return_start": found["resumed"], "returned": found["resumed"]}
            return found

        await serving()
        yield Harmed(service.url, lambda: service.kill(victim), again)


def _report(name: str, outcome: Outcome) -> None:
    counts = outcome.counts
    say(
        f"{name}: {outcome.summary.recovery_pause_s:.3f} s without service; "
        f"{counts.completed} requests completed, {counts.lost} lost, {counts.wrong} changed"
    )


def _shape(config: RunConfig) -> dict:
    model, values = config.model, absl_flags.FLAGS
    return {
        "config": config.name,
        "redundancy": config.cluster.redundancy,
        "hidden": model.hidden,
        "layers": model.layers,
        "experts": model.experts,
        "requests": values.concurrency,
        "output_len": values.output_len,
        "exchange": values.exchange,
    }


def _add_records(sheet: Sheet, outcomes: dict[str, Outcome]) -> None:
    """For each system its pause, losses and rates, and the curves; elastic's pause twice, once
    against each baseline."""

    def add(metric: str, value: float | None, unit: str = "", **more) -> None:
        if value is not None:
            sheet.add(metric, value, unit, **more, samples=1)

    pauses = {name: outcome.summary.recovery_pause_s for name, outcome in outcomes.items()}
    for name, outcome in outcomes.items():
        counts, marks, summary = outcome.counts, outcome.marks, outcome.summary
        against = [b for b in AIMS if name == "elastic" and b in pauses]
        for other in against:
            add(f"pause_s {name}", pauses[name], "s", baseline=pauses[other], against=other)
        if not against:
            add(f"pause_s {name}", pauses[name], "s")
        add(f"detection_s {name}", summary.detection_s, "s")
        resumed_s = marks.get("resumed")
        recovered = recovered_after(outcome.load.tokens, marks["kill"], resumed_s=resumed_s)
        add(f"recovered_s {name}", recovered, "s")
        add(f"return_pause_s {name}", summary.return_gap_s, "s")
        for metric, value, unit in _repair_figures(outcome):
            add(f"{metric} {name}", value, unit)
        add(f"requests_lost {name}", counts.lost + counts.refused)
        add(f"answers_changed {name}", counts.wrong)
        add(f"before_tokens_per_s {name}", summary.before_tokens_per_s, "tokens/s")
        add_timeline(sheet, name, outcome.load.tokens, marks)
        for latency, seconds in stats.measured(outcome.load.samples).items():
            if seconds and latency in ("e2e", "itl"):
                add_cdf(sheet, name, latency, seconds)


def _repair_figures(outcome: Outcome):
    """The supervisor's record of the repair: seconds by phase, bytes by source, compilations."""
    if outcome.status is None:
        return
    repair = repair_of(outcome.status, outcome.marks["kill"])
    for phase, seconds in repair["seconds"].items():
        if phase != "load":  # of a rank that comes in
            yield f"phase_{phase}_s", seconds, "s"
    for source, count in repair["bytes"].items():
        yield f"bytes_{source}", float(count), "bytes"
    compiled = sum(r["compilations_after_start"] for r in outcome.status["ranks"])
    yield "compilations", float(compiled), ""


def _print(records: list[Record]) -> None:
    rows = []
    for r in (r for r in records if r.metric not in SERIES):
        against = r.shape.get("against", "")
        aim = f"{AIMS[against]:.3f}" if against else ""
        ratio = command.number(r.ratio, ".4f")
        rows.append([r.metric, f"{r.value:.4g}", r.unit, against, ratio, aim])
    title = f"{records[0].device}; {records[0].ranks} ranks"
    command.show(title, "metric|>value|unit|against|>ratio|>aim", rows)


if __name__ == "__main__":
    define()
    command.run(main)
