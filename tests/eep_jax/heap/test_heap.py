"""Promises of the symmetric heap, one class for all implementations."""

import contextlib
import ctypes
import gc
import os
import pathlib
import threading
import time

import jax
import ml_dtypes
import numpy as np
import pytest

from eep_jax.errors import HeapError
from eep_jax.heap.arrays import import_memory
from eep_jax.heap.cuda.loopback import CudaLoopbackHeap
from eep_jax.heap.cuda.vmm import CudaVmmHeap
from eep_jax.heap.heap import CONTROL_BYTES, SymmetricHeap
from eep_jax.heap.loopback import LoopbackHeap
from eep_jax.heap.mirror.heap import MirrorHeap, MirrorOptions
from eep_jax.heap.open import open_heap as open_heap_for
from eep_jax.heap.posix_shm import PosixShmHeap
from pallas_kernels.window import WindowLayout
from tests.support.fake_cuda import put_fake_driver

SLAB_BYTES = 8192
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class NearHeap(MirrorHeap):
    """A heap of several hosts whose ranks happen to be on one: nothing may be different."""

    def __init__(self, rank: int, ranks: int, slab_bytes: int):
        layout = WindowLayout(ranks=3, tokens=1, choices=1, hidden=4)
        options = MirrorOptions(host="127.0.0.1", host_id="here", token="x" * 16, layout=layout)
        super().__init__(rank, ranks, slab_bytes, options)


@pytest.fixture(
    params=[LoopbackHeap, PosixShmHeap, NearHeap, CudaLoopbackHeap, CudaVmmHeap],
    ids=lambda c: c.__name__,
)
def open_heap(request, monkeypatch):
    """Opens heaps that are closed after the test; those of CUDA over a driver of host memory."""
    opened = []
    put_fake_driver(monkeypatch)

    def a_heap(rank=0, ranks=3, slab_bytes=SLAB_BYTES) -> SymmetricHeap:
        opened.append(request.param(rank, ranks, slab_bytes))
        return opened[-1]

    yield a_heap
    for heap in opened:
        heap.close()
        if heap.device == "cuda":
            heap.release()


def memory(heap) -> np.ndarray:
    """The range as host memory, which it is here for every implementation."""
    flat = (ctypes.c_uint8 * (heap.ranks * heap.slab_bytes)).from_address(heap.base)
    return np.ctypeslib.as_array(flat).reshape(heap.ranks, heap.slab_bytes)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def soon(condition) -> bool:
    """Whether it comes true within a minute: a server's thread may still be at its end."""
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def open_slabs() -> int:
    """Memory files of heaps that this process has open; other tests' files do not count."""
    found = 0
    for entry in os.scandir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found += "eep" in os.readlink(entry.path)
    return found


def fd_servers() -> int:
    return sum(thread.name == "fd-server" for thread in threading.enumerate())


def named_files(heap) -> list[str]:
    """Files of a file system that the heap maps; those of `memfd_create` are in none."""
    paths = [line.split(maxsplit=5)[5] for line in mappings_of(heap) if line.count("/")]
    return [path for path in paths if not path.startswith("/memfd:")]


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
        memory(owner)[0, 5] = 17
        assert memory(peer)[0, 5] == 17
        memory(peer)[0, 6] = 18
        assert memory(owner)[0, 6] == 18

    def test_slots_of_absent_ranks_may_be_read_and_written(self, open_heap):
        heap = open_heap(1)
        memory(heap)[...] = 9
        memory(heap)[1] = 1
        assert set(memory(heap)[0]) | set(memory(heap)[2]) == {9}, "dummies"
        assert set(memory(heap)[1]) == {1}, "no dummy may alias the own slab"

    def test_after_detaching_writes_no_longer_reach_the_peer(self, open_heap):
        owner, peer = open_heap(0), open_heap(1)
        peer.attach(0, owner.export())
        peer.detach(0)
        memory(peer)[0] = 7
        assert not memory(owner)[0].any()

    def test_addresses_stay_over_attach_and_detach(self, open_heap):
        owner, peer = open_heap(0), open_heap(1)
        before = peer.base, peer.control_address(), peer.control().ctypes.data
        peer.attach(0, owner.export())
        assert (peer.base, peer.control_address(), peer.control().ctypes.data) == before
        peer.detach(0)
        assert (peer.base, peer.control_address(), peer.control().ctypes.data) == before

    def test_a_returning_rank_is_attached_over_its_old_slab(self, open_heap):
        first, second, peer = open_heap(0), open_heap(0), open_heap(1)
        memory(first)[0], memory(second)[0] = 1, 2
        for owner in (first, second):
            peer.attach(0, owner.export())
        assert set(memory(peer)[0]) == {2}

    def test_a_heap_outlives_the_owner_of_an_attached_slab(self, open_heap):
        peer = open_heap(1)
        owner = type(peer)(0, 3, SLAB_BYTES)
        memory(owner)[0] = 3
        handle = owner.export()
        peer.attach(0, handle)
        owner.close()
        assert set(memory(peer)[0]) == {3}
        with pytest.raises(HeapError, match="rank 0"):
            peer.attach(0, handle)
        assert set(memory(peer)[0]) == {3}, "a failed attach changes nothing"

    def test_a_slab_of_another_size_is_refused_with_both_sizes(self, open_heap):
        owner, peer = open_heap(0, slab_bytes=2 * SLAB_BYTES), open_heap(1)
        with pytest.raises(HeapError, match=f"rank 0 has {2 * SLAB_BYTES} .* expects {SLAB_BYTES}"):
            peer.attach(0, owner.export())

    @pytest.mark.parametrize(
        "handle", ["", "unix:", "unix:nobody-here", "cuda:", "cuda:nobody-here", "x:y"]
    )
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

    @pytest.mark.parametrize("wrong", [{"rank": 3}, {"rank": -1}, {"slab_bytes": 0}])
    def test_a_heap_of_wrong_sizes_is_refused(self, open_heap, wrong):
        with pytest.raises(HeapError, match=str(*wrong.values())):
            open_heap(**wrong)

    def test_what_one_rank_writes_another_reads_and_copies(self, open_heap):
        owner, peer = open_heap(0), open_heap(1)
        peer.attach(0, owner.export())
        values = np.arange(100, dtype=np.int16).reshape(4, 25)
        owner.write(4096, values)
        assert peer.read(0, 4096, 200).tobytes() == values.tobytes()
        peer.copy_in(5000, 0, 4096, 200)
        assert peer.read(1, 5000, 200).tobytes() == values.tobytes()
        assert not peer.read(1, 4096, 904).any() and not peer.read(1, 5200, 2992).any()

    def test_what_was_read_is_a_copy(self, open_heap):
        heap = open_heap(0)
        found = heap.read(0, 4096, 8)
        heap.write(4096, np.ones(8, np.uint8))
        assert not found.any()
        found[...] = 7
        assert set(heap.read(0, 4096, 8)) == {1}

    def test_zeroing_ends_where_it_is_told(self, open_heap):
        heap = open_heap(0)
        heap.write(4096, np.full(32, 255, np.uint8))
        heap.fill_zero(4104, 16)
        assert heap.read(0, 4096, 32).tolist() == [255] * 8 + [0] * 16 + [255] * 8

    def test_arrays_are_written_as_they_lie_in_c_order(self, open_heap):
        heap, values = open_heap(0), np.arange(12, dtype=np.float32).reshape(3, 4)
        heap.write(4096, values.T)
        assert heap.read(0, 4096, 48).tobytes() == np.ascontiguousarray(values.T).tobytes()
        heap.write(4096, values.astype(ml_dtypes.bfloat16))
        assert heap.read(0, 4096, 24).tobytes() == values.astype(ml_dtypes.bfloat16).tobytes()

    def test_no_bytes_are_no_error(self, open_heap):
        heap = open_heap(0)
        heap.write(SLAB_BYTES, np.zeros(0))
        heap.fill_zero(0, 0)
        heap.copy_in(0, 1, 0, 0)
        assert heap.read(2, SLAB_BYTES, 0).shape == (0,)

    @pytest.mark.parametrize(
        ("rank", "offset", "nbytes"), [(1, 8190, 3), (2, -1, 2), (1, 0, 8193), (0, 8193, 0)]
    )
    def test_bytes_outside_a_slab_are_refused_with_rank_and_offset(
        self, open_heap, rank, offset, nbytes
    ):
        heap, said = open_heap(1), f"{nbytes} bytes at offset {offset} are not in the slab of rank"
        with pytest.raises(HeapError, match=f"{said} {rank}"):
            heap.read(rank, offset, nbytes)
        with pytest.raises(HeapError, match=f"{said} {rank}"):
            heap.copy_in(0, rank, offset, nbytes)
        with pytest.raises(HeapError, match=f"{said} 1"):
            heap.copy_in(offset, 0, 0, nbytes)
        with pytest.raises(HeapError, match=f"{said} 1"):
            heap.write(offset, np.zeros(nbytes, np.uint8))
        with pytest.raises(HeapError, match=f"{said} 1"):
            heap.fill_zero(offset, nbytes)

    @pytest.mark.parametrize("rank", [-1, 3])
    def test_bytes_of_a_rank_that_is_none_are_refused(self, open_heap, rank):
        with pytest.raises(HeapError, match=f"rank {rank} is not in 0..2"):
            open_heap(1).read(rank, 0, 1)

    def test_a_copy_within_a_slab_must_not_overlap(self, open_heap):
        heap = open_heap(0)
        heap.write(4096, np.arange(8, dtype=np.uint8))
        heap.copy_in(4104, 0, 4096, 8)
        assert heap.read(0, 4104, 8).tolist() == list(range(8))
        with pytest.raises(HeapError, match="overlap"):
            heap.copy_in(4100, 0, 4096, 8)

    def test_bytes_may_be_moved_from_any_thread(self, open_heap):
        owner, peer = open_heap(0), open_heap(1)
        peer.attach(0, owner.export())
        errors = []

        def work(number):
            try:
                values = np.full(64, number, np.uint8)
                for _ in range(20):
                    owner.write(4096 + 64 * number, values)
                    assert (peer.read(0, 4096 + 64 * number, 64) == values).all()
                    peer.copy_in(64 * number, 0, 4096 + 64 * number, 64)
                    assert (peer.read(1, 64 * number, 64) == values).all()
                    peer.fill_zero(64 * number, 64)
                    owner.post_abort(number)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert not errors and not any(thread.is_alive() for thread in threads)

    def test_control_pages_are_shared_as_slabs_are(self, open_heap):
        owner, peer = open_heap(0), open_heap(1)
        assert owner.control().shape == (3, CONTROL_BYTES) and not owner.control()[0].any()
        peer.control()[0] = 1
        assert not owner.control()[0].any(), "not attached: a dummy"
        peer.attach(0, owner.export())
        owner.control()[0, 5], peer.control()[1, 5] = 8, 9
        assert peer.control()[0, 5] == 8 and not owner.control()[1, 5]
        peer.detach(0)
        peer.control()[0, 5] = 7
        assert owner.control()[0, 5] == 8

    def test_kernels_read_the_abort_word_that_hosts_write(self, open_heap):
        heap = open_heap(1)
        word = ctypes.c_uint32.from_address(heap.control_address())
        heap.control()[1, :4] = np.array([77], np.uint32).view(np.uint8)
        heap.post_abort(77)
        assert word.value == 77

    def test_attaching_fifty_times_leaks_no_file_and_no_mapping(self, open_heap):
        owner, peer = open_heap(0), open_heap(1)
        handle = owner.export()
        peer.attach(0, handle)
        peer.detach(0)
        gc.collect()
        files, mappings, threads = open_files(), len(mappings_of(peer)), fd_servers()
        for _ in range(50):
            peer.attach(0, handle)
            peer.detach(0)
        # Mappings are per slab; neighbours of one file may or may not be merged.
        assert len(mappings_of(peer)) <= max(mappings, peer.ranks)
        assert soon(lambda: open_files() <= files and fd_servers() <= threads)

    def test_its_memory_has_no_name_that_could_be_left_behind(self, open_heap):
        owner, peer = open_heap(0), open_heap(1)
        peer.attach(0, owner.export())
        assert named_files(peer) == []

    def test_closing_ends_all_threads_and_closes_all_files(self, open_heap):
        heap = type(open_heap())(0, 3, SLAB_BYTES)
        slabs, servers = open_slabs(), fd_servers()
        heap.export()
        heap.close()
        assert soon(lambda: open_slabs() < slabs and fd_servers() <= servers)

    def test_a_compiled_function_sees_what_is_mapped_now(self, open_heap):
        owner, peer = open_heap(0), open_heap(1)
        array = import_memory(peer.base, np.dtype(np.uint8), (peer.ranks, peer.slab_bytes))
        executable = jax.jit(lambda heap: heap[:, 0] + 0).lower(array).compile()
        pointer = array.unsafe_buffer_pointer()
        see = lambda: np.asarray(executable(array)).tolist()
        compilations = []
        count = lambda event, duration, **_: compilations.append(event)
        see()
        jax.monitoring.register_event_duration_secs_listener(count)
        memory(owner)[0], memory(peer)[1] = 5, 1
        assert see() == [0, 1, 0], "a dummy"
        peer.attach(0, owner.export())
        assert see() == [5, 1, 0]
        memory(owner)[0] = 6
        assert see() == [6, 1, 0]
        peer.detach(0)
        peer.attach(0, open_heap(0).export())
        assert see() == [0, 1, 0], "the new slab of a rank that returned"
        jax.monitoring.unregister_event_duration_listener(count)
        assert array.unsafe_buffer_pointer() == pointer == peer.base
        assert COMPILE_EVENT not in compilations


@pytest.mark.parametrize("heap_type", [LoopbackHeap, PosixShmHeap])
def test_a_slab_of_host_memory_is_of_whole_pages(heap_type):
    with pytest.raises(HeapError, match="slab_bytes=100 must be a positive multiple of 4096"):
        heap_type(0, 2, 100)


@pytest.mark.parametrize(
    ("platform", "expected"), [("cpu", PosixShmHeap), ("gpu", CudaVmmHeap), ("cuda", CudaVmmHeap)]
)
def test_the_platform_chooses_the_heap(monkeypatch, platform, expected):
    put_fake_driver(monkeypatch)
    heap = open_heap_for(1, 2, SLAB_BYTES, platform)
    assert type(heap) is expected and (heap.rank, heap.ranks) == (1, 2)
    heap.close()


def test_a_platform_without_a_heap_is_refused():
    with pytest.raises(HeapError, match="no heap for platform 'tpu'"):
        open_heap_for(0, 1, SLAB_BYTES, "tpu")
