"""Promises of the symmetric heap, one class for all implementations."""

import gc
import os
import pathlib
import threading
import time

import jax
import numpy as np
import pytest

from eep_jax.errors import HeapError
from eep_jax.heap.arrays import heap_array, import_host
from eep_jax.heap.heap import SymmetricHeap
from eep_jax.heap.loopback import LoopbackHeap
from eep_jax.heap.posix_shm import PosixShmHeap

SLAB_BYTES = 8192
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(params=[LoopbackHeap, PosixShmHeap], ids=lambda c: c.__name__)
def open_heap(request):
    """Opens heaps that are closed after the test."""
    opened = []

    def a_heap(rank=0, ranks=3, slab_bytes=SLAB_BYTES) -> SymmetricHeap:
        opened.append(request.param(rank, ranks, slab_bytes))
        return opened[-1]

    yield a_heap
    for heap in opened:
        heap.close()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def soon(condition) -> bool:
    """Whether it comes true within five seconds: a server's thread may still be at its end."""
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def mappings_of(heap) -> list[str]:
    """The lines of /proc/self/maps inside the heap's range."""
    end, found = heap.base + heap.ranks * heap.slab_bytes, []
    for line in pathlib.Path("/proc/self/maps").read_text().splitlines():
        start = int(line.split("-")[0], 16)
        if heap.base <= start < end:
            found.append(line)
    return found


class TestSymmetricHeap:
    def test_a_slab_is_the_same_memory_for_all_who_attached_it(self, open_heap):
        owner, peer = open_heap(0), open_heap(1)
        peer.attach(0, owner.export())
        owner.whole()[0, 5] = 17
        assert peer.whole()[0, 5] == 17
        peer.whole()[0, 6] = 18
        assert owner.whole()[0, 6] == 18

    def test_slots_of_absent_ranks_may_be_read_and_written(self, open_heap):
        heap = open_heap(1)
        heap.whole()[...] = 9
        heap.whole()[1] = 1
        assert set(heap.whole()[0]) | set(heap.whole()[2]) == {9}, "dummies"
        assert set(heap.whole()[1]) == {1}, "no dummy may alias the own slab"

    def test_after_detaching_writes_no_longer_reach_the_peer(self, open_heap):
        owner, peer = open_heap(0), open_heap(1)
        peer.attach(0, owner.export())
        peer.detach(0)
        peer.whole()[0] = 7
        assert not owner.whole()[0].any()

    def test_addresses_stay_over_attach_and_detach(self, open_heap):
        owner, peer = open_heap(0), open_heap(1)
        before = peer.whole().ctypes.data
        peer.attach(0, owner.export())
        assert peer.whole().ctypes.data == before == peer.base
        peer.detach(0)
        assert peer.whole().ctypes.data == before

    def test_a_returning_rank_is_attached_over_its_old_slab(self, open_heap):
        first, second, peer = open_heap(0), open_heap(0), open_heap(1)
        first.whole()[0], second.whole()[0] = 1, 2
        for owner in (first, second):
            peer.attach(0, owner.export())
        assert set(peer.whole()[0]) == {2}

    def test_a_heap_outlives_the_owner_of_an_attached_slab(self, open_heap):
        peer = open_heap(1)
        owner = type(peer)(0, 3, SLAB_BYTES)
        owner.whole()[0] = 3
        handle = owner.export()
        peer.attach(0, handle)
        owner.close()
        assert set(peer.whole()[0]) == {3}
        with pytest.raises(HeapError, match="rank 0"):
            peer.attach(0, handle)
        assert set(peer.whole()[0]) == {3}, "a failed attach changes nothing"

    def test_a_slab_of_another_size_is_refused_with_both_sizes(self, open_heap):
        owner, peer = open_heap(0, slab_bytes=2 * SLAB_BYTES), open_heap(1)
        with pytest.raises(HeapError, match=f"rank 0 has {2 * SLAB_BYTES} .* expects {SLAB_BYTES}"):
            peer.attach(0, owner.export())

    @pytest.mark.parametrize("handle", ["", "unix:", "unix:nobody-here", "loopback:-1", "file:/x"])
    def test_a_wrong_handle_is_an_error_that_names_the_rank(self, open_heap, handle):
        with pytest.raises(HeapError, match="rank 2"):
            open_heap(1).attach(2, handle)

    @pytest.mark.parametrize("rank", [-1, 1, 3])
    def test_only_peers_can_be_attached_or_detached(self, open_heap, rank):
        owner, heap = open_heap(0), open_heap(1)
        with pytest.raises(HeapError, match=f"rank {rank} is not a peer of rank 1 of 3"):
            heap.attach(rank, owner.export())
        with pytest.raises(HeapError, match=f"rank {rank} is not a peer of rank 1 of 3"):
            heap.detach(rank)

    @pytest.mark.parametrize("wrong", [{"rank": 3}, {"slab_bytes": 100}, {"slab_bytes": 0}])
    def test_a_heap_of_wrong_sizes_is_refused(self, open_heap, wrong):
        with pytest.raises(HeapError, match=str(*wrong.values())):
            open_heap(**wrong)

    def test_attaching_fifty_times_leaks_no_file_and_no_mapping(self, open_heap):
        owner, peer = open_heap(0), open_heap(1)
        handle = owner.export()
        peer.attach(0, handle)
        peer.detach(0)
        gc.collect()
        files, mappings, threads = open_files(), len(mappings_of(peer)), threading.active_count()
        for _ in range(50):
            peer.attach(0, handle)
            peer.detach(0)
        # Mappings are per slot, and neighbours of one file may or may not be merged.
        assert len(mappings_of(peer)) <= max(mappings, peer.ranks)
        assert soon(lambda: open_files() == files) and threading.active_count() == threads

    def test_nothing_is_left_in_shared_memory(self, open_heap):
        owner, peer = open_heap(0), open_heap(1)
        peer.attach(0, owner.export())
        assert not [name for name in os.listdir("/dev/shm") if "eep" in name]

    def test_closing_ends_all_threads_and_closes_all_files(self, open_heap):
        heap = type(open_heap())(0, 3, SLAB_BYTES)
        files, threads = open_files(), threading.active_count()
        heap.export()
        heap.close()
        assert soon(lambda: open_files() < files and threading.active_count() == threads)

    def test_a_compiled_function_sees_what_is_mapped_now(self, open_heap):
        owner, peer = open_heap(0), open_heap(1)
        array = heap_array(peer)
        executable = jax.jit(lambda heap: heap[:, 0] + 0).lower(array).compile()
        pointer = array.unsafe_buffer_pointer()
        see = lambda: np.asarray(executable(array)).tolist()
        compilations = []
        count = lambda event, duration, **_: compilations.append(event)
        see()
        jax.monitoring.register_event_duration_secs_listener(count)
        owner.whole()[0], peer.whole()[1] = 5, 1
        assert see() == [0, 1, 0], "a dummy"
        peer.attach(0, owner.export())
        assert see() == [5, 1, 0]
        owner.whole()[0] = 6
        assert see() == [6, 1, 0]
        peer.detach(0)
        peer.attach(0, open_heap(0).export())
        assert see() == [0, 1, 0], "the new slab of a rank that returned"
        jax.monitoring.unregister_event_duration_listener(count)
        assert array.unsafe_buffer_pointer() == pointer == peer.base
        assert COMPILE_EVENT not in compilations


def test_a_host_array_is_imported_where_it_is():
    memory = np.zeros(4096 + 64, np.uint8)
    start = -memory.ctypes.data % 64
    array = import_host(memory[start : start + 4096])
    memory[start] = 77
    assert int(array[0]) == 77


def test_memory_that_xla_would_copy_is_refused():
    memory = np.zeros(256, np.uint8)
    start = -memory.ctypes.data % 64 + 4
    with pytest.raises(HeapError, match="not aligned to 64"):
        import_host(memory[start : start + 64])
