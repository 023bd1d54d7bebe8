"""Which kernels of a GPU take how long, as JAX's profiler (CUPTI) sees them."""

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
    "attention": ("cudnn", "sdpa", "flash"),
}


def kernel_times(run: Callable[[], object]) -> dict[str, float]:
    """Runs it and returns the microseconds that each kernel took in all, by name.

    Raises RuntimeError where the profiler saw no kernel.
    """
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(run())
        found = sorted(pathlib.Path(directory).rglob("*.trace.json.gz"))
        events = json.loads(gzip.decompress(found[-1].read_bytes()))["traceEvents"] if found else []
    times = add_up(events)
    if not times:
        raise RuntimeError("the profiler saw no kernel: it needs CUPTI, which comes with jax[cuda]")
    return times


def add_up(events: list[Mapping]) -> dict[str, float]:
    """Microseconds by name of what ran on a stream of a GPU, in Chrome's trace format."""
    named = lambda kind: [e for e in events if e.get("ph") == "M" and e["name"] == kind]
    processes = {e["pid"]: e["args"]["name"] for e in named("process_name")}
    threads = {(e["pid"], e.get("tid")): e["args"]["name"] for e in named("thread_name")}
    times: dict[str, float] = collections.defaultdict(float)
    for event in events:
        if event.get("ph") != "X" or "GPU" not in processes.get(event["pid"], ""):
            continue
        if "Stream" in threads.get((event["pid"], event["tid"]), ""):
            times[event["name"]] += event["dur"]
    return dict(times)


def shares(times: Mapping[str, float]) -> dict[str, float]:
    """The part of all time in each of PARTS, and in the `rest`: they add up to 1."""
    found = dict.fromkeys((*PARTS, "rest"), 0.0)
    for name, value in times.items():
        fits = [part for part, words in PARTS.items() if any(word in name for word in words)]
        found[fits[0] if fits else "rest"] += value
    total = sum(found.values())
    return {part: value / total for part, value in found.items()}
