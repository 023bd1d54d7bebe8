"""Promises of fingerprints: the same on every device, shared among ranks, sensitive to damage."""

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eep_jax.placement.placement import EMPTY
from eep_jax.relocation import slot_check
from eep_jax.relocation.slot_check import fingerprints
from tests.eep_jax.relocation.test_executor import CHECKPOINT, PEER, World, bring
from tests.support.fingerprints import by_hand

SHAPE = (3, 2, 3, 4, 8)  # slots, and an expert
compiled = jax.jit(fingerprints)


def words_of(bank: np.ndarray) -> np.ndarray:
    return bank.reshape(len(bank), -1).view(np.uint32)


def of(bank: np.ndarray, slot: int = 1) -> tuple[int, ...]:
    return tuple(int(word) for word in compiled(words_of(bank), np.array([slot], np.int32))[0])


def a_bank(seed: int, dtype) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(SHAPE).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_fingerprint_equals_its_definition(dtype):
    bank = a_bank(0, dtype)
    assert [of(bank, slot) for slot in range(3)] == [by_hand(bank[slot]) for slot in range(3)]


def test_the_way_of_a_gpu_finds_the_same(monkeypatch):
    monkeypatch.setattr(slot_check, "platform", lambda: "gpu")
    for shape in ((2, 3, 4096), (2, 17, 96), (3, 7, 2)):
        bank = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        words, slots = words_of(bank), np.arange(len(bank), dtype=np.int32)
        found = np.asarray(jax.jit(lambda w, s: fingerprints(w, s))(words, slots))
        assert [tuple(map(int, row)) for row in found] == [by_hand(slot) for slot in bank]


def test_several_slots_are_looked_at_together():
    bank, slots = a_bank(1, ml_dtypes.bfloat16), np.array([2, 0, 0, 1], np.int32)
    found = np.asarray(compiled(words_of(bank), slots))
    assert [tuple(map(int, row)) for row in found] == [by_hand(bank[slot]) for slot in slots]


@pytest.mark.parametrize("at_once", [1, 3, 8])
def test_however_many_fit_into_a_launch_each_slot_gets_its_own(
    pristine_checkpoint, monkeypatch, at_once
):
    monkeypatch.setitem(slot_check.SLOTS_AT_ONCE, "cpu", at_once)
    world = World(pristine_checkpoint, checks=True)
    for slot in range(4):
        world.bank.write(slot, slot, world.right[slot])
    found = world.slot_check.of([3, 1, 0, 2, 3])
    assert found == [world.slot_check.known(expert) for expert in (3, 1, 0, 2, 3)]
    assert len(set(found)) == 4 and world.slot_check.of([]) == []


@given(st.integers(0, 2**32), st.integers(0, 191), st.integers(0, 15))
@settings(max_examples=200, deadline=None)
def test_any_flipped_bit_changes_both_sums(seed, word, bit):
    bank = a_bank(seed, ml_dtypes.bfloat16)
    damaged = bank.copy()
    damaged[1].reshape(-1).view(np.uint16)[word] ^= 1 << bit
    before, after = of(bank), of(damaged)
    assert before[0] != after[0] and before != after


@given(st.integers(0, 2**32), st.data())
@settings(max_examples=100, deadline=None)
def test_words_that_changed_places_change_it(seed, data):
    bank = a_bank(seed, np.float32)
    words = bank[1].reshape(-1).view(np.uint32)
    i, j = data.draw(st.integers(0, 190)), data.draw(st.integers(0, 191))
    before, same = of(bank), words[i] == words[j]
    words[[i, j]] = words[[j, i]]
    assert (of(bank) == before) == bool(same)


def test_ranks_share_learned_fingerprints(pristine_checkpoint, tmp_path):
    first, second = World(pristine_checkpoint), World(pristine_checkpoint)
    learned = first.a_check(tmp_path / "fingerprints")
    other = World(pristine_checkpoint, "bfloat16").a_check(tmp_path / "fingerprints")
    for expert in range(len(first.right)):
        assert second.a_check(tmp_path / "fingerprints").known(expert) == learned.known(expert)
        assert other.known(expert) != learned.known(expert), "of another dtype"
    (tmp_path / "fingerprints").chmod(0o500)
    for path in (tmp_path / "fingerprints").iterdir():
        path.write_text("half")
    assert World(pristine_checkpoint).a_check(tmp_path / "fingerprints").known(0) is not None


def test_an_unknown_expert_is_compared_with_its_digest_once(pristine_checkpoint, monkeypatch):
    world = World(pristine_checkpoint, checks=True)
    world.slot_check._known.clear()
    verified, real = [], world.executor.verify
    monkeypatch.setattr(
        world.executor, "verify", lambda e, *rest: (verified.append(e), real(e, *rest))
    )
    world.peer.write(2, 5, world.right[5])
    for _ in range(3):
        world.bank.clear(0)
        world.executor.carry_out((5, *[EMPTY] * 3), (bring(5, 0, (PEER, 1, 2)),))
        world.check((5, *[EMPTY] * 3))
    assert verified == [5]


def test_many_experts_are_copied_before_one_is_waited_for(pristine_checkpoint, monkeypatch):
    world = World(pristine_checkpoint, checks=True)
    calls, real = [], world.heaps[0].copy_in_all
    monkeypatch.setattr(
        world.heaps[0],
        "copy_in_all",
        lambda copies: (calls.append(sum(c[3] for c in copies)), real(copies)),
    )
    for slot in range(4):
        world.peer.write(slot, slot, world.right[slot])
    world.peer.write(2, 2, world.right[7])  # one of them is wrong
    slots = (0, 1, 2, 3)
    moves = [bring(s, s, (PEER, 1, s)) for s in slots]
    moves[2] = bring(2, 2, (PEER, 1, 2), (PEER, 1, 1), CHECKPOINT)
    world.executor.carry_out(slots, tuple(moves))
    world.check(slots)
    assert calls == [4 * world.bank.layout.slot_bytes, world.bank.layout.slot_bytes], (
        "all at once, then the second source of the one that was wrong"
    )
    assert world.executor.moved == {"peer": 3, "checkpoint": 1}
