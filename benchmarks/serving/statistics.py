"""Numbers of a serving run, in the usual form of serving benchmarks."""

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.harness import Sheet, percentile
from eep_jax.config import RunConfig
from launch.load import Sample

STATISTICS = ("mean", "median", "p90", "p95", "p99")
LATENCIES = {
    "e2e": "end-to-end latency",
    "ttft": "time to first token",
    "tpot": "time per output token, without the first",
    "itl": "inter-token latency",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """Numbers of requests by their ends."""

    completed: int
    lost: int  # begun or connected, and then broken off, late or unreadable
    refused: int  # answered with an error status
    wrong: int | None  # completed with another text than unharmed; None: not compared


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving:
    """One run. Latencies are in ms: name -> statistic -> value."""

    counts: Counts
    duration_s: float
    requests_per_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    latencies: Mapping[str, Mapping[str, float]]


def texts_repeat(config: RunConfig | None) -> bool:
    """True if a request that was read again, prompt and tokens, must give the same text.

    Logits of drawn weights lie close together. On a GPU a prompt and a decode step attend by
    different kernels, whose roundings may let another token win such a tie. Then only what no
    death touched can be compared, and `wrong` counts, but breaks no promise.
    """
    return config is None or config.platform != "gpu" or config.random_weights is None


def broken(counts: Counts, config: RunConfig | None) -> bool:
    """True if a promise to clients was broken; `config` is None for a foreign server."""
    wrong = counts.wrong if texts_repeat(config) else 0
    return bool(counts.lost or counts.refused or wrong)


def count(samples: Sequence[Sample], truth: Mapping[int, str] | None = None) -> Counts:
    """`truth` holds the text of each job as an unharmed cluster gave it."""
    good = [s for s in samples if s.error is None]
    refused = sum(s.refused for s in samples)
    return Counts(
        completed=len(good),
        lost=len(samples) - len(good) - refused,
        refused=refused,
        wrong=None if truth is None else sum(s.text != truth[s.job] for s in good),
    )


def summarise(
    samples: Sequence[Sample], duration_s: float, truth: Mapping[int, str] | None = None
) -> Serving:
    """Raises ValueError where no request completed, or no time passed."""
    good = [s for s in samples if s.error is None]
    if not good or duration_s <= 0:
        first = next((s.error for s in samples if s.error is not None), "no request was sent")
        raise ValueError(f"none of {len(samples)} requests completed; the first error: {first}")
    return Serving(
        counts=count(samples, truth),
        duration_s=duration_s,
        requests_per_s=len(good) / duration_s,
        input_tokens_per_s=sum(s.prompt_tokens for s in good) / duration_s,
        output_tokens_per_s=sum(s.output_tokens for s in good) / duration_s,
        latencies={name: _of(values) for name, values in measured(good).items() if values},
    )


def measured(samples: Iterable[Sample]) -> dict[str, list[float]]:
    """All latencies of the requests that completed, in seconds, by the names of LATENCIES."""
    good = [s for s in samples if s.error is None]
    return {
        "e2e": [s.e2e_s for s in good],
        "ttft": [s.ttft_s for s in good],
        "tpot": [s.tpot_s for s in good if s.tpot_s is not None],
        "itl": [gap for s in good for gap in s.gaps_s],
    }


def _of(seconds: Sequence[float]) -> dict[str, float]:
    ms = [value * 1e3 for value in seconds]
    found = {"mean": statistics.fmean(ms), "median": percentile(ms, 50)}
    return found | {f"p{n}": percentile(ms, n) for n in (90, 95, 99)}


def lines(serving: Serving) -> Iterable[str]:
    """The report on a terminal, one line after the other."""
    counts, rate = serving.counts, lambda name, value: f"{name:<38}{value:>12,.2f}"
    whole = lambda name, value: f"{name:<38}{value:>12,}"
    yield f"{' Serving Benchmark Result ':=^50}"
    yield whole("Successful requests:", counts.completed)
    yield whole("Lost requests:", counts.lost)
    yield whole("Refused requests:", counts.refused)
    if counts.wrong is not None:
        yield whole("Wrong answers:", counts.wrong)
    yield rate("Benchmark duration (s):", serving.duration_s)
    yield rate("Request throughput (req/s):", serving.requests_per_s)
    yield rate("Input token throughput (tok/s):", serving.input_tokens_per_s)
    yield rate("Output token throughput (tok/s):", serving.output_tokens_per_s)
    for name, values in serving.latencies.items():
        yield f"{f' {LATENCIES[name]} ':-^50}"
        for statistic, value in values.items():
            label = statistic.capitalize() if statistic[0] != "p" else statistic.upper()
            yield rate(f"{label} {name.upper()} (ms):", value)
    yield "=" * 50


def add_records(sheet: Sheet, serving: Serving) -> None:
    """Adds one record a number."""
    counts = serving.counts
    single = {
        "requests_completed": (counts.completed, ""),
        "requests_lost": (counts.lost, ""),
        "requests_refused": (counts.refused, ""),
        "requests_per_s": (serving.requests_per_s, "requests/s"),
        "input_tokens_per_s": (serving.input_tokens_per_s, "tokens/s"),
        "output_tokens_per_s": (serving.output_tokens_per_s, "tokens/s"),
    }
    if counts.wrong is not None:
        single["answers_wrong"] = (counts.wrong, "")
    for name, (value, unit) in single.items():
        sheet.add(name, value, unit)
    for name, values in serving.latencies.items():
        for statistic, value in values.items():
            sheet.add(f"{name} {'p50' if statistic == 'median' else statistic}", value, "ms")
