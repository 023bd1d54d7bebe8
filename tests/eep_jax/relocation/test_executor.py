"""Promises of the executor: the first source that works, only right bytes, nothing moved twice."""

import threading
import types

import numpy as np
import pytest

from eep_jax.errors import HeapError, RelocationFailed
from eep_jax.heap.loopback import open_all
from eep_jax.models.expert_bank import ExpertBank, slab_layout
from eep_jax.placement.placement import EMPTY
from eep_jax.placement.planner import Move, plan_repair
from eep_jax.placement.sources import Source, SourceKind
from eep_jax.relocation.executor import Executor, FetchOptions
from eep_jax.relocation.slot_check import SlotCheck
from eep_jax.storage.checkpoint import Checkpoint
from tests.eep_jax.storage.test_checkpoint import damage
from tests.support.factories import a_placement
from tests.support.models import a_model, a_run, rounded_weights

LOCAL, PEER, CHECKPOINT = SourceKind.LOCAL, SourceKind.PEER, SourceKind.CHECKPOINT
SLOTS = 4
DEADLINE_S = 60.0


class CountingCheckpoint(Checkpoint):
    """Records which experts were read."""

    def __init__(self, directory):
        super().__init__(directory)
        self.read = []

    def read_experts(self, experts):
        self.read += experts
        return super().read_experts(experts)

    def expert_job(self, expert, target, in_place):
        job = super().expert_job(expert, target, in_place)
        blocks = job.blocks
        job.blocks = lambda: self.read.append(expert) or blocks()
        return job


class World:
    """Rank 0 with an executor; the banks of both ranks; the right weights."""

    def __init__(self, directory, bank_dtype="float32", checks=False, deadline_ms=30_000):
        config = a_run(2, slots_per_rank=SLOTS)
        layout = slab_layout(config.model, config.engine, 2, SLOTS, bank_dtype=bank_dtype)
        self.heaps = open_all(2, layout.slab_bytes)
        self.bank, self.peer = (ExpertBank(layout, heap) for heap in self.heaps)
        self.checkpoint, self.beats = CountingCheckpoint(directory), []
        self.right = rounded_weights(a_model())[1].astype(bank_dtype)
        self.slot_check = self.a_check() if checks else None
        self.executor = Executor(
            self.bank,
            self.checkpoint,
            check=self.slot_check,
            options=FetchOptions(beat=lambda: self.beats.append(1), deadline_ms=deadline_ms),
        )

    def a_check(self, directory=None) -> SlotCheck:
        """A check that knows all fingerprints, as ranks do after the first epoch."""
        name_of = self.checkpoint.content_name
        check = SlotCheck(self.heaps[0], self.bank.layout, name_of, directory)
        for expert in range(len(self.right)):
            self.bank.write(0, expert, self.right[expert])
            check.learn(expert, 0)
        self.bank.clear(0)
        return check

    def check(self, contents) -> None:
        assert self.bank.contents == tuple(contents)
        for slot, expert in enumerate(contents):
            if expert != EMPTY:
                np.testing.assert_array_equal(self.bank.read(slot), self.right[expert])


@pytest.fixture(params=["float32", "bfloat16", "float32 checks", "bfloat16 checks"])
def world(pristine_checkpoint, request):
    """Banks of a wider dtype or the checkpoint's, with or without checks of slots."""
    dtype, *checks = request.param.split()
    return World(pristine_checkpoint, dtype, bool(checks))


def bring(expert: int, slot: int, *sources) -> Move:
    """Sources as (kind, rank, slot), or just a kind."""
    made = (s if isinstance(s, tuple) else (s,) for s in sources)
    return Move(rank=0, slot=slot, expert=expert, sources=tuple(Source(*s) for s in made))


EVERY_SOURCE = ((LOCAL, 0, 1), (PEER, 1, 2), CHECKPOINT)


@pytest.mark.parametrize(
    ("has_local", "has_peer", "used"),
    [(True, True, "local"), (False, True, "peer"), (False, False, "checkpoint")],
)
def test_sources_are_tried_in_their_order(world, has_local, has_peer, used):
    if has_local:
        world.bank.write(1, 5, world.right[5])
    if has_peer:
        world.peer.write(2, 5, world.right[5])
    slots = (5, 5 if has_local else EMPTY, EMPTY, EMPTY)
    world.executor.carry_out(slots, (bring(5, 0, *EVERY_SOURCE),))
    world.check(slots)
    assert world.executor.moved == {used: 1}
    assert world.checkpoint.read == ([5] if used == "checkpoint" else [])


def wrong_expert(weights, right):
    weights[...] = right[4]


def nan_rows(weights, right):
    weights[1, 2, 3] = np.nan


def the_lowest_bit(weights, right):
    # Digests are of bfloat16; damage that rounding to it hides must be found as well.
    weights.view(np.uint8)[0, 0, 0, 0] ^= 1


@pytest.mark.parametrize("kind", [LOCAL, PEER])
@pytest.mark.parametrize(
    "damage", [wrong_expert, nan_rows, the_lowest_bit], ids=lambda f: f.__name__
)
def test_wrong_bytes_are_refused_and_the_next_source_is_tried(world, kind, damage):
    bank, slot = (world.bank, 1) if kind is LOCAL else (world.peer, 2)
    bank.write(slot, 5, world.right[5])
    damaged = bank.read(slot)
    damage(damaged, world.right)
    bank.write(slot, 5, damaged)
    world.executor.carry_out((5, EMPTY, EMPTY, EMPTY), (bring(5, 0, *EVERY_SOURCE),))
    assert world.executor.moved == {"checkpoint": 1}
    world.check((5, EMPTY, EMPTY, EMPTY))


def test_a_bank_that_cannot_hold_the_stored_dtype_is_rejected_at_once(pristine_checkpoint):
    with pytest.raises(ValueError, match=r"bank of float16 cannot hold .* which are bfloat16"):
        World(pristine_checkpoint, "float16")


def test_a_local_slot_that_holds_something_else_is_no_source(world):
    world.bank.write(1, 6, world.right[5])
    world.executor.carry_out((5, 6, EMPTY, EMPTY), (bring(5, 0, *EVERY_SOURCE),))
    assert world.executor.moved == {"checkpoint": 1}


def test_a_copy_that_the_heap_refuses_is_followed_by_the_next_source(world, monkeypatch):
    world.peer.write(2, 5, world.right[5])

    def refuses(*_):
        raise HeapError("the driver says no")

    monkeypatch.setattr(world.heaps[0], "copy_in_all", refuses)
    monkeypatch.setattr(world.heaps[0], "read", refuses)
    world.executor.carry_out((5, EMPTY, EMPTY, EMPTY), (bring(5, 0, (PEER, 1, 2), CHECKPOINT),))
    monkeypatch.undo()
    world.check((5, EMPTY, EMPTY, EMPTY))
    assert world.executor.moved == {"checkpoint": 1}


def test_a_detached_peer_is_no_source(world):
    world.peer.write(2, 5, world.right[5])
    world.heaps[0].detach(1)
    world.executor.carry_out((5, EMPTY, EMPTY, EMPTY), (bring(5, 0, *EVERY_SOURCE),))
    assert world.executor.moved == {"checkpoint": 1}


def test_the_same_plan_moves_nothing_the_second_time(world):
    slots, moves = (5, 2, EMPTY, EMPTY), (bring(5, 0, CHECKPOINT), bring(2, 1, CHECKPOINT))
    for _ in range(2):
        assert world.executor.carry_out(slots, moves) == slots
        world.check(slots)
    assert sorted(world.checkpoint.read) == [2, 5] and world.executor.moved == {"checkpoint": 2}
    assert len(world.beats) >= 2, "it shows life after every expert"


def test_a_plan_after_an_abandoned_one_moves_only_what_is_missing(world):
    world.executor.carry_out((5, 2, EMPTY, EMPTY), ())
    world.checkpoint.read.clear()
    world.executor.carry_out((5, 3, 2, EMPTY), (bring(2, 2, (LOCAL, 0, 1), CHECKPOINT),))
    world.check((5, 3, 2, EMPTY))
    # Copies come first: slot 1 is written once slot 2 has copied it.
    assert world.checkpoint.read == [3]


def test_slots_without_a_move_come_from_the_checkpoint(world):
    world.executor.carry_out((1, EMPTY, 3, EMPTY), (bring(7, 0, (PEER, 1, 0)),))
    world.check((1, EMPTY, 3, EMPTY))
    assert world.executor.moved == {"checkpoint": 2}


def test_slots_that_shall_be_empty_hold_nothing_afterwards(world):
    world.bank.write(3, 4, world.right[4])
    assert world.executor.carry_out((EMPTY,) * SLOTS, ()) == (EMPTY,) * SLOTS
    assert world.executor.moved == {}


def test_when_all_sources_fail_each_is_named_with_its_reason(world):
    world.peer.write(2, 5, world.right[4])
    world.checkpoint.root = world.checkpoint.root / "gone"
    moves = (bring(3, 1, CHECKPOINT), bring(5, 0, *EVERY_SOURCE))
    with pytest.raises(RelocationFailed) as raised:
        world.executor.carry_out((5, 3, EMPTY, EMPTY), moves)
    said = str(raised.value)
    assert raised.value.lost.keys() == {3, 5} and raised.value.lost[5] in said
    assert "no source has expert 5 for slot 0" in said
    assert "local rank 0 slot 1: slot 1 holds" in said
    found = "digest" if world.slot_check is None else "fingerprint"
    assert f"peer rank 1 slot 2: {found}" in said and "checkpoint: cannot read" in said
    assert world.bank.contents[0] == EMPTY, "a slot that failed must not pass for the expert"


def test_experts_written_before_a_failure_stay(world):
    world.executor.carry_out((3, EMPTY, EMPTY, EMPTY), ())
    world.checkpoint.root = world.checkpoint.root / "gone"
    with pytest.raises(RelocationFailed):
        world.executor.carry_out((3, 6, EMPTY, EMPTY), ())
    world.check((3, EMPTY, EMPTY, EMPTY))


def test_one_that_no_source_has_keeps_no_other_from_coming(world):
    world.peer.write(2, 6, world.right[6])
    moves = (bring(5, 0, (PEER, 1, 2)), bring(3, 1, CHECKPOINT), bring(6, 2, (PEER, 1, 2)))
    with pytest.raises(RelocationFailed) as raised:
        world.executor.carry_out((5, 3, 6, EMPTY), moves)
    assert raised.value.lost.keys() == {5}
    world.check((EMPTY, 3, 6, EMPTY))


def test_repairs_as_planned_leave_every_expert_right(world):
    placement = a_placement("0 1 - -/2 3 0 1", experts=4)
    for slot, expert in enumerate(placement.slots[1]):
        world.peer.write(slot, expert, world.right[expert])
    world.executor.carry_out(placement.slots[0], ())
    plan = plan_repair(placement, [0])
    slots = plan.placement.slots[0]
    assert world.executor.carry_out(slots, plan.moves_of(0)) == slots
    world.check(slots)


class TestEverySourceFails:
    """A source that is missing, dead, wrong or late: the next one is tried."""

    BACKUP = SourceKind.BACKUP
    MOVE = bring(5, 0, (BACKUP, 1), CHECKPOINT)
    SLOTS_WANTED = (5, EMPTY, EMPTY, EMPTY)

    def executor(self, world, backups, deadline_ms=20_000, check=None, at_once=1):
        beat = lambda: world.beats.append(1)
        options = FetchOptions(beat=beat, deadline_ms=deadline_ms, at_once=at_once)
        return Executor(world.bank, world.checkpoint, backups, check, options)

    def backups(self, world, fetch=None):
        """Backups that answer with `fetch(expert)`, or the right weights without it."""
        stored = world.checkpoint.manifest["dtype"]
        right = lambda expert: rounded_weights(a_model())[1][expert].astype(stored)
        return types.SimpleNamespace(fetch=lambda expert, _: (fetch or right)(expert))

    @pytest.mark.parametrize("kind", [LOCAL, PEER, BACKUP, CHECKPOINT])
    def test_each_source_alone_is_enough(self, world, kind):
        world.bank.write(1, 5, world.right[5])
        world.peer.write(2, 5, world.right[5])
        source = {LOCAL: (LOCAL, 0, 1), PEER: (PEER, 1, 2)}.get(kind, kind)
        executor = self.executor(world, self.backups(world))
        executor.carry_out((5, 5, EMPTY, EMPTY), (bring(5, 0, source),))
        assert executor.moved == {kind.value: 1}
        assert executor.bytes_moved[kind.value] > 0 and executor.rates.medians()[kind.value] > 0
        world.check((5, 5, EMPTY, EMPTY))

    @pytest.mark.parametrize("rank", [0, 1], ids=["own", "another's"])
    def test_bytes_of_a_backup_are_those_it_keeps(self, world, rank):
        executor = self.executor(world, self.backups(world), check=world.slot_check)
        executor.carry_out(self.SLOTS_WANTED, (bring(5, 0, (self.BACKUP, rank)),))
        stored = np.dtype(world.checkpoint.manifest["dtype"])
        assert executor.moved == {"backup": 1}
        assert executor.bytes_moved == {"backup": world.right[5].size * stored.itemsize}

    def test_a_backup_whose_rank_dies_is_followed_by_the_next(self, world):
        def dies(expert):
            raise ConnectionResetError("the peer is gone")

        executor = self.executor(world, self.backups(world, dies))
        executor.carry_out(self.SLOTS_WANTED, (self.MOVE,))
        assert executor.moved == {"checkpoint": 1}
        world.check(self.SLOTS_WANTED)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda right: right[::-1],
            lambda right: right[:1],
            lambda right: right.reshape(-1),
            lambda right: right.astype(np.float64) + 1e-9,
            lambda right: np.zeros_like(right),
        ],
        ids=["order", "part", "shape", "low bits", "zeros"],
    )
    def test_a_corrupted_shard_is_followed_by_the_next(self, world, damage):
        right = self.backups(world).fetch(5, None)
        executor = self.executor(world, self.backups(world, lambda e: damage(right)))
        executor.carry_out(self.SLOTS_WANTED, (self.MOVE,))
        assert executor.moved == {"checkpoint": 1}
        world.check(self.SLOTS_WANTED)

    def test_without_backups_their_source_is_followed_by_the_next(self, world):
        world.executor.carry_out(self.SLOTS_WANTED, (self.MOVE,))
        assert world.executor.moved == {"checkpoint": 1}

    def test_a_corrupted_chunk_of_the_checkpoint_is_followed_by_the_next(
        self, checkpoint_dir, world
    ):
        damage(checkpoint_dir, "e005")
        world.checkpoint.root = checkpoint_dir
        executor = self.executor(world, self.backups(world))
        executor.carry_out(self.SLOTS_WANTED, (bring(5, 0, CHECKPOINT, (self.BACKUP, 1)),))
        assert executor.moved == {"backup": 1}
        world.check(self.SLOTS_WANTED)

    def test_a_corrupted_chunk_without_another_source_is_named(self, checkpoint_dir, world):
        damage(checkpoint_dir, "e005")
        world.checkpoint.root = checkpoint_dir
        with pytest.raises(RelocationFailed, match=r"no source has expert 5.*e005"):
            world.executor.carry_out(self.SLOTS_WANTED, (bring(5, 0, CHECKPOINT),))

    def test_a_slow_source_is_left_at_its_deadline_and_the_rank_shows_life(self, world):
        late, ended = threading.Event(), []
        slow = lambda expert: late.wait(DEADLINE_S) or ended.append(expert)
        executor = self.executor(world, self.backups(world, slow), 300)
        # Storage may once be slower than the deadline; a peer's memory is not.
        world.peer.write(2, 5, world.right[5])
        move = bring(5, 0, (self.BACKUP, 1), (PEER, 1, 2))
        executor.carry_out(self.SLOTS_WANTED, (move,))
        assert not ended, "it waited until the source gave up"
        assert executor.moved == {"peer": 1}
        assert len(world.beats) >= 4, "it shows life while it waits"
        late.set()

    def test_a_source_that_hangs_costs_one_deadline_for_all_experts(self, world):
        late, asked, right = threading.Event(), [], self.backups(world)

        def hangs(expert):
            asked.append(expert)
            late.wait(10)
            return right.fetch(expert, None)

        executor = self.executor(world, self.backups(world, hangs), 300)
        for slot in range(3):
            world.peer.write(slot, 5 + slot, world.right[5 + slot])
        moves = tuple(bring(5 + slot, slot, (self.BACKUP, 1), (PEER, 1, slot)) for slot in range(3))
        executor.carry_out((5, 6, 7, EMPTY), moves)
        assert asked == [5] and executor.moved == {"peer": 3}
        late.set()

    def test_own_backups_are_uploaded_together_and_wrong_ones_are_not_used(
        self, world, monkeypatch
    ):
        right, written = self.backups(world), []

        def fetch(expert):
            if expert == 6:
                raise FileNotFoundError("it was given up")
            return right.fetch(3 if expert == 7 else expert, None)

        executor = self.executor(world, self.backups(world, fetch), check=world.slot_check)
        real = world.heaps[0].write_all
        note = lambda writes: real(written.append(w[0]) or w for w in writes)
        monkeypatch.setattr(world.heaps[0], "write_all", note)
        own = (self.BACKUP, 0)
        moves = tuple(bring(5 + slot, slot, own, CHECKPOINT) for slot in range(4))
        slots = (5, 6, 7, EMPTY)
        executor.carry_out(slots, moves)
        world.check(slots)
        assert executor.moved == {"backup": 1, "checkpoint": 2}
        if world.slot_check is not None:
            offsets = [world.bank.layout.slot_offset(slot) for slot in (0, 2)]
            assert written[:2] == offsets, "before the next source of any is tried"

    def test_several_experts_are_under_way_once_one_came(self, world):
        three, right = threading.Barrier(3), self.backups(world)

        def fetch(expert):
            if expert != 4:
                three.wait(10)
            return right.fetch(expert, None)

        backups = self.backups(world, fetch)
        executor = self.executor(world, backups, check=world.slot_check, at_once=3)
        slots = (4, 5, 6, 7)
        executor.carry_out(slots, tuple(bring(e, s, (self.BACKUP, 1)) for s, e in enumerate(slots)))
        world.check(slots)
        assert executor.moved == {"backup": 4}

    def test_another_rank_s_backup_is_tried_though_one_hangs(self, world):
        late, right = threading.Event(), self.backups(world)
        hangs = lambda source: source.rank == 1 and not late.wait(10)
        backups = types.SimpleNamespace(fetch=lambda e, s: hangs(s) or right.fetch(e, s))
        executor = self.executor(world, backups, 300)
        executor.carry_out(self.SLOTS_WANTED, (bring(5, 0, (self.BACKUP, 1), (self.BACKUP, 2)),))
        assert executor.moved == {"backup": 1}
        late.set()

    def test_memory_is_measured_once_and_only_where_nothing_was_copied_yet(self, world):
        world.executor.measure_memory([])
        assert set(world.executor.rates.medians()) == {"local"}
        world.executor.measure_memory([1])
        before = world.executor.rates.medians()
        assert set(before) == {"local", "peer"} and min(before.values()) > 0
        world.executor.measure_memory([1])
        assert world.executor.rates.medians() == before

    def test_a_plan_without_sources_is_an_error_that_names_the_setting(self, world):
        with pytest.raises(RelocationFailed, match=r"names none; see cluster\.sources"):
            world.executor.carry_out(self.SLOTS_WANTED, (bring(5, 0),))
