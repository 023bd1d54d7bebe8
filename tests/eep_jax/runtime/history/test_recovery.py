"""Records of a supervisor are what the next one knows, also after the journal was cut short."""

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from eep_jax.runtime.control.messages import HostProcess
from eep_jax.runtime.history.recovery import process_facts, read_back, snapshot
from tests.support.control_world import a_config

RANKS = 3
CONFIG = a_config(RANKS)


@st.composite
def lives(draw) -> list[dict]:
    """Records of processes that were let in, one after the other of each rank, and that died."""
    records, incarnations = [], [0] * RANKS
    for _ in range(draw(st.integers(0, 12))):
        rank = draw(st.integers(0, RANKS - 1))
        incarnations[rank] += 1
        facts = {"rank": rank, "incarnation": incarnations[rank]}
        records.append({"kind": "incarnation", **facts})
        if draw(st.booleans()):  # else the supervisor was killed in between
            process = HostProcess(**facts, pid=draw(st.integers(1, 99)), ticks=7)
            host = draw(st.sampled_from(["", "elsewhere"]))
            records.append({"kind": "process", **process_facts(host, process)})
        if draw(st.booleans()):
            records.append({"kind": "dead", "reason": "", "time": 0.0, **facts})
        if draw(st.booleans()):
            records.append({"kind": "prepare", "epoch": draw(st.integers(1, 9)), "time": 0.0})
        if draw(st.booleans()):
            out = draw(st.lists(st.integers(0, RANKS - 1), unique=True))
            records.append({"kind": "scale", "out": out, "time": 0.0})
    return records


def state_of(before):
    return before.coordinator_state(CONFIG.cluster, now_ms=0)


@given(lives(), st.data())
def test_a_cut_journal_says_the_same_but_for_processes_that_have_ended(records, data):
    before = read_back(records, CONFIG)
    gone = data.draw(
        st.sets(st.sampled_from(before.processes)) if before.processes else st.just([])
    )
    left = [process for process in before.processes if process not in gone]
    after = read_back(snapshot(state_of(before), None, left, []), CONFIG)
    assert after.processes == left
    same = {"processes": before.processes, "events": before.events, "is_first": not records}
    assert dataclasses.replace(after, **same) == before


@given(lives())
def test_only_the_newest_process_of_a_rank_is_looked_for_and_no_number_is_given_twice(records):
    before = read_back(records, CONFIG)
    for rank in range(RANKS):
        numbers = [r["incarnation"] for r in records if r.get("rank") == rank]
        assert before.issued[rank] == max(numbers, default=0)
    ranks = [process.rank for _, process in before.processes]
    assert len(ranks) == len(set(ranks))
    assert all(p.incarnation == before.issued[p.rank] for _, p in before.processes)
    there = [(p.rank, p.incarnation) for _, p in before.processes]
    issued = [(rank, number) for rank, number in enumerate(before.issued) if number]
    assert sorted(there + before.ended) == issued
