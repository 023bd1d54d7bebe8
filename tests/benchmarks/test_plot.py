"""Plots are drawn from records alone; their numbers are those of the curves."""

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from benchmarks import cost_model, plot
from benchmarks.harness import Sheet
from benchmarks.serving.series import add_cdf, add_timeline
from benchmarks.table import render


def a_sheet(**changes) -> Sheet:
    return Sheet("faults", "cpu, 2 cores, X", 4, {"config": "tiny_cpu"}, commit="c", **changes)


def a_timeline(system: str = "elastic", resumed: float = 1.0, time: str = "2026-01-01T00:00:00"):
    """100 tokens/s until the kill at 10 s, nothing until `resumed` s later, then 100 again."""
    times = [(n / 100, 1) for n in range(1_000)]
    times += [(10 + resumed + n / 100, 1) for n in range(1_000)]
    marks = {"kill": 10.0, "detected": 10.1, "resumed": 10 + resumed}
    return add_timeline(a_sheet(time=time), system, times, marks)


def test_a_timeline_has_every_token_in_its_bin():
    record = a_timeline()
    shape = record.shape
    assert sum(shape["rates"]) * shape["bin_s"] == pytest.approx(2_000)
    assert shape["begin_s"] == -10 and shape["marks"] == {
        "kill": 0.0,
        "detected": 0.1,
        "resumed": 1.0,
    }
    assert set(shape["rates"][:40]) == {100.0} and set(shape["rates"][40:44]) == {0.0}


@pytest.mark.parametrize("resumed", [0.5, 3.0])
def test_95_percent_are_back_when_tokens_flow_again(resumed):
    assert plot.time_to_recovered(a_timeline(resumed=resumed)) == pytest.approx(resumed, abs=0.25)


def test_a_cdf_has_the_percentiles():
    record = add_cdf(a_sheet(), "rejit", "itl", [n / 1000 for n in range(1, 201)])
    points = record.shape["points"]
    assert len(points) == 101 and points[0] == 1 and points[50] == record.value == 101
    assert points[-1] == 200 and points == sorted(points)


def test_the_newest_curve_of_each_system_counts():
    old, new = a_timeline(time="2026-01-01T00:00:00"), a_timeline(time="2026-01-02T00:00:00")
    other = a_timeline("restart", resumed=8.0)
    assert plot.newest_curves([new, other, old], "timeline", "faults") == [new, other]


def test_all_pictures_are_drawn_and_the_tables_leave_curves_out():
    curves = [a_timeline(s, r) for s, r in (("elastic", 0.1), ("rejit", 3.0), ("restart", 9.0))]
    cdfs = [
        add_cdf(a_sheet(), system, latency, [0.01, 0.02, 0.5])
        for system in plot.SYSTEMS
        for latency in ("e2e", "itl")
    ]
    records = cost_model.all_results()
    for figure in (
        plot.timeline(curves),
        plot.latency_cdf(cdfs),
        plot.dispatch_combine(records),
        plot.scale(records),
    ):
        FigureCanvasAgg(figure).draw()
        assert figure.axes
    assert "timeline" not in render(curves + cdfs)
    assert plot.timeline([]) is None and plot.scale([]) is None
