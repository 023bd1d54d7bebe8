"""Promises of the CUDA heap on a real GPU: peers die, return and are read, and no address changes.

EEP_TEST_PLATFORM=gpu python -m pytest tests/gpu/test_cuda_heap.py
"""

import os
import threading
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from eep_jax.errors import HeapError
from eep_jax.heap.arrays import control_array, device_array, heap_array
from eep_jax.heap.cuda.libcuda import Device
from eep_jax.heap.cuda.loopback import CudaLoopbackHeap, open_all_cuda
from eep_jax.heap.cuda.vmm import DUMMY_BYTES_MAX, CudaVmmHeap
from eep_jax.heap.heap import CONTROL_BYTES
from eep_jax.heap.open import open_heap
from eep_jax.models.expert_bank import ExpertBank, slab_layout
from pallas_kernels.window import Region
from tests.gpu.heap_process import HeapProcess
from tests.support.models import a_run, some_weights

SLAB_BYTES = 2 << 20
OFFSET = 8192
LEAK_BYTES_MAX = 64 << 20  # what the driver keeps for itself, per process rather than per cycle
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


@pytest.fixture
def keep():
    """Keeps what must be given back after the test: heaps are released, processes killed."""
    kept = []

    def remember(thing):
        kept.extend(thing if isinstance(thing, list) else [thing])
        return thing

    yield remember
    jax.effects_barrier()
    for thing in reversed(kept):
        thing.kill() if isinstance(thing, HeapProcess) else thing.release()


@pytest.fixture
def compilations():
    """The compile events since the test began."""
    seen = []
    count = lambda event, duration, **_: seen.append(event) if event == COMPILE_EVENT else None
    jax.monitoring.register_event_duration_secs_listener(count)
    yield seen
    jax.monitoring.unregister_event_duration_listener(count)


def reader(heap):
    """A compiled function of no arguments: the byte at OFFSET of every slab, read by the GPU."""
    array = heap_array(heap)
    executable = jax.jit(lambda heap: heap[:, OFFSET] + 0).lower(array).compile()
    read = lambda: np.asarray(executable(array)).tolist()
    read()
    return read


def free_bytes() -> int:
    device = Device(0, "the test")
    try:
        return device.memory("the test")[0]
    finally:
        device.close()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def settled(count, expected) -> bool:
    """Whether `count()` comes down to `expected` soon: threads of servers end a little later."""
    deadline = time.monotonic() + 5
    while count() > expected and time.monotonic() < deadline:
        time.sleep(0.01)
    return count() <= expected


class TestRanksOfOneProcess:
    def test_the_array_of_a_heap_is_the_heap(self, keep):
        for heap in keep(open_all_cuda(2, SLAB_BYTES)):
            array = heap_array(heap)
            assert array.unsafe_buffer_pointer() == heap.base
            assert array.shape == (2, heap.slab_bytes) and array.dtype == np.uint8
            assert array.device.platform == "gpu"

    def test_what_a_rank_writes_the_gpu_of_another_reads(self, keep):
        first, second = keep(open_all_cuda(2, SLAB_BYTES))
        read = reader(second)
        first.write(OFFSET, np.full(64, 7, np.uint8))
        second.write(OFFSET, np.full(64, 9, np.uint8))
        assert read() == [7, 9]
        assert second.read(0, OFFSET, 64).tolist() == [7] * 64
        assert not first.read(0, OFFSET + 64, 256).any(), "a slab is zero at first"

    @pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int32, np.uint32])
    def test_a_region_is_an_array_of_its_dtype_over_own_and_peers_memory(self, keep, dtype):
        first, second = keep(open_all_cuda(2, SLAB_BYTES))
        region = Region("rows", OFFSET, np.dtype(dtype), (4, 128))
        values = np.arange(512).reshape(4, 128).astype(dtype)
        arrays = device_array(first, region), device_array(second, region, rank=0)
        first.write(OFFSET, values)
        for heap, array in zip((first, second), arrays, strict=True):
            assert array.unsafe_buffer_pointer() == heap.base + OFFSET
            np.testing.assert_array_equal(np.asarray(array), values)
            total = float(jax.jit(lambda x: x.astype(jnp.float32).sum())(array))
            assert total == float(values.astype(np.float32).sum()), "integers of float32"

    def test_attach_and_detach_are_seen_by_the_same_executable(self, keep, compilations):
        heap = keep(CudaLoopbackHeap(1, 3, SLAB_BYTES))
        read = reader(heap)
        compilations.clear()
        assert read() == [0, 0, 0]
        for value in (5, 6):
            owner = keep(CudaLoopbackHeap(0, 3, SLAB_BYTES))
            owner.write(OFFSET, np.full(8, value, np.uint8))
            heap.attach(0, owner.export())
            assert read() == [value, 0, 0]
        heap.detach(0)
        assert read()[1:] == [0, 0]
        heap.write(OFFSET, np.full(8, 3, np.uint8))
        assert read()[1] == 3 and read()[0] == read()[2], "one dummy stands for all"
        assert not compilations

    def test_a_slab_of_many_dummies_may_be_read_and_written_whole(self, keep):
        heap = keep(CudaLoopbackHeap(0, 2, 2 * DUMMY_BYTES_MAX + 1))
        assert heap.slab_bytes == 3 * DUMMY_BYTES_MAX
        total = jax.jit(lambda heap: heap.astype(jnp.uint32).sum())
        assert int(total(heap_array(heap))) == 0
        owner = keep(CudaLoopbackHeap(1, 2, 2 * DUMMY_BYTES_MAX + 1))
        owner.write(owner.slab_bytes - 8, np.ones(8, np.uint8))
        heap.attach(1, owner.export())
        assert int(total(heap_array(heap))) == 8
        heap.detach(1)
        assert int(total(heap_array(heap))) == 0

    def test_bytes_are_copied_on_the_gpu(self, keep):
        first, second = keep(open_all_cuda(2, SLAB_BYTES))
        values = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)
        first.write(OFFSET, values)
        second.copy_in(OFFSET + 512, 0, OFFSET, values.size)
        np.testing.assert_array_equal(second.read(1, OFFSET + 512, values.size), values)
        second.fill_zero(OFFSET + 512, 100)
        assert not second.read(1, OFFSET + 512, 100).any()
        assert second.read(1, OFFSET + 612, 4).tolist() == values[100:104].tolist()

    def test_bytes_may_be_moved_from_other_threads(self, keep):
        first, second = keep(open_all_cuda(2, SLAB_BYTES))
        errors = []

        def work(number):
            try:
                for _ in range(50):
                    first.write(OFFSET + 4096 * number, np.full(4096, number, np.uint8))
                    found = second.read(0, OFFSET + 4096 * number, 4096)
                    assert set(found) == {number}
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not errors and not any(thread.is_alive() for thread in threads)

    def test_a_bank_in_bfloat16_is_written_read_and_computed_with(self, keep):
        config = a_run(2)
        layout = slab_layout(config.model, config.engine, 2, 4, bank_dtype="bfloat16")
        heaps = keep(open_all_cuda(2, layout.slab_bytes))
        own, peer = (ExpertBank(layout, heap) for heap in heaps)
        expert = some_weights(config.model)[1][5].astype(ml_dtypes.bfloat16)
        array = device_array(heaps[0], layout.bank)
        own.write(2, 5, expert)
        np.testing.assert_array_equal(own.read(2), expert)
        np.testing.assert_array_equal(peer.read_peer(0, 2), expert)
        width = expert.shape[2]
        np.testing.assert_array_equal(np.asarray(array[2])[:, :, :width], expert)
        assert not np.asarray(array[2])[:, :, width:].any()
        source, target = layout.slot(2), layout.slot(3)
        heaps[1].copy_in(target.offset, 0, source.offset, source.bytes)
        np.testing.assert_array_equal(peer.read(3), expert)

    def test_a_hundred_returns_cost_no_memory_and_no_file(self, keep):
        heap = keep(CudaLoopbackHeap(0, 2, 16 << 20))
        read = reader(heap)

        def one_return(value):
            owner = CudaLoopbackHeap(1, 2, 16 << 20)
            owner.write(OFFSET, np.full(8, value, np.uint8))
            heap.attach(1, owner.export())
            assert read()[1] == value
            heap.detach(1)
            owner.release()

        one_return(1)
        free, files = free_bytes(), open_files()
        for number in range(100):
            one_return(number + 1)
        assert abs(free_bytes() - free) <= LEAK_BYTES_MAX
        assert settled(open_files, files)

    def test_everything_is_given_back_by_release(self):
        open_all_cuda(2, 64 << 20)[0].release()
        free, files = free_bytes(), open_files()
        for _ in range(10):
            for heap in open_all_cuda(2, 256 << 20):
                heap.release()
        assert abs(free_bytes() - free) <= LEAK_BYTES_MAX
        assert settled(open_files, files)


class TestProcesses:
    def test_a_survivor_keeps_its_memory_when_a_peer_is_killed_and_takes_the_next_one(
        self, keep, compilations
    ):
        heap = keep(open_heap(0, 2, SLAB_BYTES, jax.default_backend()))
        assert isinstance(heap, CudaVmmHeap)
        read, pointer = reader(heap), heap_array(heap).unsafe_buffer_pointer()
        compilations.clear()
        first = keep(HeapProcess(1, 2, SLAB_BYTES))
        first.ask("write", OFFSET, 11, 64)
        heap.attach(1, first.handle)
        assert read() == [0, 11]
        first.ask("write", OFFSET, 12, 64)
        assert read() == [0, 12], "one memory, no copy"
        assert first.ask("attach", 0, heap.export()) == "ok"
        heap.write(OFFSET, np.full(64, 21, np.uint8))
        assert first.ask("read", 0, OFFSET) == "21"
        heap.control()[0, 300], heap.control()[1, 300] = 8, 9
        assert (first.ask("control", 0, 300), first.ask("control", 1, 300)) == ("8", "9")

        first.kill()
        assert read() == [21, 12], "the memory of a dead process lives while it is mapped"
        heap.copy_in(OFFSET + 64, 1, OFFSET, 64)
        assert set(heap.read(0, OFFSET + 64, 64)) == {12}
        with pytest.raises(HeapError, match="rank 1 does not export its slab"):
            heap.attach(1, first.handle)
        heap.detach(1)
        assert read()[0] == 21
        heap.control()[1, 300] = 0

        second = keep(HeapProcess(1, 2, SLAB_BYTES))
        second.ask("write", OFFSET, 13, 64)
        heap.attach(1, second.handle)
        assert read() == [21, 13]
        assert second.ask("attach", 0, heap.export()) == "ok"
        assert second.ask("read", 0, OFFSET) == "21"
        assert heap_array(heap).unsafe_buffer_pointer() == pointer == heap.base
        assert not compilations, "the executable of before reads the memory of now"

    def test_a_slab_of_another_gpu_is_mapped_the_same_way(self, keep):
        if len(jax.devices()) < 2:
            pytest.skip("needs two visible GPUs")
        heap = keep(CudaVmmHeap(0, 2, SLAB_BYTES))
        read = reader(heap)
        owner = keep(HeapProcess(1, 2, SLAB_BYTES, gpu="1"))
        owner.ask("write", OFFSET, 31, 64)
        heap.attach(1, owner.handle)
        assert read() == [0, 31]
        owner.kill()
        assert read() == [0, 31]
        heap.detach(1)
        assert read()[0] == 0

    def test_ten_killed_processes_cost_no_memory_and_no_file(self, keep):
        heap = keep(CudaVmmHeap(0, 2, 16 << 20))
        read = reader(heap)

        def one_life(value):
            owner = keep(HeapProcess(1, 2, 16 << 20))
            owner.ask("write", OFFSET, value, 8)
            heap.attach(1, owner.handle)
            owner.kill()
            assert read()[1] == value
            heap.detach(1)

        one_life(1)
        free, files = free_bytes(), open_files()
        for number in range(10):
            one_life(number + 1)
        # The context of a killed process is torn down a moment after it is reaped.
        lost = lambda: free - free_bytes()
        assert settled(lost, LEAK_BYTES_MAX), f"{lost()} bytes are gone"
        assert settled(open_files, files)


class TestControl:
    def test_the_gpu_reads_the_abort_word_that_a_host_stores(self, keep):
        heap = keep(CudaVmmHeap(1, 2, SLAB_BYTES))
        if heap._abort_word is not None:
            pytest.skip("this driver refuses to register shared memory: the other test holds")
        words = control_array(heap)
        assert words.unsafe_buffer_pointer() == heap.control_address()
        read = jax.jit(lambda words: words[:1] + 0).lower(words).compile()
        for epoch in (0, 3, 70_000):
            heap.control()[1, :4] = np.array([epoch], np.uint32).view(np.uint8)
            heap.post_abort(epoch)
            assert int(read(words)[0]) == epoch

    def test_a_killed_peer_and_a_close_leave_the_page_usable(self, keep):
        heap = keep(CudaVmmHeap(0, 2, SLAB_BYTES))
        peer = keep(HeapProcess(1, 2, SLAB_BYTES))
        heap.attach(1, peer.handle)
        peer.ask("attach", 0, heap.export())
        peer.kill()
        heap.detach(1)
        heap.control()[0, :4] = np.array([9], np.uint32).view(np.uint8)
        heap.post_abort(9)
        found = np.empty(4, np.uint8)
        heap._gpu.download(heap.control_address(), found, "the test")
        assert found.view(np.uint32)[0] == 9

    def test_without_registration_the_word_reaches_the_gpu_while_it_computes(
        self, keep, monkeypatch
    ):
        def refuse(self, address, nbytes, what):
            raise HeapError(f"cuMemHostRegister of {what} failed: as told by the test")

        monkeypatch.setattr(Device, "register", refuse)
        heap = keep(CudaVmmHeap(0, 2, SLAB_BYTES))
        words = control_array(heap)
        assert words.shape == (CONTROL_BYTES // 4,) and not np.asarray(words).any()

        def long_work(x):
            return jax.lax.fori_loop(0, 2000, lambda _, y: jnp.tanh(y @ x), x)

        x = jnp.ones((4096, 4096), jnp.float32) / 4096
        work = jax.jit(long_work).lower(x).compile()
        work(x).block_until_ready()
        running = work(x)
        found = np.zeros(4, np.uint8)
        for epoch in (3, 2, 70_000):
            heap.post_abort(epoch)
        deadline = time.monotonic() + 5
        while found.view(np.uint32)[0] != 70_000 and time.monotonic() < deadline:
            heap._gpu.download(heap.control_address(), found, "the test")
        assert not running.is_ready(), "the GPU was to be busy all along; make the work longer"
        assert found.view(np.uint32)[0] == 70_000
        running.block_until_ready()
        assert int(np.asarray(jax.jit(lambda words: words[0] + 0)(words))) == 70_000


class TestErrors:
    def test_too_large_a_slab_says_what_is_free_and_what_to_lower(self):
        free, files = free_bytes(), open_files()
        wanted = 4 * free
        with pytest.raises(HeapError) as raised:
            CudaVmmHeap(0, 2, wanted)
        said = str(raised.value)
        assert "cuMemCreate of the slab of rank 0 failed: CUDA_ERROR_OUT_OF_MEMORY" in said
        assert "bytes are free: lower --device_memory_fraction" in said
        assert abs(free_bytes() - free) <= LEAK_BYTES_MAX and settled(open_files, files)

    def test_slabs_of_other_sizes_are_refused(self, keep):
        heap, peer = keep(CudaVmmHeap(0, 2, SLAB_BYTES)), keep(CudaVmmHeap(1, 2, 4 * SLAB_BYTES))
        with pytest.raises(HeapError, match="start all ranks with the same configuration"):
            heap.attach(1, peer.export())

    def test_the_slab_is_no_host_memory(self, keep):
        with pytest.raises(HeapError, match="device memory"):
            keep(CudaVmmHeap(0, 2, SLAB_BYTES)).whole()

    def test_a_device_that_is_not_there_is_an_error_in_words(self):
        with pytest.raises(HeapError, match="cuDeviceGet of rank 0 failed: CUDA_ERROR_INVALID"):
            CudaVmmHeap(0, 2, SLAB_BYTES, device=99)
