"""Promises of backups: bounded, equal to the bit, for members only, within a deadline."""

import logging
import os
import pathlib
import re
import shutil
import socket
import struct
import threading
import time

import numpy as np
import pytest
from orbax.checkpoint.experimental.emergency.p2p import protocol

from eep_jax.handshake import NotAMember, admit, enter
from eep_jax.heap.loopback import LoopbackHeap
from eep_jax.placement.placement import Placement
from eep_jax.placement.planner import initial_placement
from eep_jax.placement.sources import Source, SourceKind
from eep_jax.relocation import backup_store, shard_server
from eep_jax.relocation.backup_store import BackupOptions, BackupStore, bytes_on_disk
from eep_jax.relocation.rates import Rates
from eep_jax.relocation.shard_server import fetch_shard
from eep_jax.relocation.shards import chunk_name, load_shard
from eep_jax.storage.digests import digest
from tests.eep_jax.relocation.test_executor import CountingCheckpoint
from tests.eep_jax.test_handshake import Recorder
from tests.support.models import a_model, rounded_weights

DEADLINE_S = 60.0
TOKEN = "a token of enough letters"
EXPERTS = a_model().experts
PLACEMENT = initial_placement(EXPERTS, 2, EXPERTS, 1)
RIGHT = rounded_weights(a_model())[1]


@pytest.fixture(autouse=True)
def no_rest(monkeypatch):
    monkeypatch.setattr(backup_store, "REST", 0.0)
    server = shard_server._MembersOnly
    serve = server.serve_forever
    monkeypatch.setattr(server, "serve_forever", lambda self: serve(self, poll_interval=0.01))


@pytest.fixture
def open_store(pristine_checkpoint, tmp_path):
    """Opens stores of ranks; closes them after the test."""
    opened = []

    def open_one(rank=0, bytes_max=64 << 20, token=TOKEN, deadline_ms=10_000, heap=None):
        options = BackupOptions(
            rank=rank,
            directory=tmp_path / f"store{len(opened)}",
            bytes_max=bytes_max,
            host="127.0.0.1",
            token=token,
            fetch_deadline_ms=deadline_ms,
        )
        opened.append(BackupStore(CountingCheckpoint(pristine_checkpoint), options, Rates(), heap))
        opened[-1].root = options.directory
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


def wait_for(wanted, deadline_s=DEADLINE_S):
    ends_s = time.monotonic() + deadline_s
    while not wanted():
        assert time.monotonic() < ends_s, "it did not happen in time"
        time.sleep(0.005)


def filled(store, ranks=(0,), placement: Placement = PLACEMENT, count=EXPERTS):
    store.follow(ranks, placement)
    wait_for(lambda: len(store.offer.experts) == count)
    return store


def of(store, rank=0) -> Source:
    return Source(SourceKind.BACKUP, rank, address=store.offer.address)


def test_all_experts_are_kept_where_they_fit_and_come_back_to_the_bit(open_store):
    store = filled(open_store())
    other = open_store(rank=1)
    assert store.offer.experts == tuple(range(EXPERTS))
    for expert in range(EXPERTS):
        for reader in (store, other):  # without a network, and through it
            found = reader.fetch(expert, of(store))
            assert found.dtype == np.dtype(store._checkpoint.manifest["dtype"])
            assert digest(found) == digest(RIGHT[expert])
    assert list((other.root / "fetched").iterdir()) == [], "copies stay only while they are read"


class PinningHeap(LoopbackHeap):
    """Pinned memory by address; as strict as a driver."""

    def __init__(self):
        super().__init__(0, 1, 4096)
        self.pinned = {}

    def pin(self, array):
        assert array.ctypes.data not in self.pinned and array.flags.c_contiguous
        self.pinned[array.ctypes.data] = array
        return True

    def unpin(self, array):
        del self.pinned[array.ctypes.data]


def test_exactly_the_held_experts_are_pinned(open_store):
    heap = PinningHeap()
    store = filled(open_store(heap=heap))
    assert len(heap.pinned) == EXPERTS
    for expert in range(EXPERTS):
        found = store.fetch(expert, of(store))
        assert heap.pinned[found.ctypes.data].nbytes == found.nbytes
        assert not found.flags.writeable
    wait_for(lambda: len(store._rates.medians()) == 2)
    room = store._options.bytes_max - sum(store._bytes.values()) + store._expert_bytes
    store._make_room(room, wanted=(1, 2))  # for one more expert than is held
    assert 2 <= len(heap.pinned) == len(store.offer.experts) < EXPERTS
    store.close()
    assert heap.pinned == {}


def test_it_never_takes_more_than_its_bytes(open_store):
    whole = filled(open_store())
    per_expert = bytes_on_disk(whole.root / "served") // EXPERTS
    store = open_store(bytes_max=3 * (per_expert + (64 << 10)))
    store.follow((0,), PLACEMENT)
    wait_for(lambda: store.offer.experts and not store._news.is_set())
    wait_for(lambda: store._rates.known(SourceKind.BACKUP))
    assert 1 <= len(store.offer.experts) < EXPERTS
    assert bytes_on_disk(store.root) <= 3 * (per_expert + (64 << 10))


def test_too_little_memory_for_one_expert_is_reported_with_its_size(open_store):
    store = open_store(bytes_max=1_000)
    store.follow((0,), PLACEMENT)
    wait_for(lambda: store.offer.problem)
    assert re.fullmatch(
        r"one expert takes \d+ bytes, cluster.backup_bytes=1000 holds none", store.offer.problem
    )
    assert not filled(open_store()).offer.problem


def test_another_plan_adds_new_experts_and_reads_none_twice(open_store):
    store = filled(open_store())
    wait_for(lambda: len(store._checkpoint.read) == EXPERTS + backup_store.SAMPLES)
    store.follow((0, 1), PLACEMENT)
    store.follow((0,), PLACEMENT)
    wait_for(lambda: not store._news.is_set())
    time.sleep(0.1)
    assert len(store._checkpoint.read) == EXPERTS + backup_store.SAMPLES


def test_an_expert_that_cannot_be_read_is_not_kept(open_store, caplog):
    store = open_store()
    read = store._checkpoint.read_experts

    def failing(experts):
        if experts == [2]:
            raise OSError("bad sector")
        return read(experts)

    store._checkpoint.read_experts = failing
    with caplog.at_level(logging.WARNING, "eep_jax"):
        filled(store, count=EXPERTS - 1)
        wait_for(lambda: store._rates.known(SourceKind.BACKUP))
    assert 2 not in store.offer.experts
    assert "no backup of expert 2: bad sector" in caplog.text


def test_rates_of_both_storage_and_network_are_measured(open_store):
    store = filled(open_store())
    wait_for(lambda: len(store._rates.medians()) == 2)
    assert set(store._rates.medians()) == {"backup", "checkpoint"}
    assert all(rate > 0 for rate in store._rates.medians().values())


def test_an_expert_that_a_peer_does_not_have_is_an_error(open_store):
    store, other = open_store(), open_store(rank=1)
    with pytest.raises(LookupError, match="has no backup of expert 5"):
        other.fetch(5, of(store))


def test_half_an_expert_is_never_served(open_store, monkeypatch):
    """While a shard is written, peers cannot see it."""
    store, other = open_store(), open_store(rank=1)
    real, writing, go_on = backup_store.save_shard, threading.Event(), threading.Event()

    def slow(directory, weights):
        real(directory, weights)
        writing.set()
        go_on.wait(10)

    monkeypatch.setattr(backup_store, "save_shard", slow)
    store.follow((0,), PLACEMENT)
    assert writing.wait(10)
    with pytest.raises(LookupError):
        other.fetch(0, of(store))
    go_on.set()
    wait_for(lambda: 0 in store.offer.experts)
    assert digest(other.fetch(0, of(store))) == digest(RIGHT[0])


class TestSecurity:
    """Orbax answers every connection; this service only members."""

    def connect(self, store) -> socket.socket:
        host, _, port = store.offer.address.rpartition(":")
        return socket.create_connection((host, int(port)), 5)

    def ask(self, connection, expert=0):
        payload = {"step": expert, "process_index": 0}
        protocol.TCPMessage.send_json(connection, protocol.OP_GET_MANIFEST, payload)

    def everything_from(self, connection) -> bytes:
        connection.settimeout(10)
        found = b""
        try:
            while part := connection.recv(1 << 16):
                found += part
        except ConnectionError:
            pass
        return found

    def test_orbaxs_own_client_without_a_token_gets_nothing(self, open_store, caplog, monkeypatch):
        monkeypatch.setattr(shard_server, "HANDSHAKE_S", 0.3)
        store = filled(open_store())
        with self.connect(store) as connection, caplog.at_level(logging.WARNING, "eep_jax"):
            self.ask(connection)
            found = self.everything_from(connection)
            wait_for(lambda: "refused a backup connection from 127.0.0.1" in caplog.text)
        assert len(found) == 44, "the greeting, and no byte more"
        host, _, port = store.offer.address.rpartition(":")
        request = {"step": 0, "process_index": 0}
        assert not protocol.TCPClient.request(host, int(port), protocol.OP_GET_MANIFEST, request)

    def test_a_wrong_token_gets_nothing_and_is_logged(self, open_store, caplog):
        store = filled(open_store())
        stranger = open_store(rank=1, token="another token, as long")
        with (
            caplog.at_level(logging.WARNING, "eep_jax"),
            pytest.raises(ConnectionError, match="token"),
        ):
            stranger.fetch(0, of(store))
        wait_for(lambda: "wrong token" in caplog.text)

    def test_a_peer_that_does_not_know_the_token_supplies_nothing(self, open_store):
        stranger = filled(open_store(token="another token, as long"))
        with pytest.raises(ConnectionError):
            open_store(rank=1).fetch(0, of(stranger))

    def test_a_replayed_connection_gets_nothing(self, open_store):
        store = filled(open_store())
        with self.connect(store) as connection:
            recorder = Recorder(connection)
            enter(recorder, TOKEN, 5.0)
            self.ask(connection)
            assert protocol.TCPMessage.recv(connection)[0] == protocol.OP_RESPONSE_JSON
        with self.connect(store) as connection:
            connection.sendall(recorder.sent)
            self.ask(connection)
            assert len(self.everything_from(connection)) == 44

    def test_a_member_reads_nothing_outside_of_the_backups(self, open_store, tmp_path):
        store = filled(open_store())
        (store.root / "secret").write_text("the token")
        for name in ("../secret", str(store.root / "secret"), "0/../../secret"):
            with self.connect(store) as connection:
                enter(connection, TOKEN, 5.0)
                protocol.TCPMessage.send_json(
                    connection, protocol.OP_DOWNLOAD_FILE, {"rel_path": name}
                )
                assert protocol.TCPMessage.recv(connection) == (protocol.OP_FILE_STREAM, 0)

    def test_nothing_listens_beside_the_one_server(self, open_store):
        store = open_store()
        node = store._server._node
        assert node.server.server_address == ("127.0.0.1", node.port)
        open_files = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        inodes = {os.readlink(path) for path in open_files if os.path.islink(path)}
        listening = [
            line.split()
            for name in ("tcp", "tcp6")
            if os.path.exists(f"/proc/self/net/{name}")
            for line in pathlib.Path(f"/proc/self/net/{name}").read_text().splitlines()[1:]
        ]
        ours = [f for f in listening if f[3] == "0A" and f"socket:[{f[9]}]" in inodes]
        assert {f[1] for f in ours} == {f"0100007F:{node.port:04X}"}

    def test_silent_connections_do_not_keep_members_out(self, open_store, monkeypatch):
        monkeypatch.setattr(shard_server, "HANDSHAKE_S", 0.3)
        store, other = filled(open_store()), open_store(rank=1)
        silent = [self.connect(store) for _ in range(shard_server.CONNECTIONS_MAX)]
        wait_for(lambda: self.works(other, store))
        for connection in silent:
            connection.close()

    def works(self, other, store) -> bool:
        try:
            return digest(other.fetch(0, of(store))) == digest(RIGHT[0])
        except OSError:
            return False


class FakePeer:
    """A member that answers with `say(connection, opcode, payload)`."""

    def __init__(self, say):
        self.say, self.socket = say, socket.create_server(("127.0.0.1", 0))
        self.source = Source(
            SourceKind.BACKUP, 1, address=f"127.0.0.1:{self.socket.getsockname()[1]}"
        )
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            with connection:
                try:
                    admit(connection, TOKEN, 5.0)
                    self.say(connection, *protocol.TCPMessage.recv(connection))
                except (OSError, NotAMember):  # the client has gone
                    continue


def manifest_of(*files):
    def say(connection, opcode, payload):
        listed = [{"rel_path": name, "size": size} for name, size in files]
        protocol.TCPMessage.send_json(connection, protocol.OP_RESPONSE_JSON, listed)

    return say


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([("0/../../../etc/x", 3)], "outside of expert 0"),
        ([("/etc/x", 3)], "outside of expert 0"),
        ([("1/state/x", 3)], "outside of expert 0"),
        ([("0/state/x", 1 << 40)], "at most"),
        ([("0/state/x", -1)], "at most"),
        ([(f"0/state/{n}", 1) for n in range(65)], "at most 64 files"),
    ],
)
def test_an_excessive_manifest_is_rejected(open_store, files, said):
    store = open_store()
    with pytest.raises(ValueError, match=said):
        store.fetch(0, FakePeer(manifest_of(*files)).source)
    assert list((store.root / "fetched").iterdir()) == []


def test_a_peer_that_stops_in_the_middle_costs_no_more_than_the_deadline(open_store):
    def say(connection, opcode, payload):
        if opcode == protocol.OP_GET_MANIFEST:
            manifest_of(("0/state/x", 1000))(connection, opcode, payload)
        else:
            connection.sendall(struct.pack("!B I Q", protocol.OP_FILE_STREAM, 8, 1000) + bytes(10))
            held.wait(DEADLINE_S)  # its end would be a ConnectionError, see below

    store, held = open_store(deadline_ms=300), threading.Event()
    with pytest.raises(TimeoutError):
        store.fetch(0, FakePeer(say).source)
    held.set()
    assert list((store.root / "fetched").iterdir()) == []


def test_a_peer_that_dies_in_the_middle_is_an_error_at_once(open_store):
    def say(connection, opcode, payload):
        if opcode == protocol.OP_GET_MANIFEST:
            manifest_of(("0/state/x", 1000))(connection, opcode, payload)
        else:
            connection.sendall(struct.pack("!B I Q", protocol.OP_FILE_STREAM, 8, 1000) + bytes(10))

    with pytest.raises(ConnectionError, match="990 bytes of 0/state/x to come"):
        open_store().fetch(0, FakePeer(say).source)


def test_a_peer_that_is_gone_is_an_error_at_once(open_store):
    store, other = open_store(), open_store(rank=1)
    source = of(store)
    store.close()
    with pytest.raises(OSError):
        other.fetch(0, source)


@pytest.mark.parametrize("left", [None, 0, 100])
def test_a_shard_whose_bytes_are_missing_never_passes_the_digest(open_store, left):
    store, other = filled(open_store()), open_store(rank=1)
    chunk = store.root / "served/0" / chunk_name(4)
    chunk.unlink() if left is None else os.truncate(chunk, left)
    with pytest.raises((OSError, ValueError)):
        store.fetch(0, of(store))
    try:  # as a whole shard: Orbax reads missing chunks as zeros
        assert digest(other.fetch(0, of(store))) != digest(RIGHT[0])
    except Exception as error:
        assert not isinstance(error, AssertionError)


def test_a_shard_is_a_checkpoint_that_orbax_reads_and_serves(open_store, tmp_path):
    store = filled(open_store())
    found = load_shard(store.root / "served/3")
    assert digest(found) == digest(RIGHT[3])
    ends_s = time.monotonic() + DEADLINE_S
    path = fetch_shard(store.offer.address, 3, tmp_path / "copy", TOKEN, ends_s, 1 << 20)
    assert digest(load_shard(path)) == digest(RIGHT[3])


def test_a_shard_of_another_layout_is_fetched_whole(open_store, monkeypatch):
    monkeypatch.setattr(backup_store, "chunk_name", lambda dimensions: "state/weights/elsewhere")
    store, other = filled(open_store()), open_store(rank=1)
    assert digest(other.fetch(2, of(store))) == digest(RIGHT[2])
    assert list((other.root / "fetched").iterdir()) == []


@pytest.mark.parametrize("where", [0.1, 0.5, 0.9])  # position in a file of mostly weights
def test_a_flipped_bit_of_a_shard_never_passes_the_digest(open_store, where):
    store, other = filled(open_store()), open_store(rank=1)
    data = max((store.root / "served/0").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[int(where * len(content))] ^= 1
    data.write_bytes(content)
    for reader in (store, other):
        try:
            found = reader.fetch(0, of(store))
        except Exception:  # the storage format detected it
            continue
        assert digest(found) != digest(RIGHT[0])


def test_a_store_that_lost_its_directory_goes_on(open_store):
    store = open_store()
    shutil.rmtree(store.root)
    store.follow((0,), PLACEMENT)
    wait_for(lambda: not store._news.is_set())
    time.sleep(0.2)
    assert store._thread.is_alive() and store.offer.experts == ()
