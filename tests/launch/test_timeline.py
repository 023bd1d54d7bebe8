"""Costs of a failure are measured from tokens, and drawn so that every mark can be read."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from launch.timeline import (
    bin_rates,
    plot,
    render_report,
    spread,
    summarise,
)

MARKS = {"kill": 10.0, "detected": 10.1, "resumed": 10.8, "return_start": 15.0, "returned": 20.0}


def every(step_s: float, start_s: float, end_s: float) -> list[float]:
    return list(np.arange(start_s, end_s - step_s / 2, step_s))


def a_failure() -> list[float]:
    """100 tokens/s, a step that still ends after the kill, 50 tokens/s from 10.9 s on, then 100."""
    before, late = every(0.01, 0.0, 10.0), [10.05]
    return [*before, *late, *every(0.02, 10.9, 20.0), *every(0.01, 20.15, 30.0)]


class TestSummarise:
    def test_rates_count_the_tokens_of_each_span(self):
        summary = summarise(a_failure(), MARKS)
        assert summary.before_tokens_per_s == pytest.approx(100, rel=0.01)
        assert summary.during_tokens_per_s == pytest.approx(1 / 0.8)
        assert summary.reduced_tokens_per_s == pytest.approx(455 / 9.2)
        assert summary.after_tokens_per_s == pytest.approx(985 / 9.99)

    def test_the_pause_runs_from_the_kill_to_the_token_that_ends_the_kill_gap(self):
        summary = summarise(a_failure(), MARKS)
        assert summary.kill_gap_s == pytest.approx(0.85)
        assert summary.recovery_pause_s == pytest.approx(0.9)
        assert (summary.detection_s, summary.recovery_s) == pytest.approx((0.1, 0.8))

    def test_the_example_of_the_docstring(self):
        summary = summarise([0.9, 1.1, 1.9, 2.0], {"kill": 1.0, "resumed": 1.8})
        assert (summary.kill_gap_s, summary.recovery_pause_s) == pytest.approx((0.8, 0.9))

    def test_a_gap_that_reaches_over_both_marks_is_the_kill_gap(self):
        summary = summarise([0.0, 0.9, 2.0, 9.0], {"kill": 1.0, "resumed": 1.8})
        assert (summary.kill_gap_s, summary.recovery_pause_s) == pytest.approx((1.1, 1.0))

    def test_the_return_has_its_own_gap(self):
        summary = summarise(a_failure(), MARKS)
        assert summary.return_s == pytest.approx(5.0)
        assert summary.return_gap_s == pytest.approx(0.17)
        assert summary.steady_gap_s == pytest.approx(0.01)

    def test_skip_leaves_out_the_warm_up(self):
        times = [0.0, 4.0, *every(0.01, 5.0, 10.0), 10.5]
        assert summarise(times, {"kill": 10.0}).steady_gap_s == pytest.approx(4.0)
        summary = summarise(times, {"kill": 10.0}, skip_s=5.0)
        assert summary.before_tokens_per_s == pytest.approx(100, rel=0.01)
        assert summary.steady_gap_s == pytest.approx(0.01)

    def test_the_order_of_tokens_does_not_matter(self):
        assert summarise(a_failure()[::-1], MARKS) == summarise(a_failure(), MARKS)

    @pytest.mark.parametrize("count", range(len(MARKS)))
    def test_marks_that_did_not_happen_leave_their_values_out(self, count):
        summary = summarise(a_failure(), dict(list(MARKS.items())[:count]))
        assert summary.return_s is None and summary.after_tokens_per_s is None
        assert (summary.recovery_pause_s is None) == (count < 3)
        assert summary.before_tokens_per_s is not None

    @pytest.mark.parametrize("times", [[], [3.0]])
    def test_without_tokens_there_is_no_pause(self, times):
        assert summarise(times, MARKS).recovery_pause_s is None

    def test_a_service_that_never_came_back_has_no_pause(self):
        assert summarise([1.0, 2.0], {"kill": 3.0, "resumed": 4.0}).recovery_pause_s is None

    @pytest.mark.parametrize("marks", [{"died": 1.0}, {"kill": float("nan")}, MARKS | {"kill": 11}])
    def test_wrong_marks_are_refused(self, marks):
        with pytest.raises(ValueError, match=r"mark"):
            summarise([1.0], marks)


class TestReport:
    def test_it_prints_names_and_values(self):
        output = io.StringIO()
        rows = [("recovery pause", "0.900 s"), ("before the kill", "100 tokens/s")]
        render_report(rows, title="Recovery", console=Console(file=output, width=100))
        assert "0.900 s" in output.getvalue() and "100 tokens/s" in output.getvalue()

    def test_brackets_are_no_markup(self):
        output = io.StringIO()
        render_report([("ranks [0]", "[red]")], console=Console(file=output, width=100))
        assert "ranks [0]" in output.getvalue() and "[red]" in output.getvalue()


class TestBinRates:
    def test_the_example_of_the_docstring(self):
        edges, rates = bin_rates(np.array([0.05, 0.15, 0.25, 0.31]), 100)
        np.testing.assert_allclose(edges, [0, 0.1, 0.2, 0.3])
        np.testing.assert_allclose(rates, [10, 10, 10])

    def test_bins_before_second_0_end_there(self):
        edges, rates = bin_rates(np.array([-0.3, -0.1, 0.1, 0.5]), 200)
        np.testing.assert_allclose(edges, [-0.4, -0.2, 0, 0.2, 0.4], atol=1e-12)
        np.testing.assert_allclose(rates, [5, 5, 5, 0])


class TestSpread:
    def test_the_example_of_the_docstring(self):
        assert spread([0, 1, 9], [2, 2, 2], 0, 10) == [1, 3, 9]

    @given(st.lists(st.tuples(st.integers(-20, 120), st.integers(1, 20)), max_size=5))
    def test_labels_that_fit_lie_in_range_and_do_not_overlap(self, labels):
        labels.sort()
        centres, widths = [c for c, _ in labels], [w for _, w in labels]
        placed = spread(centres, widths, 0, 100)
        starts = [p - w / 2 for p, w in zip(placed, widths, strict=True)]
        ends = [p + w / 2 for p, w in zip(placed, widths, strict=True)]
        assert all(s >= e for s, e in zip([*starts, 100], [0, *ends], strict=True))


class TestPlot:
    @pytest.mark.parametrize("count", [0, 1, 3, 5])
    def test_it_writes_a_png_whatever_marks_there_are(self, tmp_path, count):
        path = tmp_path / "timeline.png"
        plot(str(path), a_failure(), dict(list(MARKS.items())[:count]), "A failure")
        assert path.read_bytes().startswith(b"\x89PNG")

    def test_a_mark_after_the_last_token_is_still_drawn(self, tmp_path):
        plot(str(tmp_path / "x.png"), [1.0, 2.0, 12.0], MARKS, "Late")

    def test_no_tokens_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="token_times"):
            plot(str(tmp_path / "x.png"), [], MARKS, "Nothing")
