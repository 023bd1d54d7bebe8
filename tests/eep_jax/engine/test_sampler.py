"""Promises of sampling: greedy or by chance, but always the same for the same key."""

import jax
import numpy as np
import pytest

from eep_jax.engine.sampler import sample

compiled = jax.jit(sample)


def draw(probabilities, *, temperature=1.0, top_p=1.0, rows=1, seed=1, first_position=0):
    """Draws `rows` tokens at successive positions of one request."""
    logits = np.broadcast_to(np.log(np.float32(probabilities)), (rows, len(probabilities)))
    seeds = np.tile(np.uint32([seed >> 32, seed & 0xFFFFFFFF]), (rows, 1))
    positions = np.arange(first_position, first_position + rows, dtype=np.int32)
    full = lambda value: np.full(rows, value, np.float32)
    return np.asarray(compiled(logits, seeds, positions, full(temperature), full(top_p)))


FOUR = [0.1, 0.4, 0.3, 0.2]


def test_temperature_zero_takes_the_most_likely_and_the_lower_of_equals():
    assert set(draw(FOUR, temperature=0.0, rows=50)) == {1}
    assert draw([0.2, 0.4, 0.4], temperature=0.0).tolist() == [1]


@pytest.mark.parametrize("top_p", [0.0, 1e-50, 1e-8, 0.39])
def test_the_most_likely_token_is_kept_however_small_top_p_is(top_p):
    assert set(draw(FOUR, top_p=top_p, rows=200)) == {1}


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.41, {1, 2}), (0.69, {1, 2}), (0.71, {1, 2, 3}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_fewest_tokens_with_that_mass(top_p, kept):
    assert set(draw(FOUR, top_p=top_p, rows=400)) == kept


def test_draws_follow_the_probabilities():
    found = np.bincount(draw(FOUR, rows=4000), minlength=4) / 4000
    # Four standard deviations of a share of 4000 draws.
    np.testing.assert_allclose(found, FOUR, atol=4 * (0.25 / 4000) ** 0.5)


def test_a_lower_temperature_sharpens():
    share = lambda t: np.mean(draw(FOUR, temperature=t, rows=2000) == 1)
    assert share(0.3) > share(1.0) > share(3.0)


def test_the_same_request_and_position_give_the_same_token_in_any_row():
    together = draw(FOUR, rows=60, seed=2**63 + 5)
    alone = [draw(FOUR, seed=2**63 + 5, first_position=p)[0] for p in range(60)]
    assert together.tolist() == alone


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
