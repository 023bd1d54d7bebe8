"""Bytes go through pinned buffers in turn: none is filled while the GPU still reads it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eep_jax.errors import HeapError
from eep_jax.heap.cuda import staging, vmm
from eep_jax.heap.cuda.libcuda import Device
from eep_jax.heap.cuda.loopback import CudaLoopbackHeap
from eep_jax.heap.cuda.staging import BUFFERS, PinnedUpload
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
    assert (copies, waits) == (5, 5 - BUFFERS) and cuda.begun == []
    assert names[:BUFFERS] == ["cuMemcpyHtoDAsync"] * BUFFERS, "two are on their way at once"
    device.free(address, "the test")
    uploads.close()


@given(
    sizes=st.lists(st.integers(1, 5 * CHUNK), min_size=1, max_size=4),
    pinned=st.sets(st.integers(0, 3)),
    part=st.integers(1, 2 * CHUNK),
)
@settings(max_examples=60, deadline=None)
def test_memory_pinned_where_it_is_and_other_memory_arrive_together(sizes, pinned, part):
    with pytest.MonkeyPatch.context() as patch:
        fake = put_fake_driver(patch)
        patch.setattr(staging, "PIECE_BYTES", CHUNK)
        device = Device(0, "the test")
        uploads = PinnedUpload(device, "the test", CHUNK)
        arrays = [np.random.default_rng(n).integers(0, 256, n, np.uint8) for n in sizes]
        for index in pinned & set(range(len(arrays))):
            assert uploads.pin(arrays[index])
        sent = [*arrays, arrays[0][:part]]  # a part that begins where a whole does
        targets = [device.allocate(array.nbytes, "the test") for array in sent]
        before = fake.calls.count("cuStreamSynchronize")
        uploads.upload_all(zip(targets, sent, strict=True), "the test")
        assert fake.calls.count("cuStreamSynchronize") == before + 1
        for target, array in zip(targets, sent, strict=True):
            found = np.empty_like(array)
            device.download(target, found, "the test")
            np.testing.assert_array_equal(found, array)
            device.free(target, "the test")
        for array in arrays:
            uploads.unpin(array)  # also those that never were
        assert not fake.registered
        uploads.close()
        device.close()
        assert set(fake.kept().values()) == {0}


def test_memory_that_cannot_be_pinned_whole_is_not_kept_in_part(cuda, device, monkeypatch):
    monkeypatch.setattr(staging, "PIECE_BYTES", CHUNK)
    uploads, data = PinnedUpload(device, "the test", CHUNK), np.ones(4 * CHUNK, np.uint8)
    cuda.fail("cuMemHostRegister", nth=3)
    assert not uploads.pin(data) and not cuda.registered
    address = device.allocate(data.nbytes, "the test")
    uploads.upload(address, data, "the test")
    device.free(address, "the test")
    assert uploads.pin(data)
    uploads.close()  # gives it back


@pytest.mark.parametrize("refused", ["cuMemHostAlloc", "cuEventCreate"])
def test_where_nothing_can_be_pinned_nothing_is_kept(cuda, device, refused):
    cuda.fail(refused, nth=2, error=CUresult.CUDA_ERROR_OUT_OF_MEMORY)
    with pytest.raises(HeapError, match=refused):
        PinnedUpload(device, "the test", CHUNK)


@pytest.mark.parametrize("pins", [True, False])
def test_a_heap_writes_large_arrays_through_pinned_memory_if_it_can(cuda, monkeypatch, pins):
    monkeypatch.setattr(vmm, "STAGED_BYTES_MIN", CHUNK)
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


@pytest.mark.parametrize("pins", [True, False])
def test_a_heap_takes_several_arrays_whatever_memory_they_are_in(cuda, pins):
    heap = CudaLoopbackHeap(0, 2, 8 * CHUNK)
    if not pins:
        cuda.fail("cuMemHostAlloc")
    first, second = np.arange(CHUNK, dtype=np.uint8), np.arange(CHUNK // 2, dtype=np.uint16)
    assert heap.pin(first) is pins
    heap.write_all((offset, array) for offset, array in ((0, first), (3 * CHUNK, second)))
    np.testing.assert_array_equal(heap.read(0, 0, CHUNK), first)
    np.testing.assert_array_equal(heap.read(0, 3 * CHUNK, CHUNK).view(np.uint16), second)
    heap.unpin(first)
    assert len(cuda.registered) == 1, "its control page"
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
