"""Promises of shortages: the next rank to try, the time of the next try, and the reasons given."""

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from eep_jax.coordination.coordinator import initial_state
from eep_jax.coordination.protocol import Load, Mode, Status
from eep_jax.coordination.shortages import (
    RANKS_TRIED,
    RETRY_MAX_MS,
    RETRY_MS,
    avoided,
    explain,
    forget_old,
    note_lost,
)
from eep_jax.placement.placement import EMPTY
from tests.support.factories import some_cluster

RANKS, EXPERTS, SLOTS = 4, 6, 3


def a_joining_cluster(*slots: int):
    """Every rank was told to load these."""
    state = initial_state(some_cluster(ranks=RANKS, slots_per_rank=SLOTS), EXPERTS)
    load = Load(slots=slots, moves=(), handles={})
    records = tuple(dataclasses.replace(record, load=load) for record in state.records)
    return dataclasses.replace(state, records=records)


def short(rank: int, contents, *experts: int) -> Status:
    lost = {expert: f"no source has expert {expert}" for expert in experts}
    return Status(
        rank=rank,
        incarnation=1,
        sequence=1,
        mode=Mode.OFFERED,
        contents=tuple(contents),
        lost=lost,
    )


def test_an_expert_is_left_alone_once_two_ranks_could_not_get_it():
    state = a_joining_cluster(0, 1, 2)
    state = note_lost(state, short(0, (0, EMPTY, 2), 1), 100)
    assert avoided(state) == {(0, 1)}, "it may be the first rank's network"
    state = note_lost(state, short(2, (0, EMPTY, 2), 1), 200)
    assert avoided(state) == {(rank, 1) for rank in range(RANKS)}
    assert explain(state) == "no source has expert 1"


def test_a_rank_comes_in_without_what_it_could_not_get():
    state = note_lost(a_joining_cluster(0, 1, 2), short(3, (0, EMPTY, 2), 1), 100)
    assert state.records[3].load.slots == (0, EMPTY, 2)
    assert state.records[1].load.slots == (0, 1, 2)


def test_what_is_of_an_older_load_counts_for_nothing():
    state = a_joining_cluster(0, 1, 2)
    assert note_lost(state, short(0, (0, 1, 2), 5), 100) is state
    assert note_lost(state, short(0, (), 1), 100) is state


@given(st.integers(1, 12))
def test_it_is_tried_again_after_longer_and_longer_but_not_for_ever(times):
    state, now_ms, waited = a_joining_cluster(0, 1, 2), 0, []
    told = short(0, (0, EMPTY, 2), 1)
    for _ in range(times):
        state = note_lost(state, told, now_ms)
        assert forget_old(state, state.shortages.until_ms - 1) is state
        waited.append(state.shortages.until_ms - now_ms)
        now_ms = state.shortages.until_ms
        state = forget_old(state, now_ms)
        assert avoided(state) == frozenset() and explain(state) == ""
        load = dataclasses.replace(state.records[0].load, slots=(0, 1, 2))
        record = dataclasses.replace(state.records[0], load=load)
        state = dataclasses.replace(state, records=(record, *state.records[1:]))
    assert waited == [min(RETRY_MS << n, RETRY_MAX_MS) for n in range(times)]


def test_many_reasons_are_shortened():
    state = a_joining_cluster(0, 1, 2)
    for first in (0, 3):
        slots = (first, first + 1, first + 2)
        load = Load(slots=slots, moves=(), handles={})
        record = dataclasses.replace(state.records[0], load=load)
        state = dataclasses.replace(state, records=(record, *state.records[1:]))
        state = note_lost(state, short(0, (EMPTY,) * SLOTS, *slots), 100)
    assert explain(state).endswith("; and 3 experts more")
    assert RANKS_TRIED <= RANKS
