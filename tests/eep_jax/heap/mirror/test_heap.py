"""Promises of the heap over several hosts: order, limits, deadlines, and who is let in."""

import contextlib
import dataclasses
import socket
import threading

import numpy as np
import pytest

from eep_jax.errors import HeapError
from eep_jax.handshake import enter
from eep_jax.heap.mirror import heap as mirror_heap
from eep_jax.heap.mirror import nixl, server, stream
from eep_jax.heap.mirror.frames import HEADER, Kind
from eep_jax.heap.mirror.heap import MirrorOptions
from eep_jax.heap.mirror.nixl import NixlStream, load_nixl
from eep_jax.heap.mirror.server import READ, UNAUTHENTICATED_MAX
from eep_jax.heap.mirror.wire import SERVICE, Purpose, call, receive
from eep_jax.heap.open import open_heap
from pallas_kernels.exchange.signals import post
from tests.support import mirrors
from tests.support.kernels import an_exchange, naive_combine, some_results
from tests.support.loopback import LoopbackRanks, some_ranks, waits_that_know
from tests.support.mirrors import (
    LAYOUT,
    SLAB_BYTES,
    TOKEN,
    a_mirror,
    attach_all,
    on_hosts,
    until,
)

BANK = SLAB_BYTES - 4096


@pytest.fixture(params=["tcp", "nixl"], autouse=True)
def transport(request, monkeypatch):
    """Every promise, over both. NIXL runs on CPUs, where its package is installed."""
    if request.param == "nixl":
        try:
            load_nixl()
        except ImportError as error:
            assert "pip install" in str(error)
            pytest.skip(str(error))
    monkeypatch.setattr(mirrors, "TRANSPORT", request.param)
    return request.param


@pytest.fixture
def keep():
    with contextlib.ExitStack() as stack:

        def kept(heap):
            stack.callback(heap.close)
            return heap

        yield kept


@pytest.fixture
def pair(keep):
    """Rank 0 on host a, rank 1 on host b, attached to each other."""
    heaps = [keep(a_mirror(0, "a")), keep(a_mirror(1, "b"))]
    attach_all(heaps)
    return heaps


def window(heap, rank=None):
    return LAYOUT.views(heap.whole())[heap.rank if rank is None else rank]


def write(heap, peer: int, number: int, value: float, token: int = 0) -> None:
    """What a dispatch kernel does: rows, routing, and then the flag."""
    there, half = window(heap, peer), number & 1
    there["slots"][half, heap.rank] = -1
    there["slots"][half, heap.rank, token] = 0
    there["rows"][half, heap.rank, token] = value
    post(there["sent"][half, heap.rank : heap.rank + 1], number)


def has_come(heap, writer: int, number: int) -> bool:
    return int(window(heap)["sent"][number & 1, writer]) == number


class TestBetweenHosts:
    def test_rows_and_then_the_flag_come_to_the_other_host(self, pair):
        near, far = pair
        assert (near.is_mapped(0), near.is_mapped(1), near.is_mapped(2)) == (True, False, True)
        for number in range(2, 40):
            write(near, 1, number, float(number))
            until(lambda n=number: has_come(far, 0, n), f"round {number}")
            assert set(window(far)["rows"][number & 1, 0, 0]) == {float(number)}

    def test_a_wake_word_rings_the_bell_of_the_other_host(self, pair):
        near, far = pair
        doorbell = int(window(far)["doorbell"][0])
        post(window(near, 1)["wake"][0:1], 17)
        until(lambda: window(far)["wake"][0] == 17, "the wake")
        until(lambda: int(window(far)["doorbell"][0]) == doorbell + 1, "the doorbell")

    def test_an_abort_word_stays_at_home(self, pair):
        near, far = pair
        window(near, 1)["abort"][0] = 9
        write(near, 1, 2, 1.0)
        until(lambda: has_come(far, 0, 2))
        assert window(far)["abort"][0] == 0

    def test_banks_are_read_and_copied_over_the_network(self, pair):
        near, far = pair
        values = np.arange(1000, dtype=np.int32)
        far.write(BANK, values)
        assert near.read(1, BANK, values.nbytes).tobytes() == values.tobytes()
        near.copy_in(BANK, 1, BANK, 4000)
        assert near.read(0, BANK, 4000).tobytes() == values.tobytes()
        with pytest.raises(HeapError, match=f"not in the slab of rank 1, which has {SLAB_BYTES}"):
            near.read(1, SLAB_BYTES - 4, 8)

    def test_a_joining_rank_reads_members_that_did_not_attach_it(self, keep):
        member, joining = keep(a_mirror(0, "a")), keep(a_mirror(1, "b"))
        member.write(BANK, np.full(64, 5, np.uint8))
        joining.attach(0, member.export())
        assert set(joining.read(0, BANK, 64)) == {5}
        write(joining, 0, 2, 1.0)
        until(lambda: member.frames_refused == 1, "the frame of a rank that is no member")
        assert not window(member)["sent"].any()

    def test_ranks_of_one_host_are_mapped_as_always(self, keep):
        heaps = [keep(a_mirror(0, "a")), keep(a_mirror(1, "a"))]
        attach_all(heaps)
        write(heaps[0], 1, 2, 3.0)
        assert has_come(heaps[1], 0, 2), "at once: it is the same memory"
        assert heaps[0].is_mapped(1) and not heaps[0]._peers

    def test_flags_cleared_at_home_are_told_anew_afterwards(self, pair):
        near, far = pair
        for _ in range(2):
            write(near, 1, 2, 1.0)
            until(lambda: has_come(far, 0, 2))
            for heap in pair:
                region = LAYOUT.regions["sent"]
                heap.fill_zero(region.offset, region.bytes)
            until(lambda: near._peers[1].sender._done[0] == 0, "the proxy to see it")
            assert not has_come(far, 0, 2)


class TestRanksThatGo:
    def test_after_detaching_nothing_passes_either_way(self, pair):
        near, far = pair
        near.detach(1)
        write(near, 1, 2, 1.0)
        write(far, 0, 2, 1.0)
        until(lambda: near.frames_refused == 1, "the frame of the detached")
        assert not window(near)["sent"].any() and not window(far)["sent"].any()

    def test_frames_of_an_earlier_process_of_a_rank_are_refused(self, pair, keep):
        near, old = pair
        new = keep(a_mirror(1, "c"))
        near.attach(1, new.export())
        new.attach(0, near.export())
        write(old, 0, 4, np.nan)
        until(lambda: near.frames_refused == 1, "the late frame")
        assert not window(near)["sent"].any()
        write(new, 0, 2, 3.0)
        until(lambda: has_come(near, 1, 2))
        assert set(window(near)["rows"][0, 1, 0]) == {3.0}

    def test_what_an_older_connection_still_holds_is_not_stored_over_newer(self, pair):
        near, far = pair
        write(far, 0, 2, 1.0)
        until(lambda: has_come(near, 1, 2))
        connection = far._peers[0].sender._stream.connection
        connection.shutdown(socket.SHUT_RDWR)
        write(far, 0, 4, 2.0)
        until(lambda: has_come(near, 1, 4), "the frame over the new connection")
        first, caller = 1, far._introduction(Purpose.WRITES, near._id)
        frame = far._codec.pack(Kind.SENT, 6, window(far, 0), window(far), 0)
        payload = memoryview(b"".join(bytes(p) for p in frame[1:]))
        items = HEADER.unpack(frame[0])[2]
        with pytest.raises(ValueError, match="older connection than its newest"):
            near._store(caller, first, Kind.SENT, 6, items, payload)
        assert has_come(near, 1, 4)

    def test_a_broken_connection_is_made_again_and_what_stands_is_sent(self, pair):
        near, far = pair
        for number in (2, 3, 4, 5):
            near._peers[1].sender._stream.connection.shutdown(socket.SHUT_RDWR)
            write(near, 1, number, float(number))
            until(lambda n=number: has_come(far, 0, n), f"round {number}")
        assert near._peers[1].sender.reconnections

    def test_detaching_waits_for_no_host_that_is_gone(self, pair, monkeypatch):
        near, _ = pair
        calling, answered = threading.Event(), threading.Event()

        def never():
            calling.set()
            assert answered.wait(60)
            raise ConnectionError("gone")

        sender = near._peers[1].sender
        sender._connect = never
        sender._stream.connection.shutdown(socket.SHUT_RDWR)
        write(near, 1, 2, 1.0)
        assert calling.wait(20)
        near.detach(1)  # returns although the thread is still calling
        assert sender._thread.is_alive()
        answered.set()
        sender._thread.join(20)
        assert not sender._thread.is_alive()

    def test_a_peer_that_takes_nothing_fills_no_memory(self, keep, monkeypatch):
        """Flags are overwritten, not queued: after any number of rounds few frames were made."""
        monkeypatch.setattr(stream, "SEND_DEADLINE_S", 60.0)
        wide = dataclasses.replace(LAYOUT, hidden=1 << 20)  # 4 MB a row
        near, far = keep(a_mirror(0, "a", wide)), keep(a_mirror(1, "b", wide))
        attach_all([near, far])
        there, own = wide.views(near.whole())[1], wide.views(far.whole())[1]
        there["slots"][:, 0], there["slots"][:, 0, 0] = -1, 0
        with far._lock:  # its server's thread stands still
            for number in range(2, 500):
                there["rows"][number & 1, 0, 0, :8] = number
                post(there["sent"][number & 1, 0:1], number)
                until(lambda: near._peers[1].sender._thread.is_alive())
        until(lambda: own["sent"][1, 0] == 499, "the last round")
        assert set(own["rows"][1, 0, 0, :8]) == {499.0}
        assert near._peers[1].sender.frames < 100

    def test_a_peer_that_is_gone_is_an_error_that_names_it(self, pair, keep):
        near, far = pair
        handle = far.export()
        far.close()
        with pytest.raises(HeapError, match="cannot read 8 bytes of rank 1 over its mirror"):
            near.read(1, BANK, 8)
        with pytest.raises(HeapError, match="rank 1 on host b cannot be reached"):
            near.attach(1, handle)


class TestWhoIsLetIn:
    def connect(self, heap) -> socket.socket:
        host, _, port = heap._mirror.address.rpartition(":")
        connection = socket.create_connection((host, int(port)), 5)
        connection.settimeout(5)
        return connection

    def test_who_does_not_know_the_token_reads_and_writes_nothing(self, pair):
        near, _ = pair
        with self.connect(near) as connection, pytest.raises(ConnectionError):
            enter(connection, "another token, as long as that", 5, SERVICE)
        with pytest.raises(OSError):
            call(near._mirror.address, "x" * 20, self.from_rank_1(near), 5)
        with self.connect(near) as connection:
            receive(connection, len(SERVICE) + 32, None)  # its greeting
            connection.sendall(b"\0" * 64 + self.from_rank_1(near).pack() + READ.pack(0, 8))
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(64) == b"", "closed without an answer"

    def test_a_proof_for_another_service_is_none_here(self, pair):
        with self.connect(pair[0]) as connection, pytest.raises(OSError):
            enter(connection, TOKEN, 0.5)

    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"slab_bytes": SLAB_BYTES + 4096}, f"has {SLAB_BYTES} bytes .* same configuration"),
            ({"layout": b"\1" * 16}, "another layout"),
            ({"rank": 0}, "rank 0 is not a peer of rank 0 of 3"),
            ({"rank": 3}, "rank 3 is not a peer"),
            ({"wanted": b"\1" * 16}, "the process of rank 0 here is a newer one"),
        ],
    )
    def test_who_does_not_fit_is_told_why(self, pair, changes, why):
        near, _ = pair
        caller = dataclasses.replace(self.from_rank_1(near), **changes)
        with pytest.raises(HeapError, match=why):
            call(near._mirror.address, TOKEN, caller, 5)

    @pytest.mark.parametrize(
        "frame",
        [
            HEADER.pack(7, 2, 0, 0),
            HEADER.pack(Kind.SENT, 2, 0, 1 << 31),
            HEADER.pack(Kind.SENT, 2, 1 << 30, 0),
            HEADER.pack(Kind.RETURNED, 2, 1, 4 + 32) + b"\xff" * 36,
        ],
    )
    def test_a_member_that_sends_what_no_rank_sends_is_cut_off(self, pair, frame):
        near, far = pair
        caller = far._introduction(Purpose.WRITES, near._id)
        with call(near._mirror.address, TOKEN, caller, 5) as connection:
            connection.sendall(frame)
            connection.settimeout(20)
            assert connection.recv(1) == b""
        assert not window(near)["sent"].any() and not window(near)["returned"].any()
        write(far, 0, 2, 1.0)  # which called before, and calls again
        until(lambda: has_come(near, 1, 2), "a proper frame")

    def test_only_so_many_strangers_stand_at_the_door(self, pair, monkeypatch):
        near, far = pair
        monkeypatch.setattr(server, "HANDSHAKE_S", 60.0)
        with contextlib.ExitStack() as stack:
            waiting = [stack.enter_context(self.connect(near)) for _ in range(UNAUTHENTICATED_MAX)]
            for connection in waiting:
                receive(connection, 1, None)  # it is served
            one_more = stack.enter_context(self.connect(near))
            assert one_more.recv(1) == b""
            write(far, 0, 2, 1.0)
            until(lambda: has_come(near, 1, 2), "the frame of a member")
        until(lambda: far.read(0, BANK, 8).size == 8)

    def from_rank_1(self, near):
        own = near._introduction(Purpose.WRITES, near._id)
        return dataclasses.replace(own, rank=1, heap=b"\2" * 16)


class TestTransports:
    def test_nixl_is_taken_where_both_ends_have_it_and_rdma(self, keep, transport, monkeypatch):
        monkeypatch.setattr(mirror_heap, "rdma_devices", lambda: [])
        assert keep(a_mirror(0, "a", transport="auto"))._inbox is None
        monkeypatch.setattr(mirror_heap, "rdma_devices", lambda: ["mlx5_0:1"])
        wanted = "auto" if transport == "nixl" else "tcp"
        near, far = keep(a_mirror(0, "a", transport="auto")), keep(a_mirror(1, "b"))
        far_too = keep(a_mirror(2, "c", transport=wanted))
        attach_all([near, far, far_too])
        for heap, peer in ((near, 2), (far_too, 0), (near, 1)):
            stream = heap._peers[peer].sender._stream
            assert isinstance(stream, NixlStream) == (transport == "nixl"), (heap.rank, peer)
        write(near, 2, 2, 5.0)
        until(lambda: has_come(far_too, 0, 2))

    def test_one_that_must_be_nixl_says_why_it_is_not(self, keep, transport, monkeypatch):
        near = keep(a_mirror(0, "a", transport="tcp"))
        if transport == "nixl":
            with pytest.raises(HeapError, match=r"rank 0 on host a .* NIXL is not available here"):
                keep(a_mirror(1, "b", transport="nixl")).attach(0, near.export())
        monkeypatch.setattr(nixl, "PACKAGES", ("no_such_package",))
        with pytest.raises(HeapError, match=r"NIXL is not installed.*serve.mirror_transport"):
            a_mirror(1, "b", transport="nixl")
        far = keep(a_mirror(1, "b", transport="auto"))
        far.attach(0, near.export())
        assert not isinstance(far._peers[0].sender._stream, NixlStream)

    def test_another_transport_is_refused(self):
        with pytest.raises(ValueError, match="must be one of"):
            a_mirror(0, "a", transport="pigeon")


class TestMisconfigured:
    def test_an_address_of_another_machine_is_refused(self):
        with pytest.raises(HeapError, match=r"cannot serve a mirror at 192.0.2.1.*--mirror_host"):
            a_mirror(0, "a", host="192.0.2.1")

    def test_a_rank_without_a_mirror_is_told_how_to_start(self, keep):
        with pytest.raises(HeapError, match=r"rank 0 is not of the form mirror:.*--mirror_host"):
            keep(a_mirror(1, "b")).attach(0, "unix:eep-1-abc")

    @pytest.mark.parametrize("name", ["", "a|b"])
    def test_a_host_id_that_a_handle_cannot_hold(self, name):
        with pytest.raises(ValueError, match="host_id"):
            MirrorOptions(host="127.0.0.1", host_id=name, token=TOKEN, layout=LAYOUT)

    def test_gpu_ranks_are_on_one_host(self):
        options = MirrorOptions(host="127.0.0.1", host_id="a", token=TOKEN, layout=LAYOUT)
        with pytest.raises(HeapError, match="must share one host"):
            open_heap(0, 3, SLAB_BYTES, "gpu", options)


class TestKernelsCannotTell:
    @pytest.mark.parametrize("mode", ["per_choice", "per_rank"])
    def test_exchanges_give_the_same_bits_over_three_hosts_as_on_one(self, mode, keep):
        near = some_ranks(mode=mode)
        far = LoopbackRanks(near.spec.layout, 3, on_hosts(near.spec.layout, "aabc"))
        for heap in far.heaps:
            keep(heap)
        for seed in range(6):
            work = an_exchange(seed)
            results = some_results(seed, work)
            here, there = near.exchange(work, results), far.exchange(work, results)
            assert np.array_equal(here.y, there.y) and np.array_equal(here.rows, there.rows)
            assert np.array_equal(here.here, there.here)
            assert not any(there.suspicion[rank].any() for rank in work.members)
        absent = {2}
        with waits_that_know(absent):
            outcome = far.exchange(work, results, absent=absent)
        wanted = naive_combine(work.among([0, 1, 3]), results)
        for rank in (0, 1, 3):
            assert outcome.accused_by(rank) == [2]
            np.testing.assert_allclose(outcome.y[rank], wanted[rank], rtol=1e-5, atol=1e-6)
