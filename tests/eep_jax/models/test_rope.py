"""Promises of rotations: pairs, parts of a head, and stretched frequencies, each by its formula."""

import jax.numpy as jnp
import numpy as np
import pytest

from eep_jax.model_config import RopeConfig
from eep_jax.models.rope import frequencies, rope

THETA = 100.0
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # sines of float32 angles, against float64


def heads(channels: int = 12, tokens: int = 7):
    x = np.random.default_rng(0).normal(0, 1, (tokens, 2, channels))
    return x, np.arange(3, 3 + tokens)


def turned(x, positions, pairs, theta=THETA, amplitude=1.0):
    """Pair number c, channels `pairs[c]`, turns by `position * theta ** (-c / len(pairs))`."""
    out = np.array(x, np.float64)
    for number, (low, high) in enumerate(pairs):
        angle = (positions * theta ** (-number / len(pairs)))[:, None]
        sine, cosine = amplitude * np.sin(angle), amplitude * np.cos(angle)
        out[..., low] = x[..., low] * cosine - x[..., high] * sine
        out[..., high] = x[..., high] * cosine + x[..., low] * sine
    return out


def found(x, positions, **changes):
    given = jnp.asarray(x, jnp.float32), jnp.asarray(positions, jnp.int32)
    return np.asarray(rope(*given, THETA, RopeConfig(**changes)))


def test_halves_of_a_head_are_pairs():
    x, positions = heads()
    wanted = turned(x, positions, [(c, c + 6) for c in range(6)])
    np.testing.assert_allclose(found(x, positions), wanted, **CLOSE)


def test_the_rest_of_a_head_is_left_as_it_is():
    x, positions = heads()
    out = found(x, positions, rotated_channels=8)
    wanted = turned(x, positions, [(c, c + 4) for c in range(4)])
    np.testing.assert_allclose(out, wanted, **CLOSE)
    np.testing.assert_array_equal(out[..., 8:], x[..., 8:].astype(np.float32))


def test_neighbours_may_be_pairs_and_come_out_in_halves():
    x, positions = heads()
    wanted = turned(x, positions, [(2 * c, 2 * c + 1) for c in range(6)])
    in_halves = np.concatenate([wanted[..., 0::2], wanted[..., 1::2]], axis=-1)
    np.testing.assert_allclose(found(x, positions, interleaved=True), in_halves, **CLOSE)


def test_an_amplitude_scales_what_is_rotated_only():
    x, positions = heads()
    out = found(x, positions, rotated_channels=8, amplitude=1.5)
    wanted = turned(x, positions, [(c, c + 4) for c in range(4)], amplitude=1.5)
    np.testing.assert_allclose(out, wanted, **CLOSE)


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_leaves_fast_pairs_stretches_slow_ones_and_ramps_between(truncate):
    how = {"factor": 8.0, "original_positions": 512, "beta_fast": 16.0, "beta_slow": 1.0}
    plain = np.asarray(frequencies(64, THETA))
    slow = np.asarray(frequencies(64, THETA, RopeConfig(kind="yarn", truncate=truncate, **how)))
    turns = plain * 512 / (2 * np.pi)
    ratio = plain / slow
    # Truncation moves the ends of the ramp by less than one pair.
    np.testing.assert_allclose(ratio[turns > 16 * 1.2], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[turns < 1 / 1.2], 8, rtol=1e-6)
    between = (turns < 16 / 1.2) & (turns > 1.2)
    assert between.any() and ((ratio[between] > 1) & (ratio[between] < 8)).all()
    assert (np.diff(ratio) >= -1e-6).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "longrope"}, "kind='longrope' must be one of"),
        ({"kind": "linear", "factor": 0.5}, "factor=0.5, which must be >= 1"),
        (
            {"kind": "llama3", "factor": 2.0, "original_positions": 8, "beta_fast": 1.0},
            "llama3 needs a ramp",
        ),
        (
            {"kind": "yarn", "factor": 2.0, "original_positions": 8, "beta_fast": 0.5},
            "must be positive and in this order",
        ),
        ({"kind": "yarn", "factor": 2.0}, "both must be >= 1"),
        ({"rotated_channels": 3}, "rotated_channels=3 must be even"),
    ],
)
def test_a_rope_that_cannot_be_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        RopeConfig(**changes)
