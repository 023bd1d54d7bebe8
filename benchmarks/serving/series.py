"""Records that hold a curve rather than a number: plots are drawn from them, tables leave them out.

A timeline's value is the mean rate of its whole length; `shape` has `bin_s`, `begin_s` (both
seconds, the kill being 0), `rates` (tokens/s of each bin) and `marks` (name -> seconds).
"""

import json
import math
from collections.abc import Mapping, Sequence

from benchmarks.harness import Record, Sheet

SERIES = ("timeline", "cdf")  # metrics that are curves
BIN_S = 0.25
POINTS = 100


def add_timeline(
    sheet: Sheet,
    system: str,
    tokens: Sequence[tuple[float, int]],
    marks: Mapping[str, float],
    *,
    bin_s: float = BIN_S,
) -> Record:
    """Adds tokens per second over time: `tokens` are (monotonic s, tokens), `marks` monotonic s.

    Raises ValueError where there is no token.
    """
    if not tokens:
        raise ValueError(f"{sheet.bench} {system}: there is no token to draw")
    zero = marks.get("kill", min(at_s for at_s, _ in tokens))
    first = math.floor((min(at_s for at_s, _ in tokens) - zero) / bin_s)
    last = math.floor((max(at_s for at_s, _ in tokens) - zero) / bin_s)
    bins = [0] * (last - first + 1)
    for at_s, count in tokens:
        bins[math.floor((at_s - zero) / bin_s) - first] += count
    curve = {
        "system": system,
        "bin_s": bin_s,
        "begin_s": first * bin_s,
        "rates": [round(count / bin_s, 1) for count in bins],
        "marks": {name: round(at_s - zero, 4) for name, at_s in marks.items()},
    }
    return sheet.add("timeline", sum(bins) / len(bins) / bin_s, "tokens/s", **curve)


def add_cdf(sheet: Sheet, system: str, name: str, seconds: Sequence[float]) -> Record:
    """Adds the distribution of a latency: `points` are the values in ms at 0, 1, ..., 100 %."""
    ordered = sorted(seconds)
    at = lambda share: ordered[min(len(ordered) - 1, int(share * len(ordered)))]
    points = [round(at(n / POINTS) * 1e3, 3) for n in range(POINTS + 1)]
    curve = {"system": system, "latency": name, "points": points}
    return sheet.add("cdf", points[POINTS // 2], "ms", **curve)


def identity(record: Record) -> str:
    """Key of a curve: records with the same key are measurements of the same."""
    keep = ("system", "latency", "fault_plan", "target", "config", "redundancy")
    return json.dumps(
        [record.bench, record.device, record.ranks, *(record.shape.get(k) for k in keep)]
    )
