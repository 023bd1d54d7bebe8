"""Promises of copies: every dtype and order, the same values as NumPy's own assignment."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eep_jax.heap.copies import ALIGNMENT, copy_values, empty_aligned

DTYPES = [np.dtype(name) for name in (ml_dtypes.bfloat16, np.float32, np.uint8, np.float16)]
# Powers of two apart, values share places in a cache: those are turned in another way.
SIZES = st.one_of(st.integers(0, 150), st.sampled_from([512, 1024, 2048]))


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(0, 150), st.booleans(), *[st.sampled_from(DTYPES)] * 2, st.integers(0, 9))
def test_what_is_copied_is_what_assignment_says(rows, columns, turned, stored, kept, seed):
    drawn = np.random.default_rng(seed).integers(0, 250, (rows, columns))
    values = drawn.astype(stored).T if turned else drawn.astype(stored)
    out, wanted = empty_aligned(values.shape, kept), np.empty(values.shape, kept)
    copy_values(out, values)
    wanted[...] = values
    np.testing.assert_array_equal(out, wanted)
    inside = np.zeros((values.shape[0], values.shape[1] + 7), kept)
    copy_values(inside[:, 3:-4], values)
    np.testing.assert_array_equal(inside[:, 3:-4], wanted)
    assert not inside[:, :3].any() and not inside[:, -4:].any()


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (1 << 16,)])
def test_aligned_memory_is_aligned(shape):
    array = empty_aligned(shape, ml_dtypes.bfloat16)
    assert array.shape == shape and array.ctypes.data % ALIGNMENT == 0
