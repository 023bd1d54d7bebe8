"""Bytes go through pinned buffers in turn: none is filled while the GPU still reads it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eep_jax.errors import HeapError
from eep_jax.heap import cuda_vmm, staging
from eep_jax.heap.cuda_loopback import CudaLoopbackHeap
from eep_jax.heap.libcuda import Device
from eep_jax.heap.staging import BUFFERS, PinnedUpload
from tests.support.fake_cuda import CUresult, put_fake_driver

CHUNK = 4096


@pytest.fixture
def cuda(monkeypatch):
    """A driver that copies from pinned memory only once somebody waits for it."""
    fake = put_fake_driver(monkeypatch)
    yield fake
    assert set(fake.kept().values()) == {0}, fake.kept()


@pytest.fixture
def device(cuda):
    device = Device(0, "the test")
    yield device
    device.close()


@given(nbytes=st.integers(1, 6 * CHUNK), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_every_byte_arrives(nbytes, seed):
    with pytest.MonkeyPatch.context() as patch:
        fake = put_fake_driver(patch)
        patch.setattr(staging, "PART_BYTES_MIN", 256)  # several threads fill each buffer
        device = Device(0, "the test")
        uploads = PinnedUpload(device, "the test", CHUNK)
        data = np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)
        address = device.allocate(nbytes, "the test")
        found = np.empty(nbytes, np.uint8)
        for _ in range(2):  # the buffers are used again
            uploads.upload(address, data, "the test")
            device.download(address, found, "the test")
            np.testing.assert_array_equal(found, data)
            data = data[::-1].copy()
        assert fake.begun == []
        device.free(address, "the test")
        uploads.close()
        device.close()
        assert set(fake.kept().values()) == {0}


def test_a_buffer_is_waited_for_before_it_is_filled_again(cuda, device):
    uploads = PinnedUpload(device, "the test", CHUNK)
    address = device.allocate(5 * CHUNK, "the test")
    uploads.upload(address, np.zeros(5 * CHUNK, np.uint8), "the test")
    names = [name for name in cuda.calls if name in ("cuMemcpyHtoDAsync", "cuEventSynchronize")]
    copies, waits = names.count("cuMemcpyHtoDAsync"), names.count("cuEventSynchronize")
    assert (copies, waits) == (5, 3 + BUFFERS)
    assert names[:BUFFERS] == ["cuMemcpyHtoDAsync"] * BUFFERS, "two are on their way at once"
    device.free(address, "the test")
    uploads.close()


@pytest.mark.parametrize("refused", ["cuMemHostAlloc", "cuEventCreate"])
def test_where_nothing_can_be_pinned_nothing_is_kept(cuda, device, refused):
    cuda.fail(refused, nth=2, error=CUresult.CUDA_ERROR_OUT_OF_MEMORY)
    with pytest.raises(HeapError, match=refused):
        PinnedUpload(device, "the test", CHUNK)


@pytest.mark.parametrize("pins", [True, False])
def test_a_heap_writes_large_arrays_through_pinned_memory_if_it_can(cuda, monkeypatch, pins):
    monkeypatch.setattr(cuda_vmm, "STAGED_BYTES_MIN", CHUNK)
    heap = CudaLoopbackHeap(0, 2, 8 * CHUNK)
    if not pins:
        cuda.fail("cuMemHostAlloc")
    data = np.random.default_rng(0).standard_normal(3 * CHUNK // 4).astype(np.float32)
    for values in (data, data + 1):
        heap.write(CHUNK, values)
        found = heap.read(0, CHUNK, values.nbytes).view(np.float32)
        np.testing.assert_array_equal(found, values)
    assert bool(cuda.pinned) is pins
    heap.release()


def test_several_copies_into_a_slab_are_waited_for_once(cuda):
    heap = CudaLoopbackHeap(0, 2, 8 * CHUNK)
    heap.write(0, np.arange(CHUNK, dtype=np.uint16))
    before = cuda.calls.count("cuStreamSynchronize")
    heap.copy_in_all([(3 * CHUNK, 0, 0, CHUNK), (5 * CHUNK, 0, CHUNK, CHUNK)])
    assert cuda.calls.count("cuStreamSynchronize") == before + 1
    for source, target in ((0, 3), (1, 5)):
        expected = heap.read(0, source * CHUNK, CHUNK)
        np.testing.assert_array_equal(heap.read(0, target * CHUNK, CHUNK), expected)
    with pytest.raises(HeapError, match="overlap"):
        heap.copy_in_all([(0, 0, 4 * CHUNK, CHUNK), (CHUNK, 0, CHUNK, CHUNK)])
    heap.release()
