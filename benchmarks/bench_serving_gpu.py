"""Serving of one GPU over HTTP: the workload that other servers were measured with, in one command.

    python -m benchmarks.bench_serving_gpu --out=benchmarks/results/serving_gpu.jsonl

A cluster of the configuration with random weights is started, and each load of LOADS runs on it:
prompts of 1,000 tokens and answers of 200 at several numbers of streams, long prompts alone, and
the same long prompts again, whose prefix is then cached. Every answer must be complete, and those
to repeated prompts as they were before.
"""

import asyncio
import dataclasses
import random
import time
from collections.abc import Sequence

from absl import flags as absl_flags

from benchmarks import command
from benchmarks.harness import Sheet, Unfit
from benchmarks.processes import machine_of
from benchmarks.serving import statistics as stats
from benchmarks.serving.own_cluster import own_cluster, started, status_of
from benchmarks.serving.workload import TEXT, Workload, make_jobs
from launch import flags
from launch.load import Pace, Sample, Target, run

CONFIG = "qwen3_30b_a3b_h200x1"
START_S = 900.0  # until it serves
WORDS = 400_000  # of the text that prompts are cut out of
PROMPT, ANSWER = 1000, 200
REQUEST_S = 300.0  # for one request


@dataclasses.dataclass(frozen=True)
class Load:
    """So many requests of one length, at most `streams` at a time."""

    name: str
    streams: int
    requests: int
    prompt: int = PROMPT
    answer: int = ANSWER
    seed: int = 0  # the same one gives the same requests

    def workload(self) -> Workload:
        return Workload(
            input_tokens=self.prompt,
            output_tokens=self.answer,
            distinct=self.requests,
            seed=1000 * self.prompt + self.seed,
        )


LOADS = (
    Load("one stream", 1, 4, seed=1),
    Load("16 streams", 16, 48, seed=16),
    Load("64 streams", 64, 192, seed=64),
    Load("256 streams", 256, 768, seed=256),
    Load("prompt of 8,000", 1, 3, prompt=8000, answer=8),
    Load("the same prompts again", 1, 3, prompt=8000, answer=8),
    Load("prompt of 32,000", 1, 2, prompt=32_000, answer=8),
)
QUICK = (
    Load("one stream", 1, 2, prompt=64, answer=8, seed=1),
    Load("4 streams", 4, 8, prompt=64, answer=8, seed=4),
    Load("long prompt", 1, 2, prompt=200, answer=4),
    Load("the same prompts again", 1, 2, prompt=200, answer=4),
)


@dataclasses.dataclass(frozen=True)
class Line:
    """What a load measured."""

    load: Load
    samples: list[Sample]
    seconds: float

    def values(self) -> dict[str, tuple[float, str]]:
        """Value and unit of each measure."""
        serving = stats.summarise(self.samples, self.seconds)
        found = {"output_tokens_per_s": (serving.output_tokens_per_s, "tokens/s")}
        for name, latency in (("ttft", "ttft"), ("gap", "itl")):
            if times := serving.latencies.get(latency):
                found[f"{name}_p50"] = (times["median"], "ms")
                found[f"{name}_p99"] = (times["p99"], "ms")
        return found

    def __str__(self) -> str:
        parts = [f"{name} {value:,.1f} {unit}" for name, (value, unit) in self.values().items()]
        return f"{self.load.name}: " + ", ".join(parts)


def text() -> str:
    """Words in random order: prompts share no prefix by chance."""
    words = TEXT.read_text(encoding="utf-8").split()
    dice = random.Random(5)
    return " ".join(dice.choice(words) for _ in range(WORDS))


async def measure(target: Target, model: str, loads: Sequence[Load]) -> list[Line]:
    """Runs one load after the other. Raises Unfit for an answer that is lost or another one."""
    words, lines, known = text(), [], {}
    for load in loads:
        jobs = make_jobs(load.workload(), model, words)
        begin_s = time.monotonic()
        pace = Pace(concurrency=load.streams)
        samples = await run(target, jobs, pace, count=load.requests)
        seconds = time.monotonic() - begin_s
        if lost := [s.error for s in samples if s.error is not None]:
            raise Unfit(f"{load.name}: a request was lost: {lost[0]}")
        for sample in samples:
            body = jobs[sample.job]
            key = body["prompt"], body.get("seed"), body["max_tokens"]
            if known.setdefault(key, sample.text) != sample.text:
                raise Unfit(f"{load.name}: an answer differs from that to the same request before")
        lines.append(Line(load, samples, seconds))
        print(lines[-1], flush=True)
    return lines


def main() -> int:
    values = absl_flags.FLAGS
    config = flags.run_config()
    cluster = own_cluster(config, flags.RUN_DIR.value)
    machine = machine_of(config.platform, 1, flags.gpus() if config.platform == "gpu" else ())
    shape = {"config": config.name, "rows": list(config.engine.step_sizes), **machine.facts}
    sheet = Sheet("serving_gpu", machine.device, machine.ranks, shape)

    async def serve() -> None:
        begin_s = time.monotonic()
        async with started(cluster, START_S):
            sheet.add("start", time.monotonic() - begin_s, "s")
            target = Target(url=cluster.url, deadline_s=REQUEST_S)
            loads = QUICK if values.quick else LOADS
            for line in await measure(target, config.model.name, loads):
                of = sheet.of(**dataclasses.asdict(line.load))
                for name, (value, unit) in line.values().items():
                    of.add(name, value, unit)
            status = await status_of(cluster)
            compiled = sum(rank["compilations_after_start"] for rank in status["ranks"])
            sheet.add("compilations", compiled)

    try:
        asyncio.run(serve())
    finally:
        cluster.stop()
    return command.keep(sheet.records)


if __name__ == "__main__":
    command.define()
    absl_flags.DEFINE_bool("quick", False, "Short requests, to see that everything works.")
    absl_flags.FLAGS.set_default("config", CONFIG)
    absl_flags.FLAGS.set_default("random_weights", True)
    command.run(main)
