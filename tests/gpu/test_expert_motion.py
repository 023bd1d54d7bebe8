"""Experts on a real GPU: what a repair brings into slots is the checkpoint's, to the bit.

EEP_TEST_PLATFORM=gpu python -m pytest tests/gpu/test_expert_motion.py
"""

import time

import jax
import numpy as np
import pytest

from eep_jax.heap.cuda import vmm
from eep_jax.heap.cuda.loopback import open_all_cuda
from eep_jax.models.expert_bank import ExpertBank, slab_layout
from eep_jax.models.weights import expert_name
from eep_jax.placement.placement import EMPTY
from eep_jax.placement.planner import Move, initial_placement
from eep_jax.placement.sources import Source, SourceKind
from eep_jax.relocation import backup_store
from eep_jax.relocation.backup_store import BackupOptions, BackupStore
from eep_jax.relocation.executor import Executor, FetchOptions
from eep_jax.relocation.slot_check import SlotCheck
from eep_jax.storage.checkpoint import Checkpoint, save_checkpoint
from tests.eep_jax.relocation.test_executor import CHECKPOINT, PEER, bring
from tests.support.fingerprints import by_hand
from tests.support.models import a_model, a_run, rounded_weights

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

SLOTS = 4


class World:
    """Two ranks on one GPU; rank 0 brings experts, whose right weights are known."""

    def __init__(self, directory):
        model = a_model()
        dense, experts = rounded_weights(model)
        named = {expert_name(e): experts[e] for e in range(model.experts)}
        save_checkpoint(directory / "checkpoint", model, dense, named, facts={})
        config = a_run(2, slots_per_rank=SLOTS)
        layout = slab_layout(config.model, config.engine, 2, SLOTS, bank_dtype="bfloat16")
        self.heaps = open_all_cuda(2, layout.slab_bytes)
        self.bank, self.peer = (ExpertBank(layout, heap) for heap in self.heaps)
        self.right = experts.astype(self.bank.dtype)
        self.checkpoint = Checkpoint(directory / "checkpoint")
        self.slot_check = SlotCheck(self.heaps[0], layout, self.checkpoint.content_name)
        self.executor = Executor(self.bank, self.checkpoint, check=self.slot_check)

    def check(self, slots) -> None:
        assert self.bank.contents == tuple(slots)
        for slot, expert in enumerate(slots):
            if expert != EMPTY:
                found = self.bank.read(slot).view(np.uint16)
                np.testing.assert_array_equal(found, self.right[expert].view(np.uint16))


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path)
    yield made
    jax.effects_barrier()
    for heap in made.heaps:
        heap.release()


def test_a_fingerprint_is_the_same_as_on_a_host(world):
    world.bank.write(1, 3, world.right[3])
    region = world.bank.layout.slot(1)
    padded = world.heaps[0].read(0, region.offset, region.bytes)
    words = by_hand(padded)
    assert world.slot_check.of([1]) == ["".join(f"{word:08x}" for word in words)]


def test_experts_of_a_peer_are_copied_and_checked_on_the_gpu(world):
    slots = (0, 1, 2, 3)
    for slot in slots:
        world.peer.write(slot, slot, world.right[slot])
        world.bank.write(0, slot, world.right[slot])
        world.slot_check.learn(slot, 0)
        world.bank.clear(0)
    world.executor.carry_out(slots, tuple(bring(s, s, (PEER, 1, s), CHECKPOINT) for s in slots))
    world.check(slots)
    assert world.executor.moved == {"peer": 4}


def test_a_damaged_slot_of_a_peer_is_not_used(world):
    world.bank.write(0, 2, world.right[2])
    world.slot_check.learn(2, 0)
    world.bank.clear(0)
    damaged = world.right[2].copy()
    damaged.view(np.uint16).reshape(-1)[7] ^= 1
    world.peer.write(1, 2, damaged)
    slots = (2, EMPTY, EMPTY, EMPTY)
    world.executor.carry_out(slots, (bring(2, 0, (PEER, 1, 1), CHECKPOINT),))
    world.check(slots)
    assert world.executor.moved == {"checkpoint": 1}


@pytest.mark.parametrize("staged_bytes_min", [1, 1 << 30], ids=["pinned", "pageable"])
def test_what_comes_from_host_memory_is_right_either_way(world, monkeypatch, staged_bytes_min):
    monkeypatch.setattr(vmm, "STAGED_BYTES_MIN", staged_bytes_min)
    slots = (5, 3, EMPTY, EMPTY)
    world.executor.carry_out(slots, (bring(5, 0, CHECKPOINT), bring(3, 1, CHECKPOINT)))
    world.check(slots)


@pytest.fixture
def stores(world, tmp_path, monkeypatch):
    """Backups of all experts on both ranks; the first rank's heap pins its own."""
    monkeypatch.setattr(backup_store, "REST", 0.0)
    opened, placement = [], initial_placement(len(world.right), 2, len(world.right), 1)
    for rank, heap in enumerate((world.heaps[0], None)):
        options = BackupOptions(
            rank=rank,
            directory=tmp_path / f"store{rank}",
            bytes_max=64 << 20,
            host="127.0.0.1",
            token="a token of enough letters",
            fetch_deadline_ms=20_000,
        )
        opened.append(BackupStore(world.checkpoint, options, heap=heap))
        opened[-1].follow((rank,), placement)
    ends_s = time.monotonic() + 60
    while any(len(store.offer.experts) < len(world.right) for store in opened):
        assert time.monotonic() < ends_s, "backups were not filled in time"
        time.sleep(0.02)
    yield opened
    for store in opened:
        store.close()


@pytest.mark.parametrize("rank", [0, 1], ids=["pinned where they are", "over Orbax"])
@pytest.mark.parametrize("knows", [True, False], ids=["fingerprint", "digest"])
def test_backups_arrive_to_the_bit(world, stores, rank, knows):
    slots = (6, 5, 3, 7)
    for expert in slots if knows else ():
        world.bank.write(0, expert, world.right[expert])
        world.slot_check.learn(expert, 0)
        world.bank.clear(0)
    source = Source(SourceKind.BACKUP, rank, address=stores[rank].offer.address)
    executor = Executor(
        world.bank,
        world.checkpoint,
        backups=stores[0],
        check=world.slot_check,
        options=FetchOptions(at_once=3),
    )
    moves = tuple(Move(0, slot, expert, (source,)) for slot, expert in enumerate(slots))
    executor.carry_out(slots, moves)
    world.check(slots)
    assert executor.moved == {"backup": 4}


def test_the_driver_pins_a_read_only_mapping_of_a_file_and_copies_from_it(tmp_path):
    data = np.random.default_rng(1).integers(0, 256, (40 << 20) + 4096, np.uint8)
    (tmp_path / "file").write_bytes(data.tobytes())
    mapped = np.memmap(tmp_path / "file", np.uint8, "r")
    heaps = open_all_cuda(1, 64 << 20)
    try:
        assert heaps[0].pin(mapped), "see the log for what the driver said"
        heaps[0].write_all([(4096, mapped)])
        np.testing.assert_array_equal(heaps[0].read(0, 4096, data.nbytes), data)
        heaps[0].unpin(mapped)
    finally:
        heaps[0].release()


def test_many_chunks_arrive_through_pinned_buffers(world):
    """Larger than both buffers together."""
    heaps = open_all_cuda(1, 96 << 20)
    try:
        data = np.random.default_rng(0).integers(0, 256, (80 << 20) + 12_345, np.uint8)
        for values in (data, data[::-1].copy()):
            heaps[0].write(4096, values)
            np.testing.assert_array_equal(heaps[0].read(0, 4096, values.nbytes), values)
    finally:
        heaps[0].release()
