"""What one SIGKILL costs: elastic ranks, JAX's own shrink-and-re-jit, and a full restart.

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
import pathlib
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from absl import app
from absl import flags as absl_flags
from rich.console import Console
from rich.table import Table

from benchmarks.harness import Record, append, commit, compared, now
from benchmarks.serving import statistics as stats
from benchmarks.serving.client import Pace, Sample, Target, run
from benchmarks.serving.own_cluster import marks_of, serves_again, started
from benchmarks.serving.recovered import recovered_after
from benchmarks.serving.series import cdf_record, timeline_record
from benchmarks.serving.workload import TEXT, Workload, make_jobs
from benchmarks.static.front import StaticService
from benchmarks.static.processes import with_ranks
from benchmarks.wide.workers import Machine
from eep_jax.config import RunConfig
from eep_jax.placement.placement import EMPTY
from launch import flags
from launch.cluster import ClusterFailed, LocalCluster, events_since, is_whole, rank_name
from launch.console import say
from launch.timeline import Summary, summarise

SYSTEMS = ("elastic", "rejit", "restart")
AIMS = {"restart": 1 / 20, "rejit": 1 / 3}  # elastic's pause over theirs
DEADLINE_S = 240.0  # for a start, or for serving again


def define() -> None:
    """Of the process that is started, not of one that imports this."""
    f = absl_flags
    f.DEFINE_integer("ranks", None, "How many ranks; else as configured.", 2)
    f.DEFINE_integer("victim", None, "Which rank is killed; else the middle one, never 0.", 1)
    f.DEFINE_integer("concurrency", 12, "Requests kept in flight.", 1)
    f.DEFINE_integer("output_len", 64, "Tokens of each answer.", 1)
    f.DEFINE_float("before_s", 5.0, "Load before the kill.", 0.5)
    f.DEFINE_float("after_s", 5.0, "Load after service is back.", 0.5)
    f.DEFINE_list("systems", list(SYSTEMS), "Which of them.")
    f.DEFINE_string("exchange", "all_to_all", "Of the static ranks, see bench_static.")
    f.DEFINE_bool("rejoin", True, "Wait for the return of the killed elastic rank.")
    f.DEFINE_bool(
        "await_backups", False, "Kill once others have backups of what only the victim has."
    )
    f.DEFINE_string("out", None, "File of records to append to; none: only the table.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """One system, harmed once."""

    samples: list[Sample]
    truth: dict[int, str]
    times: list[tuple[float, int]]  # (monotonic s, tokens)
    marks: dict[str, float]
    summary: Summary
    status: dict | None = None  # of the elastic supervisor, at the end


class Harmed:
    """A system under load: a service at `url`, a way to kill, and when it served again."""

    def __init__(self, url: str, kill, again, status: dict | None = None):
        self.url, self.kill, self.again, self.status = url, kill, again, status


def main() -> int:
    values = absl_flags.FLAGS
    if unknown := sorted(set(values.systems) - set(SYSTEMS)):
        raise flags.UsageError(f"--systems: {unknown} are not among {list(SYSTEMS)}")
    config = flags.run_config()
    if values.ranks:
        config = with_ranks(config, values.ranks)
    victim = values.victim or max(1, config.cluster.ranks // 2)
    if victim >= config.cluster.ranks:
        raise flags.UsageError(f"--victim={victim} must be in 1..{config.cluster.ranks - 1}")
    before, outcomes, failed = (commit(), now()), {}, []
    for name in [s for s in SYSTEMS if s in values.systems]:
        try:
            outcomes[name] = asyncio.run(_harm(name, config, victim))
        except (ClusterFailed, RuntimeError, TimeoutError, OSError) as error:
            # The others are measured all the same.
            say(f"{name}: no result: {error!r}", "bold red")
            failed.append(name)
        except KeyboardInterrupt:
            say(f"{name}: no result: interrupted; what was measured before is kept", "bold red")
            failed += [s for s in SYSTEMS if s in values.systems and s not in outcomes]
            break
        else:
            _tell(name, outcomes[name])
    if not outcomes:
        return 1
    records = _records(config, outcomes, *before)
    _print(records)
    if values.out:
        append(pathlib.Path(values.out), records)
        say(f"appended {len(records)} records to {values.out}")
    if failed or "elastic" not in outcomes:
        return 1 if failed else 0
    counts = stats.count(outcomes["elastic"].samples, outcomes["elastic"].truth)
    return 1 if stats.broken(counts, config) else 0


async def _harm(name: str, config: RunConfig, victim: int) -> Outcome:
    values = absl_flags.FLAGS
    workload = Workload(output_tokens=values.output_len, distinct=16)
    jobs = make_jobs(workload, config.model.name, TEXT.read_text(encoding="utf-8"))
    say(f"{name}: starting {config.cluster.ranks} ranks")
    async with (_elastic if name == "elastic" else _static)(name, config, victim) as system:
        target, pace = Target(url=system.url), Pace(concurrency=values.concurrency)
        unharmed = await run(target, jobs, pace, count=len(jobs))
        if lost := [s.error for s in unharmed if s.error is not None]:
            raise RuntimeError(f"a request was lost while nothing was wrong: {lost[0]}")
        times: list[tuple[float, int]] = []
        note = lambda at_s, count: times.append((at_s, count))
        enough = asyncio.Event()
        load = asyncio.create_task(run(target, jobs, pace, until=enough, on_token=note))
        try:
            await asyncio.sleep(values.before_s)
            marks = {"kill": system.kill()}
            say(f"{name}: killed rank {victim} (SIGKILL)", "bold red")
            marks |= await asyncio.wait_for(system.again(marks["kill"]), DEADLINE_S)
            await asyncio.sleep(values.after_s)
        finally:
            enough.set()
            samples = await load
    every = [at_s for at_s, count in times for _ in range(count)]
    return Outcome(
        samples=samples,
        truth={s.job: s.text for s in unharmed},
        times=times,
        marks=marks,
        summary=summarise(every, marks),
        status=system.status,
    )


@asynccontextmanager
async def _elastic(name: str, config: RunConfig, victim: int) -> AsyncIterator[Harmed]:
    values = absl_flags.FLAGS
    arguments = flags.forwarded() + (["--port=0"] if flags.PORT.value is None else [])
    if values.ranks:
        cluster = config.cluster
        for field in ("ranks", "slots_per_rank", "redundancy"):
            arguments.append(f"--override=cluster.{field}={getattr(cluster, field)}")
    delay_ms = 1_000 if values.rejoin else -1
    cluster = LocalCluster(arguments, config.cluster.ranks, None, respawn_delay_ms=delay_ms)

    async def again(kill_s: float) -> dict[str, float]:
        await cluster.wait_for(serves_again(victim), DEADLINE_S, "serving again", 20)
        if values.rejoin:
            await cluster.wait_for(is_whole, DEADLINE_S, f"the return of rank {victim}")
        harmed.status = await cluster.wait_for(told_of(kill_s), 30.0, "the record of the repair")
        return marks_of(kill_s, victim, harmed.status)

    async with started(cluster):
        if values.await_backups:
            what = f"a backup of every expert of rank {victim} alone"
            await cluster.wait_for(backed_up(victim), DEADLINE_S, what)
        harmed = Harmed(cluster.url, lambda: cluster.kill(rank_name(victim)), again)
        yield harmed


def backed_up(victim: int):
    """Whether others than the victim have all experts in host memory that it alone has in slots."""

    def check(status: dict) -> bool:
        rows = status["experts"]["placement"]
        elsewhere = set().union(*(row for rank, row in enumerate(rows) if rank != victim))
        needed = set(rows[victim]) - elsewhere - {EMPTY}
        kept = (set(r["backups"]) for r in status["ranks"] if r["rank"] != victim)
        return needed <= set().union(*kept)

    return check


def told_of(kill_s: float):
    """Whether the supervisor has its record of the repair after a kill."""
    return lambda status: repair_of(status, kill_s) is not None


def repair_of(status: dict, kill_s: float) -> dict | None:
    """The first change without a rank after the kill: seconds by phase, bytes by source."""
    events = (e for e in events_since(status, kill_s) if e["kind"] == "repair")
    return next((e for e in events if e["change"] == "repair"), None)


@asynccontextmanager
async def _static(name: str, config: RunConfig, victim: int) -> AsyncIterator[Harmed]:
    directory = pathlib.Path(tempfile.mkdtemp(prefix="eep-static-"))
    exchange = absl_flags.FLAGS.exchange
    async with StaticService(config, name, exchange, directory) as service:

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
    shutil.rmtree(directory, ignore_errors=True)


def _tell(name: str, outcome: Outcome) -> None:
    counts = stats.count(outcome.samples, outcome.truth)
    say(
        f"{name}: {outcome.summary.recovery_pause_s:.3f} s without service; "
        f"{counts.completed} requests completed, {counts.lost} lost, {counts.wrong} changed"
    )


def _records(config: RunConfig, outcomes: dict[str, Outcome], commit: str, time: str):
    """For each system its pause, losses and rates, and the curves; elastic's pause twice, once
    against each baseline."""
    model, values = config.model, absl_flags.FLAGS
    gpus = flags.gpus()[: config.cluster.ranks] if config.platform == "gpu" else ()
    machine = Machine(config.platform, config.cluster.ranks, gpus)
    device = machine.device
    shape = {
        "config": config.name,
        "redundancy": config.cluster.redundancy,
        **machine.facts,
        "hidden": model.hidden,
        "layers": model.layers,
        "experts": model.experts,
        "requests": values.concurrency,
        "output_len": values.output_len,
        "exchange": values.exchange,
    }
    common = {"device": device, "ranks": config.cluster.ranks, "commit": commit, "time": time}
    records: list[Record] = []

    def add(metric: str, value: float | None, unit: str, against: str | None = None, **more):
        if value is not None:
            told = shape | ({"against": against} if against else {}) | {"samples": 1}
            kept = common | {"shape": told} | more
            records.append(Record(bench="faults", metric=metric, value=value, unit=unit, **kept))

    pauses = {name: outcome.summary.recovery_pause_s for name, outcome in outcomes.items()}
    for name, outcome in outcomes.items():
        counts = stats.count(outcome.samples, outcome.truth)
        against = [b for b in AIMS if name == "elastic" and b in pauses] or [None]
        for baseline in against:
            more = compared(pauses[baseline], pauses[name]) if baseline else {}
            add(f"pause_s {name}", pauses[name], "s", baseline, **more)
        add(f"detection_s {name}", outcome.summary.detection_s, "s")
        marks = outcome.marks
        recovered = recovered_after(outcome.times, marks["kill"], resumed_s=marks.get("resumed"))
        add(f"recovered_s {name}", recovered, "s")
        add(f"return_pause_s {name}", outcome.summary.return_gap_s, "s")
        for metric, value, unit in _repair_figures(outcome):
            add(f"{metric} {name}", value, unit)
        add(f"requests_lost {name}", counts.lost + counts.refused, "")
        add(f"answers_changed {name}", counts.wrong, "")
        add(f"before_tokens_per_s {name}", outcome.summary.before_tokens_per_s, "tokens/s")
        kept = common | {"shape": shape}
        records.append(timeline_record("faults", name, outcome.times, outcome.marks, kept))
        for latency, seconds in stats.measured(outcome.samples).items():
            if seconds and latency in ("e2e", "itl"):
                records.append(cdf_record("faults", name, latency, seconds, kept))
    return records


def _repair_figures(outcome: Outcome):
    """What the supervisor says of the repair: seconds by phase, bytes by source, compilations."""
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
    first = records[0]
    table = Table(title=f"{first.device}; {first.ranks} ranks", title_justify="left")
    for name in ("metric", "value", "unit", "against", "ratio", "aim"):
        table.add_column(name, justify="right" if name in ("value", "ratio", "aim") else "left")
    for r in records:
        if r.metric in ("timeline", "cdf"):
            continue
        against = r.shape.get("against", "")
        aim = f"{AIMS[against]:.3f}" if against else ""
        ratio = "" if r.ratio is None else f"{r.ratio:.4f}"
        table.add_row(r.metric, f"{r.value:.4g}", r.unit, against, ratio, aim)
    Console(highlight=False, width=110).print(table, markup=False)


if __name__ == "__main__":
    define()
    sys.exit(app.run(flags.main_with_usage(main)))
