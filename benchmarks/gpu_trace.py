"""Times of a GPU's kernels, from JAX's profiler (CUPTI)."""

import collections
import gzip
import json
import pathlib
import tempfile
from collections.abc import Callable, Mapping

import jax

# Parts of a decode step, by what the names of kernels begin with or hold; the first that fits.
PARTS = {
    "experts": ("expert_",),
    "dispatch": ("dispatch",),
    "combine": ("combine",),
    "attention": ("cudnn", "sdpa", "flash", "attention"),
}


def run_kernels(run: Callable[[], object]) -> list[tuple[str, float]]:
    """Runs it and returns its kernels as they began: (name, microseconds).

    Raises RuntimeError where the profiler saw no kernel.
    """
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(run())
        found = sorted(pathlib.Path(directory).rglob("*.trace.json.gz"))
        events = json.loads(gzip.decompress(found[-1].read_bytes()))["traceEvents"] if found else []
    kernels = of_streams(events)
    if not kernels:
        raise RuntimeError("the profiler saw no kernel: it needs CUPTI, which comes with jax[cuda]")
    return kernels


def of_streams(events: list[Mapping]) -> list[tuple[str, float]]:
    """(name, microseconds) of what ran on a stream of a GPU, in Chrome's trace format, by start."""
    named = lambda kind: [e for e in events if e.get("ph") == "M" and e["name"] == kind]
    processes = {e["pid"]: e["args"]["name"] for e in named("process_name")}
    threads = {(e["pid"], e.get("tid")): e["args"]["name"] for e in named("thread_name")}
    found = []
    for event in events:
        if event.get("ph") != "X" or "GPU" not in processes.get(event["pid"], ""):
            continue
        if "Stream" in threads.get((event["pid"], event["tid"]), ""):
            found.append((event["ts"], event["name"], event["dur"]))
    return [(name, duration) for _, name, duration in sorted(found)]


def longest(kernels: list[tuple[str, float]], count: int) -> str:
    """The `count` kernels that took longest in all, one a line: total, mean and runs of each."""
    times = collections.defaultdict(list)
    for name, value in kernels:
        times[name].append(value)
    order = sorted(times.items(), key=lambda entry: -sum(entry[1]))[:count]
    line = lambda name, us: f"{sum(us):11.1f} us {sum(us) / len(us):9.2f} x {len(us):<6} {name}"
    return "\n".join(line(*entry) for entry in order)


def shares(kernels: list[tuple[str, float]]) -> dict[str, float]:
    """The part of all time in each of PARTS, and in the `rest`: they add up to 1."""
    found = dict.fromkeys((*PARTS, "rest"), 0.0)
    for name, value in kernels:
        fits = [part for part, words in PARTS.items() if any(word in name for word in words)]
        found[fits[0] if fits else "rest"] += value
    total = sum(found.values())
    return {part: value / total for part, value in found.items()}
