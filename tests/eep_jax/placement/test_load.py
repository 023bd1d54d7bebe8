"""Promises of the load estimate: it adds, decays, and is unused until it has enough choices."""

import pytest

from eep_jax.placement.load import CHOICES_MIN, HALF_LIFE_MS, LoadEstimate, observe, settled


def test_counts_of_all_ranks_add_up_and_fade():
    estimate = observe(observe(LoadEstimate(), (4, 0), 1_000), (4, 2), 1_000)
    assert estimate == LoadEstimate((8.0, 2.0), 1_000)
    later = observe(estimate, (0, 0), 1_000 + 2 * HALF_LIFE_MS)
    assert later.choices == (2.0, 0.5)


def test_a_late_report_fades_nothing_twice():
    estimate = observe(LoadEstimate((8.0,), 5_000), (1,), 4_000)
    assert estimate == LoadEstimate((9.0,), 5_000)


def test_too_few_choices_decide_nothing():
    assert settled(LoadEstimate()) == ()
    assert settled(LoadEstimate((CHOICES_MIN, CHOICES_MIN - 1))) == ()
    assert settled(LoadEstimate((2 * CHOICES_MIN, 0.0))) == (2 * CHOICES_MIN, 0.0)


def test_counts_of_another_model_are_refused():
    with pytest.raises(ValueError, match="3 experts, expected 2"):
        observe(LoadEstimate((1.0, 1.0)), (1, 1, 1), 0)
