"""Records of a run of `bench_wide`, beside the link's bound and XLA's collectives.

A sample is the slowest rank's; bounds are bytes over the best rate at which this run copied a
peer's memory.
"""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence

from benchmarks import command
from benchmarks.harness import Record, Sheet, percentile
from benchmarks.processes import RunDirectory
from benchmarks.wide.exchange import Family
from launch.console import say

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
    """All lines that the processes wrote, with the rank; -1 is the process of the collectives."""

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
    """The lines of all ranks and of the collectives, as far as they came."""
    lines = []
    for rank, name in [*((r, str(r)) for r in range(ranks)), (-1, "collectives")]:
        path = directory / f"found.{name}.jsonl"
        if path.exists():
            lines += [(rank, json.loads(text)) for text in path.read_text().splitlines()]
    return Found(tuple(lines))


def slowest(lines: Iterable[Mapping]) -> list[float]:
    """The time of the slowest rank for each sample."""
    return [max(samples) for samples in zip(*(line["samples_us"] for line in lines), strict=False)]


def add_records(sheet: Sheet, found: Found, families: Sequence[Family]) -> None:
    """Adds all that the processes found. Sizes that not all ranks timed are left out."""
    for way, rate in found.link_bytes_per_s.items():
        sheet.add(f"copy_rate {way}", rate / 1e9, "GB/s", bench="wide_link")
    dense = {}
    for _, line in found.of("collective"):
        of = sheet.of("wide_collective", **_shape(families[0], line["tokens"]))
        add_times(of.of(collective=line["name"]), line["samples_us"])
        if line["name"] == DENSE:
            dense[line["tokens"]] = percentile(line["samples_us"], 50)
    link = max(found.link_bytes_per_s.values(), default=None)
    for index, family in enumerate(families):
        for tokens, name in itertools.product(
            family.tokens, ("dispatch", "combine", "combine_home")
        ):
            wanted = {"family": f"family{index}", "tokens": tokens, "name": name}
            lines = [line for _, line in found.of("time", **wanted)]
            if len(lines) < sheet.ranks:
                continue
            bound = max(line["bytes"] for line in lines) / link * 1e6 if link else None
            of = sheet.of(f"wide_{name}", **_shape(family, tokens) | _kind(family, name))
            add_times(of, slowest(lines), bound=bound, baseline=dense.get(tokens))


def _kind(family: Family, name: str) -> dict:
    if name == "dispatch":
        return {"dtype": family.dispatch_dtype or family.row_dtype}
    return {"dtype": family.row_dtype, "combine": family.combine}


def _shape(family: Family, tokens: int) -> dict:
    sizes = {"hidden": family.hidden, "experts": family.experts, "top_k": family.choices}
    return {"tokens": tokens, **sizes, "dtype": family.row_dtype}


def add_times(sheet: Sheet, samples_us: Sequence[float], metric: str = "time", **beside) -> None:
    """Adds p50 and p99; both are compared with the same baseline and bound."""
    for statistic in (50, 99):
        value, count = percentile(samples_us, statistic), len(samples_us)
        sheet.add(f"{metric} p{statistic}", value, "us", samples=count, **beside)


def finish(records: Sequence[Record], problems: Sequence[str], directory: RunDirectory) -> int:
    """Keeps the records, also if something went wrong, and then the logs; the exit status."""
    command.keep(records)
    for problem in problems:
        say(problem, "bold red")
    directory.kept = bool(problems)
    return int(directory.kept)


def published(name: str, tokens: int) -> str:
    """Published figures for this size as one line, or ""."""
    of = PUBLISHED.get("dispatch" if name == "dispatch" else "combine", {})
    return ", ".join(f"{who} {by[tokens]:g}" for who, by in of.items() if tokens in by)
