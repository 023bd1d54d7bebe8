"""Serving benchmark: latencies and throughput as clients see them, unharmed or while ranks die.

    python -m benchmarks.serve --url=http://127.0.0.1:8000 --request_rate=4
    python -m benchmarks.serve --config=tiny_cpu --concurrency=12 \
        --fault_plan='[[0,1,2,3],[0,1,-2,3],[0,1,3],[0,1,2,3]]'

1. Requests with real text of random lengths are made; the same seed makes the same ones.
2. Warm-up. On a cluster of its own it is every request once, whose answers are the truth.
3. The load: `--request_rate` (Poisson) or `--concurrency`, while the plan's ranks die and return.
4. Every answer of 3 is compared with 2. Lost and wrong ones are counted, and the status is 1.
"""

import asyncio
import dataclasses
import json
import pathlib
import signal
import time

import aiohttp
from absl import flags as absl_flags

from benchmarks import command
from benchmarks.harness import Sheet, Unfit, cpu_device
from benchmarks.processes import machine_of
from benchmarks.serving import statistics as stats
from benchmarks.serving.fault_plan import EXAMPLE, Phase, parse_plan
from benchmarks.serving.own_cluster import (
    Load,
    Played,
    own_cluster,
    play,
    started,
    status_of,
    summary_of,
    under_load,
    unharmed,
)
from benchmarks.serving.series import add_cdf, add_timeline
from benchmarks.serving.workload import TEXT, Workload, make_jobs
from launch import flags
from launch.cluster import ClusterFailed, LocalCluster
from launch.console import say
from launch.load import Pace, Sample, Target, run
from launch.timeline import Summary

SIGNALS = {"KILL": signal.SIGKILL, "STOP": signal.SIGSTOP}


def define() -> None:
    command.define()
    f = absl_flags
    f.DEFINE_string("url", None, "Root of an OpenAI-compatible server; else an own cluster.")
    f.DEFINE_string("model", None, "Model to ask for; else the first of the server's.")
    f.DEFINE_integer("random_input_len", 64, "Mean prompt length in tokens.", 1)
    f.DEFINE_integer("random_output_len", 64, "Mean output length in tokens.", 1)
    f.DEFINE_float("random_range_ratio", 0.5, "Lengths are in mean x [1 - this, 1 + this].")
    f.DEFINE_string("text_file", str(TEXT), "Text the prompts are cut out of.")
    f.DEFINE_float("bytes_per_token", 1.0, "For servers whose tokens are longer than a byte.")
    f.DEFINE_bool("ignore_eos", False, "Send ignore_eos, an extension of vLLM and SGLang.")
    f.DEFINE_float("temperature", 0.8, "Of every other request; the others are greedy.")
    f.DEFINE_integer("num_prompts", 64, "How many requests are measured.", 1)
    f.DEFINE_integer("distinct_prompts", 16, "How many different ones; the load goes around.", 1)
    f.DEFINE_float("request_rate", None, "Requests per second, as a Poisson process.")
    f.DEFINE_integer("concurrency", None, "Requests kept in flight; 12 without a rate.", 1)
    f.DEFINE_integer("num_warmups", 8, "Requests before, of a server that is not this one's.", 0)
    f.DEFINE_float("request_deadline_s", 120.0, "For one request, from its start to its end.")
    f.DEFINE_integer("seed", 0, "Of lengths, texts, drawn answers and arrivals.")
    f.DEFINE_string("fault_plan", None, f"Ranks of each phase, as {EXAMPLE}; -2 kills rank 2.")
    f.DEFINE_enum("fault_signal", "KILL", list(SIGNALS), "What a rank to be killed is sent.")
    f.DEFINE_float("phase_s", 8.0, "How long a phase lasts once its ranks serve.", 0.1)
    f.DEFINE_float("kill_after_s", None, "When in a phase ranks are killed; else in its midst.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A measured run."""

    samples: list[Sample]
    duration_s: float
    truth: dict[int, str] | None = None
    load: Load = dataclasses.field(default_factory=Load)
    played: tuple[Played, ...] = ()
    status: dict | None = None


def main() -> int:
    values = absl_flags.FLAGS
    pace, workload, phases = _pace(), _workload(), _phases()
    sheet, config = Sheet("serve", cpu_device(), 0, {}), None
    try:
        if values.url is not None:
            done, name = asyncio.run(_foreign(workload, pace)), values.url
        else:
            config = flags.run_config()
            done, name = _own(config, workload, pace, phases), config.name
        serving = stats.summarise(done.samples, done.duration_s, done.truth)
    except flags.UsageError:
        raise
    except (ClusterFailed, ValueError, aiohttp.ClientError, OSError) as error:
        raise Unfit(str(error)) from error
    for line in stats.lines(serving):
        print(line)
    sheet.shape = _shape(name, workload, pace, len(done.samples))
    if config is not None:
        gpus = flags.gpus() if config.platform == "gpu" else ()
        machine = machine_of(config.platform, phases.ranks, gpus)
        sheet.device, sheet.ranks = machine.device, machine.ranks
        sheet.shape |= machine.facts
    stats.add_records(sheet, serving)
    _add_faults(sheet, done)
    for latency, seconds in stats.measured(done.samples).items():
        if seconds:
            add_cdf(sheet, name, latency, seconds)
    command.keep(sheet.records)
    for sample in [s for s in done.samples if s.error is not None][:3]:
        say(f"request lost: {sample.error}", "bold red")
    return 1 if stats.broken(serving.counts, config) else 0


# What the flags say.


def _pace() -> Pace:
    values = absl_flags.FLAGS
    if values.request_rate is not None and values.concurrency is not None:
        raise flags.UsageError("--request_rate and --concurrency: give one of them")
    concurrency = values.concurrency or (12 if values.request_rate is None else None)
    try:
        return Pace(concurrency=concurrency, rate=values.request_rate, seed=values.seed)
    except ValueError as error:
        raise flags.UsageError(f"--request_rate={values.request_rate}: {error}") from error


def _workload() -> Workload:
    values = absl_flags.FLAGS
    try:
        return Workload(
            input_tokens=values.random_input_len,
            output_tokens=values.random_output_len,
            range_ratio=values.random_range_ratio,
            distinct=values.distinct_prompts,
            temperature=values.temperature,
            bytes_per_token=values.bytes_per_token,
            seed=values.seed,
            ignore_eos=values.ignore_eos,
        )
    except ValueError as error:
        raise flags.UsageError(str(error)) from error


@dataclasses.dataclass(frozen=True)
class Plan:
    """The phases, none without a plan, and the ranks of the cluster."""

    phases: tuple[Phase, ...]
    ranks: int


def _phases() -> Plan:
    values = absl_flags.FLAGS
    text = values.fault_plan
    if values.url is not None:
        if text is not None:
            raise flags.UsageError(
                "--fault_plan kills processes of a cluster of its own: leave --url out, "
                "and name a --config"
            )
        return Plan((), 0)
    ranks = flags.run_config().cluster.ranks
    if text is None:
        return Plan((), ranks)
    if values.kill_after_s is not None and not 0 <= values.kill_after_s < values.phase_s:
        raise flags.UsageError(
            f"--kill_after_s={values.kill_after_s} must be in a phase of {values.phase_s} s"
        )
    try:
        return Plan(parse_plan(text, ranks), ranks)
    except ValueError as error:
        raise flags.UsageError(f"--fault_plan: {error}") from error


def _jobs(workload: Workload, model: str) -> list[dict]:
    path = pathlib.Path(absl_flags.FLAGS.text_file)
    try:
        return make_jobs(workload, model, path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise flags.UsageError(f"--text_file={path}: {error}") from error


def _target(url: str) -> Target:
    values = absl_flags.FLAGS
    return Target(
        url=url, deadline_s=values.request_deadline_s, bytes_per_token=values.bytes_per_token
    )


# Running it.


async def _foreign(workload: Workload, pace: Pace) -> Run:
    """The load on a server that somebody else started."""
    values = absl_flags.FLAGS
    target = _target(values.url)
    jobs = _jobs(workload, values.model or await _first_model(target.url))
    if values.num_warmups:
        say(f"{values.num_warmups} warm-up requests to {target.url}")
        await run(target, jobs, pace, count=values.num_warmups)
    say(f"{values.num_prompts} requests")
    begin_s = time.monotonic()
    samples = await run(target, jobs, pace, count=values.num_prompts)
    return Run(samples=samples, duration_s=time.monotonic() - begin_s)


async def _first_model(url: str) -> str:
    """Raises ValueError where the server does not say what it serves."""
    timeout = aiohttp.ClientTimeout(total=10.0)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.get(url.rstrip("/") + "/v1/models") as response,
    ):
        answer = await response.text(errors="replace")
    try:
        return json.loads(answer)["data"][0]["id"]
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{url}/v1/models says {answer[:120]!r}; name a --model") from None


def _own(config, workload: Workload, pace: Pace, plan: Plan) -> Run:
    """The load on a cluster of its own, which ends with it."""
    longest = sum(workload.longest) + 1  # the token that begins a text
    if longest > config.engine.context_tokens:
        raise flags.UsageError(
            f"prompt and output may be {longest} tokens together, {config.name} has room for "
            f"{config.engine.context_tokens}; lower --random_input_len or --random_output_len"
        )
    cluster = own_cluster(config, flags.RUN_DIR.value)
    try:
        return asyncio.run(_on_cluster(cluster, _jobs(workload, config.model.name), pace, plan))
    finally:
        cluster.stop()


async def _on_cluster(cluster: LocalCluster, jobs: list[dict], pace: Pace, plan: Plan) -> Run:
    values = absl_flags.FLAGS
    say(f"starting a supervisor and {cluster.ranks} ranks; logs: {cluster.run_dir}/logs")
    async with started(cluster):
        target, played = _target(cluster.url), []
        say(f"{len(jobs)} different requests, unharmed")
        truth = {s.job: s.text for s in await unharmed(target, jobs)}
        begin_s = time.monotonic()
        if plan.phases:
            kill_after_s = values.kill_after_s
            async with under_load(target, jobs, pace) as load:
                played = await play(
                    cluster,
                    plan.phases,
                    phase_s=values.phase_s,
                    kill_after_s=values.phase_s / 2 if kill_after_s is None else kill_after_s,
                    number=SIGNALS[values.fault_signal],
                )
        else:
            say(f"{values.num_prompts} requests")
            load = Load(samples=await run(target, jobs, pace, count=values.num_prompts))
        end_s = time.monotonic()
        status = await status_of(cluster)
    return Run(
        samples=load.samples,
        duration_s=end_s - begin_s,
        truth=truth,
        load=load,
        played=tuple(played),
        status=status,
    )


# Records.


def _shape(name: str, workload: Workload, pace: Pace, samples: int) -> dict:
    values = absl_flags.FLAGS
    shape = {"target": name, **dataclasses.asdict(workload), "samples": samples}
    shape |= {"concurrency": pace.concurrency} if pace.rate is None else {"rate": pace.rate}
    if values.fault_plan is not None:
        shape |= {"fault_plan": values.fault_plan.replace(" ", "")}
        shape |= {"fault_signal": values.fault_signal, "phase_s": values.phase_s}
    return shape


def _add_faults(sheet: Sheet, done: Run) -> None:
    """Throughput of each phase, the cost of each kill, and the timeline; printed, too."""
    times, all_marks = done.load.times, []
    for index, played in enumerate(done.played):
        rate = sum(played.settled_s <= t < played.end_s for t in times)
        rate /= played.end_s - played.settled_s
        shape = {"phase": index, "present": played.phase.label}
        print(f"phase {index} [{played.phase.label}]: {rate:,.1f} tokens/s")
        sheet.add("phase_tokens_per_s", rate, "tokens/s", **shape)
        for rank, kill_s in played.kills:
            summary, marks = summary_of(kill_s, rank, times, done.status, done.played[-1].end_s)
            all_marks.append(marks)
            _add_pauses(sheet.of(**shape), rank, summary)
    if done.played:
        marks = all_marks[0] if all_marks else {}
        add_timeline(sheet, "elastic", done.load.tokens, marks)


def _add_pauses(sheet: Sheet, rank: int, summary: Summary) -> None:
    found = {
        "detection_s": summary.detection_s,
        "pause_s": summary.recovery_pause_s,
        "return_pause_s": summary.return_gap_s,
    }
    known = {name: value for name, value in found.items() if value is not None}
    print(f"rank {rank}: " + ", ".join(f"{name} {value:.3f}" for name, value in known.items()))
    for name, value in known.items():
        sheet.add(name, value, "s", rank=rank)


if __name__ == "__main__":
    define()
    command.run(main)
