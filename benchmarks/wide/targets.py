"""Aims between GPUs, and a verdict on each from the records of a run.

A line is about records of ranks that have a GPU each. Of ranks that share one, or of CPU ranks, the
value is shown and nothing is reached or missed.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from benchmarks.harness import Record
from benchmarks.wide.plans import sizes_of

TOKENS = 128
AT_128 = {"tokens": TOKENS, "hidden": 7168}


@dataclasses.dataclass(frozen=True)
class Target:
    """One line of the summary."""

    what: str
    value: str  # as measured; "" where nothing was
    aim: str
    verdict: str  # "reached", "MISSED", "not measured", or "no verdict" (see above)


def summary(records: Sequence[Record], ranks: int) -> list[Target]:
    """All lines for so many ranks. Where a metric was measured often, the newest counts."""
    wide = ranks > 2
    lines = [
        _time(records, "wide_dispatch", 40.0 if wide else 12.0, dtype="bfloat16"),
        _against(records, "wide_dispatch", "ragged_all_to_all", 1 / 10),
        _against(records, "wide_dispatch", "all_to_all", 1.0),
        _time(records, "wide_dispatch", None, dtype="float8_e4m3fn"),
        *_combine(records, 50.0 if wide else 15.0),
        _worst(records, "membership", "wide_decode", "membership p50", 1.01, max),
        *_decode(records),
        _worst(records, "relocation / peer copy", "wide_sources", "peer moved", 0.8, min),
        *_recovery(records, wide),
    ]
    lines += _plans(records)
    if scaling := _scaling(records, ranks):
        lines.append(scaling)
    return lines


def newest(records: Sequence[Record], bench: str, metric: str, **shape) -> Record | None:
    fits = lambda r: all(r.shape.get(name) == value for name, value in shape.items())
    found = [r for r in records if r.bench == bench and r.metric == metric and fits(r)]
    return max(found, key=lambda r: r.time) if found else None


def _line(what: str, record: Record | None, value: float | None, aim: float | None, form, *, least):
    """`least`: the aim is a lower limit. `form(number)` formats one."""
    sign = ">=" if least else "<="
    text = "" if aim is None else f"{sign} {form(aim)}"
    if record is None or value is None:
        return Target(what, "", text, "not measured")
    if record.shape.get("link", "peer") != "peer" or record.device.startswith("cpu"):
        return Target(what, form(value), text, "no verdict")
    if aim is None:
        return Target(what, form(value), text, "")
    good = value >= aim if least else value <= aim
    return Target(what, form(value), text, "reached" if good else "MISSED")


_us: Callable[[float], str] = lambda value: f"{value:.1f} us"
_ratio: Callable[[float], str] = lambda value: f"{value:.3f}"
_s: Callable[[float], str] = lambda value: f"{value:.3f} s"


def _time(records, bench: str, aim: float | None, **shape) -> Target:
    record = newest(records, bench, "time p50", **AT_128, **shape)
    what = f"{bench.removeprefix('wide_')} {TOKENS} x 7168 {' '.join(shape.values())}"
    value = record and record.value
    if aim is None and record is not None and record.bound:
        aim = 1.3 * record.bound + 5
    return _line(what, record, value, aim, _us, least=False)


def _combine(records, most_us: float) -> list[Target]:
    """Both modes: at most so many us, and within 1.3 x the bound + 5 us."""
    lines = []
    for bench, mode in (
        ("wide_combine", "per_rank"),
        ("wide_combine", "per_choice"),
        ("wide_combine_home", "per_choice"),
    ):
        record = newest(records, bench, "time p50", **AT_128, combine=mode)
        what = f"{bench.removeprefix('wide_')} {TOKENS} x 7168 {mode}"
        value = record and record.value
        lines.append(_line(what, record, value, most_us, _us, least=False))
        bound = record and record.bound and 1.3 * record.bound + 5
        lines.append(_line(f"{what}, 1.3 x bound + 5", record, value, bound, _us, least=False))
    return lines


def _against(records, bench: str, collective: str, aim: float) -> Target:
    record = newest(records, bench, "time p50", **AT_128, dtype="bfloat16")
    shape = {**AT_128, "collective": collective}
    other = newest(records, "wide_collective", "time p50", **shape)
    value = record.value / other.value if record and other else None
    return _line(f"dispatch / {collective}", record, value, aim, _ratio, least=False)


def _worst(records, what: str, bench: str, metric: str, aim: float, worst) -> Target:
    """The worst of the newest records by batch and model."""
    found = [r for r in records if r.bench == bench and r.metric == metric and r.ratio is not None]
    record = worst(found, key=lambda r: r.ratio) if found else None
    return _line(what, record, record and record.ratio, aim, _ratio, least=worst is min)


def _decode(records) -> list[Target]:
    """Each batch and model by itself."""
    lines = {}
    for r in records:
        of_live = r.bench == "wide_decode" and r.metric == "tokens_per_s"
        if of_live and r.shape["system"] == "live" and r.ratio is not None:
            model = f"{r.shape['model']} L={r.shape['layers']} B={r.shape['tokens']}"
            what = f"decode / {r.shape['against']}, {model}"
            lines[what] = _line(what, r, r.ratio, 1.0, _ratio, least=True)
    return list(lines.values()) or [
        _line("decode / best static", None, None, 1.0, _ratio, least=True)
    ]


def _recovery(records, wide: bool) -> list[Target]:
    def of(what, metric, aim, form=_s, least=False, by_ratio=False, **shape):
        record = newest(records, "faults", metric, **shape)
        value = record and (record.ratio if by_ratio else record.value)
        return _line(what, record, value, aim, form, least=least)

    def against(baseline: str, aim: float) -> Target:
        shape = {"by_ratio": True, "against": baseline}
        return of(f"kill: pause / {baseline}", "pause_s elastic", aim, times, **shape)

    full, backup = {"redundancy": 2}, {"redundancy": 1}
    count: Callable[[float], str] = lambda value: f"{value:g}"
    times: Callable[[float], str] = lambda value: f"1/{1 / value:.0f}" if value else "0"
    return [
        of("kill: pause", "pause_s elastic", 0.2 if wide else 0.1, **full),
        of("kill: pause of the return", "return_pause_s elastic", 0.05, **full),
        of("kill: 95 % of the throughput", "recovered_s elastic", 10.0, **full),
        of("kill: compilations", "compilations elastic", 0.0, count, **full),
        of("kill: requests lost", "requests_lost elastic", 0.0, count, **full),
        against("restart", 1 / 100),
        against("rejit", 1 / 10),
        of("orphans from backup: pause", "pause_s elastic", 2.0, **backup),
        _worst(records, "backup / host-to-device copy", "sources", "backup moved", 0.8, min),
    ]


def _plans(records) -> list[Target]:
    """The longest pause of each plan. Where more ranks die at once than there are replicas but
    one, experts have to be loaded."""
    plans: dict[str, list[Record]] = {}
    for r in records:
        if r.bench == "serve" and r.metric == "pause_s":
            plans.setdefault(r.shape["fault_plan"], []).append(r)
    lines = []
    for plan, found in plans.items():
        longest, sizes = max(found, key=lambda r: r.value), sizes_of(plan)
        counts = [int(size) for size in sizes.split("->")]
        most = max(a - b for a, b in itertools.pairwise(counts))
        aim = 0.2 if most == 1 else 2.0
        lines.append(_line(f"{sizes}: longest pause", longest, longest.value, aim, _s, least=False))
    return lines


def _scaling(records, ranks: int) -> Target | None:
    """Tokens per second of all ranks over so many times those of one, same batch for each."""
    shape = {"system": "live", "tokens": 64}
    alone = newest(records, "wide_decode", "tokens_per_s", **shape, gpus=1)
    if alone is None or ranks == 1:
        return None
    shape |= {name: alone.shape[name] for name in ("model", "layers")}
    together = newest(records, "wide_decode", "tokens_per_s", **shape, gpus=ranks)
    value = together and together.value / ranks / alone.value
    what = f"scaling from 1 to {ranks}, 64 sequences each"
    return _line(what, together, value, None, _ratio, least=True)
