"""Promises of heap memory as JAX arrays: the same bytes, in the dtype and shape asked for."""

import gc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from eep_jax.errors import HeapError
from eep_jax.heap.arrays import control_array, device_array, heap_array, import_memory
from eep_jax.heap.loopback import open_all
from pallas_kernels.window import Region

SLAB_BYTES = 8192
DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16, np.uint8, np.int32, np.uint32)


@pytest.fixture
def heaps():
    opened = open_all(2, SLAB_BYTES)
    yield opened
    for heap in opened:
        heap.close()


def a_region(dtype=np.float32, offset=4096, shape=(2, 3, 8)) -> Region:
    return Region("rows", offset, np.dtype(dtype), shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_a_region_is_an_array_of_its_dtype_and_shape_at_its_address(heaps, dtype):
    region, values = a_region(dtype), np.arange(48).reshape(2, 3, 8).astype(dtype)
    array = device_array(heaps[0], region)
    assert array.dtype == dtype and array.shape == region.shape
    assert array.unsafe_buffer_pointer() == heaps[0].base + region.offset
    heaps[0].write(region.offset, values)
    np.testing.assert_array_equal(np.asarray(array), values)


def test_the_region_of_a_peer_is_that_peers_memory(heaps):
    region, values = a_region(), np.ones((2, 3, 8), np.float32)
    array = device_array(heaps[0], region, rank=1)
    assert array.unsafe_buffer_pointer() == heaps[0].base + SLAB_BYTES + region.offset
    heaps[1].write(region.offset, values)
    np.testing.assert_array_equal(np.asarray(array), values)


def test_a_compiled_function_computes_in_bfloat16_on_what_is_written_later(heaps):
    region = a_region(ml_dtypes.bfloat16, shape=(64,))
    array = device_array(heaps[0], region)
    total = jax.jit(lambda x: x.astype(jnp.float32).sum()).lower(array).compile()
    for value in (1.0, 0.5):
        heaps[0].write(region.offset, np.full(64, value, ml_dtypes.bfloat16))
        assert float(total(array)) == 64 * value


def test_the_own_control_page_is_an_array_of_words(heaps):
    words = control_array(heaps[1])
    heaps[1].control()[1, :4] = np.array([9], np.uint32).view(np.uint8)
    assert words.dtype == np.uint32 and words.shape == (1024,) and int(words[0]) == 9


@pytest.mark.parametrize("region", [a_region(offset=SLAB_BYTES - 64), a_region(offset=-64)])
def test_a_region_outside_the_slab_is_refused(heaps, region):
    with pytest.raises(HeapError, match=f"offset {region.offset} .* slab of rank 0"):
        device_array(heaps[0], region)


def test_memory_that_xla_would_copy_is_refused(heaps):
    with pytest.raises(HeapError, match="not aligned to 64"):
        device_array(heaps[0], a_region(offset=4))


def test_a_dtype_that_jax_has_not_is_refused(heaps):
    with pytest.raises(HeapError, match="no array of"):
        device_array(heaps[0], a_region(np.dtype("S4")))


def test_arrays_end_before_the_heap_without_harm(heaps):
    for _ in range(100):
        array = heap_array(heaps[0])
        assert array.shape == (2, SLAB_BYTES)
        del array
    gc.collect()
    heaps[0].fill_zero(0, SLAB_BYTES)


def test_an_array_without_elements_needs_no_address(heaps):
    array = import_memory(heaps[0].base, np.dtype(np.float32), (0, 4))
    assert array.shape == (0, 4)
