"""Promises of repair records: one for each change, soon, with every second in one phase."""

import json
from unittest import mock

import pytest

from eep_jax.config import RunConfig
from eep_jax.relocation.executor import Executor
from eep_jax.runtime.control.messages import ChangeTimes, StartTimes
from eep_jax.runtime.history.change_costs import PAUSE_PHASES, REPORT_MS, ChangeCosts
from eep_jax.runtime.history.journal import Journal, replay
from eep_jax.runtime.history.recovery import read_back
from eep_jax.runtime.rank.change_timer import ChangeTimer
from tests.support.models import a_run


def commit(epoch=5, change="repair", members=(0, 1, 2), prepare_ms=50):
    return {
        "epoch": epoch,
        "change": change,
        "reason": "rank 3 is out",
        "members": dict.fromkeys(members, 1),
        "prepare_ms": prepare_ms,
    }


def times(epoch=5, detach_s=0.001, fetch_s=0.010, first_step_s=0.004, **changes):
    facts = {"load_s": 0.0, "commit_s": 0.002, "moved": {}, "bytes_moved": {}} | changes
    return ChangeTimes(
        epoch=epoch, detach_s=detach_s, fetch_s=fetch_s, first_step_s=first_step_s, **facts
    )


def a_log_after_a_death(silent_ms=8) -> ChangeCosts:
    """Rank 3 of four is judged dead at 1000 ms, Prepare at 1002, committed at 1052."""
    log = ChangeCosts(range(4))
    log.dead(3, "rank 3 is ending: its process was killed", silent_ms, 1_000)
    log.prepared(5, 1_002)
    log.committed(commit(), 1_052)
    return log


def test_a_repair_is_recorded_once_all_members_have_taken_a_good_step():
    log = a_log_after_a_death()
    log.add_times(0, times(moved={"backup": 2}, bytes_moved={"backup": 200}))
    log.add_times(
        1, times(fetch_s=0.030, moved={"backup": 1, "peer": 1}, bytes_moved={"backup": 100})
    )
    log.add_times(2, times(first_step_s=None))
    assert log.take(1_100) == []
    log.add_times(2, times(first_step_s=0.006))
    (record,) = log.take(1_100)
    assert record == {
        "change": "repair",
        "epoch": 5,
        "reason": "rank 3 is ending: its process was killed",
        "moves": {"backup": 3, "peer": 1},
        "bytes": {"backup": 300},
        "seconds": {
            "detect": 0.008,
            "agree": 0.021,  # 2 + 50 ms, of which the slowest rank worked 31
            "detach": 0.001,
            "fetch": 0.030,
            "commit": 0.002,
            "first_step": 0.006,
            "total": 0.068,
            "load": 0.0,
        },
        "slowest_rank": 1,
        "silent_ranks": [],
        "starts": {},
    }
    seconds = record["seconds"]
    assert sum(seconds[phase] for phase in PAUSE_PHASES) == pytest.approx(seconds["total"])
    assert log.take(9_999) == [], "one record for one repair"


def test_an_idle_cluster_is_recorded_at_the_deadline_without_a_first_step():
    log = a_log_after_a_death()
    for rank in range(3):
        log.add_times(rank, times(first_step_s=None))
    assert log.take(1_051 + REPORT_MS) == []
    (record,) = log.take(1_052 + REPORT_MS)
    assert record["seconds"]["first_step"] is None and record["seconds"]["fetch"] == 0.010


def test_ranks_that_said_nothing_are_named():
    log = a_log_after_a_death()
    log.add_times(1, times())
    (record,) = log.take(1_052 + REPORT_MS)
    assert record["silent_ranks"] == [0, 2]
    nobody = a_log_after_a_death()
    (record,) = nobody.take(1_052 + REPORT_MS)
    assert record["seconds"]["fetch"] is None and record["moves"] == {}


def test_what_belongs_to_another_epoch_or_to_no_member_does_not_count():
    log = a_log_after_a_death()
    for rank in range(3):
        log.add_times(rank, times(epoch=4))
    log.add_times(3, times())
    assert log.take(1_100) == []


def test_two_deaths_of_one_change_are_one_record_with_both_reasons():
    log = ChangeCosts(range(4))
    log.dead(3, "rank 3 was silent", 3_000, 1_000)
    log.prepared(5, 1_001)
    log.dead(2, "rank 2 is ending", 5, 1_010)
    log.prepared(6, 1_011)
    log.committed(commit(epoch=6, members=(0, 1), prepare_ms=20), 1_031)
    (record,) = log.take(1_031 + REPORT_MS)
    assert record["reason"] == "rank 3 was silent; rank 2 is ending"
    assert record["seconds"]["detect"] == 3.0
    assert record["seconds"]["agree"] == pytest.approx(0.011 + 0.020)


def test_changes_that_follow_each_other_at_once_lose_nothing():
    """Rank 0 steps between the two, rank 1 does not, and rank 2 dies before it says anything."""
    log = a_log_after_a_death()
    log.committed(commit(epoch=6, members=range(2)), 1_060)
    assert log.take(1_060) == []
    log.add_times(0, times())
    log.add_times(1, times(first_step_s=None))
    for rank in range(2):
        log.add_times(rank, times(epoch=6))
    assert log.take(1_061) == [], "rank 2 may still tell of the first"
    log.dead(2, "rank 2 is ending", 1, 1_062)
    first, second = log.take(1_062)
    assert (first["epoch"], second["epoch"]) == (5, 6)
    assert first["silent_ranks"] == [2] and first["seconds"]["first_step"] == 0.004
    assert first["seconds"]["fetch"] == second["seconds"]["fetch"] == 0.010


def test_a_change_that_comes_later_is_recorded_for_itself():
    log = a_log_after_a_death()
    log.committed(commit(epoch=6, change="admission", members=range(4)), 1_200)
    (record,) = log.take(1_052 + REPORT_MS)
    assert (record["epoch"], record["change"]) == (5, "repair")
    for rank in range(4):
        start = StartTimes(seconds={"run": 0.1}, executables={"decode": "loaded"}, compilations=0)
        came = {"load_s": 0.5, "start": start} if rank == 3 else {}
        log.add_times(rank, times(epoch=6, **came))
    (record,) = log.take(1_300)
    assert (record["epoch"], record["change"]) == (6, "admission")
    assert record["reason"] == "rank 3 is out" and record["seconds"]["detect"] == 0.0
    assert record["seconds"]["load"] == 0.5
    assert record["starts"] == {
        "3": {"seconds": {"run": 0.1}, "executables": {"decode": "loaded"}, "compilations": 0}
    }


def test_the_first_epoch_is_no_repair_and_a_joining_ranks_death_no_part_of_one():
    log = ChangeCosts()
    log.dead(2, "rank 2 died while it was starting", 5, 900)
    log.committed(commit(epoch=1, change="formation", members=(0, 1)), 1_000)
    assert log.take(99_999) == []
    log.dead(2, "rank 2 died while it was starting", 5, 1_100)
    log.committed(commit(epoch=2, change="admission"), 1_200)
    (record,) = log.take(99_999)
    assert record["reason"] == "rank 3 is out"


def test_records_are_read_back_and_journals_without_them_too(tmp_path):
    config: RunConfig = a_run(2, slots_per_rank=8)
    log = a_log_after_a_death()
    (record,) = log.take(99_999)
    Journal(tmp_path / "old").append("ended", {"rank": 1, "incarnation": 1, "pid": 7})
    journal = Journal(tmp_path / "new")
    journal.append("ended", {"rank": 1, "incarnation": 1, "pid": 7})
    journal.append("repair", record)
    old, new = (read_back(replay(tmp_path / name), config) for name in ("old", "new"))
    assert [e["kind"] for e in old.events] == ["ended"]
    assert [e["kind"] for e in new.events] == ["ended", "repair"]
    assert new.view == old.view and new.events[1]["seconds"] == record["seconds"]
    assert json.loads(json.dumps(record)) == record


def test_a_rank_reports_what_moved_since_the_change_before():
    moved = {"moved": {"checkpoint": 4}, "bytes_moved": {"checkpoint": 40}}
    executor = mock.NonCallableMock(spec=Executor, **moved)
    watch = ChangeTimer(executor)
    with watch.loading():
        pass
    with watch.committing(1):
        pass
    assert watch.times.moved == {"checkpoint": 4} and watch.times.load_s > 0
    assert watch.is_waiting and watch.stepped()
    first = watch.times
    assert first.first_step_s > 0
    assert not watch.stepped() and not watch.is_waiting
    assert watch.times is first, "only the first good step is timed"
    watch.detached(0.5)
    with watch.fetching():
        executor.moved = {"checkpoint": 4, "backup": 1}
        executor.bytes_moved = {"checkpoint": 40, "backup": 10}
    with watch.committing(2):
        pass
    assert watch.times.moved == {"backup": 1} and watch.times.bytes_moved == {"backup": 10}
    assert watch.times.detach_s == 0.5 and watch.times.load_s == 0.0
    assert watch.times.first_step_s is None
