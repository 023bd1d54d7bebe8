"""Cost of a failure: numbers and a plot from the times of tokens and of the supervisor's marks.

Marks are monotonic seconds under these names, in this order; later ones may be missing:
    kill          the rank was killed
    detected      the supervisor's verdict
    resumed       commit of the epoch without the rank
    return_start  its return began: a new process was started, or its admission was prepared
    returned      commit of the epoch with the rank
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from rich.console import Console
from rich.table import Table

MARKS = ("kill", "detected", "resumed", "return_start", "returned")
PLOTTED = ("kill", "detected", "resumed", "returned")
INK, LINE, FILL, SHADE, GRID = "#222222", "#1f5a94", "#c9dcee", "#f8edd6", "#e4e4e4"
COLOURS = {"kill": "#b3261e", "detected": "#6b6b6b", "resumed": "#2e7d32", "returned": "#2e7d32"}
LABEL_GAP_POINTS = 8.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """The cost of one failure and return. A value is None if its marks or tokens are missing.

    Rates count the tokens of all clients in a half-open span and divide by its length.

    A gap is the time between two tokens that follow each other, whoever they are for. Tokens of a
    step that was under way still arrive just after the kill, and the last mark is written just
    before the first new token, so neither mark bounds the stop that clients see. It is measured:
    the *kill gap* is the longest gap that has a part in [kill, resumed], and the recovery pause
    runs from the kill to the token that ends the kill gap. For tokens at 0.9, 1.1, 1.9, 2.0 with
    kill 1.0 and resumed 1.8 the kill gap is 0.8 s (1.1 to 1.9) and the recovery pause 0.9 s.
    """

    before_tokens_per_s: float | None  # [first token + skip, kill)
    during_tokens_per_s: float | None  # [kill, resumed)
    reduced_tokens_per_s: float | None  # [resumed, returned), or to the last token
    after_tokens_per_s: float | None  # [returned, last token]
    detection_s: float | None  # kill to detected
    recovery_s: float | None  # kill to resumed
    recovery_pause_s: float | None  # kill to the end of the kill gap
    kill_gap_s: float | None  # longest gap that has a part in [kill, resumed]
    return_s: float | None  # return_start to returned
    return_gap_s: float | None  # longest gap that has a part in [return_start, returned]
    steady_gap_s: float | None  # longest gap before the kill, to compare the others with


def summarise(
    token_times: Sequence[float], marks: Mapping[str, float], *, skip_s: float = 0.0
) -> Summary:
    """Computes the Summary.

    Args:
        token_times: Seconds, one entry for each token, in any order.
        marks: Seconds by name; see the module.
        skip_s: Warm-up that values from before the kill leave out.

    Raises:
        ValueError: Marks are unknown or out of order.
    """
    check_marks(marks)
    times = np.sort(np.asarray(token_times, dtype=np.float64))
    kill, resumed, returned = (marks.get(name) for name in ("kill", "resumed", "returned"))
    first, last = (times[0] + skip_s, times[-1]) if len(times) else (None, None)
    after_last = None if last is None else math.nextafter(last, math.inf)
    steady_end = last if kill is None else kill
    kill_gap = _longest_gap(times, kill, resumed)
    return_gap = _longest_gap(times, marks.get("return_start"), returned)
    steady = times[(times >= first) & (times <= steady_end)] if len(times) else times
    return Summary(
        before_tokens_per_s=_rate(times, first, after_last if kill is None else kill),
        during_tokens_per_s=_rate(times, kill, resumed),
        reduced_tokens_per_s=_rate(times, resumed, after_last if returned is None else returned),
        after_tokens_per_s=_rate(times, returned, after_last),
        detection_s=_span(marks, "kill", "detected"),
        recovery_s=_span(marks, "kill", "resumed"),
        recovery_pause_s=None if kill_gap is None else kill_gap[1] - kill,
        kill_gap_s=None if kill_gap is None else kill_gap[1] - kill_gap[0],
        return_s=_span(marks, "return_start", "returned"),
        return_gap_s=None if return_gap is None else return_gap[1] - return_gap[0],
        steady_gap_s=float(np.diff(steady).max()) if len(steady) > 1 else None,
    )


def check_marks(marks: Mapping[str, float]) -> None:
    """Raises ValueError unless all marks are known, finite, and in the order of MARKS."""
    if unknown := marks.keys() - set(MARKS):
        raise ValueError(f"unknown marks {sorted(unknown)}; use {', '.join(MARKS)}")
    known = [(name, marks[name]) for name in MARKS if name in marks]
    for name, time_s in known:
        if not math.isfinite(time_s):
            raise ValueError(f"mark {name} is at {time_s}; leave it out if it did not happen")
    for (early, early_s), (late, late_s) in itertools.pairwise(known):
        if late_s < early_s:
            raise ValueError(f"mark {late} at {late_s} s is before {early} at {early_s} s")


def render_report(
    rows: Iterable[tuple[str, str]], title: str | None = None, console: Console | None = None
) -> None:
    """Prints (name, value) rows as a table."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    for name, value in rows:
        table.add_row(name, value)
    (console or Console(highlight=False)).print(table, markup=False)


def plot(
    path: str,
    token_times: Sequence[float],
    marks: Mapping[str, float],
    title: str,
    *,
    bin_ms: int = 200,
    skip_s: float = 0.0,
) -> None:
    """Draws tokens/s over time, with the marks, as a PNG. Second 0 is the kill, if there is one.

    Raises ValueError where there is no token to draw, or for marks that `check_marks` refuses.
    """
    check_marks(marks)
    if not len(token_times):
        raise ValueError("token_times is empty; there is nothing to plot")
    zero = marks.get("kill", min(token_times))
    times = np.sort(np.asarray(token_times, dtype=np.float64)) - zero
    shifted = {name: time_s - zero for name, time_s in marks.items()}
    edges, rates = bin_rates(times, bin_ms)

    figure = Figure(figsize=(7.2, 3.4), dpi=200, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    begin, end = min(edges[0], *shifted.values(), 0.0), max(edges[-1], *shifted.values(), 0.0)
    axes.set_xlim(begin, end)
    axes.set_ylim(0, 1.12 * max(rates))
    if "kill" in shifted:
        axes.axvspan(
            shifted["kill"],
            shifted.get("returned", end),
            color=SHADE,
            lw=0,
            label="reduced membership",
        )
    axes.stairs(rates, edges, fill=True, color=FILL, label=f"tokens/s in bins of {bin_ms} ms")
    axes.stairs(rates, edges, baseline=None, color=LINE, lw=0.7)
    means = _draw_means(axes, summarise(times, shifted, skip_s=skip_s), shifted, times, skip_s)
    origin = "the kill" if "kill" in marks else "the first token"
    axes.set_xlabel(f"Time since {origin} (s)")
    axes.set_ylabel("Throughput (tokens/s)")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=GRID, lw=0.6)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    labels = _draw_marks(axes, shifted)
    axes.set_title(title, fontsize=10, color=INK, loc="left", pad=38 if labels else 8)
    canvas.draw()  # only now the places and widths of texts are known
    _spread_texts(labels, 0.0, figure.bbox.width)
    for text, start, stop in means:
        room = np.diff(axes.transData.transform([(start, 0), (stop, 0)])[:, 0])
        text.set_visible(Text.get_window_extent(text).width < room)
    figure.savefig(path)


def bin_rates(times: np.ndarray, bin_ms: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (edges, tokens/s) of bins aligned to second 0, without a last bin that is cut short.

    Tokens at 0.05, 0.15, 0.25 and 0.31 s in bins of 100 ms: edges 0, 0.1, 0.2, 0.3, rates 10.
    """
    if bin_ms < 1:
        raise ValueError(f"{bin_ms=} must be at least 1")
    width = bin_ms / 1000
    first, last = math.floor(times.min() / width), math.floor(times.max() / width)
    last = max(last, first + 1)
    edges = np.arange(first, last + 1) * width
    counts = np.bincount(np.floor(times / width).astype(int) - first, minlength=last - first)
    return edges, counts[: last - first] / width


def spread(centres: Sequence[float], widths: Sequence[float], low: float, high: float):
    """Moves sorted labels apart as little as needed, so that none overlaps and all lie in range.

    Widths 2 at 0, 1 and 9 within [0, 10] come to lie at 1, 3 and 9. If they do not all fit, they
    start at `low` and run over.
    """
    placed: list[float] = []
    floor = low
    for centre, width in zip(centres, widths, strict=True):
        placed.append(max(centre, floor + width / 2))
        floor = placed[-1] + width / 2
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], high - widths[i] / 2)
        high = placed[i] - widths[i] / 2
    overrun = max(low - high, 0.0) if placed else 0.0
    return [centre + overrun for centre in placed]


def _rate(times: np.ndarray, start: float | None, end: float | None) -> float | None:
    if start is None or end is None or end <= start:
        return None
    return float(np.count_nonzero((times >= start) & (times < end)) / (end - start))


def _span(marks: Mapping[str, float], early: str, late: str) -> float | None:
    return marks[late] - marks[early] if early in marks and late in marks else None


def _longest_gap(
    times: np.ndarray, start: float | None, end: float | None
) -> tuple[float, float] | None:
    """(begin, end) of the longest gap between sorted times that has a part in [start, end]."""
    if start is None or end is None or len(times) < 2:
        return None
    inside = (times[1:] >= start) & (times[:-1] <= end)
    if not inside.any():
        return None
    i = int(np.argmax(np.where(inside, np.diff(times), -1.0)))
    return float(times[i]), float(times[i + 1])


def _draw_means(
    axes: Axes, summary: Summary, marks: Mapping[str, float], times: np.ndarray, skip_s: float
) -> list[tuple[Annotation, float, float]]:
    """A dashed line at the mean rate of each span, its value at the foot: (text, start, stop)."""
    begin, end = times[0] + skip_s, times[-1]
    returned = marks.get("returned", end)
    spans = [
        (begin, marks.get("kill", end), summary.before_tokens_per_s),
        (marks.get("resumed"), returned, summary.reduced_tokens_per_s),
        (returned, end, summary.after_tokens_per_s),
    ]
    drawn = []
    for start, stop, rate in spans:
        if rate is None:
            continue
        axes.hlines(rate, start, stop, color=INK, lw=1.0, ls=(0, (4, 2)))
        text = axes.annotate(
            f"mean {rate:,.0f}",
            ((start + stop) / 2, 0.0),
            xycoords=axes.get_xaxis_transform(),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=INK,
        )
        drawn.append((text, start, stop))
    return drawn


def _draw_marks(axes: Axes, marks: Mapping[str, float]) -> list[Annotation]:
    """A vertical line for each mark, and above the axes its label with a leader to the line."""
    texts = []
    for name in (name for name in PLOTTED if name in marks):
        colour = COLOURS[name]
        axes.axvline(marks[name], color=colour, lw=1.0)
        leader = {"arrowstyle": "-", "color": colour, "lw": 0.7, "shrinkA": 1, "shrinkB": 0}
        texts.append(
            axes.annotate(
                f"{name}\n{marks[name]:.2f} s" if marks[name] else f"{name}\n0 s",
                (marks[name], 1.0),
                xycoords=axes.get_xaxis_transform(),
                xytext=(0, 12),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=8,
                color=colour,
                arrowprops=leader | {"relpos": (0.5, 0.0)},
            )
        )
    return texts


def _spread_texts(texts: Sequence[Annotation], low: float, high: float) -> None:
    """Shifts texts apart sideways, within [low, high] pixels of a figure that was drawn."""
    if not texts:
        return
    pixels_per_point = texts[0].figure.dpi / 72
    homes, widths = [], []
    for text in texts:
        # The extent of the words alone: that of an annotation includes its leader.
        box = Text.get_window_extent(text)
        homes.append((box.x0 + box.x1) / 2)
        widths.append(box.width + LABEL_GAP_POINTS * pixels_per_point)
    for text, home, place in zip(texts, homes, spread(homes, widths, low, high), strict=True):
        _, height = text.get_position()
        text.set_position(((place - home) / pixels_per_point, height))
