"""What a run of `bench_wide` found, as records, beside the link's bound and XLA's collectives.

A sample is the slowest rank's; bounds are bytes over the best rate at which this run copied a
peer's memory.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.harness import Record, compared, percentile
from benchmarks.wide.exchange import Family
from benchmarks.wide.workers import Machine

DENSE = "all_to_all"
# Published, hidden 7168, 256 experts, top-8, on eight H100 (or GB200, where said) of one NVLink
# domain: microseconds by tokens of each rank. Other machines, other software: to compare sizes.
PUBLISHED = {
    "dispatch": {
        "DeepEP": {16: 32, 32: 38, 64: 49, 128: 75, 256: 129, 512: 229},
        "NCCL EP": {128: 65},
        "pplx fp8": {1: 41.6, 128: 83.6},
        "one-sided GB200": {1: 18.9, 16: 18.5, 64: 22.3, 128: 31.7},
    },
    "combine": {
        "NCCL EP": {128: 79},
        "pplx": {1: 41.7, 128: 102.3},
        "one-sided GB200": {1: 31.0, 16: 32.6, 64: 34.1, 128: 38.1},
    },
}


@dataclasses.dataclass(frozen=True)
class Found:
    """Everything that the processes wrote, in the order of time; `rank` -1 is the collectives'."""

    lines: tuple[tuple[int, Mapping], ...]

    def of(self, kind: str, **facts) -> list[tuple[int, Mapping]]:
        fits = lambda line: all(line.get(name) == value for name, value in facts.items())
        return [(r, line) for r, line in self.lines if line["kind"] == kind and fits(line)]

    @property
    def failures(self) -> list[str]:
        return [
            f"{line['family']} {line['what']}: {line['error']}" for _, line in self.of("failure")
        ]

    @property
    def link_bytes_per_s(self) -> dict[str, float]:
        """The slowest rank's rate by way; empty for one rank."""
        rates: dict[str, float] = {}
        for _, line in self.of("link"):
            way, rate = line["way"], line["bytes_per_s"]
            rates[way] = min(rate, rates.get(way, rate))
        return rates


def read_found(directory: pathlib.Path, ranks: int) -> Found:
    """Of all ranks, and of the collectives, as far as they came."""
    lines = []
    for rank, name in [*((r, str(r)) for r in range(ranks)), (-1, "collectives")]:
        path = directory / f"found.{name}.jsonl"
        if path.exists():
            lines += [(rank, json.loads(text)) for text in path.read_text().splitlines()]
    return Found(tuple(lines))


def slowest(lines: Iterable[Mapping]) -> list[float]:
    """Of each sample, the time of the slowest rank."""
    return [max(samples) for samples in zip(*(line["samples_us"] for line in lines), strict=False)]


def records_of(
    found: Found, families: Sequence[Family], machine: Machine, common: Mapping
) -> list[Record]:
    """`common` are commit and time. Sizes that not all ranks timed are left out."""
    fields = {"device": machine.device, "ranks": machine.ranks, **common}
    records = _link_records(found, families[0], machine, fields)
    dense = {}
    for _, line in found.of("collective"):
        shape = _shape(families[0], line["tokens"], machine) | {"collective": line["name"]}
        records += _times("wide_collective", line["samples_us"], shape, fields)
        if line["name"] == DENSE:
            dense[line["tokens"]] = percentile(line["samples_us"], 50)
    link = max(found.link_bytes_per_s.values(), default=None)
    for index, family in enumerate(families):
        for tokens in family.tokens:
            for name in ("dispatch", "combine", "combine_home"):
                wanted = {"family": f"family{index}", "tokens": tokens, "name": name}
                lines = [line for _, line in found.of("time", **wanted)]
                if len(lines) < machine.ranks:
                    continue
                bound = max(line["bytes"] for line in lines) / link * 1e6 if link else None
                shape = _shape(family, tokens, machine) | _kind(family, name)
                baseline = dense.get(tokens)
                records += _times(
                    f"wide_{name}", slowest(lines), shape, fields, bound=bound, baseline=baseline
                )
    return records


def _kind(family: Family, name: str) -> dict:
    if name == "dispatch":
        return {"dtype": family.dispatch_dtype or family.row_dtype}
    return {"dtype": family.row_dtype, "combine": family.combine}


def _shape(family: Family, tokens: int, machine: Machine) -> dict:
    sizes = {"hidden": family.hidden, "experts": family.experts, "top_k": family.choices}
    return {"tokens": tokens, **sizes, "dtype": family.row_dtype, **machine.facts}


def _times(bench: str, samples, shape, fields, bound=None, baseline=None) -> list[Record]:
    """p50 and p99; both are compared with the median of the baseline."""
    found = []
    for statistic in (50, 99):
        value = percentile(samples, statistic)
        found.append(
            Record(
                bench=bench,
                metric=f"time p{statistic}",
                value=value,
                unit="us",
                bound=bound,
                shape=shape | {"samples": len(samples)},
                **compared(baseline, value),
                **fields,
            )
        )
    return found


def _link_records(found: Found, family: Family, machine: Machine, fields) -> list[Record]:
    rates = found.link_bytes_per_s
    return [
        Record(
            bench="wide_link",
            metric=f"copy_rate {way}",
            value=rate / 1e9,
            unit="GB/s",
            shape=machine.facts,
            **fields,
        )
        for way, rate in rates.items()
    ]


def published(name: str, tokens: int) -> str:
    """Figures of others for this size, as one line; empty where there are none."""
    of = PUBLISHED.get("dispatch" if name == "dispatch" else "combine", {})
    return ", ".join(f"{who} {by[tokens]:g}" for who, by in of.items() if tokens in by)
