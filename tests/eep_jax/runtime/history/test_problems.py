"""Problems that a person reads of a cluster that is not whole."""

import dataclasses

from eep_jax.coordination.protocol import Mode
from eep_jax.coordination.state import Shortages
from eep_jax.membership.view import RankState
from eep_jax.placement.sources import Backup
from eep_jax.runtime.history.problems import problems, waiting_for
from tests.eep_jax.coordination.test_coordinator import a_serving_cluster

FAILED = "rank 2 failed: it could not start: the disk is full"


def dead(rank: int, reason: str) -> dict:
    return {"kind": "dead", "rank": rank, "reason": reason}


def without(rank: int):
    cluster = a_serving_cluster()
    members = list(cluster.state.view.members)
    members[rank] = dataclasses.replace(members[rank], state=RankState.ABSENT)
    view = dataclasses.replace(cluster.state.view, members=tuple(members))
    return dataclasses.replace(cluster.state, view=view)


def test_a_whole_cluster_has_none_whatever_it_went_through():
    state = a_serving_cluster().state
    commit = {"kind": "commit", "members": {"2": 4}}
    assert problems(state, []) == problems(state, [dead(2, FAILED), commit]) == []
    assert waiting_for(state) == ""


def test_a_rank_that_was_killed_once_is_none_and_one_that_dies_again_and_again_is():
    state, killed = without(2), dead(2, "rank 2 is ending: its process was killed or exits")
    assert problems(state, [killed]) == []
    assert problems(state, [dead(2, FAILED)]) == [FAILED]
    assert problems(state, [killed, killed]) == [killed["reason"] + ", 2 times by now"]
    since = {"kind": "commit", "members": {2: 1}}
    assert problems(state, [killed, killed, since, killed]) == []


def test_a_rank_that_the_operator_took_out_is_none():
    state = dataclasses.replace(without(2), out=frozenset({2}))
    assert problems(state, [dead(2, FAILED)]) == []


def test_the_reason_why_nothing_is_served_comes_first():
    state = dataclasses.replace(without(2), blocked="experts [3] have no live replica")
    found = problems(state, [dead(2, FAILED)])
    assert found == ["no expert coverage: experts [3] have no live replica", FAILED]


def test_experts_that_no_source_supplies_are_told_though_all_is_served():
    short = Shortages(reasons={(1, 3): "no source has expert 3: the disk is gone"})
    state = dataclasses.replace(a_serving_cluster().state, shortages=short)
    assert problems(state, []) == ["no source has expert 3: the disk is gone"]
    degraded = dataclasses.replace(state, dropped=(3,))
    told = "no source has expert 3: the disk is gone (served without experts [3])"
    assert problems(degraded, []) == [told]


def test_ranks_without_backups_for_one_reason_are_told_together():
    cluster = a_serving_cluster()
    for rank in (0, 2):
        cluster.say(rank, backup=Backup(problem="one expert takes 9 bytes"))
    told = "backups are missing on ranks [0, 2]: one expert takes 9 bytes"
    assert problems(cluster.state, []) == [told]


def test_a_cluster_that_starts_says_what_it_waits_for():
    state = without(2)
    records = list(state.records)
    records[2] = dataclasses.replace(records[2], fenced=records[2].incarnation)
    state = dataclasses.replace(state, records=tuple(records))
    assert waiting_for(state) == "no process of ranks [2] has come"
    members = (dataclasses.replace(m, state=RankState.ABSENT) for m in state.view.members)
    state = dataclasses.replace(state, view=dataclasses.replace(state.view, members=tuple(members)))
    status = dataclasses.replace(state.records[0].status, mode=Mode.ALONE)
    records[0] = dataclasses.replace(records[0], status=status)
    state = dataclasses.replace(state, records=tuple(records))
    assert waiting_for(state) == "no process of ranks [2] has come; ranks [0] load and compile"
