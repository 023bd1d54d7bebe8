"""Renderer of all plots from the records in `results/*.jsonl`; nothing is measured.

python -m benchmarks.plot [--out=benchmarks/results/plots]

timeline.png          tokens/s around one SIGKILL: elastic, re-jit, restart, with marks
latency_cdf.png       latencies of their requests
dispatch_combine.png  time against tokens, with the lower bound
wide.png              dispatch and combine between GPUs, with the link's bound, NCCL, and others
plans.png             tokens/s while several ranks die and return, as plans say
cost_model.png        what the cost model says for R = 8..512, over NVLink and RDMA
"""

import pathlib
from collections.abc import Sequence

import numpy as np
from absl import flags as absl_flags
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from benchmarks import command, cost_model
from benchmarks.harness import RESULTS, Record
from benchmarks.serving.series import POINTS, identity
from benchmarks.wide.exchange_report import PUBLISHED
from benchmarks.wide.plans import sizes_of
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
        "wide.png": wide(records),
        "plans.png": plans(of_one_run(newest_curves(records, "timeline", "serve"))),
        "dispatch_combine.png": dispatch_combine(records),
        "cost_model.png": scale(records),
    }
    for name, figure in drawn.items():
        if figure is None:
            print(f"{name}: left out for lack of results")
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
    _stairs(axes, curve)
    before = [r for r, s in zip(shape["rates"], starts, strict=True) if -BEFORE_S <= s < 0]
    level = RECOVERED * float(np.mean(before)) if before else 0.0
    axes.axhline(level, color=INK, lw=0.8, ls=(0, (4, 2)))
    axes.annotate("95 %", (-BEFORE_S, level), xytext=(2, 2), textcoords="offset points", fontsize=7)
    marks = shape["marks"]
    for name in (n for n in PLOTTED if n in marks):
        axes.axvline(marks[name], color=COLOURS[name], lw=1.0)
    axes.set_xlim(-BEFORE_S, last)
    axes.set_ylim(0, 1.1 * top)
    _plain(axes, "y")
    words = [f"{n} {marks[n]:.2f} s" for n in PLOTTED if n in marks and n != "kill"]
    recovered = time_to_recovered(curve)
    words.append("95 % never" if recovered is None else f"95 % after {recovered:.1f} s")
    name = SYSTEMS[shape["system"]]
    axes.set_title(f"{name}:  " + ",  ".join(["kill 0 s", *words]), fontsize=8, loc="left")


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


# (bench, key of the shape, its value) -> colour, label.
ONE_GPU = {
    ("dispatch", "dtype", "bfloat16"): (HUES["elastic"], "bfloat16"),
    ("dispatch", "dtype", "float8_e4m3fn"): (HUES["rejit"], "float8_e4m3fn"),
    ("combine", "combine", "per_choice"): (HUES["elastic"], "per_choice"),
    ("combine", "combine", "per_rank"): (HUES["rejit"], "per_rank"),
    ("combine_home", "hidden", 7168): ("#2e7d32", "per_choice, sent by the GEMM"),
}
WIDE = {
    ("wide_dispatch", "dtype", "bfloat16"): (HUES["elastic"], "bf16"),
    ("wide_dispatch", "dtype", "float8_e4m3fn"): (HUES["rejit"], "fp8"),
    ("wide_combine", "combine", "per_choice"): (HUES["elastic"], "per_choice"),
    ("wide_combine", "combine", "per_rank"): (HUES["rejit"], "per_rank"),
    ("wide_combine_home", "combine", "per_choice"): ("#2e7d32", "per_choice, sent by the GEMM"),
}
THEIRS = {
    "all_to_all": ("x--", "NCCL all_to_all"),
    "ragged_all_to_all": ("+-.", "ragged_all_to_all"),
}
MARKERS = "sD^v"


def dispatch_combine(records: Sequence[Record]) -> Figure | None:
    """Time of one exchange of one rank against the tokens of each rank, and a copy of its bytes."""
    alike = [r for r in records if r.metric == "time p50" and r.shape.get("hidden") == 7168]
    wanted = [r for r in alike if r.bench in ("dispatch", "combine", "combine_home")]
    if not wanted:
        return None
    figure = Figure(figsize=(8.0, 3.4), dpi=110, layout="constrained")
    for axes, name in _exchange_panels(figure):
        _exchange_curves(axes, name, wanted, ONE_GPU, "copy of the same bytes")
        axes.legend(frameon=False, fontsize=7)
    _head(figure, f"8 ranks in turn on one {wanted[0].device}; hidden 7168, 256 experts, top 8")
    return figure


def wide(records: Sequence[Record]) -> Figure | None:
    """Time of an exchange against the tokens of each rank, of the newest run on GPUs with links of
    their own: with the link's bound, XLA's collectives, and published figures (of 8 GPUs)."""
    wanted = [r for r in records if r.metric == "time p50" and r.shape.get("link") == "peer"]
    if not wanted:
        return None
    newest = max(wanted, key=lambda r: (r.ranks, r.time))
    alike = [r for r in wanted if (r.device, r.ranks) == (newest.device, newest.ranks)]
    figure = Figure(figsize=(8.6, 4.0), dpi=110, layout="constrained")
    for axes, name in _exchange_panels(figure):
        _exchange_curves(axes, name, alike, WIDE, "link")
        for collective, (style, label) in THEIRS.items():
            points = by_tokens(r for r in alike if r.shape.get("collective") == collective)
            if points:
                values = [r.value for r in points.values()]
                axes.plot(list(points), values, style, color=INK, lw=0.9, ms=5, label=label)
        for (who, figures), marker in zip(PUBLISHED[name].items(), MARKERS, strict=False):
            values = list(figures.values())
            axes.plot(list(figures), values, marker, ms=4, color="#9a9a9a", label=who)
        axes.legend(frameon=False, fontsize=6)
    hidden = newest.shape["hidden"]
    _head(figure, f"{newest.ranks} ranks, {newest.device}; hidden {hidden}; grey: published")
    return figure


def _exchange_panels(figure: Figure):
    """(axes, name) of dispatch and combine, over tokens."""
    panels = list(zip(figure.subplots(1, 2, sharey=True), ("dispatch", "combine"), strict=True))
    for axes, name in panels:
        _log_axes(axes)
        axes.set_xlabel("Tokens of each rank")
        axes.set_title(name, fontsize=9, loc="left")
        _plain(axes)
    panels[0][0].set_ylabel("Time of one exchange, p50 (us)")
    return panels


def _exchange_curves(axes: Axes, name: str, records, kinds, bound: str) -> None:
    """A line for each kind, and a dotted one for its bounds; `combine_home` shares the bound."""
    for (bench, key, value), (colour, label) in kinds.items():
        if not bench.removeprefix("wide_").startswith(name):
            continue
        points = by_tokens(r for r in records if r.bench == bench and r.shape.get(key) == value)
        if not points:
            continue
        found = list(points.values())
        axes.plot(list(points), [r.value for r in found], "o-", ms=4, color=colour, label=label)
        if all(r.bound for r in found) and not bench.endswith("home"):
            bounds = [r.bound for r in found]
            axes.plot(list(points), bounds, ":", color=colour, label=f"{label}: {bound}")


def by_tokens(records) -> dict[int, Record]:
    """The newest record of each number of tokens."""
    found: dict[int, Record] = {}
    for record in records:
        tokens = record.shape["tokens"]
        if tokens not in found or record.time >= found[tokens].time:
            found[tokens] = record
    return dict(sorted(found.items()))


def plans(curves: Sequence[Record]) -> Figure | None:
    """A row for each plan of failures that `benchmarks.serve` carried out: tokens/s over time."""
    curves = [c for c in curves if "fault_plan" in c.shape]
    if not curves:
        return None
    figure = Figure(figsize=(8.6, 1.4 * len(curves) + 0.9), dpi=110, layout="constrained")
    rows = figure.subplots(len(curves), 1, squeeze=False)[:, 0]
    for axes, curve in zip(rows, curves, strict=True):
        _stairs(axes, curve)
        axes.axvline(0.0, color=COLOURS["kill"], lw=1.0)
        axes.set_ylim(bottom=0)
        plan = curve.shape["fault_plan"]
        axes.set_title(f"{sizes_of(plan)}:  {plan}", fontsize=7, loc="left")
        _plain(axes)
    rows[-1].set_xlabel("Time since the first kill (s)")
    rows[len(rows) // 2].set_ylabel("Throughput (tokens/s)")
    _head(figure, f"Plans of failures under load; {curves[0].device}")
    return figure


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
    _log_axes(right)
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


def _stairs(axes: Axes, curve: Record) -> None:
    """Tokens per second over time, filled."""
    starts = _starts(curve)
    edges = np.append(starts, starts[-1] + curve.shape["bin_s"])
    axes.stairs(curve.shape["rates"], edges, fill=True, color=FILL)
    axes.stairs(curve.shape["rates"], edges, baseline=None, color=LINE, lw=0.7)


def _log_axes(axes: Axes) -> None:
    """Powers of two to the right, a logarithmic scale upwards, plain numbers at both."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _plain(axes: Axes, grid: str = "both") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color=GRID, lw=0.6)
    axes.set_axisbelow(True)


if __name__ == "__main__":
    absl_flags.DEFINE_string("out", str(RESULTS / "plots"), "Directory of the pictures.")
    command.run(main)
