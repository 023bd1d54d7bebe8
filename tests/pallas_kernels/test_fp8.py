"""Promises of rows in fp8: small errors for all values, and bytes at the offsets that are read."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.exchange.fp8 import E4M3_MAX, SMALLEST_PEAK, pack_rows, unpack_rows
from pallas_kernels.window import SCALE_CHANNELS, WindowLayout

HIDDEN = 2 * SCALE_CHANNELS
pack = jax.jit(pack_rows)
unpack = jax.jit(functools.partial(unpack_rows, hidden=HIDDEN, dtype=jnp.float32))
seeds = st.integers(0, 2**32 - 1)
LARGEST = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)


def rows_of(seed: int, peak: float = 1.0, rows: int = 3) -> np.ndarray:
    """Rows in bfloat16; the largest value of each block is about `peak`, magnitudes vary widely."""
    random = np.random.default_rng(seed)
    sizes = 2.0 ** random.uniform(-20, 0, (rows, HIDDEN))
    values = np.clip(sizes * random.choice([-1, 1], (rows, HIDDEN)) * peak, -LARGEST, LARGEST)
    return values.astype(ml_dtypes.bfloat16)


def bound(x: np.ndarray) -> np.ndarray:
    """Error bound of e4m3: 2**-4 of a value, or half a subnormal step."""
    blocks = np.abs(x.astype(np.float64)).reshape(*x.shape[:-1], -1, SCALE_CHANNELS)
    scale = np.maximum(blocks.max(-1, keepdims=True), SMALLEST_PEAK) / E4M3_MAX
    errors = np.maximum(2.0**-4 * blocks, 2.0**-10 * scale)
    # Scale, quotient and product are rounded to float32 as well.
    return (errors * (1 + 1e-6) + 1e-6 * blocks).reshape(x.shape)


def check(x: np.ndarray) -> None:
    error = np.abs(np.asarray(unpack(pack(x))).astype(np.float64) - x.astype(np.float64))
    worst = np.argmax(error - bound(x))
    assert (error <= bound(x)).all(), f"{x.flat[worst]} has error {error.flat[worst]}"


@given(seeds, st.floats(-30, 30))
def test_values_keep_their_size(seed, exponent):
    check(rows_of(seed, 2.0**exponent))


@given(seeds, st.sampled_from([LARGEST, LARGEST / 3, 1e30, 1e-11, 1e-12, 1e-20, 1e-38, 1e-40]))
def test_huge_and_tiny_rows_stay_within_the_same_bound(seed, peak):
    check(rows_of(seed, peak))


@given(seeds)
def test_an_error_is_at_most_a_sixteenth_of_the_peak_of_the_block(seed):
    x = rows_of(seed, 3.0)
    error = np.abs(np.asarray(unpack(pack(x))) - x.astype(np.float32))
    by_block = (3, -1, SCALE_CHANNELS)
    peak = np.abs(x.astype(np.float32)).reshape(by_block).max(-1)
    assert (error.reshape(by_block).max(-1) <= peak / 16 * (1 + 1e-6)).all()


def test_zeros_stay_zero():
    assert not np.asarray(unpack(pack(np.zeros((3, HIDDEN), ml_dtypes.bfloat16)))).any()


def test_one_block_does_not_narrow_another():
    x = np.ones((1, HIDDEN), ml_dtypes.bfloat16)
    x[:, SCALE_CHANNELS:] = 1e-6
    x[0, 0] = LARGEST
    check(x)
    assert (np.asarray(unpack(pack(x)))[0, SCALE_CHANNELS:] > 0).all()


@pytest.mark.parametrize("hidden", [128, 256, 384, 640, 2048])
def test_a_packed_row_has_the_length_of_the_layout_and_scales_behind_values(hidden):
    layout = WindowLayout(1, 1, 1, hidden, row_dtype="bfloat16", dispatch_dtype="float8_e4m3fn")
    x = np.linspace(-5, 5, hidden).astype(ml_dtypes.bfloat16)[None]
    packed = np.asarray(pack_rows(x))
    assert packed.shape == (1, layout.row_bytes) and packed.dtype == np.uint8
    blocks = hidden // SCALE_CHANNELS
    scales = packed[0, hidden : hidden + 4 * blocks].copy().view("<f4")
    wanted = np.abs(x.astype(np.float32)).reshape(blocks, -1).max(-1) / np.float32(E4M3_MAX)
    np.testing.assert_allclose(scales, wanted, rtol=1e-6)
    assert not packed[0, hidden + 4 * blocks :].any()
    values = packed[0, :hidden].copy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(
        np.asarray(unpack_rows(packed, hidden, jnp.float32))[0],
        (values.reshape(blocks, -1) * scales[:, None]).reshape(-1),
    )


def test_rows_unpack_into_the_requested_dtype():
    packed = pack(rows_of(0))
    narrow = unpack_rows(packed, HIDDEN, jnp.bfloat16)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_array_equal(narrow, np.asarray(unpack(packed)).astype(ml_dtypes.bfloat16))
