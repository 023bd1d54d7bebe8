"""Promises of `detector.judge`: each sign kills past its limit, an accusation alone never does."""

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from eep_jax.membership.detector import Signs, judge
from tests.support.factories import some_cluster

LIMITS = some_cluster(
    lease_ms=3_000, accused_lease_ms=1_500, channel_grace_ms=1_200, stall_ms=15_000
)
NOW_MS = 100_000
ACCUSERS = st.lists(st.integers(0, 7), unique=True, max_size=8).map(lambda r: tuple(sorted(r)))


@given(accused_by=ACCUSERS, silent_ms=st.integers(0, 1_500))
def test_accusations_alone_never_kill(accused_by, silent_ms):
    signs = Signs(rank=2, heard_ms=NOW_MS - silent_ms, accused_by=accused_by)
    verdict = judge(NOW_MS, signs, LIMITS)
    assert not verdict.dead
    if accused_by:
        assert f"{silent_ms} ms" in verdict.reason and str(list(accused_by)) in verdict.reason


@given(st.integers(0, 6_000), ACCUSERS)
def test_silence_kills_past_the_lease_which_accusations_shorten(silent_ms, accused_by):
    lease_ms = LIMITS.accused_lease_ms if accused_by else LIMITS.lease_ms
    signs = Signs(rank=2, heard_ms=NOW_MS - silent_ms, accused_by=accused_by)
    verdict = judge(NOW_MS, signs, LIMITS)
    assert verdict.dead == (silent_ms > lease_ms)
    if verdict.dead:
        assert f"silent for {silent_ms} ms, longer than {lease_ms} ms" in verdict.reason


@given(st.integers(0, 120_000), ACCUSERS)
def test_one_that_still_loads_has_a_lease_of_its_own(silent_ms, accused_by):
    limits = some_cluster(joining_lease_ms=60_000)
    signs = Signs(rank=2, heard_ms=NOW_MS - silent_ms, accused_by=accused_by, joining=True)
    verdict = judge(NOW_MS, signs, limits)
    assert verdict.dead == (silent_ms > 60_000)
    assert judge(NOW_MS, dataclasses.replace(signs, ended=True), limits).dead


@given(st.integers(0, 3_000))
def test_a_lost_channel_kills_past_its_grace(lost_ms):
    signs = Signs(rank=2, heard_ms=NOW_MS, channel_lost_ms=NOW_MS - lost_ms)
    verdict = judge(NOW_MS, signs, LIMITS)
    assert verdict.dead == (lost_ms > 1_200)
    if verdict.dead:
        assert f"lost its channel {lost_ms} ms ago, longer than 1200 ms" in verdict.reason


@given(st.integers(0, 30_000))
def test_an_engine_that_does_not_move_kills_past_its_limit(stalled_ms):
    verdict = judge(NOW_MS, Signs(rank=2, heard_ms=NOW_MS, stalled_ms=stalled_ms), LIMITS)
    assert verdict.dead == (stalled_ms > 15_000)
    if verdict.dead:
        assert f"did not move for {stalled_ms} ms, longer than 15000 ms" in verdict.reason


@given(
    heard_ms=st.integers(0, NOW_MS + 9_000),
    channel_lost_ms=st.none() | st.integers(0, NOW_MS + 9_000),
    stalled_ms=st.integers(0, 90_000),
    accused_by=ACCUSERS,
    ended=st.booleans(),
)
def test_the_reason_is_a_sentence_about_the_rank_and_more_signs_never_revive(
    heard_ms, channel_lost_ms, stalled_ms, accused_by, ended
):
    signs = Signs(
        rank=5,
        ended=ended,
        heard_ms=heard_ms,
        channel_lost_ms=channel_lost_ms,
        stalled_ms=stalled_ms,
        accused_by=accused_by,
    )
    verdict = judge(NOW_MS, signs, LIMITS)
    assert verdict.rank == 5 and verdict.reason.startswith("rank 5 ")
    assert judge(NOW_MS, dataclasses.replace(signs, ended=True), LIMITS).dead
    if verdict.dead:
        assert judge(NOW_MS, dataclasses.replace(signs, accused_by=(0, 1)), LIMITS).dead


def test_a_process_that_is_ending_is_dead_before_it_is_gone():
    verdict = judge(NOW_MS, Signs(rank=1, heard_ms=NOW_MS, ending=True), LIMITS)
    assert verdict.dead and verdict.reason == "rank 1 is ending: its process was killed or exits"


def test_a_process_that_ended_is_dead_at_once():
    verdict = judge(NOW_MS, Signs(rank=1, heard_ms=NOW_MS, ended=True), LIMITS)
    assert verdict.dead and verdict.reason == "rank 1 ended: its process exited"


def test_a_rank_without_any_sign_is_well():
    assert judge(NOW_MS, Signs(rank=1, heard_ms=NOW_MS), LIMITS).reason == "rank 1 is well"
