"""Demonstration: completions without a failure, and with a rank killed under load; its cost.

1. Every prompt once, without a failure: these completions are the reference.
2. The same prompts in a loop. A rank is killed with SIGKILL in mid-generation, and returns.
3. Every completion of 2 is compared with 1, byte by byte; rates and pauses go into a table and a
   plot.
"""

import asyncio
import dataclasses
import os
import pathlib

import aiohttp

from launch.cluster import LocalCluster, events_since, is_whole, rank_name
from launch.console import progress, say
from launch.load import run_load, run_once
from launch.timeline import plot, render_report, summarise

VICTIM = 2
CONCURRENCY = 12
MAX_TOKENS = 96
BEFORE_S, AFTER_S = 6.0, 6.0
RETURN_DEADLINE_S = 90.0

OPENINGS = (
    "In the beginning",
    "And it came to pass in those days, that",
    "The LORD is my shepherd;",
    "And Moses said unto the people,",
    "Blessed are they that",
    "Now these are the names of the children of Israel, which",
    "Hear, O heavens, and give ear, O earth:",
    "And Jesus answered and said unto them,",
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Results of the demonstration; `failures` is empty if every promise was kept."""

    rows: list[tuple[str, str]]
    failures: list[str]


def prompts(model: str) -> list[dict]:
    """Bodies of completions: each opening greedy, and drawn with a fixed seed."""
    common = {"model": model, "max_tokens": MAX_TOKENS}
    greedy = [common | {"prompt": text, "temperature": 0} for text in OPENINGS]
    drawn = [
        common | {"prompt": text, "temperature": 0.8, "top_p": 0.95, "seed": 1000 + number}
        for number, text in enumerate(OPENINGS)
    ]
    return greedy + drawn


async def run_demo(cluster: LocalCluster, config, out_dir: str) -> int:
    """Returns 0 if every promise was kept, else 1."""
    victim = min(VICTIM, config.cluster.ranks - 1)
    jobs = prompts(config.model.name)
    say(f"{len(jobs)} prompts without a failure")
    truth = await run_once(cluster.url, jobs, CONCURRENCY)
    for result in truth[:2]:
        say("> " + " ".join((jobs[result.job]["prompt"] + result.text).split()), "italic")

    times, marks, results, status = await _load_with_failure(cluster, jobs, victim)
    outcome = _judge(truth, times, marks, results, status)
    path = pathlib.Path(out_dir) / "timeline.png"
    title = (
        f"{config.name}: rank {victim} of {config.cluster.ranks} killed under load, "
        f"on {os.cpu_count()} cores"
    )
    plot(str(path), times, marks, title)
    render_report(outcome.rows, title="What the failure cost")
    say(f"wrote {path.absolute()}")
    for failure in outcome.failures:
        say(failure, "bold red")
    return 1 if outcome.failures else 0


async def _load_with_failure(cluster: LocalCluster, jobs: list[dict], victim: int):
    """Returns token times, marks (monotonic seconds), results, and the status at the end."""
    times: list[float] = []
    enough = asyncio.Event()
    load = asyncio.create_task(
        run_load(cluster.url, jobs, CONCURRENCY, enough, lambda at_s, n: times.extend([at_s] * n))
    )
    try:
        say(f"the same prompts, {CONCURRENCY} at a time; rank {victim} dies in {BEFORE_S:.0f} s")
        await asyncio.sleep(BEFORE_S)
        marks = {"kill": cluster.kill(rank_name(victim))}
        say(f"killed rank {victim} (SIGKILL)", "bold red")
        evicted = lambda s: s["ranks"][victim]["state"] == "absent"
        await cluster.wait_for(evicted, RETURN_DEADLINE_S, "its eviction", poll_ms=20)
        say("its requests continue on other ranks; waiting for its return")
        with progress("ranks serving", len(cluster.children) - 1) as show:

            def whole(status: dict) -> bool:
                show(sum(r["mode"] == "serving" for r in status["ranks"]))
                return is_whole(status)

            await cluster.wait_for(whole, RETURN_DEADLINE_S, f"the return of rank {victim}")
        say(f"rank {victim} is back", "bold green")
        await asyncio.sleep(AFTER_S)
    finally:
        enough.set()
        results = await load
    async with aiohttp.ClientSession() as session:
        status = await cluster.status(session)
    marks |= _marks_of(events_since(status, marks["kill"]), victim)
    return times, marks, results, status


def _marks_of(events: list[dict], victim: int) -> dict[str, float]:
    """Times of detection, of resumption without the victim, and of the victim's admission."""
    first = lambda kind, wanted: next(
        (e["at_s"] for e in events if e["kind"] == kind and wanted(e)), None
    )
    found = {
        "detected": first("dead", lambda e: e["rank"] == victim),
        "resumed": first("commit", lambda e: str(victim) not in e["members"]),
        "returned": first("commit", lambda e: str(victim) in e["members"]),
        "return_start": first("prepare", lambda e: victim in e["admitted"]),
    }
    return {name: at_s for name, at_s in found.items() if at_s is not None}


def _judge(truth, times, marks, results, status) -> Outcome:
    summary = summarise(times, marks, skip_s=1.0)
    lost = [r for r in results if r.error is not None]
    different = [r for r in results if r.error is None and r.text != truth[r.job].text]
    compilations = sum(r["compilations_after_start"] for r in status["ranks"])
    seconds = lambda value: "-" if value is None else f"{value:.3f} s"
    rate = lambda value: "-" if value is None else f"{value:,.0f}"
    rows = [
        ("recovery pause (kill to next token)", seconds(summary.recovery_pause_s)),
        ("   of which until detected", seconds(summary.detection_s)),
        ("return pause (longest gap while it is admitted)", seconds(summary.return_gap_s)),
        ("requests completed", str(len(results) - len(lost))),
        ("requests moved to another rank", str(status["requests"]["requeued"])),
        ("requests lost", str(len(lost))),
        ("compilations after start-up", str(compilations)),
        ("outputs identical to the run without failure", "no" if different else "yes"),
        ("tokens/s before the kill", rate(summary.before_tokens_per_s)),
        ("tokens/s with one rank less", rate(summary.reduced_tokens_per_s)),
        ("tokens/s after its return", rate(summary.after_tokens_per_s)),
    ]
    failures = [f"request lost: {r.error}" for r in lost[:3]]
    failures += [f"prompt {r.job} changed: {r.text!r}" for r in different[:3]]
    if compilations:
        failures.append(f"{compilations} compilations after start-up")
    if not status["requests"]["requeued"]:
        failures.append("the killed rank had no request: this run shows nothing")
    return Outcome(rows, failures)
