"""Promises of sampling: greedy or by chance, but always the same for the same key."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eep_jax.engine.sampler import nucleus, sample

DRAWS_MAX = 4000  # always drawn, so that one program serves all tests
compiled = jax.jit(sample)


def draw(probabilities, *, temperature=1.0, top_p=1.0, rows=1, seed=1, first_position=0):
    """Draws `rows` tokens at successive positions of one request."""
    logits = np.tile(np.log(np.float32(probabilities)), (DRAWS_MAX, 1))
    seeds = np.tile(np.uint32([seed >> 32, seed & 0xFFFFFFFF]), (DRAWS_MAX, 1))
    positions = np.arange(first_position, first_position + DRAWS_MAX, dtype=np.int32)
    full = lambda value: np.full(DRAWS_MAX, value, np.float32)
    return np.asarray(compiled(logits, seeds, positions, full(temperature), full(top_p)))[:rows]


FOUR = [0.1, 0.4, 0.3, 0.2]


def test_temperature_zero_takes_the_most_likely_and_the_lower_of_equals():
    assert set(draw(FOUR, temperature=0.0, rows=50)) == {1}
    assert draw([0.1, 0.4, 0.4, 0.1], temperature=0.0).tolist() == [1]


@pytest.mark.parametrize("top_p", [0.0, 1e-50, 1e-8, 0.39])
def test_the_most_likely_token_is_kept_however_small_top_p_is(top_p):
    assert set(draw(FOUR, top_p=top_p, rows=200)) == {1}


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.41, {1, 2}), (0.69, {1, 2}), (0.71, {1, 2, 3}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_fewest_tokens_with_that_mass(top_p, kept):
    assert set(draw(FOUR, top_p=top_p, rows=400)) == kept


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 0.99), st.floats(0.1, 4.0))
def test_the_nucleus_is_the_one_that_sorting_finds(seed, top_p, spread):
    logits = np.random.default_rng(seed).normal(0, spread, (1, 1000)).astype(np.float32)
    found = np.asarray(jax.jit(nucleus)(logits, np.float32([top_p])))[0]
    exact = np.exp(logits[0].astype(np.float64))
    exact /= exact.sum()
    order = np.argsort(-exact)
    before = np.cumsum(exact[order]) - exact[order]
    # Sums of 1000 float32 are off by about 1e-6; a token that near to the edge may go either way.
    clear = np.abs(before - top_p) > 1e-5
    np.testing.assert_array_equal(found[order][clear], (before < top_p)[clear])


def test_equally_likely_tokens_stay_or_go_together():
    assert set(draw([0.1, 0.4, 0.4, 0.1], top_p=0.3, rows=400)) == {1, 2}


def test_draws_follow_the_probabilities():
    found = np.bincount(draw(FOUR, rows=DRAWS_MAX), minlength=4) / DRAWS_MAX
    # Four standard deviations of a share of so many draws.
    np.testing.assert_allclose(found, FOUR, atol=4 * (0.25 / DRAWS_MAX) ** 0.5)


def test_a_lower_temperature_sharpens():
    share = lambda t: np.mean(draw(FOUR, temperature=t, rows=2000) == 1)
    assert share(0.3) > share(1.0) > share(3.0)


def test_the_same_request_and_position_give_the_same_token_in_any_row():
    together = draw(FOUR, rows=60, seed=2**63 + 5)
    later = draw(FOUR, rows=30, seed=2**63 + 5, first_position=30)
    assert together[30:].tolist() == later.tolist()
    alone = jax.jit(sample)(
        np.log(np.float32([FOUR])),
        np.uint32([[2**31, 5]]),
        np.int32([17]),
        np.float32([1]),
        np.float32([1]),
    )
    assert together[17] == alone[0]


def test_other_seeds_and_positions_give_other_draws():
    base = draw(FOUR, rows=60, seed=1)
    for other in (draw(FOUR, rows=60, seed=2), draw(FOUR, rows=60, seed=1 + 2**32)):
        assert base.tolist() != other.tolist()
    assert base.tolist() != draw(FOUR, rows=60, seed=1, first_position=60).tolist()


def test_the_same_temperature_in_other_rows_changes_nothing():
    logits = np.tile(np.log(np.float32(FOUR)), (2, 1))
    seeds, positions = np.uint32([[0, 1], [0, 1]]), np.int32([3, 3])
    both = compiled(logits, seeds, positions, np.float32([1, 0]), np.float32([1, 0.5]))
    assert both.tolist() == [draw(FOUR, first_position=3)[0], 1]
