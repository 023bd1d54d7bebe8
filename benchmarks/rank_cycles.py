"""Kills and returns of ranks on one cluster under load, and full restarts of it to compare with.

1. Every prompt once, unharmed: these completions are the truth.
2. The whole cluster is ended and started again, until it gives a token: the baseline.
3. Under load, each rank in turn is killed with SIGKILL, and after a while started again.
4. Every completion of 3 is compared with 1. Only if all are equal is any number returned; but with
   drawn weights on a GPU, where a request that is read again may flip a tie, others are counted.
"""

import asyncio
import dataclasses
import signal
import time

from absl import flags as absl_flags

from benchmarks import command
from benchmarks.harness import Record, Sheet, Unfit, cpu_device, gpu_device, percentile
from benchmarks.serving.own_cluster import (
    Load,
    own_cluster,
    started,
    status_of,
    under_load,
    unharmed,
)
from benchmarks.serving.statistics import texts_repeat
from eep_jax.config import RunConfig
from launch import flags
from launch.cluster import ClusterFailed, LocalCluster, events_since, is_whole, rank_name
from launch.console import say
from launch.demo import prompts
from launch.load import Pace, Sample, Target, run_load
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


def define() -> None:
    command.define()
    absl_flags.DEFINE_integer("cycles", 20, "How many kills; ranks take turns.", 1)
    absl_flags.DEFINE_integer("restarts", 3, "How many full restarts, the baseline.", 1)
    absl_flags.DEFINE_integer("concurrency", 12, "Requests kept in flight.", 1)


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


@dataclasses.dataclass(frozen=True)
class Measured:
    """The result of a run; `rows` collects records from it."""

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
    """Numbers of completions, and of those that differ from the unharmed ones."""

    completed: int
    changed: int
    changed_before_a_kill: int  # of these: no kill came before what differs


class Rows:
    """Records of one run; each quantity gives its median, 90 % and largest value."""

    def __init__(self, config: RunConfig):
        model = config.model
        shape = {
            "config": config.name,
            "hidden": model.hidden,
            "layers": model.layers,
            "experts": model.experts,
            "top_k": model.experts_per_token,
            "redundancy": config.cluster.redundancy,
            "requests": absl_flags.FLAGS.concurrency,
        }
        device = gpu_device(flags.gpus()[0]) if config.platform == "gpu" else cpu_device()
        self._sheet = Sheet("", device, config.cluster.ranks, shape)

    @property
    def records(self) -> list[Record]:
        return self._sheet.records

    def add(self, bench: str, name: str, values: list[float], unit: str = "", **beside) -> None:
        """`beside` are the baseline and the bound."""
        for label, value in (
            ("p50", percentile(values, 50)),
            ("p90", percentile(values, 90)),
            ("max", max(values)),
        ):
            metric, samples = f"{name} {label}", len(values)
            self._sheet.add(metric, value, unit, bench=bench, samples=samples, **beside)


def run(make_rows) -> list[Record]:
    """Measures as the flags say; prints and returns the records of `make_rows(measured)`."""
    config = flags.run_config()
    cluster = own_cluster(config, flags.RUN_DIR.value)
    try:
        measured = asyncio.run(_measure(cluster, config))
    except (ClusterFailed, Unfit) as error:
        cluster.keep_run_dir()
        raise Unfit(f"{error}; logs: {cluster.run_dir}/logs") from error
    finally:
        cluster.stop()
    records = make_rows(measured).records
    show(records)
    return records


def show(records: list[Record]) -> None:
    rows = []
    for p50, p90, most in zip(records[::3], records[1::3], records[2::3], strict=True):
        numbers = [f"{r.value:.4g}" for r in (p50, p90, most)]
        beside = [p50.unit, command.number(p50.baseline), command.number(p50.ratio)]
        rows.append([p50.bench, p50.metric.removesuffix(" p50"), *numbers, *beside])
    title = f"{records[0].device}; {records[0].ranks} ranks"
    command.show(title, "bench|metric|>p50|>p90|>max|unit|compared with|ratio", rows)


async def _measure(cluster: LocalCluster, config: RunConfig) -> Measured:
    jobs, values = prompts(config.model.name), absl_flags.FLAGS
    pace = Pace(concurrency=values.concurrency)
    async with started(cluster, DEADLINE_S, stops=False):
        say(f"{len(jobs)} prompts, unharmed")
        target = Target(url=cluster.url, may_be_empty=True)
        truth = await unharmed(target, jobs, values.concurrency)
    restarts = []
    for number in range(values.restarts):
        restarts.append(await _restart(cluster, jobs))
        say(f"full restart {number + 1}/{values.restarts}: {restarts[-1]:.2f} s until a token")
    cycles = []
    async with started(cluster, DEADLINE_S, stops=False):
        async with under_load(dataclasses.replace(target, url=cluster.url), jobs, pace) as load:
            for number in range(values.cycles):
                victim = number % config.cluster.ranks
                cycles.append(await _cycle(cluster, load, victim))
                say(
                    f"cycle {number + 1}/{values.cycles}: rank {victim} detected after "
                    f"{cycles[-1].detection * 1e3:.0f} ms, pause {cycles[-1].pause:.3f} s, "
                    f"return pause {cycles[-1].return_pause:.3f} s"
                )
        kills = [cycle.kill_s for cycle in cycles]
        answers = judge_answers(load.samples, truth, kills, config)
        _require_no_compilation(await status_of(cluster))
    if answers.changed:
        say(
            f"{answers.completed} completions, {answers.changed} of them not as unharmed, "
            f"{answers.changed_before_a_kill} in what no kill came before",
            "bold yellow",
        )
    else:
        say(f"{answers.completed} completions, all equal to the unharmed ones")
    return Measured(config, restarts, cycles, answers)


async def _restart(cluster: LocalCluster, jobs: list[dict]) -> float:
    """Ends all processes and starts them again; returns seconds from the end to the next token."""
    url, served, begin_s = cluster.url, asyncio.Event(), time.monotonic()
    await asyncio.to_thread(cluster.stop)
    cluster.start()
    first_s: list[float] = []

    def note(at_s: float, count: int) -> None:
        first_s.append(at_s)
        served.set()

    probe = asyncio.create_task(run_load(url, jobs[:1], 1, served, note))
    async with started(cluster, DEADLINE_S, stops=False):
        await asyncio.wait_for(probe, DEADLINE_S)
    return first_s[0] - begin_s


async def _cycle(cluster: LocalCluster, load: Load, victim: int) -> Cycle:
    """Kills a rank, serves without it, starts it again."""
    first_s, name, ended_before = time.monotonic(), rank_name(victim), len(cluster.exits)

    def killed(status: dict) -> bool:
        _require_no_other_death(cluster, ended_before, name)
        return status["ranks"][victim]["state"] == "absent" and status["state"] == "serving"

    def returned(status: dict) -> bool:
        _require_no_other_death(cluster, ended_before, name)
        return is_whole(status)

    await asyncio.sleep(WHOLE_S)
    _require_no_compilation(await status_of(cluster))
    kill_s = cluster.kill(name)
    await cluster.wait_for(killed, DEADLINE_S, f"an epoch without {name}", poll_ms=20)
    await asyncio.sleep(REDUCED_S)
    repair = await _record(cluster, kill_s, lambda r: r["change"] == "repair")
    start_s = time.monotonic()
    cluster.start_rank(victim)
    await cluster.wait_for(returned, DEADLINE_S, f"the return of {name}")
    await asyncio.sleep(AFTER_S)
    admission = await _record(cluster, start_s, lambda r: str(victim) in r["starts"])
    events = events_since(await status_of(cluster), kill_s)
    seen = sorted(t for t in load.times if t >= first_s)
    return _judge(seen, events, victim, kill_s, start_s, repair, admission)


async def _record(cluster: LocalCluster, begin_s: float, wanted) -> dict:
    """The supervisor's record of a change: it is complete once all ranks have sent theirs."""

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
    results: list[Sample], truth: list[Sample], kills: list[float], config: RunConfig
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


def _differs_before(result: Sample, right: str, kills: list[float]) -> bool:
    """True if it differs in what arrived before any rank was killed while it was under way."""
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
