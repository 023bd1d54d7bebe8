"""Promises of the CUDA heap that need no GPU: its driver is one over host memory, as strict."""

import gc
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eep_jax.errors import HeapError
from eep_jax.heap.arrays import heap_array
from eep_jax.heap.cuda import libcuda, vmm
from eep_jax.heap.cuda.loopback import CudaLoopbackHeap, open_all_cuda
from eep_jax.heap.cuda.vmm import CudaVmmHeap
from eep_jax.heap.fd_passing import FdServer
from tests.support.fake_cuda import PAGE_BYTES, CUresult, FakeCuda, put_fake_driver

RANKS = 3
SLAB_BYTES = 4 * PAGE_BYTES
OUT_OF_MEMORY = CUresult.CUDA_ERROR_OUT_OF_MEMORY
HEAPS = pytest.mark.parametrize(
    "heap_type", [CudaVmmHeap, CudaLoopbackHeap], ids=lambda c: c.__name__
)


@pytest.fixture
def cuda(monkeypatch):
    """A strict driver. All that a test opened it must have given back."""
    fake = put_fake_driver(monkeypatch)
    fake.opened = []
    yield fake
    for heap in fake.opened:
        heap.release()
    assert set(fake.kept().values()) == {0}, fake.kept()


def opened(cuda, heap):
    cuda.opened.append(heap)
    return heap


def a_pair(cuda, heap_type=CudaVmmHeap, slab_bytes=SLAB_BYTES):
    """Rank 0 and a peer that has attached nothing."""
    return [opened(cuda, heap_type(rank, RANKS, slab_bytes)) for rank in (0, 1)]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def settled(count, expected) -> bool:
    """Whether `count()` becomes `expected` soon: a server's thread may still be at its end."""
    deadline = time.monotonic() + 60
    while count() != expected and time.monotonic() < deadline:
        time.sleep(0.01)
    return count() == expected


def is_dummy(heap, rank: int) -> bool:
    """Whether the slab of `rank` is readable and writable memory of no rank."""
    before = heap.read(heap.rank, 0, heap.slab_bytes).tobytes()
    dummies = {memory for _, memory in _memories(heap, rank)}
    again = heap.read(rank, 0, heap.slab_bytes).size == heap.slab_bytes
    return (
        again
        and dummies == {heap._dummy}
        and before == heap.read(heap.rank, 0, heap.slab_bytes).tobytes()
    )


def _memories(heap, rank: int):
    start = heap.base + rank * heap.slab_bytes
    mappings = libcuda._module.mappings.items()
    return [
        (address, memory)
        for address, (_, memory) in mappings
        if start <= address < start + heap.slab_bytes
    ]


class TestRange:
    @pytest.mark.parametrize(
        ("wanted", "page", "slab"), [(1, 4096, 4096), (4097, 4096, 8192), (100, 1 << 16, 1 << 16)]
    )
    def test_slabs_are_rounded_up_to_what_the_gpu_maps(self, monkeypatch, wanted, page, slab):
        put_fake_driver(monkeypatch, page_bytes=page)
        heap = CudaVmmHeap(0, 2, wanted)
        assert heap.slab_bytes == slab
        heap.release()

    def test_a_large_slab_takes_few_calls_for_a_dead_peer(self, cuda, monkeypatch):
        monkeypatch.setattr(vmm, "DUMMY_BYTES_MAX", 4 * PAGE_BYTES)
        heap = opened(cuda, CudaVmmHeap(0, 2, 9 * PAGE_BYTES))
        assert heap.slab_bytes == 12 * PAGE_BYTES and len(_memories(heap, 1)) == 3
        assert is_dummy(heap, 1)

    def test_dead_peers_cost_one_dummy_and_no_slab(self, cuda):
        opened(cuda, CudaVmmHeap(0, 64, SLAB_BYTES))
        assert sum(memory.nbytes for memory in cuda.memories) == SLAB_BYTES + PAGE_BYTES

    def test_the_own_slab_is_zero_though_fresh_device_memory_is_not(self, cuda):
        heap, _ = a_pair(cuda)
        assert not heap.read(0, 0, heap.slab_bytes).any()

    @HEAPS
    def test_a_heap_that_cannot_be_opened_keeps_nothing(self, cuda, heap_type):
        opened(cuda, heap_type(0, RANKS, SLAB_BYTES))
        names = [name for name in cuda.calls if name != "cuCtxSetCurrent"]
        kept, files = cuda.kept(), open_files()
        forgiven = ("cuMemHostRegister", "cuMemHostGetDevicePointer")
        for position, name in enumerate(names):
            if name in forgiven:
                continue
            cuda.fail(name, names[: position + 1].count(name))
            with pytest.raises(HeapError, match=f"{name} of .*rank 0"):
                heap_type(0, RANKS, SLAB_BYTES)
            assert cuda.kept() == kept and settled(open_files, files), name

    def test_the_memory_of_a_closed_heap_stays_until_it_is_released(self, cuda):
        heap, peer = a_pair(cuda)
        peer.attach(0, heap.export())
        heap.write(0, np.ones(8, np.uint8))
        heap.close()
        heap.close()
        assert heap.read(0, 0, 8).all() and peer.read(0, 0, 8).all()
        heap.release()
        heap.release()
        assert peer.read(0, 0, 8).all(), "who mapped it keeps it"
        for use in (
            lambda: heap.read(0, 0, 8),
            lambda: heap.write(0, np.ones(8)),
            lambda: heap.fill_zero(0, 8),
            lambda: heap.copy_in(0, 1, 0, 8),
        ):
            with pytest.raises(HeapError, match="heap of rank 0 is released"):
                use()

    def test_a_closed_heap_attaches_and_exports_nothing(self, cuda):
        heap, peer = a_pair(cuda)
        handle = peer.export()
        heap.close()
        with pytest.raises(HeapError, match="rank 0 is closed; rank 1 stays"):
            heap.attach(1, handle)
        with pytest.raises(HeapError, match="rank 0 is closed"):
            heap.export()
        with pytest.raises(HeapError, match="rank 0 is closed"):
            heap.control_address()
        heap.post_abort(3)

    def test_the_slab_is_no_host_memory_and_the_error_says_what_to_use(self, cuda):
        heap, _ = a_pair(cuda)
        with pytest.raises(HeapError, match=r"read, write, fill_zero and copy_in, control\(\)"):
            heap.whole()

    def test_its_arrays_are_of_the_gpu_backend(self, cuda):
        heap, _ = a_pair(cuda)
        with pytest.raises(RuntimeError, match="cuda"):
            heap_array(heap)


class TestAttach:
    @HEAPS
    def test_attaching_a_hundred_times_leaks_no_handle_and_no_file(self, cuda, heap_type):
        _, peer = a_pair(cuda, heap_type)
        gc.collect()
        kept, files = cuda.kept(), open_files()
        for number in range(100):
            owner = heap_type(0, RANKS, SLAB_BYTES)
            peer.attach(0, owner.export())
            owner.write(8192, np.full(8, number, np.uint8))
            assert set(peer.read(0, 8192, 8)) == {number}
            if number % 3:
                peer.detach(0)
            owner.release()
        peer.detach(0)
        assert cuda.kept() == kept
        assert settled(open_files, files)

    @HEAPS
    @pytest.mark.parametrize("name", ["cuMemUnmap", "cuMemMap", "cuMemSetAccess"])
    def test_after_a_failure_midway_the_slot_can_be_used_and_the_error_names_it(
        self, cuda, heap_type, name
    ):
        owner, peer = a_pair(cuda, heap_type)
        handle, kept = owner.export(), None
        for already in (False, True):
            if already:
                peer.attach(0, handle)
                peer.detach(0)
            kept = cuda.kept()
            cuda.fail(name)
            said = f"{name} of rank 1, slab 0 failed: CUDA_ERROR_NOT_SUPPORTED (text of 801)"
            with pytest.raises(HeapError, match=re.escape(said)):
                peer.attach(0, handle)
            assert is_dummy(peer, 0) and cuda.kept() == kept
        peer.attach(0, handle)
        assert not is_dummy(peer, 0)

    @HEAPS
    @pytest.mark.parametrize("name", ["cuMemMap", "cuMemSetAccess"])
    def test_a_failure_while_an_old_slab_is_replaced_leaves_the_dummy(self, cuda, heap_type, name):
        first, peer = a_pair(cuda, heap_type)
        second = opened(cuda, heap_type(0, RANKS, SLAB_BYTES))
        peer.attach(0, first.export())
        cuda.fail(name)
        with pytest.raises(HeapError, match=f"{name} of rank 1, slab 0"):
            peer.attach(0, second.export())
        assert is_dummy(peer, 0)
        peer.control()[0, 9] = 5
        assert not first.control()[0, 9] and not second.control()[0, 9]

    def test_a_descriptor_that_cannot_be_imported_changes_nothing(self, cuda):
        owner, peer = a_pair(cuda)
        peer.attach(0, owner.export())
        kept, files = cuda.kept(), open_files()
        cuda.fail("cuMemImportFromShareableHandle")
        with pytest.raises(HeapError, match="cuMemImportFromShareableHandle of rank 1, slab 0"):
            peer.attach(0, owner.export())
        owner.write(0, np.full(8, 6, np.uint8))
        assert set(peer.read(0, 0, 8)) == {6}
        assert cuda.kept() == kept and settled(open_files, files)

    @pytest.mark.parametrize("name", ["cuMemUnmap", "cuMemMap", "cuMemSetAccess"])
    def test_a_detach_that_failed_can_be_repeated(self, cuda, name):
        owner, peer = a_pair(cuda)
        kept = cuda.kept()
        peer.attach(0, owner.export())
        cuda.fail(name, 2 if name == "cuMemMap" else 1)
        with pytest.raises(HeapError, match=f"{name} of .*rank 1.*slab 0"):
            peer.detach(0)
        peer.detach(0)
        assert is_dummy(peer, 0)
        owner.close()
        assert {**cuda.kept(), "registered": 2} == kept

    def test_detaching_what_is_detached_calls_no_driver(self, cuda):
        _, peer = a_pair(cuda)
        calls = len(cuda.calls)
        peer.detach(0)
        assert len(cuda.calls) == calls

    @HEAPS
    def test_slabs_of_other_sizes_are_refused_with_both_sizes(self, cuda, heap_type):
        _, peer = a_pair(cuda, heap_type)
        owner = opened(cuda, heap_type(0, RANKS, 2 * SLAB_BYTES))
        with pytest.raises(HeapError, match=f"rank 0 has {2 * SLAB_BYTES} .* expects {SLAB_BYTES}"):
            peer.attach(0, owner.export())
        assert is_dummy(peer, 0)

    @pytest.mark.parametrize("message", [b"", b"nonsense", b"-16384"])
    def test_a_server_that_says_no_size_is_refused(self, cuda, message):
        owner, peer = a_pair(cuda)
        server = FdServer([owner.control_fd] * 2, message)
        with pytest.raises(HeapError, match="slab of rank 0 has 0 bytes"):
            peer.attach(0, f"cuda:{server.name}")
        server.close()

    @pytest.mark.parametrize("count", [1, 3])
    def test_a_server_of_another_number_of_descriptors_is_refused(self, cuda, count):
        owner, peer = a_pair(cuda)
        server = FdServer([owner.control_fd] * count, b"%d" % SLAB_BYTES)
        with pytest.raises(HeapError, match=f"rank 0 .* sent {min(count, 3)} descriptors"):
            peer.attach(0, f"cuda:{server.name}")
        server.close()

    def test_a_control_page_of_another_size_detaches_the_slab_again(self, cuda):
        _, peer = a_pair(cuda)
        slab, control = os.memfd_create("slab"), os.memfd_create("control")
        os.ftruncate(slab, SLAB_BYTES), os.ftruncate(control, 100)
        server = FdServer([slab, control], b"%d" % SLAB_BYTES)
        with pytest.raises(HeapError, match="slab of rank 0 has 100 bytes"):
            peer.attach(0, f"cuda:{server.name}")
        assert is_dummy(peer, 0)
        server.close(), os.close(slab), os.close(control)


class TestControl:
    def test_where_pages_cannot_be_registered_the_abort_word_is_stored_on_the_device(self, cuda):
        for name in ("cuMemHostRegister", "cuMemHostGetDevicePointer"):
            cuda.fail(name)
            heap = opened(cuda, CudaVmmHeap(0, RANKS, SLAB_BYTES))
            address = heap.control_address()
            word = cuda.allocated[address]
            assert address in cuda.allocated and not any(word)
            for epoch, expected in ((3, 3), (2, 3), (70_000, 70_000)):
                heap.post_abort(epoch)
                found = np.ctypeslib.as_array(word).tobytes()
                assert np.uint32(expected).tobytes() in found, "never back to an older epoch"
            heap.close()
            assert not cuda.allocated
            heap.post_abort(80_000)

    def test_where_they_can_no_driver_is_called_for_an_abort(self, cuda):
        heap, _ = a_pair(cuda)
        calls = len(cuda.calls)
        heap.post_abort(3)
        assert len(cuda.calls) == calls and not cuda.allocated

    def test_ranks_of_one_process_are_all_attached(self, cuda):
        heaps = [opened(cuda, heap) for heap in open_all_cuda(RANKS, SLAB_BYTES)]
        for heap in heaps:
            heap.write(4096, np.full(8, heap.rank + 1, np.uint8))
            heap.control()[heap.rank] = heap.rank + 1
        for heap in heaps:
            assert [int(heap.read(r, 4096, 1)[0]) for r in range(RANKS)] == [1, 2, 3]
            assert heap.control()[:, 0].tolist() == [1, 2, 3]


class TestErrors:
    @pytest.mark.parametrize(
        ("name", "use"),
        [
            ("cuMemcpyDtoHAsync", lambda heap: heap.read(2, 64, 8)),
            ("cuMemcpyDtoDAsync", lambda heap: heap.copy_in(0, 2, 64, 8)),
            ("cuStreamSynchronize", lambda heap: heap.read(2, 64, 8)),
            ("cuCtxSetCurrent", lambda heap: heap.read(2, 64, 8)),
        ],
    )
    def test_errors_of_moving_bytes_name_call_rank_slot_and_bytes(self, cuda, name, use):
        heap, _ = a_pair(cuda)
        cuda.fail(name)
        said = f"{name} of rank 0, slab 2, 8 bytes at offset 64 failed: CUDA_ERROR_NOT_SUPPORTED"
        with pytest.raises(HeapError, match=said):
            use(heap)

    def test_out_of_memory_says_what_was_wanted_what_is_free_and_what_to_lower(self, monkeypatch):
        put_fake_driver(monkeypatch, total_bytes=3 * SLAB_BYTES)
        with pytest.raises(HeapError) as raised:
            CudaVmmHeap(0, RANKS, 4 * SLAB_BYTES)
        said = str(raised.value)
        assert said.startswith("cuMemCreate of the slab of rank 0 failed: CUDA_ERROR_OUT_OF_MEMORY")
        assert f"wanted {4 * SLAB_BYTES} bytes, {3 * SLAB_BYTES} of {3 * SLAB_BYTES} bytes" in said
        for way_out in (
            "--device_memory_fraction",
            "XLA_PYTHON_CLIENT_MEM_FRACTION",
            "cluster.slots_per_rank",
            "engine.batch_rows",
            "engine.prefill_tokens",
        ):
            assert way_out in said

    def test_an_error_without_a_name_is_told_by_its_number(self, cuda, monkeypatch):
        cuda.fail("cuInit")
        unknown = lambda self, error: (CUresult.CUDA_ERROR_INVALID_VALUE, None)
        monkeypatch.setattr(FakeCuda, "cuGetErrorName", unknown)
        with pytest.raises(HeapError, match=r"cuInit of rank 0 failed: error 801 \(text of 801\)"):
            CudaVmmHeap(0, RANKS, SLAB_BYTES)

    def test_a_device_that_is_not_there_is_an_error_in_words(self, cuda):
        with pytest.raises(HeapError, match=r"cuDeviceGet of rank 0 .*CUDA_ERROR_INVALID"):
            CudaVmmHeap(0, RANKS, SLAB_BYTES, device=5)

    @pytest.mark.parametrize("present", [False, True], ids=["no bindings", "no driver"])
    def test_without_bindings_or_driver_the_error_says_what_to_install(self, monkeypatch, present):
        def load():
            raise RuntimeError("libcuda.so.1 not found")

        monkeypatch.setattr(libcuda, "_module", None)
        monkeypatch.setattr(libcuda, "_load", load) if present else monkeypatch.setitem(
            sys.modules, "cuda.bindings.driver", None
        )
        with pytest.raises(HeapError, match=r"pip install eep-jax\[cuda13\]"):
            CudaVmmHeap(0, RANKS, SLAB_BYTES)

    def test_the_heap_is_imported_without_cuda_bindings(self):
        program = (
            "import sys; sys.modules['cuda'] = None; import eep_jax.heap.cuda.vmm, "
            "eep_jax.heap.cuda.loopback, eep_jax.heap.open"
        )
        path = os.pathsep.join(filter(None, sys.path))
        subprocess.run(
            [sys.executable, "-c", program],
            check=True,
            timeout=60,
            env=os.environ | {"PYTHONPATH": path},
        )


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("attach"), st.integers(0, 2), st.integers(0, 2)),
        st.tuples(st.just("detach"), st.integers(0, 2), st.integers(0, 2)),
        st.tuples(st.just("renew"), st.integers(0, 2), st.just(0)),
        st.tuples(st.just("close"), st.integers(0, 2), st.just(0)),
    ),
    max_size=20,
)
FAILURES = st.one_of(
    st.none(),
    st.tuples(
        st.sampled_from(["cuMemMap", "cuMemSetAccess", "cuMemImportFromShareableHandle"]),
        st.integers(1, 12),
    ),
)


@HEAPS
@settings(max_examples=60)
@given(actions=ACTIONS, failure=FAILURES)
def test_after_any_sequence_every_rank_reads_what_it_attached(heap_type, actions, failure):
    """A model beside the heaps: who has mapped whose memory. Slots are readable at any time."""
    with pytest.MonkeyPatch.context() as patch:
        World(heap_type, put_fake_driver(patch)).play(actions, failure)


class World:
    """Three ranks that come and go; `seen[rank][peer]` is the incarnation attached, or None."""

    def __init__(self, heap_type, cuda):
        self.heap_type, self.cuda = heap_type, cuda
        self.heaps, self.born, self.closed = {}, 0, set()
        self.old = []
        self.seen = {rank: dict.fromkeys(range(RANKS)) for rank in range(RANKS)}
        self.number: dict[int, int] = {}
        for rank in range(RANKS):
            self.renew(rank, 0)

    def play(self, actions, failure) -> None:
        if failure:
            self.cuda.fail(*failure)
        for name, rank, peer in actions:
            getattr(self, name)(rank, peer)
            self.check()
        self.cuda._failing.clear()
        for heap in (*self.old, *self.heaps.values()):
            heap.release()
        assert set(self.cuda.kept().values()) == {0}, self.cuda.kept()

    def renew(self, rank: int, _) -> None:
        """A new process of a rank; those who mapped the old one keep its memory."""
        try:
            heap = self.heap_type(rank, RANKS, SLAB_BYTES)
        except HeapError:
            return
        if rank in self.heaps:
            self.heaps[rank].close()
            self.old.append(self.heaps[rank])
        self.heaps[rank], self.born = heap, self.born + 1
        self.number[rank] = self.born
        self.closed.discard(rank)
        self.seen[rank] = dict.fromkeys(range(RANKS)) | {rank: self.born}
        heap.write(4096, np.full(8, self.born, np.uint8))
        heap.control()[rank] = self.born

    def attach(self, rank: int, peer: int) -> None:
        refused = rank == peer or {rank, peer} & self.closed
        failing = bool(self.cuda._failing)
        try:
            self.heaps[rank].attach(peer, "" if peer in self.closed else self.handle(peer))
        except HeapError:
            assert refused or failing
            if not refused and self.heaps[rank]._is_dummy[peer]:
                self.seen[rank][peer] = None
        else:
            assert not refused
            self.seen[rank][peer] = self.number[peer]

    def handle(self, peer: int) -> str:
        return self.heaps[peer].export()

    def detach(self, rank: int, peer: int) -> None:
        if rank == peer or rank in self.closed:
            with pytest.raises(HeapError):
                self.heaps[rank].detach(peer)
            return
        try:
            self.heaps[rank].detach(peer)
        except HeapError:
            self.heaps[rank].detach(peer)
        self.seen[rank][peer] = None

    def close(self, rank: int, _) -> None:
        self.heaps[rank].close()
        self.closed.add(rank)

    def check(self) -> None:
        for rank, heap in self.heaps.items():
            for peer, incarnation in self.seen[rank].items():
                found = int(heap.read(peer, 4096, 8)[0])
                assert found == (incarnation or 0), f"rank {rank} reads {found} of rank {peer}"
                if incarnation is not None or rank not in self.closed:
                    assert int(heap.control()[peer, 7]) == (incarnation or 0)
