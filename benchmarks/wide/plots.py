"""Pictures of what ranks on GPUs of their own did: exchanges over tokens, and plans of failures."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import Record
from benchmarks.wide.exchange_report import PUBLISHED
from benchmarks.wide.plans import sizes_of
from launch.timeline import COLOURS, FILL, GRID, INK, LINE

OURS = {
    ("wide_dispatch", "dtype", "bfloat16"): ("#1f5a94", "bf16"),
    ("wide_dispatch", "dtype", "float8_e4m3fn"): ("#c77700", "fp8"),
    ("wide_combine", "combine", "per_choice"): ("#1f5a94", "per_choice"),
    ("wide_combine", "combine", "per_rank"): ("#c77700", "per_rank"),
    ("wide_combine_home", "combine", "per_choice"): ("#2e7d32", "per_choice, sent by the GEMM"),
}
THEIRS = {
    "all_to_all": ("x--", "NCCL all_to_all"),
    "ragged_all_to_all": ("+-.", "ragged_all_to_all"),
}
MARKERS = "sD^v"


def exchanges(records: Sequence[Record]) -> Figure | None:
    """Time of an exchange against the tokens of each rank, of the newest run on GPUs with links of
    their own: with the link's bound, XLA's collectives, and what others published (of 8 GPUs)."""
    wanted = [r for r in records if r.metric == "time p50" and r.shape.get("link") == "peer"]
    if not wanted:
        return None
    newest = max(wanted, key=lambda r: (r.ranks, r.time))
    alike = [r for r in wanted if (r.device, r.ranks) == (newest.device, newest.ranks)]
    figure = Figure(figsize=(8.6, 4.0), dpi=110, layout="constrained")
    for axes, name in zip(figure.subplots(1, 2, sharey=True), PUBLISHED, strict=True):
        _ours(axes, name, alike)
        for collective, (style, label) in THEIRS.items():
            of = (r for r in alike if r.shape.get("collective") == collective)
            if points := by_tokens(of):
                values = [r.value for r in points.values()]
                axes.plot(list(points), values, style, color=INK, lw=0.9, ms=5, label=label)
        for (who, figures), marker in zip(PUBLISHED[name].items(), MARKERS, strict=False):
            axes.plot(
                list(figures), list(figures.values()), marker, ms=4, color="#9a9a9a", label=who
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("Tokens of each rank")
        axes.set_title(name, fontsize=9, loc="left")
        axes.legend(frameon=False, fontsize=6)
        _plain(axes)
    figure.axes[0].set_ylabel("Time of one exchange, p50 (us)")
    text = (
        f"{newest.ranks} ranks, {newest.device}; hidden {newest.shape['hidden']}; grey: published"
    )
    figure.suptitle(text, fontsize=10, x=0.01, ha="left")
    return figure


def _ours(axes: Axes, name: str, records: Sequence[Record]) -> None:
    for (bench, key, value), (colour, label) in OURS.items():
        of = (r for r in records if r.bench == bench and r.shape.get(key) == value)
        points = by_tokens(of) if bench.startswith(f"wide_{name}") else {}
        if not points:
            continue
        axes.plot(
            list(points), [r.value for r in points.values()], "o-", ms=3, color=colour, label=label
        )
        if all(r.bound for r in points.values()) and bench != "wide_combine_home":
            bounds = [r.bound for r in points.values()]
            axes.plot(list(points), bounds, ":", color=colour, label=f"{label}: link")


def by_tokens(records) -> dict[int, Record]:
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
        shape = curve.shape
        edges = shape["begin_s"] + shape["bin_s"] * np.arange(len(shape["rates"]) + 1)
        axes.stairs(shape["rates"], edges, fill=True, color=FILL)
        axes.stairs(shape["rates"], edges, baseline=None, color=LINE, lw=0.7)
        axes.axvline(0.0, color=COLOURS["kill"], lw=1.0)
        axes.set_ylim(bottom=0)
        axes.set_title(
            f"{sizes_of(shape['fault_plan'])}:  {shape['fault_plan']}", fontsize=7, loc="left"
        )
        _plain(axes)
    rows[-1].set_xlabel("Time since the first kill (s)")
    rows[len(rows) // 2].set_ylabel("Throughput (tokens/s)")
    text = f"Plans of failures under load; {curves[0].device}"
    figure.suptitle(text, fontsize=10, x=0.01, ha="left")
    return figure


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GRID, lw=0.6)
    axes.set_axisbelow(True)
