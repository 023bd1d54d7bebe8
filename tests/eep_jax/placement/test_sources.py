"""Promises of the ranking of sources: fastest first where measured, never what is not allowed."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eep_jax.placement.sources import (
    Backup,
    Source,
    SourceKind,
    Supply,
    kind_order,
    median_rates,
    rank_sources,
)
from tests.support.factories import a_placement

LOCAL, PEER, BACKUP, CHECKPOINT = SourceKind
PLACEMENT = a_placement("0 1 -/2 0 -/- - -", experts=3)
BACKUPS = {0: Backup("a:1", (0, 1)), 1: Backup("b:2", (0,)), 2: Backup("c:3", (2, 0))}


def kinds(sources):
    return [source.kind for source in sources]


def test_unmeasured_sources_come_by_tier_and_the_nearest_rank_upwards_first():
    assert rank_sources(PLACEMENT, 1, 0, Supply(backups=BACKUPS)) == (
        Source(LOCAL, 1, 1),
        Source(PEER, 0, 0),
        Source(BACKUP, 1, address="b:2"),
        Source(BACKUP, 2, address="c:3"),
        Source(BACKUP, 0, address="a:1"),
        Source(CHECKPOINT),
    )


def test_without_backups_an_orphan_has_only_the_checkpoint():
    assert rank_sources(PLACEMENT.without_ranks([1]), 2, 2) == (Source(CHECKPOINT),)


def test_only_those_that_back_up_the_expert_are_sources():
    found = rank_sources(PLACEMENT.without_ranks([1]), 0, 2, Supply(backups=BACKUPS))
    assert found == (Source(BACKUP, 2, address="c:3"), Source(CHECKPOINT))


def test_a_faster_source_comes_first():
    supply = Supply(backups=BACKUPS, rates={BACKUP: 1e9, CHECKPOINT: 9e9})
    assert kinds(rank_sources(PLACEMENT, 2, 1, supply)) == [PEER, CHECKPOINT, BACKUP]


def test_the_operator_may_list_them_in_another_order():
    supply = Supply(backups=BACKUPS, allowed=(CHECKPOINT, BACKUP))
    assert kinds(rank_sources(PLACEMENT, 2, 1, supply)) == [CHECKPOINT, BACKUP]
    assert kind_order({BACKUP: 9e9, CHECKPOINT: 1e9}, (CHECKPOINT, BACKUP)) == (BACKUP, CHECKPOINT)


def test_noise_does_not_change_the_order():
    assert kind_order({LOCAL: 1.1e9, PEER: 1.9e9}) == tuple(SourceKind)


def test_what_was_not_measured_stays_in_its_tier():
    assert kind_order({PEER: 1e6, CHECKPOINT: 8e9}) == (LOCAL, CHECKPOINT, BACKUP, PEER)


def test_what_is_not_allowed_is_no_source():
    for count in range(5):
        for allowed in itertools.combinations(SourceKind, count):
            found = rank_sources(PLACEMENT, 1, 0, Supply(backups=BACKUPS, allowed=allowed))
            assert set(kinds(found)) == set(allowed)


@given(st.dictionaries(st.sampled_from(SourceKind), st.floats(0, 1e12)))
def test_every_kind_has_one_place(rates):
    assert sorted(kind_order(rates), key=list(SourceKind).index) == list(SourceKind)


def test_medians_are_over_the_ranks_that_measured():
    assert median_rates([{"peer": 2.0}, {"peer": 4.0, "backup": 1.0}, {"peer": 9.0}]) == {
        PEER: 4.0,
        BACKUP: 1.0,
    }
    assert median_rates([]) == {}
    with pytest.raises(ValueError, match="moon"):
        median_rates([{"moon": 1.0}])
