"""Draws all plots from the records in `results/*.jsonl`; nothing is measured.

python -m benchmarks.plot [--out=benchmarks/results/plots]

timeline.png          tokens/s around one SIGKILL: elastic, re-jit, restart, with marks
latency_cdf.png       latencies of their requests
dispatch_combine.png  time against tokens, with the lower bound
wide.png              dispatch and combine between GPUs, with the link's bound, NCCL, and others
plans.png             tokens/s while several ranks die and return, as plans say
cost_model.png        what the cost model says for R = 8..512, over NVLink and RDMA
"""

import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from absl import app
from absl import flags as absl_flags
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from benchmarks import cost_model
from benchmarks.harness import RESULTS, Record
from benchmarks.serving.series import POINTS, identity
from benchmarks.wide import plots as wide
from launch import flags
from launch.timeline import COLOURS, FILL, GRID, INK, LINE, PLOTTED

SYSTEMS = {
    "elastic": "elastic",
    "rejit": "live_devices and re-jit",
    "restart": "full restart",
}
HUES = {"elastic": "#1f5a94", "rejit": "#c77700", "restart": "#8e2a6b"}
RECOVERED = 0.95  # of the rate before the kill
SMOOTH_BINS = 4  # that the 95 % line is compared with: one step's tokens come in one bin
BEFORE_S, AFTER_S = 5.0, 4.0  # shown around kill and last mark


def main() -> int:
    out = pathlib.Path(absl_flags.FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    records = cost_model.all_results()
    drawn = {
        "timeline.png": timeline(of_one_run(newest_curves(records, "timeline", "faults"))),
        "latency_cdf.png": latency_cdf(of_one_run(newest_curves(records, "cdf", "faults"))),
        "wide.png": wide.exchanges(records),
        "plans.png": wide.plans(of_one_run(newest_curves(records, "timeline", "serve"))),
        "dispatch_combine.png": dispatch_combine(records),
        "cost_model.png": scale(records),
    }
    for name, figure in drawn.items():
        if figure is None:
            print(f"{name}: left out, there is no result for it")
            continue
        FigureCanvasAgg(figure)
        figure.savefig(out / name)
        print(f"wrote {out / name}")
    return 0


def newest_curves(records: Sequence[Record], metric: str, bench: str) -> list[Record]:
    """The newest curve of each system, by what `series.identity` says."""
    found: dict[str, Record] = {}
    for record in records:
        if record.metric == metric and record.bench == bench:
            key = identity(record)
            if key not in found or record.time >= found[key].time:
                found[key] = record
    order = list(SYSTEMS)
    known = [r for r in found.values() if r.shape["system"] in SYSTEMS]
    return sorted(known, key=lambda r: order.index(r.shape["system"]))


def of_one_run(curves: Sequence[Record]) -> list[Record]:
    """The curves of one device, configuration and number of ranks: of those with the most systems,
    ranks on GPUs of their own first, then the newest."""
    groups: dict[tuple, list[Record]] = {}
    for curve in curves:
        shape = curve.shape
        key = curve.device, curve.ranks, shape.get("config"), shape.get("redundancy")
        groups.setdefault(key, []).append(curve)

    def worth(group: list[Record]) -> tuple:
        systems = {curve.shape["system"] for curve in group}
        on_links = group[0].shape.get("link") == "peer"
        return len(systems), on_links, max(curve.time for curve in group)

    return max(groups.values(), key=worth, default=[])


def time_to_recovered(curve: Record) -> float | None:
    """Seconds from the kill until the smoothed rate is at 95 % of that before it; None if never."""
    shape = curve.shape
    rates, starts = np.array(shape["rates"]), _starts(curve)
    before = rates[(starts >= -BEFORE_S) & (starts + shape["bin_s"] <= 0)]
    if not len(before):
        return None
    smooth = np.convolve(rates, np.ones(SMOOTH_BINS) / SMOOTH_BINS, "valid")
    # A window counts once all of it lies after the stop: else it would hold what was before.
    begin = shape["marks"].get("resumed", 0.0)
    for start, rate in zip(starts, smooth, strict=False):
        if start >= begin and rate >= RECOVERED * before.mean():
            return float(start)
    return None


def timeline(curves: Sequence[Record]) -> Figure | None:
    """One row for each system, over the same seconds."""
    if not curves:
        return None
    figure = Figure(figsize=(8.0, 1.5 * len(curves) + 1.1), dpi=110, layout="constrained")
    rows = figure.subplots(len(curves), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    last = max(max(c.shape["marks"].values()) for c in curves) + AFTER_S
    top = max(max(c.shape["rates"]) for c in curves)
    for axes, curve in zip(rows, curves, strict=True):
        _timeline_row(axes, curve, last, top)
    rows[-1].set_xlabel("Time since SIGKILL of one rank (s)")
    rows[len(rows) // 2].set_ylabel("Throughput (tokens/s)")
    lines = [Line2D([], [], color=COLOURS[name], label=name) for name in PLOTTED[:3]]
    lines[-1].set_label("resumed, returned")
    lines.append(Line2D([], [], color=INK, lw=0.8, ls=(0, (4, 2)), label="95 % of before"))
    figure.legend(handles=lines, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    first = curves[0]
    _head(figure, f"One of {first.ranks} ranks killed under load; {first.device}")
    return figure


def _timeline_row(axes: Axes, curve: Record, last: float, top: float) -> None:
    shape, starts = curve.shape, _starts(curve)
    edges = np.append(starts, starts[-1] + shape["bin_s"])
    axes.stairs(shape["rates"], edges, fill=True, color=FILL)
    axes.stairs(shape["rates"], edges, baseline=None, color=LINE, lw=0.7)
    before = [r for r, s in zip(shape["rates"], starts, strict=True) if -BEFORE_S <= s < 0]
    level = RECOVERED * float(np.mean(before)) if before else 0.0
    axes.axhline(level, color=INK, lw=0.8, ls=(0, (4, 2)))
    axes.annotate("95 %", (-BEFORE_S, level), xytext=(2, 2), textcoords="offset points", fontsize=7)
    marks = shape["marks"]
    for name in (n for n in PLOTTED if n in marks):
        axes.axvline(marks[name], color=COLOURS[name], lw=1.0)
    axes.set_xlim(-BEFORE_S, last)
    axes.set_ylim(0, 1.1 * top)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=GRID, lw=0.6)
    axes.set_axisbelow(True)
    told = [f"{n} {marks[n]:.2f} s" for n in PLOTTED if n in marks and n != "kill"]
    recovered = time_to_recovered(curve)
    told.append("95 % never" if recovered is None else f"95 % after {recovered:.1f} s")
    name = SYSTEMS[shape["system"]]
    axes.set_title(f"{name}:  " + ",  ".join(["kill 0 s", *told]), fontsize=8, loc="left")


def _starts(curve: Record) -> np.ndarray:
    shape = curve.shape
    return shape["begin_s"] + shape["bin_s"] * np.arange(len(shape["rates"]))


def latency_cdf(curves: Sequence[Record]) -> Figure | None:
    """The share of requests (e2e) and of tokens (itl) that took no longer."""
    if not curves:
        return None
    figure = Figure(figsize=(8.0, 3.2), dpi=110, layout="constrained")
    panels = {"e2e": "End-to-end latency of a request", "itl": "Time between two tokens"}
    for axes, (latency, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for curve in (c for c in curves if c.shape["latency"] == latency):
            system, points = curve.shape["system"], np.maximum(curve.shape["points"], 1e-3)
            shares = np.arange(POINTS + 1)
            axes.plot(points, shares, color=HUES[system], lw=1.4, label=SYSTEMS[system])
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        # Tokens that came together have no time between them.
        if latency == "itl":
            axes.set_xlim(left=1)
        axes.set_xlabel(f"{title} (ms)", fontsize=9)
        axes.set_ylim(0, 101)
        _plain(axes)
    figure.axes[0].set_ylabel("Share (%)")
    figure.axes[0].legend(frameon=False, fontsize=8)
    first = curves[0]
    _head(figure, f"Requests that completed, one of {first.ranks} ranks killed; {first.device}")
    return figure


def dispatch_combine(records: Sequence[Record]) -> Figure | None:
    """Time of one exchange of one rank against the tokens of each rank, and a copy of its bytes."""
    wanted = [r for r in records if r.bench in ("dispatch", "combine") and r.metric == "time p50"]
    if not wanted:
        return None
    figure = Figure(figsize=(8.0, 3.4), dpi=110, layout="constrained")
    kinds = {"dispatch": {"bfloat16": {}, "float8_e4m3fn": {}}}
    kinds["combine"] = {"per_choice": {}, "per_rank": {}}
    for axes, bench in zip(figure.subplots(1, 2, sharey=True), kinds, strict=True):
        key = "dtype" if bench == "dispatch" else "combine"
        for kind, colour in zip(kinds[bench], (HUES["elastic"], HUES["rejit"]), strict=True):
            of_kind = lambda r, kind=kind, key=key: (
                r.shape.get(key) == kind and r.shape["hidden"] == 7168
            )
            points = _by_tokens(r for r in wanted if r.bench == bench and of_kind(r))
            if not points:
                continue
            tokens = list(points)
            axes.plot(
                tokens, [r.value for r in points.values()], "o-", ms=4, color=colour, label=kind
            )
            bounds = [r.bound for r in points.values()]
            axes.plot(tokens, bounds, ":", color=colour, label=f"{kind}: copy of the same bytes")
        home = _by_tokens(
            r
            for r in records
            if bench == "combine"
            and r.bench == "combine_home"
            and r.metric == "time p50"
            and r.shape["hidden"] == 7168
        )
        if home:
            axes.plot(
                list(home),
                [r.value for r in home.values()],
                "s--",
                ms=4,
                color=HUES["elastic"],
                label="per_choice, sent by the GEMM",
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("Tokens of each rank")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_title(bench, fontsize=9, loc="left")
        axes.legend(frameon=False, fontsize=7)
        _plain(axes)
    figure.axes[0].set_ylabel("Time of one exchange, p50 (us)")
    first = wanted[0]
    _head(figure, f"8 ranks in turn on one {first.device}; hidden 7168, 256 experts, top 8")
    return figure


def _by_tokens(records) -> dict[int, Record]:
    found: dict[int, Record] = {}
    for record in records:
        tokens = record.shape["tokens"]
        if tokens not in found or record.time >= found[tokens].time:
            found[tokens] = record
    return dict(sorted(found.items()))


def scale(records: Sequence[Record]) -> Figure | None:
    """Left: the model beside what was measured. Right: its R = 8..512."""
    try:
        found = {bench: cost_model.checked(records, bench) for bench in ("dispatch", "combine")}
    except ValueError:
        return None
    kernels = {bench: kernel for bench, (kernel, _) in found.items()}
    figure = Figure(figsize=(8.0, 3.4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    for (bench, (_, points)), colour in zip(found.items(), HUES.values(), strict=False):
        tokens = list(points)
        left.plot(
            tokens, [m for m, _ in points.values()], "-", color=colour, label=f"{bench}: model"
        )
        values = [v for _, v in points.values()]
        left.plot(tokens, values, "o", ms=4, color=colour, label=f"{bench}: measured")
    left.set_xscale("log", base=2)
    left.set_xlabel("Tokens of each rank")
    left.set_ylabel("Time (us)")
    left.set_title("Checked: R = 8 on one H100", fontsize=9, loc="left")
    for link, colour in zip((cost_model.NVLINK, cost_model.RDMA), HUES.values(), strict=False):
        for tokens, style in ((128, "-"), (16, ":")):
            loads = [cost_model.Load(ranks=r, tokens=tokens) for r in cost_model.RANKS]
            times = [cost_model.total_us(kernels, load, link) for load in loads]
            label = f"{link.name}, {tokens} tokens"
            right.plot(cost_model.RANKS, times, style, marker=".", color=colour, label=label)
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xlabel("Ranks R")
    right.set_ylim(20, 6_000)  # room for the legend
    right.set_title("Model: dispatch + combine of a layer (us)", fontsize=9, loc="left")
    for axes in (left, right):
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.legend(frameon=False, fontsize=7, loc="upper left")
        _plain(axes)
    _head(figure, "hidden 7168, 256 experts, top 8, bf16; link rates are nominal, not measured")
    return figure


def _head(figure: Figure, text: str) -> None:
    figure.suptitle(text, fontsize=10, x=0.01, ha="left")


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GRID, lw=0.6)
    axes.set_axisbelow(True)


if __name__ == "__main__":
    absl_flags.DEFINE_string("out", str(RESULTS / "plots"), "Directory of the pictures.")
    sys.exit(app.run(flags.main_with_usage(main)))
