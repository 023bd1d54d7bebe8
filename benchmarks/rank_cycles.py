"""Kills and returns of ranks on one cluster under load, and full restarts of it to compare with.

1. Every prompt once, unharmed: these completions are the truth.
2. The whole cluster is ended and started again, until it gives a token: the baseline.
3. Under load, each rank in turn is killed with SIGKILL, and after a while started again.
4. Every completion of 3 is compared with 1. Only if all are equal is any number returned; but with
   drawn weights on a GPU, where a request that is read again may flip a tie, others are counted.
"""

import asyncio
import contextlib
import dataclasses
import pathlib
import shutil
import signal
import subprocess
import tempfile
import time

import aiohttp
from absl import flags as absl_flags
from rich.console import Console
from rich.table import Table

from benchmarks.harness import Record, append, commit, compared, cpu_device, now, percentile
from benchmarks.serving.statistics import texts_repeat
from eep_jax.config import RunConfig
from launch import flags
from launch.cluster import ClusterFailed, LocalCluster, events_since, is_whole, rank_name
from launch.console import say
from launch.demo import prompts
from launch.load import Result, run_load, run_once
from launch.timeline import summarise

WHOLE_S, REDUCED_S, AFTER_S = 2.5, 4.0, 1.0  # how long each state is measured
DEADLINE_S = 600.0  # for each state to be reached; GPU ranks may compile for minutes
PAUSES = (
    "agree",
    "detach",
    "fetch",
    "commit",
    "first_step",
)  # of an admission: runtime/history/change_costs.py
RECORD_S = 15.0  # for the supervisor to have the record of a change


def define_flags() -> None:
    """Of the process that is started, not of one that imports a benchmark."""
    absl_flags.DEFINE_integer("cycles", 20, "How many kills; ranks take turns.", 1)
    absl_flags.DEFINE_integer("restarts", 3, "How many full restarts, the baseline.", 1)
    absl_flags.DEFINE_integer("concurrency", 12, "Requests kept in flight.", 1)
    absl_flags.DEFINE_string("out", None, "File of records to append to; none: only the table.")


class Unfit(Exception):
    """A promise was broken during the measurement, so its numbers mean nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cycle:
    """One kill and return. Seconds, or tokens per second."""

    kill_s: float  # on the monotonic clock
    detection: float  # kill to the supervisor's verdict
    pause: float  # kill to the token that ends the stop
    rate_whole: float  # before the kill
    rate_reduced: float  # from the commit without the rank until its new process starts
    steady_gap: float  # longest time without a token before the kill
    return_pause: float  # longest time without a token while it is admitted
    rate_preparing: float  # from the start of the new process until it is admitted
    phases: dict[str, float]  # of the return, from process start to serving
    repair: dict  # the supervisor's record of the change without the rank
    admission: dict  # that of the change that took it back


class Load:
    """Completions in flight from `start` to `finish`, and when each token came."""

    def __init__(self, url: str, jobs: list[dict], concurrency: int):
        self.times: list[float] = []
        self._enough = asyncio.Event()
        note = lambda at_s, count: self.times.extend([at_s] * count)
        self._running = asyncio.create_task(run_load(url, jobs, concurrency, self._enough, note))

    async def finish(self) -> list[Result]:
        self._enough.set()
        return await self._running


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a run found; `rows` collects records from it."""

    config: RunConfig
    restarts: list[float]  # seconds
    cycles: list[Cycle]
    answers: "Answers"

    def rows(self) -> "Rows":
        rows = Rows(self.config)
        rows.add("restart", "first_token_s", self.restarts, "s")
        if not texts_repeat(self.config):
            for name, count in dataclasses.asdict(self.answers).items():
                rows.add("answers", name, [float(count)], "")
        return rows

    @property
    def restart(self) -> float:
        """Seconds of the median full restart."""
        return percentile(self.restarts, 50)

    def of(self, name: str) -> list[float]:
        return [getattr(cycle, name) for cycle in self.cycles]


@dataclasses.dataclass(frozen=True)
class Answers:
    """How many completions there were, and how many were not as unharmed."""

    completed: int
    changed: int
    changed_before_a_kill: int  # of these: no kill came before what differs


class Rows:
    """Records of one run; each quantity gives its median, 90 % and largest value."""

    def __init__(self, config: RunConfig):
        model, self.records = config.model, []
        self._shape = {
            "config": config.name,
            "hidden": model.hidden,
            "layers": model.layers,
            "experts": model.experts,
            "top_k": model.experts_per_token,
            "redundancy": config.cluster.redundancy,
            "requests": absl_flags.FLAGS.concurrency,
        }
        self._common = {"ranks": config.cluster.ranks, "commit": commit(), "time": now()}
        self._common["device"] = gpu_name() if config.platform == "gpu" else cpu_device()

    def add(
        self,
        bench: str,
        name: str,
        values: list[float],
        unit: str,
        baseline: float | None = None,
        bound: float | None = None,
    ) -> None:
        for label, value in (
            ("p50", percentile(values, 50)),
            ("p90", percentile(values, 90)),
            ("max", max(values)),
        ):
            self.records.append(
                Record(
                    bench=bench,
                    metric=f"{name} {label}",
                    value=value,
                    unit=unit,
                    bound=bound,
                    shape=self._shape | {"samples": len(values)},
                    **compared(baseline, value),
                    **self._common,
                )
            )


def gpu_name() -> str:
    """Of the first GPU that ranks use, as JAX calls it; this process loads no JAX."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", f"--id={flags.gpus()[0]}"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return said.stdout.strip().splitlines()[0] if said.returncode == 0 else "an NVIDIA GPU"


def run(make_rows) -> int:
    """Measures as the flags say; prints and keeps what `make_rows(measured)` makes of it."""
    config = flags.run_config()
    arguments = flags.forwarded() + (["--port=0"] if flags.PORT.value is None else [])
    run_dir = pathlib.Path(flags.RUN_DIR.value or tempfile.mkdtemp(prefix="eep-bench-"))
    ranks, nice = config.cluster.ranks, config.cluster.joiner_nice
    cluster = LocalCluster(arguments, ranks, str(run_dir), -1, nice)
    try:
        measured = asyncio.run(_measure(cluster, config))
    except (ClusterFailed, Unfit) as error:
        say(f"no result: {error}", "bold red")
        say(f"logs: {run_dir}/logs")
        return 1
    finally:
        cluster.stop()
    records = make_rows(measured).records
    show(records)
    if out := absl_flags.FLAGS.out:
        append(pathlib.Path(out), records)
        say(f"appended {len(records)} records to {out}")
    if flags.RUN_DIR.value is None:
        shutil.rmtree(run_dir, ignore_errors=True)
    return 0


def show(records: list[Record]) -> None:
    first = records[0]
    table = Table(title=f"{first.device}; {first.ranks} ranks", title_justify="left")
    for name in ("bench", "metric", "p50", "p90", "max", "unit", "compared with", "ratio"):
        table.add_column(name, justify="right" if name[0] == "p" or name == "max" else "left")
    for p50, p90, most in zip(records[::3], records[1::3], records[2::3], strict=True):
        name = p50.metric.removesuffix(" p50")
        numbers = [f"{r.value:.4g}" for r in (p50, p90, most)]
        base = "" if p50.baseline is None else f"{p50.baseline:.4g}"
        ratio = "" if p50.ratio is None else f"{p50.ratio:.4g}"
        table.add_row(p50.bench, name, *numbers, p50.unit, base, ratio)
    Console(highlight=False, width=110).print(table, markup=False)


async def _measure(cluster: LocalCluster, config: RunConfig) -> "Measured":
    jobs = prompts(config.model.name)
    async with _started(cluster):
        say(f"{len(jobs)} prompts, unharmed")
        truth = await run_once(cluster.url, jobs, absl_flags.FLAGS.concurrency)
        judge_answers(truth, truth, [], config)
    restarts, wanted = [], absl_flags.FLAGS.restarts
    for number in range(wanted):
        restarts.append(await _restart(cluster, jobs))
        say(f"full restart {number + 1}/{wanted}: {restarts[-1]:.2f} s until a token")
    async with _started(cluster):
        load = Load(cluster.url, jobs, absl_flags.FLAGS.concurrency)
        cycles = []
        try:
            for number in range(absl_flags.FLAGS.cycles):
                victim = number % config.cluster.ranks
                cycles.append(await _cycle(cluster, load.times, victim))
                say(
                    f"cycle {number + 1}/{absl_flags.FLAGS.cycles}: rank {victim} detected after "
                    f"{cycles[-1].detection * 1e3:.0f} ms, pause {cycles[-1].pause:.3f} s, "
                    f"return pause {cycles[-1].return_pause:.3f} s"
                )
        finally:
            results = await load.finish()
        answers = judge_answers(results, truth, [cycle.kill_s for cycle in cycles], config)
        _require_no_compilation(await _status(cluster))
    if answers.changed:
        say(
            f"{answers.completed} completions, {answers.changed} of them not as unharmed, "
            f"{answers.changed_before_a_kill} in what no kill came before",
            "bold yellow",
        )
    else:
        say(f"{answers.completed} completions, all equal to the unharmed ones")
    return Measured(config, restarts, cycles, answers)


@contextlib.asynccontextmanager
async def _started(cluster: LocalCluster):
    """The cluster, started and whole; all its processes end with the body."""
    if not cluster.children or cluster.children["supervisor"].process.poll() is not None:
        cluster.start()
    watch = asyncio.create_task(cluster.watch())
    try:
        await cluster.wait_for(is_whole, DEADLINE_S, "the start of all ranks")
        yield
    finally:
        watch.cancel()  # else it would bring the supervisor back
        await asyncio.gather(watch, return_exceptions=True)


async def _restart(cluster: LocalCluster, jobs: list[dict]) -> float:
    """Ends all processes and starts them again; returns seconds from the end to the next token."""
    url, served, begin_s = cluster.url, asyncio.Event(), time.monotonic()
    await asyncio.to_thread(cluster.stop)
    cluster.start()
    first_s: list[float] = []

    def note(at_s: float, count: int) -> None:
        if count:
            first_s.append(at_s)
            served.set()

    probe = asyncio.create_task(run_load(url, jobs[:1], 1, served, note))
    async with _started(cluster):
        await asyncio.wait_for(probe, DEADLINE_S)
    return first_s[0] - begin_s


async def _cycle(cluster: LocalCluster, times: list[float], victim: int) -> Cycle:
    """Kills a rank, serves without it, starts it again."""
    first_s, name, ended_before = time.monotonic(), rank_name(victim), len(cluster.exits)

    def killed(status: dict) -> bool:
        _require_no_other_death(cluster, ended_before, name)
        return status["ranks"][victim]["state"] == "absent" and status["state"] == "serving"

    def returned(status: dict) -> bool:
        _require_no_other_death(cluster, ended_before, name)
        return is_whole(status)

    await asyncio.sleep(WHOLE_S)
    _require_no_compilation(await _status(cluster))
    kill_s = cluster.kill(name)
    await cluster.wait_for(killed, DEADLINE_S, f"an epoch without {name}", poll_ms=20)
    await asyncio.sleep(REDUCED_S)
    repair = await _record(cluster, kill_s, lambda r: r["change"] == "repair")
    start_s = time.monotonic()
    cluster.start_rank(victim)
    await cluster.wait_for(returned, DEADLINE_S, f"the return of {name}")
    await asyncio.sleep(AFTER_S)
    admission = await _record(cluster, start_s, lambda r: str(victim) in r["starts"])
    events = events_since(await _status(cluster), kill_s)
    seen = sorted(t for t in times if t >= first_s)
    return _judge(seen, events, victim, kill_s, start_s, repair, admission)


async def _record(cluster: LocalCluster, begin_s: float, wanted) -> dict:
    """The supervisor's record of a change: it comes once all ranks have told of theirs."""

    def find(status: dict) -> dict | None:
        records = [e for e in events_since(status, begin_s) if e["kind"] == "repair"]
        return next((record for record in records if wanted(record)), None)

    return find(await cluster.wait_for(find, RECORD_S, "the record of the change"))


def _judge(
    times: list[float],
    events: list[dict],
    victim: int,
    kill_s: float,
    start_s: float,
    repair: dict,
    admission: dict,
) -> Cycle:
    of_victim = lambda e: e.get("rank") == victim
    inside = lambda e: str(victim) in e["members"]
    detected = _first(events, "dead", of_victim)
    resumed = _first(events, "commit", lambda e: not inside(e))
    returned = _first(events, "commit", inside)
    # An admission that was given up is followed by another; the last one led to the commit.
    asked = [e["at_s"] for e in events if e["kind"] == "prepare" and e["at_s"] <= returned]
    marks = {"kill": kill_s, "detected": detected, "resumed": resumed, "return_start": asked[-1]}
    summary = summarise(times, marks | {"returned": returned})
    reduced = [t for t in times if resumed <= t < start_s]
    new = [e for e in events if e["at_s"] >= start_s]
    known, offered = _first(new, "incarnation", of_victim), _first(new, "offered", of_victim)
    preparing = [t for t in times if start_s <= t < asked[-1]]
    start = admission["starts"][str(victim)]
    phases = {
        "known_s": known - start_s,
        "offered_s": offered - known,
        **{f"start_{name}_s": seconds for name, seconds in start["seconds"].items()},
        "experts_s": asked[-1] - offered,
        "load_s": admission["seconds"]["load"],
        "serving_s": returned - asked[-1],
        "total_s": returned - start_s,
    }
    return Cycle(
        kill_s=kill_s,
        detection=summary.detection_s,
        pause=summary.recovery_pause_s,
        rate_whole=summary.before_tokens_per_s,
        rate_reduced=len(reduced) / (start_s - resumed),
        steady_gap=summary.steady_gap_s,
        return_pause=summary.return_gap_s,
        rate_preparing=len(preparing) / (asked[-1] - start_s),
        phases=phases,
        repair=repair,
        admission=admission,
    )


def _first(events: list[dict], kind: str, wanted) -> float:
    found = [e["at_s"] for e in events if e["kind"] == kind and wanted(e)]
    if not found:
        raise Unfit(f"no event {kind!r} of this cycle among {[e['kind'] for e in events]}")
    return found[0]


def judge_answers(
    results: list[Result], truth: list[Result], kills: list[float], config: RunConfig
) -> Answers:
    """Raises Unfit for what broke a promise: a request that was lost or is not whole, or another
    text than unharmed where texts repeat (see `texts_repeat`)."""
    changed = []
    for result in results:
        right = truth[result.job]
        if result.error is not None:
            raise Unfit(f"a request was lost: {result.error}")
        if result.text != right.text:
            if texts_repeat(config):
                raise Unfit(f"prompt {result.job} gave another text: {result.text!r}")
            changed.append(result)
        if result.finish_reason != right.finish_reason:
            raise Unfit(f"prompt {result.job} ended by {result.finish_reason}, too early or late")
    early = [r for r in changed if _differs_before(r, truth[r.job].text, kills)]
    return Answers(len(results), len(changed), len(early))


def _differs_before(result: Result, right: str, kills: list[float]) -> bool:
    """Whether it differs in what arrived before any rank was killed while it was under way."""
    harmed = [kill_s for kill_s in kills if result.start_s <= kill_s <= result.end_s]
    if not harmed:
        return True
    arrived = sum(at_s < min(harmed) for at_s in result.token_times)
    found, wanted = (
        text.replace("\ufffd", "?").encode()[:arrived] for text in (result.text, right)
    )
    return found != wanted


def _require_no_other_death(cluster: LocalCluster, ended_before: int, victim: str) -> None:
    ended = [(name, status) for _, name, status in cluster.exits[ended_before:]]
    if ended and ended != [(victim, -signal.SIGKILL)]:
        raise Unfit(f"processes ended with these statuses, only {victim} was killed: {ended}")


def _require_no_compilation(status: dict) -> None:
    compiled = {r["rank"]: r["compilations_after_start"] for r in status["ranks"]}
    if any(compiled.values()):
        raise Unfit(f"ranks compiled while they served: {compiled}")


async def _status(cluster: LocalCluster) -> dict:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5.0)) as session:
        status = await cluster.status(session)
    if status is None:
        raise Unfit("the supervisor does not answer")
    return status
